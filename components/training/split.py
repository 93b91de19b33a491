"""Split: the layers of one model on several devices, for a model that is too large for one.

    layout map: pattern of layer names -> device      {"encoder_.*": 0, "decoder_.*": 1}

Weights, optimizer state, activations and gradients of a layer live where it computes; what passes between two layers on
different devices is copied. The numbers are those of one device. Whole layers rather than DTensor's slices of them:
Keras 3 has no DTensor for TensorFlow (its module says "DO NOT USE"), and through tf_keras only what DTensor has rules for
would train. A layer must therefore fit one device.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from components.errors import ConfigError
from components.options import TrainOptions

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types


@dataclasses.dataclass(frozen=True)
class Split:
    """Where the layers of a model go.

    Attributes:
      devices: Names as `tf.device` takes them; the layout's numbers are places in it.
      layout: Regular expression of layer names -> place; the first that matches whole decides. A layer that none matches
        goes with the one before it. Empty: the layers are cut into runs that need about the same memory.
    """

    devices: tuple[str, ...]
    layout: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
    """What one device holds.

    Attributes:
      device: Its name.
      layers: Names, in the order in which they compute.
      weight_bytes: Of their variables.
    """

    device: str
    layers: tuple[str, ...]
    weight_bytes: int

    def __str__(self) -> str:
        short = ":".join(self.device.split(":")[-2:]) if ":" in self.device else self.device
        if not self.layers:
            return f"{short} no layer"
        ends = self.layers[0] if len(self.layers) == 1 else f"{self.layers[0]} to {self.layers[-1]}"
        return f"{short} {ends} ({len(self.layers)} layers, {self.weight_bytes / 2**20:.1f} MiB of weights)"


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on its devices.

    Attributes:
      parts: What each device has, in their order.
      home: The device of the last layer, where what belongs to no layer is computed: the loss.
    """

    parts: tuple[Part, ...]
    home: str

    def __str__(self) -> str:
        return "; ".join(map(str, self.parts))


def whole_somewhere(split: Split | None) -> contextlib.AbstractContextManager[Any]:
    """Where all of a model that is to be split may be at once: in the host's memory."""
    return contextlib.nullcontext() if split is None else tf.device("CPU:0")


def check_split(model: keras.Model, split: Split) -> None:
    """Looks whether `model` can be cut as `split` says; asked by `plan`.

    Raises:
      ConfigError: A pattern names no layer or no device, or the model is none that can be cut.
    """
    operations = list(_operations(model))
    if split.layout:
        _mapped(operations, split)


@contextlib.contextmanager
def placed(model: keras.Model, split: Split, options: TrainOptions) -> Iterator[Placed]:
    """Layers of `model` compute on their devices inside the block, their weights lie there; after it all is as it was.

    Args:
      model: Functional or Sequential, and so what it nests; a layer that contains others otherwise (attention) stays whole.
      split: Devices and layout.
      options: Batch, parts and optimizer of the training: what a layer needs beside its weights.

    Raises:
      ConfigError: A pattern names no layer or no device, or the model is none that can be cut.
    """
    # A layer that is shared with a nested model is met twice, and goes where it is met first.
    operations = list({id(each): each for each in _operations(model)}.values())
    places = _mapped(operations, split) if split.layout else _balanced(operations, len(split.devices), options)
    kinds = [type(each) for each in operations]
    moved: dict[int, tuple[Any, Any]] = {}
    try:
        for operation, place in zip(operations, places, strict=True):
            device = split.devices[place]
            for variable in _variables(operation):
                if id(variable) not in moved:
                    moved[id(variable)] = variable, variable._value
                    variable._value = _copy(variable._value, device)
            operation.__class__ = _computing_on(device, type(operation))
        yield Placed(tuple(_parts(operations, places, split)), split.devices[places[-1]])
    finally:
        for operation, kind in zip(operations, kinds, strict=True):
            operation.__class__ = kind
        for variable, before in moved.values():
            before.assign(variable._value.numpy())
            variable._value = before


def beside_their_weights(optimizer: keras.optimizers.Optimizer) -> None:
    """Lets what `optimizer` will create for a weight lie on the weight's device; its gradient does not pass by another one."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
    create = inner.add_variable_from_reference

    def beside(reference_variable: Any, *args: Any, **kwargs: Any) -> Any:
        with tf.device(reference_variable.value.device):
            return create(reference_variable, *args, **kwargs)

    inner.add_variable_from_reference = beside
    # It sums over replicas, of which there is one, in a single operation for all gradients.
    inner._all_reduce_sum_gradients = lambda pairs: pairs


def gradients(loss: Tensor, variables: Sequence[Any]) -> list[Tensor | None]:
    """Of `loss` by Keras variables, each operation on the device of the one that it is the gradient of; inside a graph.

    Not from a tape, whose operations would all go to one device, with all the activations that they need.
    """
    found: list[Tensor | None] = tf.compat.v1.gradients(
        loss, [variable.value for variable in variables], colocate_gradients_with_ops=True
    )
    return found


def beside_their_inputs() -> contextlib.AbstractContextManager[Any]:
    """What is added to the graph inside the block computes where the largest of its inputs is: updates beside weights."""

    def device_of(operation: Any) -> str:
        known = [each for each in operation.inputs if _device(each)]
        return _device(max(known, key=_elements)) if known else ""

    block: contextlib.AbstractContextManager[Any] = tf.compat.v1.get_default_graph().device(device_of)
    return block


def _device(tensor: Tensor) -> str:
    """Where a tensor of a graph is, '' where nothing says so. A variable read is where it lies; a loop captures it again."""
    while hasattr(tensor, "graph") and not tensor.device:
        if tensor.op.type in ("ReadVariableOp", "Identity"):
            found = tensor.op.inputs[0]
        else:
            found = next((outer for outer, inner in getattr(tensor.graph, "captures", ()) if inner is tensor), None)
        if found is None:
            return ""
        tensor = found
    return str(tensor.device or "")


def _elements(tensor: Tensor) -> int:
    """How many; a variable's handle stands for those of the variable."""
    data = getattr(tensor, "_handle_data", None)
    shapes = [tf.TensorShape(each.shape) for each in data.shape_and_type] if data is not None and data.is_set else []
    return (shapes[0] if shapes else tensor.shape).num_elements() or 0


# --- where ---------------------------------------------------------------------------------------------------------


def _operations(model: keras.Model) -> Iterator[Any]:
    """Layers and operations in the order in which they compute; those of nested models in their place."""
    if isinstance(model, keras.Sequential):
        model = model._functional
    if not isinstance(model, keras.src.models.functional.Functional):
        raise ConfigError(
            f"strategy.name=split cuts functional and Sequential models, got {type(model).__name__} '{getattr(model, 'name', '')}'; "
            "build it as one of them, or use another strategy."
        )
    for operation in model.operations:
        if isinstance(operation, keras.layers.InputLayer):
            continue
        if isinstance(operation, keras.Model):
            yield from _operations(operation)
        else:
            yield operation


def _mapped(operations: Sequence[Any], split: Split) -> list[int]:
    names = [each.name for each in operations]
    for pattern, place in split.layout.items():
        if place >= len(split.devices):
            raise ConfigError(
                f"strategy.layout '{pattern}': {place} must be below the {len(split.devices)} devices; 0 is the first."
            )
        if not any(re.fullmatch(pattern, name) for name in names):
            raise ConfigError(
                f"strategy.layout: '{pattern}' names no layer of the model; it has {', '.join(names)[:300]}."
            )
    places, place = [], 0
    for name in names:
        place = next((at for pattern, at in split.layout.items() if re.fullmatch(pattern, name)), place)
        places.append(place)
    return places


def _balanced(operations: Sequence[Any], devices: int, options: TrainOptions) -> list[int]:
    """Runs of operations, one a device, whose largest need is as small as runs can make it."""
    slots = {"sgd": 1, "adam": 2, "adamw": 2}[options.optimizer.name]  # numbers kept for each weight
    needs = [_need(each, options.batch_size // options.accumulate, slots) for each in operations]

    def cut(most: int) -> list[int]:
        places, place, filled = [], 0, 0
        for need in needs:
            if filled + need > most and filled:
                place, filled = place + 1, 0
            filled += need
            places.append(place)
        return places

    low, high = max(needs, default=0), sum(needs)
    while low < high:
        middle = (low + high) // 2
        if cut(middle)[-1] < devices:
            high = middle
        else:
            low = middle + 1
    return cut(high)


def _need(operation: Any, batch_size: int, slots: int) -> int:
    """Bytes: a weight, its gradient and its slots, and what the layer gives for a batch."""
    weights = sum(_bytes(each) * (2 + slots if each.trainable else 1) for each in _variables(operation))
    given = 0
    for output in keras.tree.flatten(operation.output):
        given += batch_size * math.prod(side or 1 for side in output.shape[1:]) * 4
    return weights + given


def _parts(operations: Sequence[Any], places: Sequence[int], split: Split) -> list[Part]:
    at: dict[int, list[Any]] = collections.defaultdict(list)
    for operation, place in zip(operations, places, strict=True):
        at[place].append(operation)
    return [
        Part(
            device,
            tuple(each.name for each in at[place]),
            sum(map(_bytes, itertools.chain(*map(_variables, at[place])))),
        )
        for place, device in enumerate(split.devices)
    ]


# --- there ---------------------------------------------------------------------------------------------------------


def _variables(operation: Any) -> list[Any]:
    return list(getattr(operation, "variables", ()))


def _bytes(variable: Any) -> int:
    return int(np.prod(variable.shape)) * tf.as_dtype(variable.dtype).size


def _copy(variable: tf.Variable, device: str) -> tf.Variable:
    with tf.device(device):
        return tf.Variable(
            variable.numpy(),
            trainable=variable.trainable,
            dtype=variable.dtype,
            name=variable.name.split(":")[0],
            aggregation=variable.aggregation,
        )


def _computing_on(device: str, kind: type) -> type:
    """The class of the operation, whose calls compute on `device`; casts of mixed precision included."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        with tf.device(device):
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
