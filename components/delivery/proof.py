"""Proof: what a `.tflite` file says of itself, and whether that is what its recipe promised.

    model.tflite --read_proof()--> Proof --check(promises)--> broken promises, in words

Everything is read from the flatbuffer: no model, no training log and no TensorFlow. Works on any `.tflite` file, also
on one that trimline did not make. Layout: tensorflow/lite/schema/schema.fbs, as ai-edge-litert ships it.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import pathlib
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from components.artifacts import Promise
from components.delivery.formats import INTEGER_KERNELS, check_format, has_precision
from components.delivery.scopes import Scopes
from components.delivery.zeros import Zeros, densify, find_zeros, storage
from components.errors import ContractError

OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
TYPE_NAMES = {code: name.lower() for name, code in vars(schema.TensorType).items() if isinstance(code, int)}
# operator: (position of the kernel among its inputs, axis of the kernel that counts output channels)
KERNELS = {
    "CONV_2D": (1, 0),
    "CONV_3D": (1, 4),
    "DEPTHWISE_CONV_2D": (1, 3),
    "FULLY_CONNECTED": (1, 0),
    "TRANSPOSE_CONV": (1, 0),
    "EMBEDDING_LOOKUP": (1, 0),
    "GATHER": (0, 0),  # what an Embedding becomes; from a table of whole numbers it is none
}
OPERATORS_OF_KIND = {
    "conv1d": ("CONV_2D",),
    "conv2d": ("CONV_2D",),
    "conv3d": ("CONV_3D",),
    "depthwise_conv2d": ("DEPTHWISE_CONV_2D",),
    "conv2d_transpose": ("TRANSPOSE_CONV",),
    "dense": ("FULLY_CONNECTED", "BATCH_MATMUL"),
    "embedding": ("EMBEDDING_LOOKUP", "GATHER"),
}
# These only change how a kernel is stored; the operator behind them is the one that uses it.
STORAGE = ("DEQUANTIZE", "DENSIFY")
NUMPY_TYPES = {"bfloat16": np.uint16} | {
    name: np.dtype(name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
}
# What the generated parser raises on bytes that are no flatbuffer.
DAMAGED = (struct.error, IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """One weight tensor that an operator multiplies its input with.

    Attributes:
      name: The tensor's name in the file; the converter builds it from Keras layer names.
      operator: Built-in operator that uses it, as 'CONV_2D'.
      used_as: Name of that operator's output; names the layer where `name` does not.
      shape: As TFLite lays it out, see `Promise.shape`.
      dtype: Stored type, as 'int8'.
      sparsity: Fraction of exact zeros, in [0, 1]; for integers the codes that equal the zero point.
      distinct: Different values in the whole tensor.
      distinct_per_channel: Most different values in one output channel.
      scales: Quantization scales: 0 float, 1 one for the tensor, more: one per channel.
      zeros: Where the zeros lie.
      storage: 'dense', or 'sparse' with the blocks that are stored, as 'sparse 1x16'.
      computes: Type of that operator's output: what it computes in.
    """

    name: str
    operator: str
    used_as: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    distinct: int
    distinct_per_channel: int
    scales: int
    zeros: Zeros = Zeros()
    storage: str = "dense"
    computes: str = "float32"

    @property
    def size(self) -> int:
        """Number of weights."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def short(self) -> str:
        """The part of the name before ';': the converter joins the names of all fused operations."""
        return self.name.partition(";")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proof:
    """What the file holds.

    Attributes:
      bytes: Size of the file.
      gzip_bytes: Size after gzip at level 9 without a timestamp: what a download costs.
      parameters: Weights and biases stored in the file; batch normalization is folded, a bias of zeros is left out.
      sparsity: Fraction of zeros over all kernels.
      distinct_weights_max: Most different values in one kernel.
      distinct_per_channel_max: Most different values in one output channel of one kernel.
      weight_dtypes: {stored type: number of kernels}.
      operators: {operator: number of uses}, kernels' storage operators included.
      float_operators: Operators whose output is float in a file with integer kernels, without DEQUANTIZE.
      flex: TensorFlow operators that a built-in runtime cannot run.
      custom: Other custom operators.
      input_dtype: Type of the first input, as 'float32'.
      output_dtype: Type of the first output.
      weights: Every kernel, in the order in which the operators run.
    """

    bytes: int
    gzip_bytes: int
    parameters: int
    sparsity: float
    distinct_weights_max: int
    distinct_per_channel_max: int
    weight_dtypes: dict[str, int]
    operators: dict[str, int]
    float_operators: tuple[str, ...]
    flex: tuple[str, ...]
    custom: tuple[str, ...]
    input_dtype: str
    output_dtype: str
    weights: tuple[Kernel, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-able values."""
        value = dataclasses.asdict(self)
        for key in ("float_operators", "flex", "custom", "weights"):
            value[key] = list(value[key])
        for kernel in value["weights"]:
            kernel["shape"] = list(kernel["shape"])
        return value

    def summary(self) -> dict[str, Any]:
        """The entry `proof` of `results.json`: totals, without the kernels and what stands beside it there."""
        elsewhere = ("bytes", "gzip_bytes", "parameters", "weights")
        return {key: value for key, value in self.to_json().items() if key not in elsewhere}


def gzip_bytes(content: bytes) -> int:
    """Size of `content` after gzip at level 9, without name and timestamp so that equal bytes give equal sizes."""
    return len(gzip.compress(content, compresslevel=9, mtime=0))


def read_proof(path: pathlib.Path) -> Proof:
    """Reads a `.tflite` file; bytes appended behind the flatbuffer (metadata as a zip) count into the sizes only.

    Raises:
      ContractError: The file is absent, is no TFLite flatbuffer, or is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ContractError(
            f"{path}: a .tflite file was promised, got {error.strerror}; run the export again."
        ) from None
    if content[4:8] != b"TFL3":
        raise ContractError(
            f"{path}: a .tflite file holds 'TFL3' at byte 4, got {content[4:8]!r}; pass a TFLite flatbuffer."
        )
    try:
        return _prove(content)
    except DAMAGED as error:
        raise ContractError(
            f"{path}: the flatbuffer ends or points outside itself ({type(error).__name__}: {error}); copy or export it again."
        ) from error


def _prove(content: bytes) -> Proof:
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    graphs = [_Graph(model, graph, content) for graph in model.subgraphs]
    kernels = [kernel for graph in graphs for kernel in graph.kernels()]
    operators = collections.Counter(name for graph in graphs for name in graph.names)
    custom = sorted({name for name in operators if name.startswith("CUSTOM:")})
    weights = sum(kernel.size for kernel in kernels)
    first = graphs[0]
    return Proof(
        bytes=len(content),
        gzip_bytes=gzip_bytes(content),
        parameters=sum(graph.parameters() for graph in graphs),
        sparsity=sum(kernel.sparsity * kernel.size for kernel in kernels) / weights if weights else 0.0,
        distinct_weights_max=max((kernel.distinct for kernel in kernels), default=0),
        distinct_per_channel_max=max((kernel.distinct_per_channel for kernel in kernels), default=0),
        weight_dtypes=dict(sorted(collections.Counter(kernel.dtype for kernel in kernels).items())),
        operators={name.removeprefix("CUSTOM:"): count for name, count in sorted(operators.items())},
        float_operators=_float_operators(graphs, kernels),
        flex=tuple(name[11:] for name in custom if name.startswith("CUSTOM:Flex")),
        custom=tuple(name[7:] for name in custom if not name.startswith("CUSTOM:Flex")),
        input_dtype=first.dtype(first.graph.inputs[0]),
        output_dtype=first.dtype(first.graph.outputs[0]),
        weights=tuple(kernels),
    )


def _float_operators(graphs: Sequence[_Graph], kernels: Sequence[Kernel]) -> tuple[str, ...]:
    if not any(kernel.dtype in INTEGER_KERNELS for kernel in kernels):
        return ()
    found = {
        name
        for graph in graphs
        for name, operator in zip(graph.names, graph.graph.operators, strict=True)
        if name not in STORAGE and any(graph.dtype(output) == "float32" for output in operator.outputs)
    }
    return tuple(sorted(found))


class _Graph:
    """One subgraph with what is needed to look things up in it."""

    def __init__(self, model: Any, graph: Any, content: bytes) -> None:
        self.graph = graph
        self.buffers = model.buffers
        self.content = content
        self.names = [operator_name(model.operatorCodes[operator.opcodeIndex]) for operator in graph.operators]
        # tensor -> the constant behind it, through operators that only change its storage
        self.stored = {
            operator.outputs[0]: operator.inputs[0]
            for name, operator in zip(self.names, graph.operators, strict=True)
            if name in STORAGE
        }

    def dtype(self, tensor: int) -> str:
        """Stored type of a tensor."""
        return TYPE_NAMES[self.graph.tensors[tensor].type]

    def source(self, tensor: int) -> int | None:
        """The constant that an operator's input comes from, or None where it is computed."""
        while tensor in self.stored:
            tensor = self.stored[tensor]
        return tensor if tensor >= 0 and self.data(tensor) is not None else None

    def data(self, tensor: int) -> np.ndarray | None:
        """Raw bytes of a constant, uint8; None for a tensor that is computed."""
        buffer = self.buffers[self.graph.tensors[tensor].buffer]
        if buffer.offset > 1:  # files above 2 GB keep their constants behind the flatbuffer
            return np.frombuffer(self.content, np.uint8, buffer.size, buffer.offset)
        return None if buffer.data is None or len(buffer.data) == 0 else np.asarray(buffer.data, np.uint8)

    def kernels(self) -> Iterator[Kernel]:
        """Kernels in the order of their operators; one that several operators share comes once."""
        seen = set()
        for name, operator in zip(self.names, self.graph.operators, strict=True):
            if name not in KERNELS:
                continue
            position, axis = KERNELS[name]
            tensor = self.source(operator.inputs[position])
            if tensor is not None and tensor not in seen and self.dtype(tensor) not in ("int32", "int64"):
                seen.add(tensor)
                yield self._kernel(name, tensor, axis, operator.outputs[0])

    def _kernel(self, operator: str, tensor: int, axis: int, output: int) -> Kernel:
        stored = self.graph.tensors[tensor]
        shape = tuple(int(side) for side in stored.shape)
        quantization = stored.quantization
        scales = 0 if quantization is None or quantization.scale is None else len(quantization.scale)
        values = _values(self.data(tensor), self.dtype(tensor))
        if stored.sparsity is not None:
            values = densify(values, stored.sparsity, shape)
        values = _centred(values.reshape(shape), quantization, scales)
        return Kernel(
            name=stored.name.decode(),
            operator=operator,
            used_as=self.graph.tensors[output].name.decode(),
            shape=shape,
            dtype=self.dtype(tensor),
            scales=scales,
            zeros=find_zeros(values == 0, operator),
            storage=storage(stored.sparsity),
            **_dense_facts(values, axis % len(shape)),
            computes=self.dtype(output),
        )

    def parameters(self) -> int:
        """Values of every constant that takes part in arithmetic: kernels, biases, factors; not shapes and axes."""
        counted = {}
        for name, operator in zip(self.names, self.graph.operators, strict=True):
            bias = 2 if name in KERNELS else None
            for position, index in enumerate(operator.inputs):
                tensor = self.source(index)
                if tensor is None or name in STORAGE:
                    continue
                if position == bias or self.dtype(tensor) not in ("int32", "int64", "bool", "string"):
                    shape = self.graph.tensors[tensor].shape
                    # Of a scalar the converter may leave it out.
                    counted[tensor] = 1 if shape is None else int(np.prod(shape, dtype=np.int64))
        return sum(counted.values())


def operator_name(code: Any) -> str:
    """Name of a built-in operator, or 'CUSTOM:' and the name of another."""
    if code.customCode is not None:
        return "CUSTOM:" + code.customCode.decode()
    # Old files hold the number in the one-byte field only; see the schema's note on `deprecated_builtin_code`.
    return OPERATOR_NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)]


def _values(data: np.ndarray | None, dtype: str) -> np.ndarray:
    if data is None:
        raise ValueError("a kernel has no data")
    if dtype in ("int4", "uint4"):  # two codes a byte, the low half first
        pairs = np.stack([data & 0x0F, data >> 4], axis=-1).reshape(-1)
        return np.where(pairs > 7, pairs.astype(np.int8) - 16, pairs).astype(np.int8) if dtype == "int4" else pairs
    if dtype == "int2":  # four codes a byte
        quarters = np.stack([(data >> shift) & 0x03 for shift in (0, 2, 4, 6)], axis=-1).reshape(-1)
        return np.where(quarters > 1, quarters.astype(np.int8) - 4, quarters).astype(np.int8)
    return data.view(NUMPY_TYPES[dtype])


def _centred(values: np.ndarray, quantization: Any, scales: int) -> np.ndarray:
    """Integer codes minus their zero points, so that zero means zero; floats as they are."""
    if scales == 0:
        return values
    points = np.asarray(quantization.zeroPoint, np.int32)
    if len(points) > 1:
        sides = [1] * values.ndim
        sides[quantization.quantizedDimension] = len(points)
        points = points.reshape(sides)
    return values.astype(np.int32) - points


def _dense_facts(values: np.ndarray, axis: int) -> dict[str, Any]:
    # As float32, the same values: with -0.0 among them, numpy 2.4 sorts float16 wrongly on processors with AVX512.
    values = values.astype(np.float32) if values.dtype == np.float16 else values
    channels = np.sort(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1), axis=1)
    per_channel = 1 + np.count_nonzero(np.diff(channels, axis=1), axis=1)
    return {
        "sparsity": 1 - int(np.count_nonzero(values)) / values.size,
        "distinct": len(np.unique(values)),
        "distinct_per_channel": int(per_channel.max()),
    }


def check(proof: Proof, promises: Sequence[Promise], format: str) -> list[str]:
    """Compares the file with what its recipe promised.

    Args:
      proof: Of the file.
      promises: Of the compression steps, in the order of the model's layers.
      format: How the file was written, one of `components.recipe.FORMATS`.

    Returns:
      Each broken promise in words that name layer and tensor; empty when all hold. Quantization may add zeros and
      merge values, so more sparsity and fewer distinct values than promised are fine.
    """
    broken = [f"operator {name} needs the TensorFlow runtime (Flex)" for name in proof.flex]
    broken += [f"operator {name} is not built in" for name in proof.custom]
    found = match(proof.weights, promises)
    named = [kernel for promise, kernel in found if promise.precision and kernel is not None]
    broken += check_format([kernel for kernel in proof.weights if kernel not in named], format)
    for promise, kernel in found:
        if kernel is None:
            broken.append(f"layer '{promise.layer}': no {promise.kind} kernel of shape {promise.shape} in the file")
        else:
            broken += _check_kernel(promise, kernel)
    return broken


def _check_kernel(promise: Promise, kernel: Kernel) -> list[str]:
    where = f"layer '{promise.layer}' (tensor '{kernel.short}')"
    broken = []
    # Half a weight: sparsities are fractions of the same whole number, written and read as decimals.
    if kernel.sparsity < promise.sparsity - 0.5 / kernel.size:
        broken.append(f"{where}: sparsity {promise.sparsity:.4f} was promised, the file holds {kernel.sparsity:.4f}")
    lack = kernel.zeros.lack(promise.pattern, promise.sparsity, 0.5 / kernel.size) if promise.pattern else None
    if lack is not None:
        broken.append(f"{where}: {lack}")
    if promise.distinct and kernel.distinct_per_channel > promise.distinct:
        broken.append(
            f"{where}: at most {promise.distinct} distinct weights in an output channel were promised, the file holds {kernel.distinct_per_channel}"
        )
    if promise.precision and not has_precision(kernel, promise.precision):
        broken.append(
            f"{where}: {promise.precision} was promised, it is {kernel.dtype} and computes in {kernel.computes}"
        )
    if promise.quantized and kernel.dtype not in INTEGER_KERNELS:
        broken.append(f"{where}: int8 was promised, the file holds {kernel.dtype}")
    return broken


def match(kernels: Sequence[Kernel], promises: Sequence[Promise]) -> list[tuple[Promise, Kernel | None]]:
    """Finds each promise's kernel: same operator and shape, then the layer's name, then the order.

    Names come first because parallel branches may run in another order than that of the layers; the order decides
    where the converter gave a folded kernel a name of its own ('arith.constant3').
    """
    # In a file of Keras 3, 'a_1' is the scope of layer 'a'; in one of tf_keras that of layer 'a_1'.
    names = [name for kernel in kernels for name in (kernel.name, kernel.used_as)]
    numbered = Scopes([promise.layer for promise in promises], names).numbered
    by_name = (_numbered, _named, _used_as) if numbered else (_named, _used_as, _numbered)
    free = list(kernels)
    found: dict[int, Kernel] = {}
    for named in (*by_name, _unnamed):
        for number, promise in enumerate(promises):
            if number in found:
                continue
            kernel = next((k for k in free if fits(k, promise) and named(k, promise.layer)), None)
            if kernel is not None:
                found[number] = kernel
                free.remove(kernel)
    return [(promise, found.get(number)) for number, promise in enumerate(promises)]


def fits(kernel: Kernel, promise: Promise) -> bool:
    """Whether operator and shape of a kernel are what the promise says; its name is another matter."""
    if kernel.operator not in OPERATORS_OF_KIND.get(promise.kind, (kernel.operator,)):
        return False
    # A 1-D convolution becomes a 2-D one with a side of 1.
    sides = [side for side in kernel.shape if side != 1]
    return sides == [side for side in promise.shape if side != 1]


def _parts(names: str) -> set[str]:
    """Scopes in a joined name: 'model/quant_stem/Conv2D;model/bn/add' -> {model, quant_stem, Conv2D, bn, add}."""
    return set(re.split(r"[/;:]", names))


def _spellings(layer: str) -> set[str]:
    """How tfmot's wrappers call a layer."""
    return {layer, f"quant_{layer}", f"prune_low_magnitude_{layer}", f"cluster_{layer}"}


def _named(kernel: Kernel, layer: str) -> bool:
    return not _spellings(layer).isdisjoint(_parts(kernel.name))


def _used_as(kernel: Kernel, layer: str) -> bool:
    return not _spellings(layer).isdisjoint(_parts(kernel.used_as))


def _numbered(kernel: Kernel, layer: str) -> bool:
    """Keras 3 numbers a scope that it enters twice: layer 'stem' shows as 'stem_1'."""
    pattern = re.compile(rf"(quant_)?{re.escape(layer)}_\d+")
    return any(pattern.fullmatch(part) for part in _parts(kernel.name))


def _unnamed(kernel: Kernel, layer: str) -> bool:
    return True
