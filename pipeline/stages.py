"""START HERE: the journey as one ordered table.

    preprocess -> train -> compress (a tree) -> export -> measure -> select -> bundle -> report

Each row says which part of the configuration the stage depends on, which earlier stages it takes from, and the function
that calls the stage's one public verb. Stages meet here and nowhere else: `components` know nothing of each other.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from components.artifacts import (
    Batches,
    CompressedModel,
    Measured,
    PreparedData,
    TFLiteFile,
    TrainedModel,
    read_json,
)
from components.machine import processor
from components.options import CompressDistillation, TrainDistillation
from components.recipe import Recipe, parse_recipe
from components.tracing import Trace
from pipeline import results

if TYPE_CHECKING:
    import numpy as np

    from pipeline.config import Config


@dataclasses.dataclass(frozen=True)
class Call:
    """All that a stage's function gets.

    Attributes:
      name: The step's name in the plan: 'train', 'export int8', ...
      config: The whole configuration; a function reads only what its row's `options` names.
      folder: Where the artifact is built; may hold what a killed attempt left.
      takes: Finished artifacts, by step name ('train', 'compress prune@0.8', ...).
      recipe: The recipe, or prefix of one, that this step carries out; None where there is none.
      failures: Recipe -> why it could not be carried out; read by `select` only.
      seconds: Step name -> how long it worked; read by `select` only.
      trace: Where numbers, progress and warnings go.
    """

    name: str
    config: Config
    folder: pathlib.Path
    takes: dict[str, pathlib.Path]
    recipe: Recipe | None
    failures: dict[str, str]
    seconds: dict[str, float]
    trace: Trace

    @property
    def data(self) -> PreparedData:
        """The prepared data, which every later stage may read."""
        return PreparedData(self.takes["preprocess"])

    @functools.cached_property
    def strategy(self) -> Any:
        """The `tf.distribute` strategy of the run."""
        from pipeline.strategy import make_strategy

        return make_strategy(self.config.strategy)

    def batches(self) -> Batches:
        """The training data as `tf.data`, augmented as the configuration says."""
        from components.data.dataset import make_batches

        return make_batches(self.data, augmentation=self.config.train.augmentation)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One row of the journey.

    Attributes:
      name: As the user writes it after `--until` and `--force`.
      options: The part of the configuration that the result depends on; goes into the fingerprint.
      run: Calls the stage's verb.
      modules: Where its code is; these and all that they import from `components` go into the fingerprint.
      libraries: Distributions whose versions go into the fingerprint.
      files: What else its result depends on, below the repository's root.
      resumes: True where the verb goes on from what a killed attempt left.
    """

    name: str
    options: Callable[[Config, Recipe | None], dict[str, Any]]
    run: Callable[[Call], None]
    modules: tuple[str, ...]
    libraries: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    resumes: bool = False


def _preprocess(call: Call) -> None:
    from components.data.preprocess import preprocess

    config = call.config
    preprocess(
        config.source,
        config.preprocess,
        call.folder,
        task=None if config.task == "auto" else config.task,
        seed=config.seed,
        golden=config.bundle.golden,
        trace=call.trace,
    )


def _teachers(call: Call, section: str) -> Callable[[], tuple[Any, ...]]:
    """Loads whoever teaches in `train` or `compress`; asked only where the section says distill."""
    from components.training.teacher import load_teachers

    distill, like = getattr(call.config, section).distill, call.config.model
    files = teacher_files(distill)
    outputs = None
    if distill is not None and not files:
        trained = TrainedModel(call.takes["train" if section == "compress" else TEACHER])
        files, outputs = [trained.file], trained.facts["outputs"]
        like = like if section == "compress" else distill.teacher_model
    where = f"{section}.distill.teacher"
    return functools.partial(load_teachers, files, call.data.spec, like, where=where, outputs=outputs)


def teacher_files(distill: TrainDistillation | CompressDistillation | None) -> list[pathlib.Path]:
    """The files that teach; none where it is a model of the run, or nobody."""
    named = distill.teacher if distill else None
    return [] if named is None or named == "base" else [pathlib.Path(name) for name in named]


def teacher_config(config: Config) -> Config | None:
    """The configuration under which the teacher of the base training is trained: there, it is the model.

    So it is the very step of a run of that model alone, and is found in the store where there was one.
    """
    distill = config.train.distill
    if distill is None or distill.teacher_model is None:
        return None
    train = config.train.model_copy(update={"distill": None})
    return config.model_copy(update={"model": distill.teacher_model, "train": train})


def _distill_facts(distill: TrainDistillation | CompressDistillation | None) -> dict[str, Any] | None:
    """For a fingerprint: files count by their content, which the plan adds, not by their paths."""
    if distill is None:
        return None
    return {**distill.model_dump(), "teacher": len(teacher_files(distill)) or "own"}


def _know_layers(call: Call) -> None:
    """Imports the user's builder: it registers the layers that saved models hold, and may add to TWINS."""
    from components.training.model import import_builder

    import_builder(call.config.model)


def _train(call: Call) -> None:
    from components.training.model import build
    from components.training.train import train

    config, batches = call.config, call.batches()
    train(
        config.train,
        functools.partial(build, config.model, batches.spec, seed=config.seed),
        config.model,
        batches,
        call.folder,
        strategy=call.strategy,
        seed=config.seed,
        trace=call.trace,
        teachers=_teachers(call, "train"),
    )


def _compress(call: Call) -> None:
    from components.compression.compress import compress

    _know_layers(call)
    config, path = call.config, _recipe(call).steps
    before = prefix_name(path[:-1])
    compress(
        path[-1],
        path,
        config.compress,
        TrainedModel(call.takes["train"]),
        CompressedModel(call.takes[before]) if len(path) > 1 else None,
        call.batches(),
        call.folder,
        strategy=call.strategy,
        batch_size=config.compress.batch_size or config.train.batch_size,
        seed=config.seed,
        trace=call.trace,
        teachers=_teachers(call, "compress"),
    )


def _export(call: Call) -> None:
    from components.data.dataset import read
    from components.delivery.calibration import CALIBRATION_LIMIT
    from components.delivery.export import export

    recipe = _recipe(call)
    model, facts, promises = _model_to_export(call, recipe)
    calibration, labels = read(call.data, "calibration")
    export(
        str(recipe),
        recipe.format,
        model,
        call.data.spec,
        facts["outputs"],
        call.config.export,
        calibration,
        call.folder,
        labels=labels,
        held_out=read(call.data, "validation", CALIBRATION_LIMIT)[0],
        promises=promises,
        untreated=facts.get("untreated", []),
        sparse=recipe.sparse,
        seed=call.config.seed,
        trace=call.trace,
    )


def _model_to_export(call: Call, recipe: Recipe) -> tuple[Any, dict[str, Any], list[Any]]:
    """The live model of a recipe's training steps, the facts of its artifact, and what the file must show."""
    if not recipe.steps:
        from components.training.model import load

        trained = TrainedModel(call.takes["train"])
        return load(trained.file, call.config.model), trained.facts, []
    from components.compression.compress import load as load_compressed

    _know_layers(call)
    compressed = CompressedModel(call.takes[prefix_name(recipe.steps)])
    return load_compressed(compressed), compressed.facts, compressed.promises


def _measure(call: Call) -> None:
    from components.data.dataset import read
    from components.delivery.measure import measure

    def rows(split: str) -> tuple[np.ndarray, np.ndarray]:
        return read(call.data, split)

    measure(
        TFLiteFile(call.takes[f"export {_recipe(call)}"]),
        functools.partial(rows, "test"),
        functools.partial(rows, "validation"),
        call.data.spec,
        call.config.measure,
        call.folder,
        trace=call.trace,
    )


def _select(call: Call) -> None:
    measured = {
        name.removeprefix("measure "): Measured(path).variant
        for name, path in call.takes.items()
        if name.startswith("measure ")
    }
    results.write_results(
        call.folder,
        name=call.config.name,
        select_options=call.config.select,
        data=call.data,
        measured=measured,
        files={recipe: _relative(TFLiteFile(call.takes[f"export {recipe}"]).file) for recipe in measured},
        failures=call.failures,
        seconds=call.seconds,
        trace=call.trace,
    )


def _bundle(call: Call) -> None:
    from components.delivery.bundle import bundle

    chosen = read_json(call.takes["select"] / results.FILE)
    name = chosen["selected"]
    if name is None:
        return  # nothing met the constraints: the runner says so after the report
    variant = next(each for each in chosen["variants"] if each["recipe"] == name)
    recipe = parse_step(call.config, name)
    model, _, _ = _model_to_export(call, recipe)
    bundle(
        variant,
        TFLiteFile(call.takes[f"export {name}"]),
        call.data,
        call.config.bundle,
        call.folder,
        run=call.config.name,
        selected_because=chosen["selected_because"],
        keras_outputs=lambda inputs: model(inputs, training=False).numpy(),
        batches=call.batches(),
        trace=call.trace,
    )


def _report(call: Call) -> None:
    from components.delivery.report import picture, report

    value = read_json(call.takes["select"] / results.FILE)
    chosen = call.takes.get(f"measure {value['selected']}")
    report(
        value,
        call.folder,
        labels=call.data.spec.labels,
        predictions=None if chosen is None else chosen / "predictions.npz",
        history=read_json(call.takes["train"] / "history.json"),
    )
    if any(variant["status"] == "ok" for variant in value["variants"]):
        picture(value, call.folder / "report.png")


def _relative(path: pathlib.Path) -> str:
    """A file of the store as seen from the workspace: 'store/export/<fingerprint>/model.tflite'."""
    return pathlib.PurePosixPath(*path.parts[-4:]).as_posix()


def _recipe(call: Call) -> Recipe:
    assert call.recipe is not None, "the plan gives every compress, export and measure step its recipe"
    return call.recipe


TEACHER = "train teacher"
"""Name of the step that trains `train.distill.teacher_model`."""


def prefix_name(steps: tuple[Any, ...]) -> str:
    """Step name of the artifact that these training steps lead to."""
    return "compress " + "+".join(map(str, steps)) if steps else "train"


def parse_step(config: Config, text: str) -> Recipe:
    """Reads a recipe with the configuration's default strengths."""
    return parse_recipe(text, config.compress.strengths)


JOURNEY = (
    Stage(
        "preprocess",
        lambda config, _: {
            "source": config.source.model_dump(),
            "preprocess": config.preprocess.model_dump(),
            "task": config.task,
            "seed": config.seed,
            "golden": config.bundle.golden,
        },
        _preprocess,
        ("components.data.preprocess",),
        ("apache-beam", "numpy", "pyarrow", "pillow", "scikit-learn", "datasketches"),
    ),
    Stage(
        "train",
        lambda config, _: {
            "model": config.model.model_dump(),
            "train": {**config.train.model_dump(), "distill": _distill_facts(config.train.distill)},
            "strategy": config.strategy.model_dump(),
            "seed": config.seed,
        },
        _train,
        (
            "components.training.train",
            "components.training.model",
            "components.training.teacher",
            "components.data.dataset",
            "pipeline.strategy",
        ),
        ("tensorflow", "keras", "numpy"),
        resumes=True,
    ),
    Stage(
        "compress",
        lambda config, recipe: {
            "path": list(map(str, recipe.steps)) if recipe else [],
            "step": getattr(config.compress, recipe.steps[-1].name).model_dump() if recipe else {},
            "batch_size": config.compress.batch_size or config.train.batch_size,
            "augmentation": config.train.augmentation.model_dump(),
            "distill": _distill_facts(config.compress.distill),
            "strategy": config.strategy.model_dump(),
            "seed": config.seed,
        },
        _compress,
        (
            "components.compression.compress",
            "components.training.teacher",
            "components.data.dataset",
            "pipeline.strategy",
        ),
        ("tensorflow", "keras", "tf-keras", "tensorflow-model-optimization", "numpy"),
        resumes=True,
    ),
    Stage(
        "export",
        lambda config, recipe: {
            "recipe": str(recipe),
            "export": config.export.model_dump(),
            "seed": config.seed,
        },
        _export,
        ("components.delivery.export", "components.compression.compress", "components.training.model"),
        ("tensorflow", "keras", "tf-keras", "tensorflow-model-optimization", "ai-edge-quantizer"),
    ),
    Stage(
        "measure",
        lambda config, recipe: {
            "recipe": str(recipe),
            "measure": config.measure.model_dump(),
            "machine": processor(),  # a latency is true for one kind of machine only
        },
        _measure,
        ("components.delivery.measure", "components.delivery.proof", "components.data.dataset"),
        ("ai-edge-litert", "numpy"),
    ),
    Stage(
        "select",
        lambda config, _: {"select": config.select.model_dump(), "name": config.name},
        _select,
        ("components.delivery.select",),
    ),
    Stage(
        "bundle",
        lambda config, _: {"bundle": config.bundle.model_dump(), "name": config.name},
        _bundle,
        ("components.delivery.bundle", "components.data.transform", "components.data.dataset"),
        ("ai-edge-litert", "numpy"),
    ),
    Stage(
        "report",
        lambda config, _: {"name": config.name},
        _report,
        ("components.delivery.report",),
        ("matplotlib", "jinja2"),
        ("components/delivery/report.html",),
    ),
)
STAGES = {stage.name: stage for stage in JOURNEY}
