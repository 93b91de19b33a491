"""Owners: which Keras layers an operator of a `.tflite` file was made from.

    model.tflite + layer names --operations()--> operators in order, each with its layers

The converter names a tensor after the scopes of all operations that it fused, 'net_1/relu_1/Relu;net_1/stem_1/convolution',
and drops them for the file's output. So the output's name is asked first, then the constants that the operator reads.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from components.delivery.proof import KERNELS, operator_name

RETYPES = ("QUANTIZE", "DEQUANTIZE")
"""These only change the type of a tensor; it still is what the operator before them made."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One operator of the file's main graph.

    Attributes:
      kind: Built-in operator, as 'CONV_2D'.
      inputs: Numbers of the tensors that it reads, constants included.
      outputs: Numbers of the tensors that it makes.
      name: Of the first of those.
      layers: Keras layers that it was made from, the one that owns the kernel first; empty where no name tells.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str
    layers: tuple[str, ...]

    @property
    def layer(self) -> str:
        """The layer that stands for the operator: its kernel's, else its output's, else the output's own name."""
        return self.layers[0] if self.layers else self.name


def operations(content: bytes, layers: Sequence[str]) -> list[Operation]:
    """Reads the operators of a file in the order in which they run.

    Args:
      content: The flatbuffer.
      layers: Names of all Keras layers of the model, nested ones included; see `layer_classes`.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graph = model.subgraphs[0]
    names = [tensor.name.decode() for tensor in graph.tensors]
    owners = Owners(layers, names)
    made = {tensor for operator in graph.operators for tensor in operator.outputs}
    return [_operation(model, operator, names, owners, made) for operator in graph.operators]


def _operation(model: Any, operator: Any, names: Sequence[str], owners: Owners, made: set[int]) -> Operation:
    kind = operator_name(model.operatorCodes[operator.opcodeIndex])
    inputs = [int(tensor) for tensor in operator.inputs if tensor >= 0]
    position = KERNELS.get(kind, (1, 0))[0]
    # The kernel's own name tells one layer only; equal biases of two layers are one tensor, so they are asked last.
    kernel = [names[tensor] for tensor in inputs[position : position + 1] if kind in KERNELS]
    constants = [names[tensor] for tensor in inputs if tensor not in made]
    found = owners.of(kernel) + owners.of(names[tensor] for tensor in operator.outputs)
    return Operation(
        kind=kind,
        inputs=tuple(inputs),
        outputs=tuple(map(int, operator.outputs)),
        name=names[operator.outputs[0]],
        layers=tuple(dict.fromkeys(found or owners.of(constants))),
    )


def layer_classes(model: Any) -> dict[str, str]:
    """Name -> class of all layers of a Keras 3 or tf_keras model, those of nested models included."""
    found: dict[str, str] = {}
    for layer in getattr(model, "layers", ()):
        found |= {layer.name: type(layer).__name__, **layer_classes(layer)}
    return found


class Owners:
    """Finds layers in the names of tensors.

    Keras 3 enters each scope twice, so TensorFlow numbers it: layer 'conv' shows as 'conv_1' and layer 'conv_1' as
    'conv_1_2'; tf_keras leaves names as they are. Which of the two a file follows, its names tell together.

    Args:
      layers: Names of all layers.
      names: Of all tensors of the file.
    """

    def __init__(self, layers: Sequence[str], names: Iterable[str]) -> None:
        self.layers = frozenset(layers)
        scopes = {part for name in names for path in _paths(name) for part in path}
        numbered = {_stem(part) for part in scopes if part not in self.layers} & self.layers
        exact = {part for part in scopes & self.layers if _stem(part) == part or _stem(part) not in self.layers}
        self.numbered = len(numbered) >= len(exact)

    def of(self, names: Iterable[str]) -> list[str]:
        """The innermost layer of each operation in joined tensor names, in order; none where no scope is a layer's."""
        found = [self._innermost(path) for name in names for path in _paths(name)]
        return [layer for layer in found if layer is not None]

    def _innermost(self, path: Sequence[str]) -> str | None:
        return next((layer for part in reversed(path) if (layer := self._layer(part)) is not None), None)

    def _layer(self, part: str) -> str | None:
        spellings = (_stem(part), part) if self.numbered else (part, _stem(part))
        return next((each for each in spellings if each in self.layers), None)


def _paths(name: str) -> Iterator[list[str]]:
    """Scopes of each operation in a joined name, without the operation itself: 'a/b/Relu;a/c/Conv2D' -> [a, b], [a, c]."""
    for operation in name.split(";"):
        yield operation.split("/")[:-1]


def _stem(part: str) -> str:
    return re.sub(r"_\d+$", "", part)
