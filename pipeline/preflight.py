"""Checks before the first second of work: what would fail after an hour is said in seconds. Trains nothing."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from components.artifacts import DataSpec, PreparedData, TrainedModel, read_json, write_json
from components.errors import ConfigError, TrimlineError
from pipeline.config import Config
from pipeline.fingerprint import fingerprint
from pipeline.plan import Plan, Step, recipes
from pipeline.stage import Stage
from pipeline.stages import parse_step
from pipeline.store import Key
from pipeline.teachers import teacher_config, teacher_files

if TYPE_CHECKING:
    from components.data.schema import Peek, Schema


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing to know before the run.

    Attributes:
      level: 'error' stops the run, 'warning' does not.
      text: One line.
    """

    level: str
    text: str


def check(plan: Plan) -> list[Finding]:
    """Looks at source, strategy, model and recipes.

    A model is built for this, which loads TensorFlow; what it said is kept in the store, so an unchanged
    configuration is answered at once.
    """
    return [*_check_source(plan), *_check_strategy(plan.config), *_check_model(plan)]


def refuse(plan: Plan) -> None:
    """The checks that take no time, as an error: what a run asks before its first step.

    Raises:
      ConfigError: The first finding, with a count of the others.
    """
    errors = [finding.text for finding in (*_check_source(plan), *_check_strategy(plan.config))]
    if errors:
        more = f" (and {len(errors) - 1} more: see 'trimline plan')" if len(errors) > 1 else ""
        raise ConfigError(errors[0] + more)


def _check_source(plan: Plan) -> list[Finding]:
    if plan.cached(plan.steps[0]):
        return []
    try:
        _look(plan.config)
    except TrimlineError as error:
        return [Finding("error", str(error))]
    return []


def _check_strategy(config: Config) -> list[Finding]:
    from pipeline.strategy import check_strategy

    found = []
    train, compress = config.train.batch_size, config.compress.batch_size or config.train.batch_size
    if config.strategy.rescale:
        train *= config.strategy.devices or config.strategy.workers or 1
    for batch_size, accumulate in {(train, config.train.accumulate), (compress, 1)}:
        try:
            check_strategy(config.strategy, batch_size, accumulate)
        except TrimlineError as error:
            found.append(Finding("error", str(error)))
    return found


def _check_model(plan: Plan) -> list[Finding]:
    trains = [step for step in plan.steps if step.stage.name in ("train", "compress") and not step.lazy]
    if all(map(plan.cached, trains)):
        return []  # what is trained already was possible
    key = _key(plan)
    if not plan.store.completed(key):
        plan.store.build(key, lambda folder: _write_findings(plan, folder), resumes=False)
    said = read_json(plan.store.folder(key) / "findings.json")
    return [Finding(**each) for each in said]


def _key(plan: Plan) -> Key:
    """The findings depend on the model, the recipes, and the shape of the data."""
    spec = rough_spec(plan)
    train = next(step for step in plan.steps if step.stage.name == "train")
    stage = Stage(
        "preflight",
        lambda *_: {},
        cast(Any, _probe),
        (
            "components.compression.compress",
            "components.training.model",
            "components.training.split",
            "components.training.teacher",
            "components.training.trainable",
        ),
    )
    facts = {
        "model": plan.config.model.model_dump(),
        "compress": plan.config.compress.model_dump(),
        "recipes": list(map(str, recipes(plan.config))),
        "spec": spec.to_json() if spec else None,
        "train": train.stage.name,
        "training": plan.config.train.model_dump(include={"epochs", "privacy", "transfer", "rematerialize"}),
        "strategy": plan.config.strategy.model_dump(include={"name", "devices", "layout"}),
        "teacher_model": taught.model.model_dump() if (taught := teacher_config(plan.config)) else None,
        "teachers": {section: len(files) for section, files in _teachers(plan.config).items()},
    }
    content = (*plan.content.get("train", ()), *plan.content.get("compress", ()))
    return Key("preflight", fingerprint(stage, json.loads(json.dumps(facts)), (), content))


def _write_findings(plan: Plan, folder: pathlib.Path) -> None:
    write_json(folder / "findings.json", [dataclasses.asdict(each) for each in _probe(plan)])


def _probe(plan: Plan) -> list[Finding]:
    """Builds the model untrained and asks every step of every recipe about it."""
    from components.compression.compress import unsupported
    from components.training.model import build
    from components.training.split import check_split, whole_somewhere
    from components.training.teacher import load_teachers
    from components.training.trainable import check_trainable
    from pipeline.strategy import make_split

    spec = rough_spec(plan)
    if spec is None:
        return []
    try:
        split = make_split(plan.config.strategy)
        for section, files in _teachers(plan.config).items():
            load_teachers(files, spec, plan.config.model, where=f"{section}.distill.teacher")
        if (taught := teacher_config(plan.config)) is not None:
            build(taught.model, spec, seed=plan.config.seed)
        with whole_somewhere(split):
            model = build(plan.config.model, spec, seed=plan.config.seed)
        check_trainable(model, plan.config.train)
        if split is not None:
            check_split(model, split)
    except TrimlineError as error:
        return [Finding("error", str(error))]
    if not any(recipe.steps for recipe in recipes(plan.config)):
        return []
    try:
        return [Finding("warning", line) for line in unsupported(model, recipes(plan.config), plan.config.compress)]
    except TrimlineError as error:
        return [Finding("warning", str(error))]


_CANNOT = "impossible.json"


def impossible(plan: Plan, names: Sequence[str], *, ask: bool) -> dict[str, str] | None:
    """Which training steps the trained model does not allow, each with the reason; kept in the store.

    Args:
      plan: Its base model is trained.
      names: Steps as `parse_recipe` reads them.
      ask: False answers None where it is not known yet; to find out loads TensorFlow.
    """
    options = plan.config.compress.model_copy(update={"recipes": [], "budget": ""})
    train = next(step for step in plan.steps if step.name == "train")
    stage = Stage("preflight", lambda *_: {}, cast(Any, _find_impossible), ("components.compression.compress",))
    facts = {"compress": options.model_dump(mode="json"), "steps": list(names)}
    key = Key("preflight", fingerprint(stage, facts, [train.key.fingerprint], ()))
    if not plan.store.completed(key):
        if not ask:
            return None
        base = TrainedModel(plan.store.folder(train.key))
        plan.store.build(key, lambda folder: _find_impossible(base, names, plan.config, folder), resumes=False)
    return dict(read_json(plan.store.folder(key) / _CANNOT))


def _find_impossible(base: TrainedModel, names: Sequence[str], config: Config, folder: pathlib.Path) -> None:
    from components.compression import compress

    steps = [parse_step(config, name).steps[0] for name in names]
    write_json(folder / _CANNOT, compress.impossible(base, steps, config.compress))


def _teachers(config: Config) -> dict[str, list[pathlib.Path]]:
    """By section, the files that teach."""
    return {section: teacher_files(getattr(config, section).distill) for section in ("train", "compress")}


def rough_spec(plan: Plan) -> DataSpec | None:
    """The shape of the data: exact where it is prepared already, else from a look at the source; None if unknown."""
    first: Step = plan.steps[0]
    if plan.cached(first):
        return PreparedData(plan.store.folder(first.key)).spec
    from components.data import schema

    try:
        return schema.rough_spec(*_look(plan.config))
    except TrimlineError:
        return None  # said by the check of the source


def _look(config: Config) -> tuple[Peek, Schema]:
    """A first look at the source, and what its columns are taken for."""
    from components.data import schema
    from components.data.source import peek

    seen = peek(config.source)
    task = None if config.task == "auto" else config.task
    return seen, schema.infer(seen, config.source, config.preprocess, task)
