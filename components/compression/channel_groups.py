"""Channel groups: which filters and neurons of a twin can only go together, and what each layer would be left with.

    twin --trace_channels()--> Channels: by layer, the number of each input and output channel

Two channels with the same number live and die together. Numbers are handed out by the layers that make channels
(convolutions, dense layers), travel along the graph, and are tied where tensors meet: a residual sum ties channel by
channel, a flattening repeats the numbers for every position, a concatenation lines them up. So dependencies need no
rule for any architecture (the idea of a dependency graph: Fang et al. 2023, arXiv 2301.12900), and a layer that is
called twice ties what it is called with. What the rules below do not know freezes the channels that touch it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf
import tf_keras

from components.errors import ModelError

Numbers = np.ndarray  # int64 (channels,)
layers = tf_keras.layers

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
MAKERS: dict[type, tuple[int, int]] = {
    layers.Dense: (-2, -1),
    **dict.fromkeys(_CONVOLUTIONS, (-2, -1)),
    layers.Conv2DTranspose: (-1, -2),
}
"""Layers that make channels of their own: (axis of the input's channels, axis of the output's) in the kernel."""

_PASSING = (
    *(layers.ReLU, layers.LeakyReLU, layers.ELU, layers.ThresholdedReLU, layers.Activation),
    *(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D),
    *(layers.GaussianNoise, layers.GaussianDropout, layers.AlphaDropout, layers.ActivityRegularization),
    *(getattr(layers, f"{kind}Pooling{n}D") for kind in ("Average", "Max") for n in (1, 2, 3)),
    *(getattr(layers, f"Global{kind}Pooling{n}D") for kind in ("Average", "Max") for n in (1, 2, 3)),
    *(getattr(layers, f"{kind}{n}D") for kind in ("ZeroPadding", "Cropping", "UpSampling") for n in (1, 2, 3)),
    *(layers.RepeatVector, layers.Rescaling, layers.BatchNormalization, layers.PReLU),
)
_MERGING = (layers.Add, layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum)
_MIXING = ("softmax", "log_softmax")  # activations in which one channel sees the others


@dataclasses.dataclass(frozen=True)
class Flow:
    """One layer's part in the graph.

    Attributes:
      layer: The tf_keras layer.
      inputs: Number of each input channel (of the first input, where a merging layer has several).
      outputs: Number of each output channel.
      work: Multiply-adds for one input and one output channel, all positions and calls; a depthwise kernel's for one
        output channel. 0 for layers without a kernel known here.
    """

    layer: Any
    inputs: Numbers
    outputs: Numbers
    work: int = 0

    def multiply_adds(self, kept: np.ndarray) -> int:
        """Of one example, if only the channels whose number is marked in `kept` (bool) stay."""
        groups = self.groups_left(kept)
        seen = 1 if type(self.layer) is layers.DepthwiseConv2D else int(np.count_nonzero(kept[self.inputs])) // groups
        return self.work * seen * int(np.count_nonzero(kept[self.outputs]))

    def groups_left(self, kept: np.ndarray) -> int:
        """How many groups a grouped convolution would have, 1 at least; 1 for other layers."""
        if by_groups(self.layer):
            size = len(self.outputs) // self.layer.groups
            return max(1, int(np.count_nonzero(kept[self.outputs])) // size)
        return int(getattr(self.layer, "groups", 1))


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that the same layers make.

    Attributes:
      layers: Names, in the order of the graph.
      numbers: One for each channel.
    """

    layers: tuple[str, ...]
    numbers: Numbers


@dataclasses.dataclass(frozen=True)
class Channels:
    """The channels of a twin.

    Attributes:
      flows: By layer name, in the order of the graph.
      count: Numbers are below it.
      frozen: Why a channel cannot go, by number.
    """

    flows: dict[str, Flow]
    count: int
    frozen: dict[int, str]

    def multiply_adds(self, kept: np.ndarray | None = None) -> int:
        """Of one example, in dense and convolution layers; `kept` as in `Flow`, None keeps all.

        Recurrent layers, the scores of an attention, normalization and sums are not counted.
        """
        mask = np.ones(self.count, bool) if kept is None else kept
        return sum(flow.multiply_adds(mask) for flow in self.flows.values())

    def groups(self) -> list[Group]:
        """What can be removed, in the order of the graph."""
        makers: dict[int, list[str]] = collections.defaultdict(list)
        for name, flow in self.flows.items():
            if has_kernel(flow.layer):
                for number in np.unique(flow.outputs):
                    makers[int(number)].append(name)
        members: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for number, names in makers.items():
            if number not in self.frozen:
                members[tuple(names)].append(number)
        return [Group(names, np.array(sorted(numbers))) for names, numbers in members.items()]

    def refusal(self, name: str) -> str | None:
        """Why none of the channels that the layer makes can go; None where one can."""
        reasons = [self.frozen.get(int(number)) for number in self.flows[name].outputs]
        return None if None in reasons else reasons[0]


def has_kernel(layer: Any) -> bool:
    """Whether the layer multiplies its input with a kernel that can be cut."""
    return type(layer) in MAKERS or type(layer) is layers.DepthwiseConv2D


def by_groups(layer: Any) -> bool:
    """Whether a grouped convolution loses whole groups: where it has more of them than inputs in each (as ResNeXt)."""
    groups = int(getattr(layer, "groups", 1))
    return groups > 1 and groups >= layer.kernel.shape[-2]


def trace_channels(twin: tf_keras.Model, exclude: Collection[str] = ()) -> Channels:
    """Follows every channel through a twin.

    Args:
      twin: Flat, without wrappers, channels last.
      exclude: Names of layers that must keep all inputs and outputs.

    Raises:
      ModelError: A layer with a kernel has free sides, so that its work cannot be counted.

    Example: image (8, 8, 1), convolution a to 4 channels, convolution b to 4, a + b, flatten, dense: a and b share four
    numbers, and the dense layer's 256 inputs hold each of them 64 times.
    """
    tracer = _Tracer()
    for tensor in tf.nest.flatten(twin.inputs):
        tracer.freeze(tracer.new(tensor), f"its channels are those of the model's input '{tensor.name}'")
    for node in _nodes(twin):
        tracer.follow(node, node.layer.name in exclude)
    for tensor in tf.nest.flatten(twin.outputs):
        tracer.freeze(tracer.numbers[id(tensor)], "its channels are those of the model's output")
    return tracer.result(twin)


def _nodes(twin: tf_keras.Model) -> Iterator[Any]:
    """Every call of a layer, inputs before outputs."""
    for depth in sorted(twin._nodes_by_depth, reverse=True):
        yield from (node for node in twin._nodes_by_depth[depth] if not node.is_input)


class _Tracer:
    """Numbers of the tensors seen so far, with what ties and freezes them (a union-find)."""

    def __init__(self) -> None:
        self.parent: list[int] = []
        self.reasons: dict[int, str] = {}
        self.numbers: dict[int, Numbers] = {}  # by id of the tensor
        self.flows: dict[str, Flow] = {}

    def new(self, tensor: Any) -> Numbers:
        """Fresh numbers for the channels of a tensor; none where it has no fixed last axis."""
        self.numbers[id(tensor)] = made = self.fresh(_width(tensor))
        return made

    def fresh(self, count: int) -> Numbers:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, number: int) -> int:
        while self.parent[number] != number:
            self.parent[number] = self.parent[self.parent[number]]
            number = self.parent[number]
        return number

    def tie(self, ours: Numbers, theirs: Numbers) -> None:
        for a, b in zip(ours, theirs, strict=True):
            low, high = sorted((self.root(int(a)), self.root(int(b))))
            self.parent[high] = low

    def tie_groups(self, layer: Any, inputs: Numbers, outputs: Numbers) -> None:
        """Of a grouped convolution either whole groups go, or every group loses its channel at the same place."""
        into, out = np.split(inputs, layer.groups), np.split(outputs, layer.groups)
        if by_groups(layer):
            for its in map(np.concatenate, zip(into, out, strict=True)):
                self.tie(its[:1].repeat(len(its) - 1), its[1:])
            return
        for parts in (into, out):
            for part in parts[1:]:
                self.tie(parts[0], part)

    def freeze(self, numbers: Numbers, reason: str) -> None:
        for number in numbers:
            self.reasons.setdefault(int(number), reason)

    def follow(self, node: Any, excluded: bool) -> None:
        """One call of a layer."""
        layer, tensors = node.layer, tf.nest.flatten(node.keras_inputs)
        inputs = [self.numbers[id(tensor)] for tensor in tensors]
        before = self.flows.get(layer.name)
        made = self._outputs(node, tensors, inputs, before)
        if made is None:
            self._stop(node, inputs)
            return
        self.numbers[id(tf.nest.flatten(node.outputs)[0])] = made
        if before is not None and layer.weights:
            self.tie(before.inputs, inputs[0])
        elif before is not None and isinstance(layer, layers.Reshape):
            self.tie(before.outputs, made)
        if _mixes(layer):  # a dense softmax: its inputs may go, its outputs see each other
            self.freeze(made, f"each sees the others in the {layer.activation.__name__} of layer '{layer.name}'")
        work = _work(node) + (before.work if before is not None else 0)
        self.flows[layer.name] = Flow(layer, inputs[0], made, work)
        if excluded or (has_kernel(layer) and not layer.trainable):
            which = "compress.channels.exclude names" if excluded else "is frozen (trainable=False)"
            for numbers in (*inputs, made):
                self.freeze(numbers, f"its channels go through layer '{layer.name}', which {which}")

    def _outputs(self, node: Any, tensors: Sequence[Any], inputs: list[Numbers], before: Flow | None) -> Numbers | None:
        """Numbers of the one output, None where no rule is known."""
        layer, width = node.layer, _width(tf.nest.flatten(node.outputs)[0])
        if _is_strange(layer) or width == 0 or any(len(numbers) == 0 for numbers in inputs):
            return None
        if type(layer) in MAKERS:
            made = self.fresh(width) if before is None else before.outputs
            if getattr(layer, "groups", 1) > 1:
                self.tie_groups(layer, inputs[0], made)
            return made
        if type(layer) is layers.DepthwiseConv2D:
            return np.repeat(inputs[0], layer.depth_multiplier)
        if type(layer) in _PASSING:
            return inputs[0]
        rule = _RULES.get(type(layer))
        return None if rule is None else rule(self, layer, tensors, inputs)

    def _stop(self, node: Any, inputs: list[Numbers]) -> None:
        layer = node.layer
        reason = f"its channels go through layer '{layer.name}' ({type(layer).__name__}), which trimline cannot cut"
        outputs = [self.new(tensor) for tensor in tf.nest.flatten(node.outputs)]
        for numbers in (*inputs, *outputs):
            self.freeze(numbers, reason)
        none = [self.fresh(0)]
        self.flows[layer.name] = Flow(layer, np.concatenate(none + inputs), np.concatenate(none + outputs))

    def result(self, twin: tf_keras.Model) -> Channels:
        roots = np.array([self.root(number) for number in range(len(self.parent))], np.int64)
        frozen: dict[int, str] = {}
        for number, reason in self.reasons.items():
            frozen.setdefault(int(roots[number]), reason)
        flows = {
            layer.name: dataclasses.replace(flow, inputs=roots[flow.inputs], outputs=roots[flow.outputs])
            for layer in twin.layers
            if (flow := self.flows.get(layer.name)) is not None
        }
        return Channels(flows, len(roots), frozen)


# --- rules -------------------------------------------------------------------------------------------------------


def _merge(tracer: _Tracer, layer: Any, tensors: Sequence[Any], inputs: list[Numbers]) -> Numbers | None:
    """Equal widths are tied; a width of 1 is spread over all channels and stays."""
    if len({len(tensor.shape) for tensor in tensors}) > 1:
        return None
    widest = max(inputs, key=len)
    for numbers in inputs:
        if len(numbers) == len(widest):
            tracer.tie(widest, numbers)
        else:
            tracer.freeze(numbers, f"its channels are spread over those of another tensor by layer '{layer.name}'")
    return widest


def _concatenate(tracer: _Tracer, layer: Any, tensors: Sequence[Any], inputs: list[Numbers]) -> Numbers:
    if layer.axis in (-1, len(tensors[0].shape) - 1):
        return np.concatenate(inputs)
    for numbers in inputs[1:]:
        tracer.tie(inputs[0], numbers)
    return inputs[0]


def _reshape(tracer: _Tracer, layer: Any, tensors: Sequence[Any], inputs: list[Numbers]) -> Numbers | None:
    """Also Flatten. Every row of the result must hold the same channels in the same order."""
    before, after = tuple(tensors[0].shape[1:]), tuple(layer.output_shape[1:])
    if None in before or None in after:
        return None
    rows = np.broadcast_to(inputs[0], before).reshape(-1, after[-1])
    return rows[0] if (rows == rows[0]).all() else None


_RULES: dict[type, Callable[[_Tracer, Any, Sequence[Any], list[Numbers]], Numbers | None]] = {
    **dict.fromkeys(_MERGING, _merge),
    layers.Concatenate: _concatenate,
    layers.Flatten: _reshape,
    layers.Reshape: _reshape,
}


def _is_strange(layer: Any) -> bool:
    """Channels elsewhere than on the last axis, or seen by other channels."""
    if getattr(layer, "data_format", "channels_last") == "channels_first":
        return True
    if _mixes(layer) and type(layer) not in MAKERS:
        return True
    if isinstance(layer, layers.BatchNormalization):
        return list(layer.axis) != [layer.input_spec.ndim - 1]
    if isinstance(layer, layers.PReLU):
        return layer.alpha.shape[-1] == 1
    return isinstance(layer, layers.Rescaling) and not all(np.ndim(each) == 0 for each in (layer.scale, layer.offset))


def _mixes(layer: Any) -> bool:
    """Whether one output channel depends on the others by the layer's activation."""
    return getattr(getattr(layer, "activation", None), "__name__", "linear") in _MIXING


def _width(tensor: Any) -> int:
    return int(tensor.shape[-1] or 0) if len(tensor.shape) > 1 else 0


def _work(node: Any) -> int:
    """See `Flow.work`; of one call."""
    layer = node.layer
    if not has_kernel(layer):
        return 0
    kernel = layer.depthwise_kernel if type(layer) is layers.DepthwiseConv2D else layer.kernel
    # A transposed convolution sends each position of its input through the kernel.
    side = node.keras_inputs if isinstance(layer, layers.Conv2DTranspose) else node.outputs
    positions = tuple(tf.nest.flatten(side)[0].shape[1:-1])
    if None in positions:
        raise ModelError(
            f"layer '{layer.name}' ({type(layer).__name__}) has free sides {positions}, so its multiply-adds cannot be counted; "
            "build the model with a fixed input shape."
        )
    return math.prod(positions) * math.prod(kernel.shape[:-2])
