"""Compress: one step of a recipe, from the model of the step before it to a fine-tuned, self-contained model.

TrainedModel or CompressedModel --compress(step)--> CompressedModel --load()--> tf_keras model, ready to convert

folder: twin.json (the twin, without wrappers), weights.npz, quantized.json (qat only); face: compressed.json
"""

from __future__ import annotations

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from components.artifacts import Batches, CompressedModel, Promise, TrainedModel, read_json, write_json
from components.compression import cluster as clustering
from components.compression import prune as pruning
from components.compression import quantize as quantization
from components.compression.finetune import Setting, finetune, finish
from components.compression.kernels import Chosen, Untreated, kernels, sparsity
from components.compression.quantize import Kept
from components.compression.twin import to_twin
from components.errors import ContractError, ModelError
from components.options import CompressOptions
from components.recipe import Recipe, Step
from components.tracing import Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Start:
    """Where a step begins.

    Attributes:
      twin: Without wrappers.
      promises: What earlier steps did, by layer name.
      outputs: 'logits' or 'probabilities'.
      untreated: What earlier steps left alone.
    """

    twin: tf_keras.Model
    promises: Mapping[str, Promise]
    outputs: str
    untreated: list[dict[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Done:
    """What a step gave.

    Attributes:
      twin: Without wrappers; for qat the twin that `names` and `keep` refer to.
      weights: To be saved; of `twin`, or of the quantized model.
      promises: For every kernel that some step of the recipe treated.
      untreated: What this step left alone.
      validation: Loss and metric on the validation split.
      quantized: What `load` needs to rebuild the wrappers; None without qat.
    """

    twin: tf_keras.Model
    weights: list[np.ndarray]
    promises: list[Promise]
    untreated: list[Untreated]
    validation: dict[str, float]
    quantized: dict[str, Any] | None = None


def compress(
    step: Step,
    recipe: tuple[Step, ...],
    options: CompressOptions,
    base: TrainedModel,
    prefix: CompressedModel | None,
    batches: Batches,
    folder: pathlib.Path,
    *,
    strategy: tf.distribute.Strategy,
    batch_size: int,
    seed: int,
    trace: Trace,
) -> CompressedModel:
    """Carries out one training step of a recipe.

    Args:
      step: The last of `recipe`.
      recipe: The path from the base model up to and with this step.
      options: Strengths, schedules, learning rates, exclusions.
      base: The trained Keras 3 model; read where there is no prefix.
      prefix: What the steps before this one gave; None for the first step.
      batches: Training and validation data.
      folder: Exists; an attempt with the same arguments that was killed is continued from its last epoch.
      strategy: Variables and training are placed by it.
      batch_size: Global, over all replicas.
      seed: Fixes everything that is drawn.
      trace: Hears progress, losses, sparsity and distinct weights per layer.

    Returns:
      The finished artifact; its face is written last.

    Raises:
      ModelError: The model has no twin, the step finds nothing to treat, or the loss is not finite.
      ConfigError: An option names an unknown layer or cannot work.
      ContractError: An artifact that is read is damaged.
    """
    tf_keras.utils.set_random_seed(seed)
    setting = Setting(
        step=str(step),
        options=getattr(options, step.name),
        batches=batches,
        batch_size=batch_size,
        outputs=(prefix or base).facts["outputs"],
        seed=seed,
        folder=folder,
        strategy=strategy,
        trace=trace,
    )
    with strategy.scope():
        start = _start(base, prefix)
    done = _STEPS[step.name](start, step, options, setting)
    for each in done.untreated:
        trace.text("untreated", f"`{each.layer}` ({each.kind}): {each.reason}")
    return _save(folder, recipe, start, done, setting)


def _start(base: TrainedModel, prefix: CompressedModel | None) -> _Start:
    if prefix is not None:
        twin = load(prefix)
        promises = {promise.layer: promise for promise in prefix.promises}
        return _Start(
            twin=twin, promises=promises, outputs=prefix.facts["outputs"], untreated=prefix.facts["untreated"]
        )
    try:
        model = keras.saving.load_model(base.file, compile=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ContractError(
            f"{base.file}: a Keras 3 model was promised, got {error}; run train again with --force."
        ) from error
    return _Start(twin=to_twin(model), promises={}, outputs=base.facts["outputs"], untreated=[])


# --- the steps ---------------------------------------------------------------------------------------------------


def _prune(start: _Start, step: Step, options: CompressOptions, setting: Setting) -> _Done:
    chosen = _something(pruning.choose_prunable(start.twin, options.prune, _strength(step)), step)
    with setting.strategy.scope():
        model = pruning.prune(start.twin, chosen, options.prune, sparsity=_strength(step), updates=setting.updates)
    validation = finetune(
        model,
        setting,
        callbacks=[tfmot.sparsity.keras.UpdatePruningStep()],
        watch=lambda: {"sparsity": pruning.mask_sparsity(model)},
    )
    with setting.strategy.scope():
        twin = pruning.strip(model)
    return _Done(
        twin=twin,
        weights=twin.get_weights(),
        promises=[
            kernel.promise(kernel.values, pruned=True, distinct=0, quantized=False)
            for kernel in kernels(twin)
            if kernel.name in chosen.names
        ],
        untreated=chosen.untreated,
        validation=validation,
    )


def _cluster(start: _Start, step: Step, options: CompressOptions, setting: Setting) -> _Done:
    clusters = int(_strength(step))
    chosen = _something(clustering.choose_clusterable(start.twin, options.cluster, clusters), step)
    pruned = {name for name, promise in start.promises.items() if promise.sparsity > 0}
    with setting.strategy.scope():
        _set_trainable(start.twin, pruned - chosen.names, False)
        model = clustering.cluster(start.twin, chosen, options.cluster, clusters=clusters, keep_zeros=pruned)
    validation = finetune(model, setting, watch=lambda: {"distinct_weights": clustering.distinct_weights(model)})
    with setting.strategy.scope():
        twin = clustering.strip(model)
        _set_trainable(twin, pruned - chosen.names, True)
    return _Done(
        twin=twin,
        weights=twin.get_weights(),
        promises=[
            kernel.promise(
                kernel.values,
                pruned=kernel.name in pruned,
                distinct=clusters if kernel.name in chosen.names else 0,
                quantized=False,
            )
            for kernel in kernels(twin)
            if kernel.name in chosen.names | pruned
        ],
        untreated=chosen.untreated,
        validation=validation,
    )


def _quantize(start: _Start, step: Step, options: CompressOptions, setting: Setting) -> _Done:
    annotated = quantization.choose_quantizable(start.twin, options.qat)
    if not any(kernel.name in annotated.names for kernel in kernels(start.twin)):
        raise _nothing(step, annotated.untreated)
    keep = {
        kernel.name: quantization.kept(kernel, pruned=promise.sparsity > 0, distinct=promise.distinct)
        for kernel in kernels(start.twin)
        if (promise := start.promises.get(kernel.name)) is not None and kernel.name in annotated.names
    }
    frozen = sorted(set(start.promises) - set(annotated.names))
    with setting.strategy.scope():
        _set_trainable(start.twin, frozen, False)
        model = quantization.quantize(start.twin, annotated.names, keep)
        quantization.calibrate(model, setting.batches.training(setting.batch_size, setting.seed, 0), setting.strategy)
    validation = finetune(model, setting, watch=lambda: _watch_kept(model, keep))
    return _Done(
        twin=start.twin,
        weights=model.get_weights(),
        promises=_quantized_promises(start, model, set(annotated.names)),
        untreated=annotated.untreated,
        validation=validation,
        quantized={
            "names": list(annotated.names),
            "keep": {name: each.to_json() for name, each in keep.items()},
            "frozen": frozen,
        },
    )


def _quantized_promises(start: _Start, model: tf_keras.Model, names: set[str]) -> list[Promise]:
    trained = quantization.trained_kernels(model)
    made = []
    for kernel in kernels(start.twin):
        before = start.promises.get(kernel.name)
        if kernel.name in names or before is not None:
            made.append(
                kernel.promise(
                    trained.get(kernel.name, kernel.values),
                    pruned=before is not None and before.sparsity > 0,
                    distinct=before.distinct if before is not None else 0,
                    quantized=kernel.name in names,
                )
            )
    return made


def _watch_kept(model: tf_keras.Model, keep: Mapping[str, Kept]) -> dict[str, dict[str, float]]:
    trained = quantization.trained_kernels(model)
    return {"sparsity": {name: sparsity(trained[name]) for name, each in keep.items() if each.mask is not None}}


_STEPS: dict[str, Callable[[_Start, Step, CompressOptions, Setting], _Done]] = {
    "prune": _prune,
    "cluster": _cluster,
    "qat": _quantize,
}


def _strength(step: Step) -> float:
    assert step.strength is not None  # the grammar gives prune and cluster one
    return step.strength


def _something(chosen: Chosen, step: Step) -> Chosen:
    if not chosen.names:
        raise _nothing(step, chosen.untreated)
    return chosen


def _nothing(step: Step, untreated: Sequence[Untreated]) -> ModelError:
    why = "; ".join(f"'{each.layer}': {each.reason}" for each in untreated[:3]) or "it has no kernels"
    return ModelError(f"{step}: the model has no layer to work on ({why}); drop the recipes with {step.name}.")


def _set_trainable(twin: tf_keras.Model, names: Iterable[str], value: bool) -> None:
    """Freezes kernels of earlier steps that this step does not wrap: else training would fill their zeros again."""
    chosen = set(names)
    for layer in twin.layers:
        if layer.name in chosen:
            layer.trainable = value


# --- the artifact ------------------------------------------------------------------------------------------------


def _save(
    folder: pathlib.Path, recipe: tuple[Step, ...], start: _Start, done: _Done, setting: Setting
) -> CompressedModel:
    (folder / "twin.json").write_text(done.twin.to_json(), encoding="utf-8")
    with (folder / "weights.npz").open("wb") as file:
        np.savez(file, *done.weights)
    if done.quantized is not None:
        write_json(folder / "quantized.json", done.quantized)
    step = recipe[-1].name
    untreated = [{**each.to_json(), "reason": f"{step}: {each.reason}"} for each in done.untreated]
    write_json(
        folder / "compressed.json",
        {
            "recipe": "+".join(map(str, recipe)),
            "quantized": done.quantized is not None,
            "outputs": start.outputs,
            "layers": [dataclasses.asdict(promise) for promise in done.promises],
            "untreated": [*start.untreated, *untreated],
            "validation": done.validation,
        },
    )
    finish(setting)
    return CompressedModel(folder)


def load(model: CompressedModel) -> tf_keras.Model:
    """The compressed model, ready to be converted or to go into the next step.

    Quantization-aware models keep their fake quantization; all others are plain twins. Depends on `model.folder` only.

    Raises:
      ContractError: A file of the artifact is absent or damaged.
    """
    folder = model.folder
    # Layers that tfmot adds are numbered over the whole process, and their names end up in the file.
    tf_keras.backend.reset_uids()
    try:
        twin = tf_keras.models.model_from_json((folder / "twin.json").read_text(encoding="utf-8"))
        with np.load(folder / "weights.npz", allow_pickle=False) as file:
            weights = [file[f"arr_{number}"] for number in range(len(file.files))]
        made = _rebuild(twin, read_json(folder / "quantized.json")) if model.facts["quantized"] else twin
        made.set_weights(weights)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ContractError(
            f"{folder}: a compressed model was promised, got {first}; run compress again with --force."
        ) from error
    return made


def _rebuild(twin: tf_keras.Model, quantized: Mapping[str, Any]) -> tf_keras.Model:
    _set_trainable(twin, quantized["frozen"], False)
    by_name = {kernel.name: kernel for kernel in kernels(twin)}
    keep = {name: quantization.like_json(by_name[name], value) for name, value in quantized["keep"].items()}
    return quantization.quantize(twin, quantized["names"], keep)


# --- before the run ----------------------------------------------------------------------------------------------


def unsupported(model: keras.Model, recipes: Iterable[Recipe], options: CompressOptions | None = None) -> list[str]:
    """What the recipes' training steps would leave alone in this model, and which of them cannot work; trains nothing.

    Args:
      model: Built; its weights do not matter.
      recipes: All that the run would carry out.
      options: For exclusions; None: the defaults.

    Returns:
      One line a layer and step, then one a step that finds nothing to work on.

    Raises:
      ModelError: The model has no twin at all.
      ConfigError: An option excludes an unknown layer.
    """
    steps = {step.name: step for recipe in recipes for step in recipe.steps}
    if not steps:
        return []
    twin = to_twin(model)
    options = options or CompressOptions()
    lines = []
    for name, step in steps.items():
        untreated, works = _foresee(twin, step, options)
        lines += [f"{name} leaves layer '{each.layer}' ({each.kind}) alone: {each.reason}" for each in untreated]
        if not works:
            lines.append(f"{name} finds nothing to work on in model '{model.name}': its recipes will fail; drop them.")
    return lines


def _foresee(twin: tf_keras.Model, step: Step, options: CompressOptions) -> tuple[list[Untreated], bool]:
    if step.name == "qat":
        annotated = quantization.choose_quantizable(twin, options.qat)
        return annotated.untreated, any(kernel.name in annotated.names for kernel in kernels(twin))
    if step.name == "prune":
        chosen = pruning.choose_prunable(twin, options.prune, _strength(step))
    else:
        chosen = clustering.choose_clusterable(twin, options.cluster, int(_strength(step)))
    return chosen.untreated, bool(chosen.names)
