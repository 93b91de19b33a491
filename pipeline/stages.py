"""START HERE: the journey as one ordered table.

    preprocess -> train -> compress (a tree) -> export -> measure -> select -> bundle -> report

Each row says which part of the configuration the stage depends on, which earlier stages it takes from, and the function
that calls the stage's one public verb. Stages meet here and nowhere else: `components` know nothing of each other.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from typing import TYPE_CHECKING, Any

from components.artifacts import CompressedModel, Measured, TFLiteFile, TrainedModel, read_json
from components.delivery.select import REFERENCE
from components.machine import processor
from components.options import ExportOptions
from components.recipe import IO, RESCUE, Recipe, parse_recipe
from components.tracing import Trace
from pipeline import results
from pipeline.stage import Call, Stage
from pipeline.teachers import distill_facts, teachers

if TYPE_CHECKING:
    import numpy as np

    from components.delivery.errors_by_layer import LayerError
    from pipeline.config import Config


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
        opens=call.ahead is not None,
        trace=call.trace,
    )


def _know_layers(call: Call) -> None:
    """Imports the user's builder: it registers the layers that saved models hold, and may add to TWINS."""
    from components.training.model import import_builder

    import_builder(call.config.model)


def _train(call: Call) -> None:
    from components.training.model import build
    from components.training.train import train
    from pipeline.strategy import make_split

    config, batches = call.config, call.batches(call.share, overlap=call.config.train.overlap)
    train(
        config.train,
        functools.partial(build, config.model, batches.spec, seed=config.seed),
        config.model,
        batches,
        call.folder,
        strategy=call.strategy,
        seed=config.seed,
        trace=call.trace,
        teachers=teachers(call, "train"),
        rescale=config.strategy.rescale,
        split=make_split(config.strategy),
    )
    if call.ahead is not None:
        call.ahead.data.whole()  # what was read must be what is there in the end


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
        call.batches(call.share),
        call.folder,
        strategy=call.strategy,
        batch_size=config.compress.batch_size or config.train.batch_size,
        seed=config.seed,
        trace=call.trace,
        teachers=teachers(call, "compress"),
    )


def _export(call: Call) -> None:
    recipe = _recipe(call)
    if recipe.format == RESCUE:
        return _rescue(call, recipe)
    _write(call, recipe.steps, recipe.format, call.config.export, call.folder, call.trace)
    return None


def _write(
    call: Call, steps: tuple[Any, ...], format: str, options: ExportOptions, folder: pathlib.Path, trace: Trace
) -> TFLiteFile:
    """The model of these training steps as a file, under the name of the call's recipe."""
    from components.data.dataset import read
    from components.delivery.calibration import CALIBRATION_LIMIT
    from components.delivery.export import export

    recipe = _recipe(call)
    # All that a rescue writes is alike, so that layers can be compared.
    integers = recipe.format in (*IO, RESCUE)
    model, facts, promises = _model_to_export(call, steps, integers=integers)
    calibration, labels = read(call.data, "calibration")
    return export(
        str(recipe),
        format,
        model,
        call.data.spec,
        facts["outputs"],
        options,
        calibration,
        folder,
        labels=labels,
        held_out=read(call.data, "validation", CALIBRATION_LIMIT)[0],
        promises=promises,
        untreated=facts.get("untreated", []),
        sparse=recipe.sparse,
        seed=call.config.seed,
        trace=trace,
    )


def _rescue(call: Call, recipe: Recipe) -> None:
    from components.data.dataset import read
    from components.delivery.errors_by_layer import ROWS, errors_by_layer
    from components.delivery.measure import metric, predict
    from components.delivery.owners import layer_classes
    from components.delivery.rescue import rescue
    from components.delivery.select import drop

    options, select = call.config.export, call.config.select
    layers = layer_classes(_model_to_export(call, recipe.steps, integers=True)[0])
    whole = Measured(call.takes[f"measure {REFERENCE}"]).variant
    inputs, labels = read(call.data, "validation")
    quiet = Trace(on_progress=call.trace.progress)  # int8 has said what there is to say of all these files

    def write(each: ExportOptions, folder: pathlib.Path) -> TFLiteFile:
        return _write(call, recipe.steps, "int8", each, folder, call.trace if each is options else quiet)

    def retrain(folder: pathlib.Path) -> TFLiteFile:
        return _write(call, recipe.retrained, "int8", options, folder, quiet)

    def lost(file: TFLiteFile) -> float:
        value = metric(predict(file.file, inputs), labels, call.data.spec)
        return drop(whole["validation_metric"], value, whole["metric_name"])

    def blame(file: TFLiteFile) -> list[LayerError]:
        with tempfile.TemporaryDirectory() as folder:
            whole_file = _write(call, recipe.steps, "float32", options, pathlib.Path(folder), quiet)
            rows = read(call.data, "calibration", ROWS)[0]
            return errors_by_layer(whole_file.file, file.file, rows, list(layers))

    assert select.max_metric_drop is not None, "the configuration refuses a rescue without a limit"
    fast_first = ("float32", "int16") if select.objective == "latency" else ("int16", "float32")
    rescue(
        write,
        retrain if options.rescue.qat else None,
        lost,
        blame,
        layers,
        options,
        call.folder,
        allowed=select.max_metric_drop,
        precisions=options.rescue.precisions or fast_first,
        trace=call.trace,
    )


def _rescue_facts(config: Config) -> dict[str, Any]:
    select = config.select
    return {
        **config.export.rescue.model_dump(),
        "allowed": select.max_metric_drop,
        "fast_first": select.objective == "latency",
    }


def _model_to_export(
    call: Call, steps: tuple[Any, ...], *, integers: bool = False
) -> tuple[Any, dict[str, Any], list[Any]]:
    """The live model of these training steps, the facts of its artifact, and what the file must show."""
    _know_layers(call)
    if not steps:
        from components.training.model import load
        from components.training.split import whole_somewhere
        from pipeline.strategy import make_split

        trained = TrainedModel(call.takes["train"])
        with whole_somewhere(make_split(call.config.strategy)):
            model = load(trained.file, call.config.model)
            if integers:
                from components.compression.twin import for_integers

                model = for_integers(model)
        return model, trained.facts, []
    from components.compression.compress import load as load_compressed

    compressed = CompressedModel(call.demand(prefix_name(steps)))
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
        training=TrainedModel(call.takes["train"]).facts,
        measured=measured,
        files={recipe: _relative(TFLiteFile(call.takes[f"export {recipe}"]).file) for recipe in measured},
        failures=call.failures,
        skipped=call.skipped,
        trials=call.trials,
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
    recipe, file = parse_step(call.config, name), TFLiteFile(call.takes[f"export {name}"])
    retrained = file.facts.get("rescue", {}).get("taken") == "qat"
    model, _, _ = _model_to_export(call, recipe.retrained if retrained else recipe.steps)
    bundle(
        variant,
        file,
        call.data,
        call.config.bundle,
        call.folder,
        run=call.config.name,
        selected_because=chosen["selected_because"],
        privacy=chosen["training"].get("privacy"),
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
            "train": {
                **config.train.model_dump(exclude={"checkpoint_every", "profile"}),  # they change no bit
                "distill": distill_facts(config.train.distill),
            },
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
            "distill": distill_facts(config.compress.distill),
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
            "export": config.export.model_dump(exclude={"rescue"}),
            "rescue": _rescue_facts(config) if recipe and recipe.format == RESCUE else None,
            "seed": config.seed,
        },
        _export,
        (
            "components.delivery.export",
            "components.delivery.rescue",
            "components.compression.compress",
            "components.training.model",
        ),
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
