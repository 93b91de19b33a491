"""The training steps of a recipe: each takes a twin, fine-tunes it, and says what it did.

A new method is a file of its own beside this one, a function `_<step>` here that fine-tunes with it, its rows in STEPS and
FORESEE, its options in `components.options` and its strength in `components.recipe`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras

from components.artifacts import Promise, attention_parts
from components.compression import channels as shrinking
from components.compression import cluster as clustering
from components.compression import lowrank
from components.compression import prune as pruning
from components.compression import quantize as quantization
from components.compression.attention import Scores
from components.compression.finetune import Setting, finetune
from components.compression.kernels import Chosen, Untreated, kernels, sparsity
from components.compression.quantize import Kept
from components.errors import ModelError
from components.options import CompressOptions
from components.recipe import Step

Foreseen = tuple[list[Untreated], bool]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """Where a step begins.

    Attributes:
      twin: Without wrappers.
      promises: What earlier steps did, by layer name.
      outputs: 'logits' or 'probabilities'.
      untreated: What earlier steps left alone.
      reports: What earlier steps recorded, by step.
    """

    twin: tf_keras.Model
    promises: Mapping[str, Promise]
    outputs: str
    untreated: list[dict[str, str]]
    reports: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Done:
    """What a step gave.

    Attributes:
      twin: Without wrappers; for qat the twin that `names` and `keep` refer to.
      weights: To be saved; of `twin`, or of the quantized model.
      promises: For every kernel that this step treated, or that it changed though an earlier one had; others stand.
      untreated: What this step left alone.
      validation: Loss and metric on the validation split.
      quantized: What `load` needs to rebuild the wrappers; None without qat.
      report: What else is worth keeping, JSON-able.
    """

    twin: tf_keras.Model
    weights: list[np.ndarray]
    promises: list[Promise]
    untreated: list[Untreated]
    validation: dict[str, float]
    quantized: dict[str, Any] | None = None
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


def _remove_channels(start: Start, step: Step, options: CompressOptions, setting: Setting) -> Done:
    cut = shrinking.choose_channels(start.twin, options.channels, _strength(step))
    if not cut.layers:
        raise _nothing(step, cut.untreated)
    with setting.strategy.scope():
        twin = shrinking.shrink(start.twin, cut)
    report = cut.facts(start.twin, twin)
    for name in ("multiply_adds", "parameters"):
        for position, value in enumerate(report[name]):
            setting.trace.scalar(f"channels/{name}", value, position)
    validation = finetune(twin, setting)
    return Done(
        twin=twin,
        weights=twin.get_weights(),
        promises=_shapes(twin, cut.layers),
        untreated=cut.untreated,
        validation=validation,
        report=report,
    )


def _factorise(start: Start, step: Step, options: CompressOptions, setting: Setting) -> Done:
    ranks = lowrank.choose_ranks(start.twin, options.lowrank, _strength(step))
    _something(ranks.chosen, step)
    with setting.strategy.scope():
        twin, first_of = lowrank.factorise(start.twin, ranks)
    report = lowrank.report(start.twin, ranks, first_of)
    for layer, each in report.items():
        setting.trace.scalar(f"rank/{layer}", each["rank"])
        setting.trace.text(
            "lowrank",
            f"`{layer}`: rank {each['rank']}, {each['weights_after']:,} weights for {each['weights_before']:,}",
        )
    validation = finetune(twin, setting)
    return Done(
        twin=twin,
        weights=twin.get_weights(),
        promises=_shapes(twin, {*first_of, *first_of.values()}),
        untreated=ranks.chosen.untreated,
        validation=validation,
        report=report,
    )


def _shapes(twin: tf_keras.Model, names: Collection[str]) -> list[Promise]:
    """That the file holds kernels of these sizes."""
    return [
        kernel.promise(kernel.values, pruned=False, distinct=0, quantized=False)
        for kernel in kernels(twin)
        if kernel.name in names
    ]


def _prune(start: Start, step: Step, options: CompressOptions, setting: Setting) -> Done:
    chosen = _something(pruning.choose_prunable(start.twin, options.prune, _strength(step), step.pattern), step)
    with setting.strategy.scope():
        model = pruning.prune(
            start.twin,
            chosen,
            options.prune,
            sparsity=_strength(step),
            pattern=step.pattern,
            updates=setting.updates,
        )
    validation = finetune(
        model,
        setting,
        callbacks=[tfmot.sparsity.keras.UpdatePruningStep()],
        watch=lambda: {"sparsity": pruning.mask_sparsity(model)},
    )
    with setting.strategy.scope():
        twin = pruning.strip(model)
    return Done(
        twin=twin,
        weights=twin.get_weights(),
        promises=[
            kernel.promise(kernel.values, pruned=True, distinct=0, quantized=False, pattern=step.pattern or "")
            for kernel in kernels(twin)
            if kernel.name in chosen.names
        ],
        untreated=chosen.untreated,
        validation=validation,
    )


def _cluster(start: Start, step: Step, options: CompressOptions, setting: Setting) -> Done:
    clusters = int(_strength(step))
    chosen = _something(clustering.choose_clusterable(start.twin, options.cluster, clusters), step)
    pruned = {name for name, promise in start.promises.items() if promise.sparsity > 0}
    with setting.strategy.scope():
        set_trainable(start.twin, pruned - chosen.names, False)
        model = clustering.cluster(start.twin, chosen, options.cluster, clusters=clusters, keep_zeros=pruned)
    validation = finetune(model, setting, watch=lambda: {"distinct_weights": clustering.distinct_weights(model)})
    with setting.strategy.scope():
        twin = clustering.strip(model)
        set_trainable(twin, pruned - chosen.names, True)
    return Done(
        twin=twin,
        weights=twin.get_weights(),
        promises=[
            kernel.promise(
                kernel.values,
                pruned=kernel.name in pruned,
                distinct=clusters if kernel.name in chosen.names else 0,
                quantized=False,
                pattern=start.promises[kernel.name].pattern if kernel.name in pruned else "",
            )
            for kernel in kernels(twin)
            if kernel.name in chosen.names | pruned
        ],
        untreated=chosen.untreated,
        validation=validation,
    )


def _quantize(start: Start, step: Step, options: CompressOptions, setting: Setting) -> Done:
    annotated = quantization.choose_quantizable(start.twin, options.qat)
    if not any(kernel.name in annotated.names for kernel in kernels(start.twin)):
        raise _nothing(step, annotated.untreated)
    # A kernel that only got another shape may be trained as it likes.
    bound = {name: each for name, each in start.promises.items() if each.sparsity or each.distinct}
    keep = {
        kernel.name: quantization.kept(
            kernel, pruned=bound[kernel.name].sparsity > 0, distinct=bound[kernel.name].distinct
        )
        for kernel in kernels(start.twin)
        if kernel.name in bound.keys() & set(annotated.names)
    }
    frozen = sorted(bound.keys() - set(annotated.names))
    with setting.strategy.scope():
        set_trainable(start.twin, frozen, False)
        model = quantization.quantize(start.twin, annotated.names, keep)
        quantization.calibrate(model, setting.batches.training(setting.batch_size, setting.seed, 0), setting.strategy)
    validation = finetune(model, setting, watch=lambda: _watch_kept(model, keep))
    return Done(
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


def _quantized_promises(start: Start, model: tf_keras.Model, names: set[str]) -> list[Promise]:
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
                    pattern=before.pattern if before is not None else "",
                )
            )
    return made


def _watch_kept(model: tf_keras.Model, keep: Mapping[str, Kept]) -> dict[str, dict[str, float]]:
    trained = quantization.trained_kernels(model)
    return {"sparsity": {name: sparsity(trained[name]) for name, each in keep.items() if each.mask is not None}}


STEPS: dict[str, Callable[[Start, Step, CompressOptions, Setting], Done]] = {
    "channels": _remove_channels,
    "lowrank": _factorise,
    "prune": _prune,
    "cluster": _cluster,
    "qat": _quantize,
}


def all_promises(start: Start, done: Done) -> list[Promise]:
    """What the file must show after this step: its own promises, and those of earlier steps that it left as they are."""
    promises = {**start.promises, **{promise.layer: promise for promise in done.promises}}
    return [promises[layer.name] for layer in done.twin.layers if layer.name in promises]


def covering_parts(options: CompressOptions, twin: tf_keras.Model, reports: Mapping[str, Any]) -> CompressOptions:
    """Excludes every part of a layer that the user excluded: of an attention, and of what an earlier step factorised."""
    scores = {layer.name for layer in twin.layers if isinstance(layer, Scores)}
    found = [report for step, report in reports.items() if step.startswith("lowrank")]
    factors = {name: each["factor"] for report in found for name, each in report.items()}
    changed = {}
    for name in STEPS:
        section = getattr(options, name)
        parts = [attention_parts(layer) for layer in section.exclude]
        excluded = [*section.exclude, *(each for names in parts if names[-1] in scores for each in names)]
        excluded += [factors[layer] for layer in excluded if layer in factors]
        changed[name] = section.model_copy(update={"exclude": list(dict.fromkeys(excluded))})
    return options.model_copy(update=changed)


def _strength(step: Step) -> float:
    assert step.strength is not None  # the grammar gives every step but qat one
    return step.strength


def _something(chosen: Chosen, step: Step) -> Chosen:
    if not chosen.names:
        raise _nothing(step, chosen.untreated)
    return chosen


def _nothing(step: Step, untreated: Sequence[Untreated]) -> ModelError:
    why = "; ".join(f"'{each.layer}': {each.reason}" for each in untreated[:3]) or "it has no kernels"
    return ModelError(f"{step}: the model has no layer to work on ({why}); drop the recipes with {step.name}.")


def set_trainable(twin: tf_keras.Model, names: Iterable[str], value: bool) -> None:
    """Freezes kernels of earlier steps that this step does not wrap: else training would fill their zeros again."""
    chosen = set(names)
    for layer in twin.layers:
        if layer.name in chosen:
            layer.trainable = value


# --- before the run ----------------------------------------------------------------------------------------------


def _foresee_lowrank(twin: tf_keras.Model, step: Step, options: CompressOptions) -> Foreseen:
    """By shapes alone: which rank keeps the energy shows only once the model is trained."""
    chosen = lowrank.choose_factorisable(twin, options.lowrank)
    return chosen.untreated, bool(chosen.names)


def _foresee_channels(twin: tf_keras.Model, step: Step, options: CompressOptions) -> Foreseen:
    cut = shrinking.choose_channels(twin, options.channels, _strength(step))
    return cut.untreated, bool(cut.layers)


def _foresee_prune(twin: tf_keras.Model, step: Step, options: CompressOptions) -> Foreseen:
    chosen = pruning.choose_prunable(twin, options.prune, _strength(step), step.pattern)
    return chosen.untreated, bool(chosen.names)


def _foresee_cluster(twin: tf_keras.Model, step: Step, options: CompressOptions) -> Foreseen:
    chosen = clustering.choose_clusterable(twin, options.cluster, int(_strength(step)))
    return chosen.untreated, bool(chosen.names)


def _foresee_quantize(twin: tf_keras.Model, step: Step, options: CompressOptions) -> Foreseen:
    annotated = quantization.choose_quantizable(twin, options.qat)
    return annotated.untreated, any(kernel.name in annotated.names for kernel in kernels(twin))


FORESEE: dict[str, Callable[[tf_keras.Model, Step, CompressOptions], Foreseen]] = {
    "channels": _foresee_channels,
    "lowrank": _foresee_lowrank,
    "prune": _foresee_prune,
    "cluster": _foresee_cluster,
    "qat": _foresee_quantize,
}
"""What each step would leave alone in a twin, and whether it finds anything to work on; trains nothing."""
