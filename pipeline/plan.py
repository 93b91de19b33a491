"""The plan: a configuration becomes a tree of steps with fingerprints, before a second of work is done.

Recipes share their training prefixes: `prune+int8` and `prune+qat` meet in one `compress prune@0.7` step.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from components.delivery.select import REFERENCE
from components.errors import ConfigError
from components.options import AUTO
from components.recipe import RESCUE, Recipe
from components.recipe import Step as TrainingStep
from pipeline.config import Config
from pipeline.fingerprint import ContentIndex, fingerprint
from pipeline.stage import Stage
from pipeline.stages import JOURNEY, STAGES, parse_step, prefix_name
from pipeline.store import Key, Store
from pipeline.teachers import TEACHER, teacher_config, teacher_files


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage carried out for one recipe (or for none).

    Attributes:
      name: Unique in the plan: 'train', 'compress prune@0.7', 'export int8'.
      stage: Its row in the journey.
      config: What it is told: the run's own, or its teacher's.
      recipe: What it carries out; None for stages that know no recipes.
      takes: Names of the steps whose artifacts it reads.
      asks: Names of those that it may read, and has made where they are not there.
      lazy: True where it is made only if another step asks for it.
      key: Where its artifact is in the store, if every input succeeds.
    """

    name: str
    stage: Stage
    config: Config
    recipe: Recipe | None
    takes: tuple[str, ...]
    asks: tuple[str, ...]
    lazy: bool
    key: Key


@dataclasses.dataclass(frozen=True)
class Plan:
    """All steps of a run in the order in which they are walked."""

    config: Config
    store: Store
    steps: tuple[Step, ...]
    content: Mapping[str, tuple[str, ...]]

    def cached(self, step: Step) -> bool:
        """True where the step's artifact is there already."""
        return self.store.completed(step.key)

    def key(self, step: Step, said: Mapping[str, Any]) -> Key:
        """The step's address, given what was said on the way (`Walk.said`): among fewer variants it is another selection."""
        if not said or step.stage.name not in ("select", "bundle", "report"):
            return step.key
        stage = step.stage
        options = {**stage.options(self.config, step.recipe), "said": json.loads(json.dumps(said, sort_keys=True))}
        inputs = [each.key.fingerprint for each in self.steps if each.name in step.takes + step.asks]
        return Key(stage.name, fingerprint(stage, options, inputs, self.content.get(stage.name, ())))

    def after(self, stages: Iterable[str]) -> Iterator[Step]:
        """The steps of `stages`, and every step that depends on one of them."""
        touched: set[str] = set()
        for step in self.steps:
            if step.stage.name in stages or touched.intersection(step.takes + step.asks):
                touched.add(step.name)
                yield step


def make_plan(config: Config, *, until: str | None = None) -> Plan:
    """Lays out every step of `config`.

    Args:
      config: Checked configuration.
      until: Last stage to walk; None goes all the way.

    Raises:
      ConfigError: A recipe that cannot work, an unknown stage, or a missing file.
    """
    if until is not None:
        check_stages([until], "--until")
    workspace = pathlib.Path(config.workspace)
    store, index = Store(workspace / "store"), ContentIndex(workspace / "content.json")
    content = {
        "preprocess": _source_content(config, index) + _files_content(_earlier(config), index),
        "train": _train_content(config, index),
        "compress": _files_content(teacher_files(config.compress.distill), index),
    }
    taught = teacher_config(config)
    taught_content = {"train": _train_content(taught, index)} if taught is not None else {}
    index.save()
    steps: dict[str, Step] = {}
    for name, stage, recipe, takes, asks, lazy in _layout(config):
        its, read = (taught, taught_content) if taught is not None and name == TEACHER else (config, content)
        options = stage.options(its, recipe)
        if stage.name == "preprocess":
            options["source"] = {k: v for k, v in options["source"].items() if not _is_path(k)}
        inputs = [steps[each].key.fingerprint for each in takes + asks]
        key = Key(stage.name, fingerprint(stage, options, inputs, read.get(stage.name, ())))
        steps[name] = Step(name, stage, its, recipe, takes, asks, lazy, key)
    names = [stage.name for stage in JOURNEY]
    last = len(names) - 1 if until is None else names.index(until)
    walked = tuple(step for step in steps.values() if names.index(step.stage.name) <= last)
    return Plan(config, store, walked, content)


def check_stages(names: Iterable[str], option: str) -> None:
    """Raises ConfigError where a name is not a stage."""
    for name in names:
        if name not in STAGES:
            raise ConfigError(f"{option} {name}: not a stage; use one of {', '.join(STAGES)}.")


def recipes(config: Config) -> list[Recipe]:
    """The recipes in the user's order, each once, with float32 first: every drop is measured against it. Under `auto` that alone.

    Before one with sparse storage stands the same without, which tells whether that pays.
    """
    named = [] if config.compress.recipes == AUTO else config.compress.recipes
    parsed = [parse_step(config, text) for text in [REFERENCE, *named]]
    both = [each for recipe in parsed for each in ([recipe.dense, recipe] if recipe.sparse else [recipe])]
    return list({str(recipe): recipe for recipe in both}.values())


class _Place(NamedTuple):
    """A step before its fingerprint is known; see `Step`."""

    name: str
    stage: Stage
    recipe: Recipe | None
    takes: tuple[str, ...]
    asks: tuple[str, ...] = ()
    lazy: bool = False


def _layout(config: Config) -> Iterator[_Place]:
    """Every step, in the order in which they are walked."""
    wanted = recipes(config)
    yield _Place("preprocess", STAGES["preprocess"], None, ())
    teacher = (TEACHER,) if teacher_config(config) is not None else ()
    for name in teacher:
        yield _Place(name, STAGES["train"], None, ("preprocess",))
    yield _Place("train", STAGES["train"], None, ("preprocess", *teacher))
    prefixes = {prefix_name(path): path for recipe in wanted for path in recipe.prefixes()}
    resorts = {prefix_name(path): path for path in (_last_resort(recipe, config) for recipe in wanted) if path}
    for name, path in sorted((prefixes | resorts).items(), key=lambda item: len(item[1])):
        before = ("preprocess", "train") if len(path) == 1 else ("preprocess", "train", prefix_name(path[:-1]))
        yield _Place(name, STAGES["compress"], Recipe(path, "float32"), before, lazy=name not in prefixes)
    for rescued in (False, True):  # what a rescue loses is told against float32, so that is measured by then
        its = [recipe for recipe in wanted if (recipe.format == RESCUE) == rescued]
        yield from (_export_of(recipe, config) for recipe in its)
        yield from (
            _Place(f"measure {each}", STAGES["measure"], each, ("preprocess", f"export {each}")) for each in its
        )
    files = [f"{stage} {recipe}" for stage in ("export", "measure") for recipe in wanted]
    everything = ("preprocess", "train", *prefixes, *files)
    yield _Place("select", STAGES["select"], None, everything)
    lazy = tuple(name for name in resorts if name not in prefixes)
    yield _Place("bundle", STAGES["bundle"], None, (*everything, "select"), lazy)
    yield _Place("report", STAGES["report"], None, (*everything, "select"))


def _export_of(recipe: Recipe, config: Config) -> _Place:
    takes = ("preprocess", prefix_name(recipe.steps))
    if recipe.format != RESCUE:
        return _Place(f"export {recipe}", STAGES["export"], recipe, takes)
    path = _last_resort(recipe, config)
    asks = (prefix_name(path),) if path else ()
    return _Place(f"export {recipe}", STAGES["export"], recipe, (*takes, f"measure {REFERENCE}"), asks)


def _last_resort(recipe: Recipe, config: Config) -> tuple[TrainingStep, ...]:
    """The training steps that a rescue may end in; none for other recipes."""
    return recipe.retrained if recipe.format == RESCUE and config.export.rescue.qat else ()


def _is_path(field: str) -> bool:
    """In every kind of source the fields that hold paths start with the split whose records they hold."""
    return field.startswith(("train", "test"))


def _source_content(config: Config, index: ContentIndex) -> tuple[str, ...]:
    found = []
    for field, value in config.source.model_dump().items():
        if _is_path(field) and value is not None:
            paths = [value] if isinstance(value, str) else value
            found += [f"{field} {index.digest(pathlib.Path(path))}" for path in paths]
    return tuple(found)


def _earlier(config: Config) -> list[pathlib.Path]:
    """What `preprocess.transform` brings along: the file, and those beside it that are read with it."""
    if config.preprocess.transform is None:
        return []
    file = pathlib.Path(config.preprocess.transform)
    return [each for name in (file.name, "schema.json", "manifest.json") if (each := file.with_name(name)).exists()]


def _train_content(config: Config, index: ContentIndex) -> tuple[str, ...]:
    return _model_content(config, index) + _files_content(teacher_files(config.train.distill), index)


def _files_content(files: Iterable[pathlib.Path], index: ContentIndex) -> tuple[str, ...]:
    return tuple(map(index.digest, files))


def _model_content(config: Config, index: ContentIndex) -> tuple[str, ...]:
    """Digest of the user's own builder or model file."""
    if config.model.file is not None:
        return (index.digest(pathlib.Path(config.model.file)),)
    if config.model.builder is None:
        return ()
    place = config.model.builder.rpartition(":")[0]
    if place.endswith(".py"):
        return (index.digest(pathlib.Path(place)),)
    try:
        found = importlib.util.find_spec(place)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise ConfigError(
            f"model.builder must name a module that can be imported, got '{place}'; install it, or give "
            "the path of a .py file as 'file.py:function'."
        )
    return (index.digest(pathlib.Path(found.origin)),)
