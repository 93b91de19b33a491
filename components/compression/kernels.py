"""Kernels: the weight arrays of a twin that a compression step works on, and how TFLite lays them out."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tf_keras

from components.artifacts import Promise
from components.errors import ConfigError
from components.recipe import BLOCKS, block_side


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A class of layers with one kernel: its kind in `Promise`, its attribute, its way into TFLite's layout."""

    name: str
    attribute: str
    lay_out: Callable[[np.ndarray], np.ndarray]


def _depthwise(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(1, *kernel.shape[:2], -1)


_KINDS: dict[type, _Kind] = {
    tf_keras.layers.Dense: _Kind("dense", "kernel", np.transpose),
    tf_keras.layers.Conv1D: _Kind("conv1d", "kernel", lambda k: k.transpose(2, 0, 1)[:, np.newaxis]),
    tf_keras.layers.Conv2D: _Kind("conv2d", "kernel", lambda k: k.transpose(3, 0, 1, 2)),
    tf_keras.layers.Conv2DTranspose: _Kind("conv2d_transpose", "kernel", lambda k: k.transpose(2, 0, 1, 3)),
    tf_keras.layers.Conv3D: _Kind("conv3d", "kernel", lambda k: k),
    tf_keras.layers.DepthwiseConv2D: _Kind("depthwise_conv2d", "depthwise_kernel", _depthwise),
    tf_keras.layers.Embedding: _Kind("embedding", "embeddings", lambda k: k),
}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of a twin.

    Attributes:
      layer: The tf_keras layer that owns it; wrappers of tfmot are looked through.
      kind: As in `Promise`.
    """

    layer: Any
    kind: str

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def variable(self) -> Any:
        """The tf.Variable, in the layout of Keras."""
        return getattr(self.layer, _KINDS[type(self.layer)].attribute)

    @property
    def values(self) -> np.ndarray:
        """float32, in the layout of Keras."""
        return self.variable.numpy()

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.variable.shape))

    @property
    def inputs(self) -> int:
        """Length of the axis that an output sums over, a convolution's places aside: TFLite's last axis."""
        return int(self.variable.shape[-2])

    def promise(
        self, values: np.ndarray, *, pruned: bool, distinct: int, quantized: bool, pattern: str = ""
    ) -> Promise:
        """What the file must show of this kernel once it holds `values` (in the layout of Keras)."""
        return Promise(
            layer=self.name,
            kind=self.kind,
            shape=tuple(map(int, _KINDS[type(self.layer)].lay_out(values).shape)),
            sparsity=sparsity(in_blocks(values, pattern) if pattern in BLOCKS else values) if pruned else 0.0,
            distinct=distinct,
            quantized=quantized,
            pattern=pattern if pruned else "",
        )


def kernels(twin: tf_keras.Model) -> list[Kernel]:
    """Every kernel of a twin without wrappers, in the order of its layers."""
    return [Kernel(layer, _KINDS[type(layer)].name) for layer in twin.layers if type(layer) in _KINDS]


def sparsity(values: np.ndarray) -> float:
    """Fraction of exact zeros, in [0, 1]."""
    return 1 - int(np.count_nonzero(values)) / values.size


def in_blocks(values: np.ndarray, pattern: str) -> np.ndarray:
    """Sum of magnitudes of each block of a dense kernel.

    Args:
      values: (inputs, units), as Keras lays it out; inputs divide by the block's side.
      pattern: One of BLOCKS, as TFLite lays the kernel out: '1x4' is 4 inputs of one unit.

    Returns:
      (inputs / side, units).
    """
    side = block_side(pattern)
    return np.abs(values).reshape(-1, side, values.shape[-1]).sum(axis=1)


def distinct_per_channel(values: np.ndarray) -> int:
    """Most different values in one output channel (the last axis) of a kernel in the layout of Keras."""
    return max(len(np.unique(channel)) for channel in values.reshape(-1, values.shape[-1]).T)


@dataclasses.dataclass(frozen=True)
class Untreated:
    """A layer that a step leaves alone."""

    layer: str
    kind: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """As `facts["untreated"]` lists it."""
        return {"layer": self.layer, "class": self.kind, "reason": self.reason}


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What a step works on, and what it leaves alone."""

    names: frozenset[str]
    untreated: list[Untreated]


def choose(twin: tf_keras.Model, refuse: Callable[[Kernel], str | None]) -> Chosen:
    """Asks `refuse` for a reason to leave each kernel alone; None treats it.

    Layers that hold weights of two or more axes but no kernel known here (recurrent ones, hosted attention) are left alone.
    """
    found = {kernel.name: kernel for kernel in kernels(twin)}
    names, untreated = [], []
    for layer in twin.layers:
        if layer.name in found:
            reason = refuse(found[layer.name])
        elif any(len(weight.shape) > 1 for weight in layer.trainable_weights):
            reason = f"trimline does not compress {type(layer).__name__} yet"
        else:
            continue
        if reason is None:
            names.append(layer.name)
        else:
            untreated.append(Untreated(layer.name, type(layer).__name__, reason))
    return Chosen(frozenset(names), untreated)


def check_excluded(step: str, exclude: Iterable[str], twin: tf_keras.Model, key: str = "exclude") -> None:
    """Raises ConfigError where `exclude`, the option `key`, names a layer that the model does not have."""
    names = [layer.name for layer in twin.layers]
    for name in exclude:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.0)
            raise ConfigError(f"compress.{step}.{key}: the model has no layer '{name}'; did you mean '{near[0]}'?")


def wrap(twin: tf_keras.Model, names: Iterable[str], wrapper: Callable[[Any], Any]) -> tf_keras.Model:
    """A copy of `twin` in which each layer named has gone through `wrapper`; weights are copied, `twin` is left alone."""
    chosen = frozenset(names)
    return tf_keras.models.clone_model(
        copy(twin), clone_function=lambda layer: wrapper(layer) if layer.name in chosen else layer
    )


def copy(twin: tf_keras.Model) -> tf_keras.Model:
    """A twin with the same weights and no memory of graphs that its layers took part in."""
    made = tf_keras.models.clone_model(twin)
    made.set_weights(twin.get_weights())
    return made
