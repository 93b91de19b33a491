"""Compress: one step of a recipe, from the model of the step before it to a fine-tuned, self-contained model.

TrainedModel or CompressedModel --compress(step)--> CompressedModel --load()--> tf_keras model, ready to convert

folder: twin.json (the twin, without wrappers), weights.npz, quantized.json (qat only); face: compressed.json
"""

from __future__ import annotations

import dataclasses
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from components.artifacts import Batches, CompressedModel, TrainedModel, read_json, write_json
from components.compression import quantize as quantization
from components.compression.finetune import Setting, finish
from components.compression.kernels import kernels
from components.compression.steps import (
    FORESEE,
    STEPS,
    Done,
    Start,
    all_promises,
    covering_parts,
    set_trainable,
)
from components.compression.twin import to_twin
from components.distillation import Teacher, make_lesson
from components.errors import ConfigError, ContractError, ModelError
from components.options import CompressOptions
from components.recipe import Recipe, Step
from components.tracing import Trace


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
    teachers: Callable[[], tuple[Teacher, ...]] = tuple,
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
      teachers: Loads those that `options.distill` names; called under the strategy.

    Returns:
      The finished artifact; its face is written last.

    Raises:
      ModelError: The model has no twin, the step finds nothing to treat, or the loss is not finite.
      ConfigError: An option names an unknown layer or cannot work.
      ContractError: An artifact that is read is damaged.
    """
    tf_keras.utils.set_random_seed(seed)
    outputs = (prefix or base).facts["outputs"]
    with strategy.scope():
        start = _start(base, prefix)
        lesson = make_lesson(options.distill, teachers, batches.spec.task, outputs)
    setting = Setting(
        step=str(step),
        options=getattr(options, step.name),
        batches=batches,
        batch_size=batch_size,
        outputs=outputs,
        seed=seed,
        folder=folder,
        strategy=strategy,
        trace=trace,
        lesson=lesson,
    )
    done = STEPS[step.name](start, step, covering_parts(options, start.twin, start.reports), setting)
    for each in done.untreated:
        trace.text("untreated", f"`{each.layer}` ({each.kind}): {each.reason}")
    return _save(folder, recipe, start, done, setting)


def _start(base: TrainedModel, prefix: CompressedModel | None) -> Start:
    if prefix is not None:
        twin = load(prefix)
        promises = {promise.layer: promise for promise in prefix.promises}
        return Start(
            twin=twin,
            promises=promises,
            outputs=prefix.facts["outputs"],
            untreated=prefix.facts["untreated"],
            reports=prefix.facts["reports"],
        )
    return Start(twin=_twin_of(base), promises={}, outputs=base.facts["outputs"], untreated=[], reports={})


def _twin_of(base: TrainedModel) -> tf_keras.Model:
    try:
        model = keras.saving.load_model(base.file, compile=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ContractError(
            f"{base.file}: a Keras 3 model was promised, got {error}; run train again with --force."
        ) from error
    return to_twin(model)


# --- the artifact ------------------------------------------------------------------------------------------------


def _save(
    folder: pathlib.Path, recipe: tuple[Step, ...], start: Start, done: Done, setting: Setting
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
            "layers": [dataclasses.asdict(promise) for promise in all_promises(start, done)],
            "untreated": [*start.untreated, *untreated],
            "validation": done.validation,
            "reports": {**start.reports, **({str(recipe[-1]): done.report} if done.report else {})},
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
    set_trainable(twin, quantized["frozen"], False)
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
      One line a layer and step, then one a step that finds nothing to work on or cannot be as strong as the recipe says.

    Raises:
      ModelError: The model has no twin at all.
      ConfigError: An option excludes an unknown layer.
    """
    steps = {str(step): step for recipe in recipes for step in recipe.steps}
    if not steps:
        return []
    twin = to_twin(model)
    options = covering_parts(options or CompressOptions(), twin, {})
    lines = []
    for step in steps.values():
        try:
            untreated, works = FORESEE[step.name](twin, step, options)
        except ModelError as error:
            lines.append(str(error))
            continue
        name = step.name if step.pattern is None else str(step)
        lines += [f"{name} leaves layer '{each.layer}' ({each.kind}) alone: {each.reason}" for each in untreated]
        if not works:
            lines.append(f"{name} finds nothing to work on in model '{model.name}': its recipes will fail; drop them.")
    return list(dict.fromkeys(lines))  # two strengths of a step mostly leave the same layers alone


def impossible(base: TrainedModel, steps: Iterable[Step], options: CompressOptions) -> dict[str, str]:
    """Which training steps cannot work on a trained model, each with the reason; trains nothing.

    Args:
      base: The model that a recipe starts from.
      steps: Of any strength.
      options: For exclusions.

    Raises:
      ContractError: The artifact is damaged.
    """
    steps = list(steps)
    try:
        twin = _twin_of(base)
    except ModelError as error:
        return dict.fromkeys(map(str, steps), str(error))
    options = covering_parts(options, twin, {})
    found = {}
    for step in steps:
        try:
            if not FORESEE[step.name](twin, step, options)[1]:
                found[str(step)] = f"{step.name} finds nothing to work on in this model."
        except (ConfigError, ModelError) as error:
            found[str(step)] = str(error)
    return found
