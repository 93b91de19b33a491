"""Formats: what each way of writing a file promises of its kernels.

    kernels of a file --check_format--> broken promises, in words

A leaf of the delivery room: numbers and names only, so that the proof of a file needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from components.delivery.proof import Kernel

INTEGER_KERNELS = ("int8", "int4", "int2", "uint8", "uint4")
# The converter's dynamic-range quantizer leaves kernels below this size in float32 (quantize_weights.cc).
DYNAMIC_MINIMUM = 1024
WEIGHT_BITS = {"int8_weights": 8, "int4_weights": 4}
"""Formats that store kernels in few bits and compute in float: bits of a kernel."""

KERNELS_OF_BITS = {
    8: ("CONV_2D", "DEPTHWISE_CONV_2D", "EMBEDDING_LOOKUP", "FULLY_CONNECTED", "TRANSPOSE_CONV"),
    4: ("CONV_2D", "FULLY_CONNECTED"),
}
"""Operators whose kernels ai-edge-quantizer 0.10 stores in so many bits and ai-edge-litert 2.3 widens to float again.

It has more for 4 bits in its policy, but 4-bit depthwise kernels it leaves in float: they take 8.
"""


def weight_dtype(operator: str, bits: int) -> str:
    """Stored type of an operator's kernel in a file of so many bits: the fewest that the operator has, 'float32' if none."""
    fitting = [each for each, names in sorted(KERNELS_OF_BITS.items()) if each >= bits and operator in names]
    return f"int{fitting[0]}" if fitting else "float32"


def check_format(kernels: Sequence[Kernel], format: str) -> list[str]:
    """What of `kernels` contradicts the format, each in words that name the tensor; empty where nothing does."""
    check = _CHECKS.get(format)
    return check(kernels, format) if check else []


def has_precision(kernel: Kernel, precision: str) -> bool:
    """Whether a kernel's operator computes in 'float32' from a float32 kernel, or in 'int16' from an int8 one."""
    return (kernel.dtype, kernel.computes) == {"float32": ("float32", "float32"), "int16": ("int8", "int16")}[precision]


def _float16(kernels: Sequence[Kernel], format: str) -> list[str]:
    return [_is(kernel, kernel.dtype, "float16") for kernel in kernels if kernel.dtype != "float16"]


def _int8(kernels: Sequence[Kernel], format: str) -> list[str]:
    return [_is(kernel, kernel.dtype, "int8") for kernel in kernels if kernel.dtype not in INTEGER_KERNELS]


def _dynamic(kernels: Sequence[Kernel], format: str) -> list[str]:
    large = [kernel for kernel in kernels if kernel.size >= DYNAMIC_MINIMUM]
    if large and not any(kernel.dtype in INTEGER_KERNELS for kernel in large):
        return [f"tensor '{large[0].short}' and all other kernels are {large[0].dtype}, int8 was promised"]
    return []


def _int16x8(kernels: Sequence[Kernel], format: str) -> list[str]:
    stored = [_is(kernel, kernel.dtype, "int8") for kernel in kernels if kernel.dtype != "int8"]
    return stored + _computed(kernels, "int16")


def _weights(kernels: Sequence[Kernel], format: str) -> list[str]:
    wanted = [(kernel, weight_dtype(kernel.operator, WEIGHT_BITS[format])) for kernel in kernels]
    stored = [_is(kernel, kernel.dtype, dtype) for kernel, dtype in wanted if kernel.dtype != dtype]
    return stored + _computed(kernels, "float32")


def _computed(kernels: Sequence[Kernel], dtype: str) -> list[str]:
    return [
        f"the {kernel.operator} of tensor '{kernel.short}' computes in {kernel.computes}, {dtype} was promised"
        for kernel in kernels
        if kernel.computes != dtype
    ]


def _is(kernel: Kernel, found: str, promised: str) -> str:
    return f"tensor '{kernel.short}' is {found}, {promised} was promised"


_CHECKS: dict[str, Callable[[Sequence[Kernel], str], list[str]]] = {
    "float16": _float16,
    "dynamic": _dynamic,
    "int8": _int8,
    "int16x8": _int16x8,
    "int8_weights": _weights,
    "int4_weights": _weights,
}
