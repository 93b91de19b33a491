"""Contradictions: what no single key of a configuration shows to be wrong, because two of them do not go together."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from components.errors import ConfigError
from components.options import AUTO, BASE_ONLY, CsvSource, IdxSource, LineSource, TextSource
from components.recipe import IO, RESCUE, Recipe, parse_recipe
from pipeline.yaml_text import KeyPath, dotted, shown

if TYPE_CHECKING:
    from pipeline.config import Config

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""What a run may be called: a folder is named after it."""


def contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """(place, the rule with value and next step) of what cannot be, though every value is legal on its own."""
    if not re.fullmatch(NAME, config.name) or config.name.lower() == "store":
        yield (
            ("name",),
            "name must be letters, digits, '.', '_' and '-', at most 64, starting with a letter or digit, and not "
            f"'store', got {shown(config.name)}; choose another.",
        )
    yield from _source_contradictions(config)
    yield from _training_contradictions(config)
    yield from _strategy_contradictions(config)
    yield from _compression_contradictions(config)


def _source_contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    source, preprocess = config.source, config.preprocess
    if isinstance(source, IdxSource) and (source.test_images is None) != (source.test_labels is None):
        given, absent = ("images", "labels") if source.test_images else ("labels", "images")
        yield (
            ("source", f"test_{given}"),
            f"source.test_{given} must come with source.test_{absent}, got it alone; give both or neither.",
        )
    if isinstance(source, LineSource) and config.task == "classification":
        yield ("task",), "task must be regression or auto for source kind line, got classification; leave it out."
    yield from _text_contradictions(config)
    if preprocess.transform is not None and preprocess.select is not None:
        yield (
            ("preprocess", "select"),
            "preprocess.select chooses columns anew, got it beside preprocess.transform, whose columns stay; leave one out.",
        )
    named = {("preprocess", "splits", "group"): [preprocess.splits.group] if preprocess.splits.group else []}
    named |= {("preprocess", "columns", name): [name] for name in preprocess.columns}
    for path, columns in named.items():
        yield from _unknown_columns(config, path, columns)
    if isinstance(source, CsvSource) and source.columns is not None:
        yield from _unknown_columns(config, ("source", "label"), [source.label])


def _text_contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """A model of tokens takes those of a text source, and knows as many as it has."""
    source, model = config.source, config.model
    if isinstance(source, TextSource) and config.task == "regression":
        yield ("task",), "task must be classification or auto for source kind text, got regression; leave it out."
    if model.name not in ("text_encoder", "causal_lm"):
        return
    if not isinstance(source, TextSource):
        yield (
            ("model", "name"),
            f"model.name={model.name} must have a source of kind text, got kind {source.kind}; use mlp, or cnn for pictures.",
        )
        return
    wanted = 257 if source.tokens == "bytes" else source.vocabulary
    if (known := model.options.get("vocabulary", 257)) != wanted:
        yield (
            ("model", "options", "vocabulary"),
            f"model.options.vocabulary must be the {wanted} token numbers of the source, got {shown(known)}; write {wanted}.",
        )
    if config.export.io != "float32":
        yield (
            ("export", "io"),
            f"export.io must be float32 for token numbers, which {config.export.io} would merge; leave it out.",
        )
    if config.train.augmentation.noise:
        yield (
            ("train", "augmentation", "noise"),
            f"train.augmentation.noise would change one token into another, got {config.train.augmentation.noise:g}; leave it out.",
        )


def _unknown_columns(config: Config, path: KeyPath, names: Sequence[str]) -> Iterator[tuple[KeyPath, str]]:
    """Columns that a table cannot have; a header line is read later, by `plan`."""
    for name in names:
        if not isinstance(config.source, CsvSource):
            kind = config.source.kind
            yield path, f"{dotted(path)} must have a source of kind csv, got '{name}' for kind {kind}; leave it out."
        elif config.source.columns is not None and name not in config.source.columns:
            near = difflib.get_close_matches(name, config.source.columns, n=1)
            step = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(config.source.columns)}."
            yield path, f"{dotted(path)} must be one of source.columns, got {shown(name)}; {step}"


def _training_contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    train, builder = config.train, config.model.builder
    if builder is not None and not re.fullmatch(r"[^:]+:[A-Za-z_]\w*", builder):
        yield (
            ("model", "builder"),
            f"model.builder must be 'package.module:function' or 'file.py:function', got {shown(builder)}; "
            "put a colon before the function's name.",
        )
    if train.optimizer.momentum and train.optimizer.name != "sgd":
        yield (
            ("train", "optimizer", "momentum"),
            f"train.optimizer.momentum is for sgd only, got {train.optimizer.momentum:g} with "
            f"{train.optimizer.name}; leave it out.",
        )
    if not train.epochs and config.model.name is not None:
        yield (
            ("train", "epochs"),
            "train.epochs=0 takes a model as it is, so it must be one that is trained, got "
            f"model.name={config.model.name}; give model.file, or an epoch.",
        )
    if train.optimizer.warmup_epochs >= max(train.epochs, 1):
        yield (
            ("train", "optimizer", "warmup_epochs"),
            f"train.optimizer.warmup_epochs must be below train.epochs={train.epochs}, got "
            f"{train.optimizer.warmup_epochs:g}; lower it.",
        )
    if train.privacy is not None:
        yield from _leaks(config)
    if train.overlap:
        yield from _no_overlap(config)
    if train.early_stopping is not None and not config.preprocess.splits.validation:
        yield (
            ("train", "early_stopping"),
            "train.early_stopping must have a validation split, got preprocess.splits.validation=0; give it a share, "
            "for instance 0.1.",
        )


def _no_overlap(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What needs all data, or another order of them, from the first epoch on."""
    reasons = {
        "for a training, got train.epochs=0": not config.train.epochs,
        "for one process, got strategy.name=multi_worker": config.strategy.name == "multi_worker",
        "not for train.privacy, whose promise rests on batches drawn from all rows": config.train.privacy is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            yield ("train", "overlap"), f"train.overlap is {reason}; leave it out."


def _leaks(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What would look at the rows again without train.privacy's care, and so break its promise."""
    train = config.train
    if train.precision == "mixed_float16":
        yield (
            ("train", "precision"),
            "train.precision must not be mixed_float16 beside train.privacy, whose clipping its scaled loss would change; use "
            "mixed_bfloat16 or float32.",
        )
    if train.distill is not None and train.distill.teacher_model is not None:
        yield (
            ("train", "distill", "teacher_model"),
            "train.distill.teacher_model would learn from the rows without train.privacy, and the student from it; leave it out.",
        )
    if not train.epochs:
        yield (
            ("train", "privacy"),
            "train.privacy is for a training, got train.epochs=0; leave it out, or give an epoch.",
        )
    if config.compress.recipes == AUTO:
        yield (
            ("compress", "recipes"),
            "compress.recipes must be listed beside train.privacy, got auto: most of what it tries trains on the rows again; "
            "list float32, float16, dynamic or int8.",
        )
        return
    for index, text in _training_recipes(config):
        yield (
            ("compress", "recipes", index),
            f"compress.recipes must not train beside train.privacy, got '{text}', which trains on the rows again without noise; "
            "keep to float32, float16, dynamic, int8 and other formats.",
        )


def _training_recipes(config: Config) -> Iterator[tuple[int, str]]:
    """(place, recipe) of those that are listed and train, or may."""
    for index, text in enumerate(config.compress.recipes):
        with contextlib.suppress(ConfigError):  # told elsewhere
            recipe = parse_recipe(text, config.compress.strengths)
            if recipe.steps or recipe.format == RESCUE:
                yield index, text


def _strategy_contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    name, workers = config.strategy.name, config.strategy.workers
    if name == "multi_worker" and workers is None:
        yield (
            ("strategy", "name"),
            "strategy.name=multi_worker must come with strategy.workers, got null; say how many processes train together.",
        )
    if name != "multi_worker" and workers is not None:
        yield (
            ("strategy", "workers"),
            f"strategy.workers is for multi_worker only, got {workers} with strategy.name={name}; leave it out.",
        )
    yield from _split_contradictions(config)
    yield from _base_training_only(config)
    if name == "multi_worker" and config.compress.recipes == AUTO:
        yield (
            ("compress", "recipes"),
            "compress.recipes=auto must run in one process, since its clock would end a step in one worker and not in the "
            "others, got strategy.name=multi_worker; list recipes, train with --until train, then search in one process: trimline compress "
            "MODEL.keras --data CONFIG --set 'strategy={}' --budget 30m.",
        )


def _base_training_only(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """Recipes that train, under a strategy that knows Keras 3 models and no twins."""
    name = config.strategy.name
    if name not in BASE_ONLY:
        return
    told = f"must not train beside strategy.name={name}, which takes the base training only, got"
    instead = "list float32, float16, int8 and other formats, and compress the trained model afterwards: trimline compress MODEL.keras --data CONFIG."
    if config.compress.recipes == AUTO:
        yield ("compress", "recipes"), f"compress.recipes {told} auto; {instead}"
        return
    for index, text in _training_recipes(config):
        yield ("compress", "recipes", index), f"compress.recipes {told} '{text}'; {instead}"


def _split_contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    """What knows one device only, where layers lie on several."""
    strategy, train = config.strategy, config.train
    if strategy.name != "split":
        if strategy.layout:
            yield (
                ("strategy", "layout"),
                f"strategy.layout is for split only, got it with strategy.name={strategy.name}; leave it out.",
            )
        return
    for pattern, place in strategy.layout.items():
        if strategy.devices is not None and place >= strategy.devices:
            yield (
                ("strategy", "layout", pattern),
                f"strategy.layout must name devices below strategy.devices={strategy.devices}, got {place} for '{pattern}'; 0 is the first.",
            )
    if train.xla is True:
        yield (
            ("train", "xla"),
            "train.xla compiles for one device, got true with strategy.name=split; leave it out.",
        )
    if train.privacy is not None:
        yield (
            ("train", "privacy"),
            "train.privacy computes each example on one device, got it with strategy.name=split; leave one of them out.",
        )


def _compression_contradictions(config: Config) -> Iterator[tuple[KeyPath, str]]:
    prune = config.compress.prune
    if prune.begin >= prune.end:
        yield (
            ("compress", "prune", "begin"),
            f"compress.prune.begin must be below compress.prune.end={prune.end:g}, got {prune.begin:g}; lower it.",
        )
    for name in sorted(set(prune.targets).intersection(prune.exclude)):
        yield (
            ("compress", "prune", "targets"),
            f"compress.prune.targets must not name what compress.prune.exclude leaves alone, got '{name}' in both; drop one.",
        )
    if config.compress.recipes == AUTO:
        yield from ((("compress", "recipes"), rule) for rule in _blind_search(config))
        return
    for index, text in enumerate(config.compress.recipes):
        path = ("compress", "recipes", index)
        try:
            recipe = parse_recipe(text, config.compress.strengths)
        except ConfigError as error:
            yield path, str(error)
        else:
            yield from ((path, f"compress.recipes '{text}': {rule}") for rule in _impossible(recipe, config))


def _impossible(recipe: Recipe, config: Config) -> Iterator[str]:
    """What keeps a well-written recipe from being carried out under this configuration."""
    prune = config.compress.prune
    for step in recipe.steps:
        starts = prune.initial_sparsity
        fixed = step.pattern is not None and ":" in step.pattern
        if fixed and prune.targets:
            yield (
                f"{step.pattern} fixes the sparsity of every kernel, got compress.prune.targets for "
                f"'{next(iter(prune.targets))}'; drop the targets, or write a sparsity."
            )
        polynomial = step.name == "prune" and prune.schedule == "polynomial" and not fixed
        if polynomial and step.strength and starts >= step.strength:
            yield (
                f"the sparsity must be above compress.prune.initial_sparsity={starts:g}, got {step.strength:g}; "
                "lower initial_sparsity."
            )
    names = {step.name: step for step in recipe.steps}
    if "prune" in names and "cluster" in names and (names["cluster"].strength or 0) < 3:
        yield (
            f"clusters must be at least 3 after prune, since zero is one of them, got {names['cluster'].strength:g}; "
            "write cluster@3 or more."
        )
    if recipe.in_format in IO and "qat" not in names and not config.preprocess.splits.calibration:
        yield (
            f"{recipe.format} must have calibration rows to find its ranges, got preprocess.splits.calibration=0; give it a "
            "share, for instance 0.05."
        )
    if "qat" in names and (named := config.export.keep_float + config.export.int16):
        yield (
            "a recipe with qat must be without export.keep_float and export.int16, since it trains the precision of every "
            f"layer, got {', '.join(named)}; name them in compress.qat.exclude, or leave the recipe out."
        )
    if recipe.format == RESCUE:
        yield from _unguided_rescue(config)
    if config.export.io not in IO.get(recipe.in_format, (config.export.io,)):
        yield (
            f"the input and output of an {recipe.in_format} file must be {' or '.join(IO[recipe.in_format])}, got "
            f"export.io={config.export.io}; change export.io, or leave the recipe out."
        )


def _unguided_rescue(config: Config) -> Iterator[str]:
    if config.select.max_metric_drop is None:
        yield "a rescue must know what may be lost, got select.max_metric_drop=null; set it, for instance to 0.01."
    if not config.preprocess.splits.validation:
        yield (
            "a rescue must have validation rows to tell what is lost, got preprocess.splits.validation=0; give it a share, "
            "for instance 0.1."
        )


def _blind_search(config: Config) -> Iterator[str]:
    splits = config.preprocess.splits
    for name, share, use in (
        ("validation", splits.validation, "compare"),
        ("calibration", splits.calibration, "write"),
    ):
        if not share:
            yield (
                f"compress.recipes=auto must have {name} rows to {use} files of integers with, got preprocess.splits.{name}=0; give "
                "it a share, for instance 0.1."
            )
