"""Activations: what flows between the operators of a `.tflite` file, tensor by tensor.

    model.tflite --Activations--> tensors, each with its layer and its codes
    example --run()--> the values of each, as float32

Runs the built-in kernels, without the XNNPACK delegate: that one keeps nothing in between.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from components.delivery.owners import RETYPES, Operation, operations
from components.delivery.predictor import dequantized, quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """A tensor that is computed, or the file's input.

    Attributes:
      index: Its number in the file.
      name: Its name there.
      layer: Keras layer that it comes from, see `owners.Operation.layer`; 'input' for the file's input.
      dtype: As NumPy has it.
      scale: Of its codes; 0 where it is float.
      zero_point: The code that means 0.
    """

    index: int
    name: str
    layer: str
    dtype: np.dtype
    scale: float
    zero_point: int

    @property
    def range(self) -> tuple[float, float] | None:
        """Smallest and largest value that it can hold; None where it is float."""
        if self.scale == 0:
            return None
        codes = np.iinfo(self.dtype)
        return (int(codes.min) - self.zero_point) * self.scale, (int(codes.max) - self.zero_point) * self.scale

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """`values` (float, any shape) as they are once written in its codes; unchanged where it is float."""
        if self.range is None:
            return values
        low, high = self.range
        return np.clip(np.round(values / self.scale) * self.scale, low, high)


class Activations:
    """A file that keeps everything it computes.

    Args:
      content: The flatbuffer; one input, one example at a time.
      layers: Names of all Keras layers of the model.

    Attributes:
      operations: Of the file, in order.
      tensors: Its input, then what each operator makes, floats and quantized integers only.
    """

    def __init__(self, content: bytes, layers: Sequence[str]) -> None:
        self._interpreter = Interpreter(
            model_content=content,
            experimental_preserve_all_tensors=True,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            num_threads=1,
        )
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._details = {each["index"]: each for each in self._interpreter.get_tensor_details()}
        self.operations: list[Operation] = operations(content, layers)
        made = [(index, each.layer) for each in self.operations for index in each.outputs]
        found = [self._activation(index, layer) for index, layer in [(self._input["index"], "input"), *made]]
        self.tensors = [each for each in found if each.scale or each.dtype == np.float32]

    def _activation(self, index: int, layer: str) -> Activation:
        details = self._details[index]
        scale, zero_point = details["quantization"]
        return Activation(
            index=index,
            name=details["name"],
            layer=layer,
            dtype=np.dtype(details["dtype"]),
            scale=float(scale),
            zero_point=int(zero_point),
        )

    def run(self, example: np.ndarray) -> list[np.ndarray]:
        """Values of each of `tensors`, float32, for one example float32 (*shape)."""
        self._interpreter.set_tensor(self._input["index"], quantized(example, self._input)[np.newaxis])
        self._interpreter.invoke()
        return [
            dequantized(self._interpreter.get_tensor(each.index), self._details[each.index]) for each in self.tensors
        ]

    def by_name(self, names: Container[str]) -> dict[str, Activation]:
        """The tensors that another file of the same model calls by `names`.

        A quantized file has more of them: one before and one after each change of type. Of those that are the same value,
        the integer one is given.
        """
        found: dict[str, Activation] = {}
        for each in self.tensors:
            for name in [each.name, *self._retyped(each.index)]:
                if name in names:
                    if name not in found or (each.scale and not found[name].scale):
                        found[name] = each
                    break
        return found

    def _retyped(self, index: int) -> list[str]:
        """Names of the tensors that are `index` in another type."""
        pairs = [(each.inputs[0], each.outputs[0]) for each in self.operations if each.kind in RETYPES]
        others = [after for before, after in pairs if before == index] + [
            before for before, after in pairs if after == index
        ]
        return [self._details[other]["name"] for other in others]
