"""Prune: the smallest weights of each kernel become zero while the rest goes on learning.

    twin --prune()--> model with masks --train--> strip() --> twin with zeros

tfmot's prune_low_magnitude (Zhu and Gupta 2017, arXiv 1710.01878). How many zeros each kernel gets follows its size
(Erdos-Renyi-Kernel, Evci et al. 2020, arXiv 1911.11134) under the spread 'erk', the magnitude of its weights under
'global', or is the same everywhere. Where they lie follows the step's pattern:

- 'm:n', m zeros in each n inputs: tfmot fixes the masks at the first update, by the weights that the step starts from; so
  schedule, spread and targets have no say.
- '1x4', '1x16', whole blocks of inputs: by `_Blocks`, since tfmot's own fail on a layer of one unit and know no l2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl import Pruning
from tensorflow_model_optimization.python.core.sparsity.keras.pruning_wrapper import PruneLowMagnitude

from components.compression.kernels import Chosen, Kernel, check_excluded, choose, copy, kernels, wrap
from components.errors import ConfigError
from components.options import PruneOptions
from components.recipe import BLOCKS, block_side, zeros_of

_DENSEST = 0.99  # 'global' prunes no kernel further: a layer without weights ends the flow through the network
# Dense ends that pay under dense_ends 'auto', as a share of all weights. They cost that share of the zeros, and in the
# networks of docs/recipes.md (0.032 and 0.010) are worth 0.00 to 0.56 of accuracy on validation rows.
_ENDS_SHARE = 0.05


def choose_prunable(twin: tf_keras.Model, options: PruneOptions, sparsity: float, pattern: str | None = None) -> Chosen:
    """Which kernels are pruned.

    Left alone: what the user excludes, frozen layers, depthwise kernels (tfmot does not prune them, and they hold few
    weights), kernels that `pattern` does not fit, under the spread 'erk' those that are too small for any zeros at this
    sparsity, and, where `options.targets` does not name them, the smallest kernels up to a share of `options.dense_share`
    of all weights and the first and last ones under `options.dense_ends`.

    Raises:
      ConfigError: `options.exclude` or `options.targets` names an unknown layer.
    """
    check_excluded("prune", options.exclude, twin)
    check_excluded("prune", options.targets, twin, "targets")
    small = _smallest(twin, options) - set(options.targets)
    ends = _dense_ends(twin, options) - set(options.targets)

    def refuse(kernel: Kernel) -> str | None:
        if kernel.name in options.exclude:
            return "excluded by compress.prune.exclude"
        if not kernel.layer.trainable:
            return "the layer is frozen (trainable=False)"
        if kernel.kind == "depthwise_conv2d":
            return "tfmot does not prune depthwise kernels: few weights, much accuracy"
        if kernel.name in small:
            return f"among the smallest kernels, which hold {options.dense_share:g} of all weights together (compress.prune.dense_share)"
        if kernel.name in ends:
            return "the first or last kernel (compress.prune.dense_ends)"
        return _misfit(kernel, pattern)

    if options.spread != "erk" or _fixed(pattern):
        return choose(twin, refuse)
    possible = [kernel for kernel in kernels(twin) if refuse(kernel) is None]
    worth = _targets(possible, options, sparsity, pattern)
    dense = f"too small for zeros when kernels hold {sparsity:g} on average (compress.prune.spread=erk)"
    return choose(twin, lambda kernel: refuse(kernel) or (None if kernel.name in worth else dense))


def _fixed(pattern: str | None) -> bool:
    """True for m:n, which leaves no choice of how many zeros a kernel gets."""
    return pattern is not None and pattern not in BLOCKS


def _misfit(kernel: Kernel, pattern: str | None) -> str | None:
    """Why a kernel cannot hold the pattern; None where it can."""
    if pattern is None:
        return None
    kinds = ("dense",) if pattern in BLOCKS else ("dense", "conv2d")
    if kernel.kind not in kinds:
        return f"{pattern} is a pattern for kernels of {' and '.join(kinds)} layers"
    group = block_side(pattern) if pattern in BLOCKS else zeros_of(pattern)[1]
    if kernel.inputs % group:
        return f"its {kernel.inputs} inputs do not divide by {group}, so {pattern} does not fit"
    return None


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


def _dense_ends(twin: tf_keras.Model, options: PruneOptions) -> set[str]:
    """First and last kernels that stay dense."""
    if options.dense_ends is False:
        return set()
    ends, weights = _ends(twin), {kernel.name: kernel.size for kernel in kernels(twin)}
    pays = sum(weights[name] for name in ends) <= _ENDS_SHARE * sum(weights.values())
    return ends if options.dense_ends is True or pays else set()


def _ends(twin: tf_keras.Model) -> set[str]:
    """Kernels with no other kernel between them and an input or an output of the model."""
    names = {kernel.name for kernel in kernels(twin)}
    return {
        name
        for name in names
        for neighbours in (_before, _behind)
        if names.isdisjoint(_reached(twin.get_layer(name), neighbours))
    }


def _reached(layer: Any, neighbours: Callable[[Any], list[Any]]) -> set[str]:
    found: set[str] = set()
    left = neighbours(layer)
    while left:
        each = left.pop()
        if each.name not in found:
            found.add(each.name)
            left += neighbours(each)
    return found


def _before(layer: Any) -> list[Any]:
    return [each for node in layer._inbound_nodes for each in tf.nest.flatten(node.inbound_layers)]


def _behind(layer: Any) -> list[Any]:
    return [node.outbound_layer for node in layer._outbound_nodes]


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


def _targets(found: list[Kernel], options: PruneOptions, sparsity: float, pattern: str | None) -> dict[str, float]:
    """Sparsity by layer name; kernels that stay dense under 'erk' are left out."""
    named = {kernel.name: options.targets[kernel.name] for kernel in found if kernel.name in options.targets}
    others = [kernel for kernel in found if kernel.name not in named]
    if options.spread == "erk":
        return named | _spread(others, sparsity)
    if options.spread == "global":
        return named | _global(others, sparsity, lambda kernel: _magnitudes(kernel.values, options, pattern))
    return named | {kernel.name: sparsity for kernel in others}


def _magnitudes(values: np.ndarray, options: PruneOptions, pattern: str | None) -> np.ndarray:
    """What is pruned as one, weights or blocks, each with its mean magnitude."""
    if pattern is None:
        return np.abs(values).reshape(-1)
    return _block_magnitudes(tf.constant(values), block_side(pattern), options.magnitude).numpy().reshape(-1)


def _global(found: list[Kernel], sparsity: float, magnitudes: Callable[[Kernel], np.ndarray]) -> dict[str, float]:
    """Sparsity by layer name when one magnitude parts what stays from what goes in all kernels.

    No kernel is pruned beyond _DENSEST, or half way between the target and 1 where that is more; the others take over.

    Example: kernels of magnitudes (1, 2, 3, 4) and (3, 4, 5, 6) at 0.5: the 4 smallest of all 8 are 1, 2, 3 of the first
    and 3 of the second: sparsities 0.75 and 0.25.
    """
    most = max(_DENSEST, (1 + sparsity) / 2)
    size = {kernel.name: kernel.size for kernel in found}
    free = {kernel.name: np.sort(magnitudes(kernel)) for kernel in found}
    made: dict[str, float] = {}
    while free:
        zeros = sparsity * sum(size.values()) - sum(made[name] * size[name] for name in made)
        share = zeros / sum(size[name] for name in free)
        everything = np.sort(np.concatenate(list(free.values())))
        threshold = everything[min(len(everything) - 1, math.ceil(share * len(everything)))]
        targets = {name: float(np.searchsorted(values, threshold)) / len(values) for name, values in free.items()}
        capped = [name for name, target in targets.items() if target > most]
        if not capped:
            return made | targets
        for name in capped:
            made[name] = most
            del free[name]
    return made


def prune(
    twin: tf_keras.Model,
    chosen: Chosen,
    options: PruneOptions,
    *,
    sparsity: float,
    pattern: str | None = None,
    updates: int,
) -> tf_keras.Model:
    """Wraps the chosen kernels.

    Args:
      twin: Without wrappers; left as it is.
      chosen: What `choose_prunable` gave.
      options: Schedule, spread and targets by layer.
      sparsity: Target fraction of zeros of all chosen kernels together, in (0, 1).
      pattern: Where they lie; None for anywhere.
      updates: Optimizer updates of the whole step, 1 or more; the schedule is laid over them.

    Returns:
      A model to train with the callback `tfmot.sparsity.keras.UpdatePruningStep`.

    Raises:
      ConfigError: The schedule ends before it begins.
    """
    lower = tfmot.sparsity.keras.prune_low_magnitude
    if pattern is not None and pattern not in BLOCKS:
        return wrap(twin, chosen.names, lambda layer: lower(layer, sparsity_m_by_n=zeros_of(pattern)))
    found = [kernel for kernel in kernels(twin) if kernel.name in chosen.names]
    targets = _targets(found, options, sparsity, pattern)
    schedules = {name: _schedule(options, target, updates) for name, target in targets.items()}
    if pattern is not None:
        return wrap(
            twin, schedules, lambda layer: _PruneBlocks(layer, schedules[layer.name], pattern, options.magnitude)
        )
    return wrap(twin, schedules, lambda layer: lower(layer, pruning_schedule=schedules[layer.name]))


def _block_magnitudes(weights: tf.Tensor, side: int, magnitude: str) -> tf.Tensor:
    """Mean (l1) or root mean square (l2) of each `side` inputs of one unit: (inputs, units) -> (inputs / side, units)."""
    blocks = tf.reshape(weights, (-1, side, weights.shape[-1]))
    if magnitude == "l2":
        return tf.sqrt(tf.reduce_mean(tf.square(blocks), axis=1))
    return tf.reduce_mean(tf.abs(blocks), axis=1)


class _Blocks(Pruning):
    """tfmot's masks, made for blocks of inputs of one unit instead of single weights."""

    def __init__(self, wrapper: _PruneBlocks) -> None:
        super().__init__(lambda: wrapper.pruning_step, wrapper.pruning_vars, wrapper.pruning_schedule, (1, 1), "AVG")
        self.side, self.magnitude = wrapper.side, wrapper.magnitude

    def _maybe_update_block_mask(self, weights: Any) -> tuple[tf.Tensor, tf.Tensor]:
        """(threshold, mask of the kernel's shape (inputs, units))."""
        threshold, mask = self._update_mask(_block_magnitudes(weights, self.side, self.magnitude))
        return threshold, tf.repeat(mask, self.side, axis=0)


class _PruneBlocks(PruneLowMagnitude):
    """tfmot's wrapper with `_Blocks`; never saved, so it needs no configuration of its own."""

    def __init__(self, layer: Any, schedule: Any, pattern: str, magnitude: str) -> None:
        super().__init__(layer, pruning_schedule=schedule)
        self.side, self.magnitude = block_side(pattern), magnitude

    def build(self, input_shape: Any) -> None:
        """Adds masks, as tfmot's wrapper does."""
        super().build(input_shape)
        self.pruning_obj = _Blocks(self)


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
