"""Prune: the smallest weights of each kernel become zero while the rest goes on learning.

    twin --prune()--> model with masks --train--> strip() --> twin with zeros

tfmot's prune_low_magnitude (Zhu and Gupta 2017, arXiv 1710.01878). How many zeros each kernel gets follows its size
(Erdos-Renyi-Kernel, Evci et al. 2020, arXiv 1911.11134) under the spread 'erk', or is the same everywhere.
"""

from __future__ import annotations

import numpy as np
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude

from components.compression.kernels import Chosen, Kernel, check_excluded, choose, copy, kernels, wrap
from components.errors import ConfigError
from components.options import PruneOptions


def choose_prunable(twin: tf_keras.Model, options: PruneOptions, sparsity: float) -> Chosen:
    """Which kernels are pruned.

    Left alone: what the user excludes, frozen layers, depthwise kernels (tfmot does not prune them, and they hold few
    weights), the smallest kernels up to a share of `options.dense_share` of all weights, and under the spread 'erk' those
    that are too small for any zeros at this sparsity.

    Raises:
      ConfigError: `options.exclude` names an unknown layer.
    """
    check_excluded("prune", options.exclude, twin)
    small = _smallest(twin, options)

    def refuse(kernel: Kernel) -> str | None:
        if kernel.name in options.exclude:
            return "excluded by compress.prune.exclude"
        if not kernel.layer.trainable:
            return "the layer is frozen (trainable=False)"
        if kernel.kind == "depthwise_conv2d":
            return "tfmot does not prune depthwise kernels: few weights, much accuracy"
        if kernel.name in small:
            return f"among the smallest kernels, which hold {options.dense_share:g} of all weights together (compress.prune.dense_share)"
        return None

    if options.spread == "uniform":
        return choose(twin, refuse)
    possible = [kernel for kernel in kernels(twin) if refuse(kernel) is None]
    worth = _spread(possible, sparsity)
    dense = f"too small for zeros when kernels hold {sparsity:g} on average (compress.prune.spread=erk)"
    return choose(twin, lambda kernel: refuse(kernel) or (None if kernel.name in worth else dense))


def _smallest(twin: tf_keras.Model, options: PruneOptions) -> set[str]:
    found = [kernel for kernel in kernels(twin) if kernel.kind != "depthwise_conv2d"]
    budget = options.dense_share * sum(kernel.size for kernel in found)
    small: set[str] = set()
    for kernel in sorted(found, key=lambda each: each.size):
        budget -= kernel.size
        if budget < 0:
            break
        small.add(kernel.name)
    return small


def _spread(found: list[Kernel], sparsity: float) -> dict[str, float]:
    """Sparsity by layer name: the nonzero weights of a kernel are in proportion to the sum of its sides.

    Kernels that would need more nonzero weights than they have stay dense and are left out; of the others together,
    `sparsity` are zero.

    Example: a 3 x 3 kernel of 16 to 16 channels (2,304 weights, sides 38) and one of 64 to 64 (36,864, sides 134) at 0.8:
    0.2 x 39,168 = 7,834 nonzero weights, 1,731 and 6,103 of them: sparsities 0.249 and 0.834.
    """
    while True:
        nonzero = (1 - sparsity) * sum(kernel.size for kernel in found)
        unit = nonzero / max(1, sum(map(_sides, found)))
        fitting = [kernel for kernel in found if unit * _sides(kernel) < kernel.size]
        if len(fitting) == len(found):
            return {kernel.name: 1 - unit * _sides(kernel) / kernel.size for kernel in found}
        found = fitting


def _sides(kernel: Kernel) -> int:
    return sum(kernel.variable.shape)


def prune(
    twin: tf_keras.Model, chosen: Chosen, options: PruneOptions, *, sparsity: float, updates: int
) -> tf_keras.Model:
    """Wraps the chosen kernels.

    Args:
      twin: Without wrappers; left as it is.
      chosen: What `choose_prunable` gave.
      options: Schedule and spread.
      sparsity: Target fraction of zeros of all chosen kernels together, in (0, 1).
      updates: Optimizer updates of the whole step, 1 or more; the schedule is laid over them.

    Returns:
      A model to train with the callback `tfmot.sparsity.keras.UpdatePruningStep`.

    Raises:
      ConfigError: The schedule ends before it begins.
    """
    found = [kernel for kernel in kernels(twin) if kernel.name in chosen.names]
    targets = _spread(found, sparsity) if options.spread == "erk" else dict.fromkeys(chosen.names, sparsity)
    schedules = {name: _schedule(options, target, updates) for name, target in targets.items()}
    return wrap(
        twin,
        schedules,
        lambda layer: tfmot.sparsity.keras.prune_low_magnitude(layer, pruning_schedule=schedules[layer.name]),
    )


def _schedule(options: PruneOptions, sparsity: float, updates: int) -> tfmot.sparsity.keras.PruningSchedule:
    """Fractions of the step become updates.

    tfmot changes masks at begin + n x frequency only, so the end is moved onto one of these; else the target is missed.
    """
    if options.begin >= options.end:
        raise ConfigError(
            f"compress.prune.begin={options.begin:g} must be below compress.prune.end={options.end:g}; lower begin."
        )
    begin = int(options.begin * updates)
    length = max(1, int(options.end * updates) - begin)
    frequency = min(options.frequency, length)
    end = begin + frequency * (length // frequency)
    if options.schedule == "constant":
        return tfmot.sparsity.keras.ConstantSparsity(sparsity, begin_step=begin, end_step=end, frequency=frequency)
    return tfmot.sparsity.keras.PolynomialDecay(
        initial_sparsity=min(options.initial_sparsity, sparsity),
        final_sparsity=sparsity,
        begin_step=begin,
        end_step=end,
        frequency=frequency,
    )


def mask_sparsity(model: tf_keras.Model) -> dict[str, float]:
    """Fraction of zeros in the mask of each wrapped layer, by layer name; weights follow their mask at the next update."""
    wrapped = [layer for layer in model.layers if isinstance(layer, PruneLowMagnitude)]
    return {
        layer.layer.name: float(np.mean([1 - np.mean(mask.numpy()) for _, mask, _ in layer.pruning_vars]))
        for layer in wrapped
    }


def strip(model: tf_keras.Model) -> tf_keras.Model:
    """A twin without wrappers, its masked weights exactly zero."""
    for layer in model.layers:
        if isinstance(layer, PruneLowMagnitude):
            for weight, mask, _ in layer.pruning_vars:
                weight.assign(weight * mask)
    return copy(tfmot.sparsity.keras.strip_pruning(model))
