"""Owners: which Keras layers an operator of a `.tflite` file was made from.

    model.tflite + layer names --operations()--> operators in order, each with its layers

The converter names a tensor after the scopes of all operations that it fused, 'net_1/relu_1/Relu;net_1/stem_1/convolution',
and drops them for the file's output. So the output's name is asked first, then the constants that the operator reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from components.delivery.proof import KERNELS, operator_name
from components.delivery.scopes import Scopes

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
    owners = Scopes(layers, names)
    made = {tensor for operator in graph.operators for tensor in operator.outputs}
    return [_operation(model, operator, names, owners, made) for operator in graph.operators]


def _operation(model: Any, operator: Any, names: Sequence[str], owners: Scopes, made: set[int]) -> Operation:
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
