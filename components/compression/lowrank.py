"""Low rank: a large kernel becomes two thin ones whose product is nearly the same.

    twin --choose_ranks()--> Ranks --factorise()--> twin with two layers in the place of one

A kernel of m inputs and n outputs holds m n weights, its two factors of rank r hold r (m + n). The singular values say how
much of the kernel each rank holds (Sainath et al. 2013, ICASSP, for dense layers; Denton et al. 2014, arXiv 1404.0736).
The first of the two layers is thin, linear and without bias; the second keeps name, bias and activation, so whatever
stands behind it (a batch normalization that is folded, an option that names the layer) finds it as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import tf_keras

from components.compression.kernels import Chosen, Kernel, check_excluded, choose, kernels
from components.options import LowRankOptions

_WIDTHS = {"dense": "units", "conv1d": "filters", "conv2d": "filters"}  # the key that counts a layer's outputs, by kind


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The rank that each chosen kernel comes down to, by layer name."""

    chosen: Chosen
    of: Mapping[str, int]


def choose_factorisable(twin: tf_keras.Model, options: LowRankOptions) -> Chosen:
    """Which kernels could be factorised at some energy, whatever their weights are.

    Left alone: what the user excludes, frozen and shared layers, all but dense kernels and convolutions of side 1, and
    kernels so small that even `options.minimum_rank` saves nothing.

    Raises:
      ConfigError: `options.exclude` names an unknown layer.
    """
    check_excluded("lowrank", options.exclude, twin)
    return choose(twin, lambda kernel: _refusal(kernel, options))


def choose_ranks(twin: tf_keras.Model, options: LowRankOptions, energy: float) -> Ranks:
    """The smallest rank of each kernel that keeps `energy`, where two factors of it hold fewer weights.

    Args:
      twin: Trained: the ranks are read off its weights.
      options: Exclusions and the least rank.
      energy: Share of the sum of the squared singular values, in (0, 1).

    Raises:
      ConfigError: `options.exclude` names an unknown layer.
    """
    check_excluded("lowrank", options.exclude, twin)
    found = {
        kernel.name: max(options.minimum_rank, smallest_rank(_matrix(kernel), energy))
        for kernel in kernels(twin)
        if _refusal(kernel, options) is None
    }

    def refuse(kernel: Kernel) -> str | None:
        reason = _refusal(kernel, options)
        if reason is not None or _factored(kernel, found[kernel.name]) < kernel.size:
            return reason
        return f"to keep {energy:g} of its energy takes rank {found[kernel.name]}, which saves no weights"

    chosen = choose(twin, refuse)
    return Ranks(chosen, {name: rank for name, rank in found.items() if name in chosen.names})


def _refusal(kernel: Kernel, options: LowRankOptions) -> str | None:
    """Why a kernel cannot be factorised, whatever its weights are; None: it can."""
    layer = kernel.layer
    if kernel.name in options.exclude:
        return "excluded by compress.lowrank.exclude"
    if not layer.trainable:
        return "the layer is frozen (trainable=False)"
    if kernel.kind not in _WIDTHS or set(kernel.variable.shape[:-2]) - {1}:
        return "only dense kernels and convolutions of side 1 are factorised"
    if getattr(layer, "groups", 1) > 1:
        return "its convolution works in groups"
    if len(layer._inbound_nodes) > 1:
        return "the layer is called more than once"
    if layer.kernel_constraint is not None:
        return "its kernel_constraint would not hold for a product"
    if _factored(kernel, options.minimum_rank) >= kernel.size:
        return f"too small: factors of rank {options.minimum_rank} hold no fewer weights than its {kernel.size}"
    return None


def _factored(kernel: Kernel, rank: int) -> int:
    """Weights of the two factors."""
    return rank * sum(map(int, kernel.variable.shape[-2:]))


def _matrix(kernel: Kernel) -> np.ndarray:
    """float64 (inputs, outputs)."""
    return kernel.values.reshape(kernel.variable.shape[-2:]).astype(np.float64)


def smallest_rank(matrix: np.ndarray, energy: float) -> int:
    """The least number of singular values whose squares sum to `energy` of all; 1 for a matrix of zeros.

    Example: singular values 4, 2, 1 have squares 16, 4, 1: one keeps 0.76 of the energy, two keep 0.95.
    """
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    return int(np.count_nonzero(np.cumsum(squares) < energy * squares.sum())) + 1


def factors(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best product of that rank, as (inputs, rank) and (rank, outputs), float32.

    Both get the square root of the singular values: of one scale, they learn at one rate and lose alike to rounding.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return (left[:, :rank] * root).astype(np.float32), (root[:, np.newaxis] * right[:rank]).astype(np.float32)


# --- the new twin ------------------------------------------------------------------------------------------------


def factorise(twin: tf_keras.Model, ranks: Ranks) -> tuple[tf_keras.Model, dict[str, str]]:
    """Puts two layers in the place of each chosen one.

    Args:
      twin: Without wrappers; left as it is.
      ranks: What `choose_ranks` gave.

    Returns:
      The new twin, and by the name of each chosen layer (which the second of the two keeps) that of the first.
    """
    first_of = _names(twin, ranks)
    config = twin.get_config()
    config["layers"] = [
        each
        for layer in config["layers"]
        for each in (_split(layer, first_of, ranks) if layer["config"]["name"] in first_of else [layer])
    ]
    made = type(twin).from_config(config)
    by_name = {kernel.name: kernel for kernel in kernels(twin)}
    for layer in twin.layers:
        values = layer.get_weights()
        if layer.name in first_of:
            thin, wide = factors(_matrix(by_name[layer.name]), ranks.of[layer.name])
            sides = values[0].shape[:-2]
            made.get_layer(first_of[layer.name]).set_weights([thin.reshape(*sides, *thin.shape)])
            values[0] = wide.reshape(*sides, *wide.shape)
        made.get_layer(layer.name).set_weights(values)
    return made, first_of


def _names(twin: tf_keras.Model, ranks: Ranks) -> dict[str, str]:
    taken = {layer.name for layer in twin.layers}
    made = {}
    for name in sorted(ranks.of):
        first = f"{name}_factor"
        while first in taken:
            first += "_"
        taken.add(first)
        made[name] = first
    return made


def _split(layer: dict[str, Any], first_of: Mapping[str, str], ranks: Ranks) -> list[dict[str, Any]]:
    """The configuration of one layer becomes those of two, one behind the other."""
    config, name = layer["config"], layer["config"]["name"]
    kind = "units" if "units" in config else "filters"
    thin = {"name": first_of[name], kind: ranks.of[name], "activation": "linear", "use_bias": False}
    thin |= dict.fromkeys(("bias_regularizer", "activity_regularizer"))
    second = {"strides": (1,) * len(config["strides"])} if "strides" in config else {}
    common = {key: value for key, value in layer.items() if key != "build_config"}  # it holds the old shapes
    return [
        {**common, "name": first_of[name], "config": {**config, **thin}},
        {**common, "config": {**config, **second}, "inbound_nodes": [[[first_of[name], 0, 0, {}]]]},
    ]


def report(twin: tf_keras.Model, ranks: Ranks, first_of: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """By layer: its rank, the name of the new layer, and the weights of its kernel before and after."""
    return {
        kernel.name: {
            "rank": ranks.of[kernel.name],
            "factor": first_of[kernel.name],
            "weights_before": kernel.size,
            "weights_after": _factored(kernel, ranks.of[kernel.name]),
        }
        for kernel in kernels(twin)
        if kernel.name in ranks.of
    }
