"""Scales: the factors between codes and values of a quantized file, in no more bits than they need.

    flatbuffer --shorten()--> the same flatbuffer, whose scales are easy to compress

The converter stores a float32 for each channel of each kernel, and one more for its bias, with 23 random bits apiece. In a
network of many thin layers that is a sixth of what a download costs, and far finer than codes of 8 bits can tell.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from components.delivery.proof import TYPE_NAMES, operator_name
from components.options import ExportOptions

KERNEL_BITS = 8
"""Significant bits of a kernel's scales, those of bfloat16: off by at most 1 in 256, as the code of a weight of 127."""
ACTIVATION_BITS = 6
"""Of an activation's scale, rounded up so that its range only widens: by a 32nd at most. With 4 bits a DS-CNN of 28 kB
would be 0.5 % smaller still, but ranges widen by up to an eighth: on the toy of the tests that cost 0.7 dB."""
# operator: positions of its input, kernel and bias
PRODUCTS = {
    "CONV_2D": (0, 1, 2),
    "CONV_3D": (0, 1, 2),
    "DEPTHWISE_CONV_2D": (0, 1, 2),
    "FULLY_CONNECTED": (0, 1, 2),
    "TRANSPOSE_CONV": (2, 1, 3),
}
WIDE = ("int32", "int64")  # what biases are counted in


def shorten(content: bytes) -> bytes:
    """Rounds the scales of a quantized file; sizes, codes of kernels and zero points stay.

    Biases are counted in the product of their input's and their kernel's scale, so they are counted anew.

    Activations with equal scales keep equal ones, whatever ties them (pooling, concatenation, a loop's variables), and powers
    of two, which softmax, tanh and sigmoid prescribe, stay. Left as they are: the file's input and output, which others rely
    on; other constants; operators with wide constants that this does not know; and whatever has the scale of one of these.

    Args:
      content: The flatbuffer. A float file comes back unchanged.

    Returns:
      A flatbuffer of the same length; shortened again it stays the same.

    Source: TFLite int8 scheme, tensorflow.org/lite/performance/quantization_spec
    """
    made = bytearray(content)
    model = schema.Model.GetRootAs(made, 0)
    buffers = [model.Buffers(number) for number in range(model.BuffersLength())]
    if any(buffer.Offset() > 1 for buffer in buffers):  # above 2 GB constants lie elsewhere, and scales weigh nothing
        return content
    graphs = [_Graph(model, number, buffers) for number in range(model.SubgraphsLength())]
    tensors = [tensor for graph in graphs for tensor in graph.tensors]
    products = [product for graph in graphs for product in graph.products]
    kept = _kept(graphs, products)
    kernels = {id(product.kernel) for product in products}
    for tensor in tensors:
        if not kept.isdisjoint(tensor.before):
            continue
        if id(tensor) in kernels:
            tensor.scales[:] = rounded(tensor.before, KERNEL_BITS, up=False)
        elif tensor.codes is None and tensor.dtype not in WIDE:
            tensor.scales[:] = rounded(tensor.before, ACTIVATION_BITS, up=True)
    for product in products:
        product.count_bias_anew()
    return bytes(made)


def as_asked(content: bytes, options: ExportOptions) -> bytes:
    """`content` with the scales that `options.short_scales` asks for."""
    return shorten(content) if options.short_scales else content


def rounded(scales: np.ndarray, bits: int, *, up: bool) -> np.ndarray:
    """To `bits` significant bits, upwards or to the nearest.

    Args:
      scales: float32, above 0.

    >>> rounded(np.float32([1.0, 1.06, 0.9]), 4, up=True)
    array([1.    , 1.125 , 0.9375], dtype=float32)
    """
    parts, powers = np.frexp(scales)  # parts from 0.5 to 1
    parts = (np.ceil if up else np.rint)(np.ldexp(parts, bits))
    return np.ldexp(parts, powers - bits).astype(np.float32)


class _Tensor:
    """A tensor of the file: views of its scales and codes that write into it, and the scales as they were."""

    def __init__(self, tensor: Any, buffers: Sequence[Any]) -> None:
        quantization, stored = tensor.Quantization(), buffers[tensor.Buffer()]
        self.dtype = TYPE_NAMES[tensor.Type()]
        self.buffer = tensor.Buffer()
        has = quantization is not None and quantization.ScaleLength()
        self.scales = quantization.ScaleAsNumpy() if has else np.zeros(0, np.float32)
        self.before = self.scales.copy()
        self.codes: Any = stored.DataAsNumpy() if stored.DataLength() else None  # of a constant
        if self.codes is not None and self.dtype in WIDE:
            self.codes = self.codes.view(self.dtype)

    @property
    def is_sum(self) -> bool:
        """Counted in a product of scales, as biases are; sizes and axes have no scales."""
        return self.dtype in WIDE and len(self.scales) > 0


@dataclasses.dataclass(frozen=True, eq=False)
class _Product:
    """A kernel and what is counted in its scales; nothing where the arithmetic is in float."""

    kernel: _Tensor
    input: _Tensor | None = None
    bias: _Tensor | None = None

    def count_bias_anew(self) -> None:
        """The same bias in the product of the scales as they are now."""
        if self.input is None or self.bias is None:
            return
        if np.array_equal(self.kernel.scales, self.kernel.before) and np.array_equal(
            self.input.scales, self.input.before
        ):
            return
        made = self.input.scales * self.kernel.scales
        if not (made > 0).all():  # too small for float32; then the bias in the old product is as near
            return
        self.bias.scales[:] = made
        limits = np.iinfo(self.bias.dtype)
        # Those of int64 are no floats, but no bias comes near them.
        codes = self.bias.codes * (self.bias.before.astype(np.float64) / self.bias.scales)
        self.bias.codes[:] = np.clip(np.rint(codes), float(limits.min), float(limits.max))


class _Graph:
    """One subgraph."""

    def __init__(self, model: Any, number: int, buffers: Sequence[Any]) -> None:
        graph = model.Subgraphs(number)
        self.tensors = [_Tensor(graph.Tensors(place), buffers) for place in range(graph.TensorsLength())]
        ends = [graph.Inputs(place) for place in range(graph.InputsLength())]
        ends += [graph.Outputs(place) for place in range(graph.OutputsLength())]
        self.ends = [self.tensors[end] for end in ends]
        self.products: list[_Product] = []
        self.others: list[tuple[str, list[_Tensor]]] = []
        for place in range(graph.OperatorsLength()):
            operator = graph.Operators(place)
            code = schema.OperatorCodeT.InitFromObj(model.OperatorCodes(operator.OpcodeIndex()))
            inputs = [operator.Inputs(position) for position in range(operator.InputsLength())]
            read = [self.tensors[tensor] if tensor >= 0 else None for tensor in inputs]
            name = operator_name(code)
            product = _product(name, read)
            if product is not None:
                self.products.append(product)
            else:
                outputs = [self.tensors[operator.Outputs(position)] for position in range(operator.OutputsLength())]
                self.others.append((name, [tensor for tensor in read if tensor is not None] + outputs))


def _product(name: str, read: Sequence[_Tensor | None]) -> _Product | None:
    """What an operator multiplies, where its scales may be rounded."""
    if name == "DEQUANTIZE":  # widens a kernel for arithmetic in float
        input, kernel, bias = None, read[0], None
    elif name in PRODUCTS:
        input, kernel, bias = (read[position] if position < len(read) else None for position in PRODUCTS[name])
    else:
        return None
    if kernel is None or kernel.codes is None or not len(kernel.scales) or kernel.dtype in WIDE:
        return None
    if input is None or not len(input.scales) or bias is None:
        return _Product(kernel)
    fits = bias.is_sum and bias.codes is not None and len(bias.scales) == len(kernel.scales) in (1, bias.codes.size)
    return _Product(kernel, input, bias) if fits else None


def _kept(graphs: Sequence[_Graph], products: Sequence[_Product]) -> set[float]:
    """Scales that must stay what they are."""
    left = [end for graph in graphs for end in graph.ends]
    for name, touched in (other for graph in graphs for other in graph.others):
        unknown = name in PRODUCTS or name.startswith("CUSTOM:") or any(tensor.is_sum for tensor in touched)
        left += [tensor for tensor in touched if unknown or tensor.codes is not None]
    readers = collections.Counter(id(product.bias) for product in products)
    stored = collections.Counter(tensor.buffer for graph in graphs for tensor in graph.tensors)
    for product in products:
        if product.input is None or product.bias is None:
            continue
        shared = stored[product.bias.buffer] > 1 and product.bias.codes.any()
        if shared or readers[id(product.bias)] > 1:  # cannot be counted anew for the one without the other
            left += [product.input, product.kernel]
    return {float(scale) for tensor in left for scale in tensor.before}
