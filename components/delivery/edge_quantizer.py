"""What ai-edge-quantizer does for the export, on a float file that the converter made.

    float file --weights_only(bits)--> kernels in integers, arithmetic in float
    float file + ranges --mixed(precisions)--> integers, but for the operators that are named

Its import waits until it is needed: with all that it brings it takes a tenth of a second.
"""

from __future__ import annotations

import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from components.delivery.formats import KERNELS_OF_BITS
from components.delivery.proof import read_proof


def weights_only(path: pathlib.Path, bits: int) -> bytes:
    """Stores kernels as integers, symmetric and with one scale a channel; a DEQUANTIZE before each use widens them.

    Args:
      path: A float32 `.tflite` file.
      bits: 8 or 4. Operators that have no 4-bit kernel get 8, see `formats.KERNELS_OF_BITS`.

    Returns:
      The quantized file; equal arguments give equal bytes.

    Source: github.com/google-ai-edge/ai-edge-quantizer, recipes weight_only_wi8_afp32 and weight_only_wi4_afp32; scales
    of 4-bit kernels by OCTAV (Sakr et al. 2022, arXiv 2206.06501): on a toy like that of the tests its answers are off by
    0.05 of their spread, where those of the widest range are by 0.07. Pruned kernels take the widest range: OCTAV counts
    zeros as small weights, and divides by zero where an output channel holds nothing else.
    """
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName as Name
    from ai_edge_quantizer.quantizer import Quantizer

    scales = AlgorithmName.MIN_MAX_UNIFORM_QUANT if read_proof(path).sparsity else AlgorithmName.OCTAV
    quantizer = Quantizer(path)
    quantizer.add_weight_only_config(".*", Name.ALL_SUPPORTED, 8)
    for operator in KERNELS_OF_BITS[4] if bits == 4 else ():
        quantizer.add_weight_only_config(".*", Name[operator], 4, algorithm_key=scales)
    return _content(quantizer)


def mixed(content: bytes, ranges: Mapping[str, tuple[float, float]], bits: int, precisions: Mapping[str, str]) -> bytes:
    """Quantizes weights to int8 and activations to `bits`, with another precision for single operators.

    Args:
      content: A float32 `.tflite` file.
      ranges: Smallest and largest value of each activation by the tensor's name, see `calibration.settle`.
      bits: 8 or 16.
      precisions: By the name of an operator's first output: 'float32' or 'int16'.

    Returns:
      A file with float32 input and output. Operators that ai-edge-quantizer does not know stay float32.
    """
    from ai_edge_quantizer.algorithm_manager import AlgorithmName
    from ai_edge_quantizer.qtyping import TFLOperationName as Name
    from ai_edge_quantizer.quantizer import Quantizer

    quantizer = Quantizer(content)
    quantizer.add_static_config(".*", Name.ALL_SUPPORTED, bits, 8)
    for output, precision in precisions.items():
        scope = f"^{re.escape(output)};$"
        if precision == "int16":
            quantizer.add_static_config(scope, Name.ALL_SUPPORTED, 16, 8)
        else:
            quantizer.update_quantization_recipe(scope, Name.ALL_SUPPORTED, None, AlgorithmName.NO_QUANTIZE)
    for end in (Name.INPUT, Name.OUTPUT):  # matched by name like operators, so they come after them
        quantizer.update_quantization_recipe(".+", end, None, AlgorithmName.NO_QUANTIZE)
    values = {name: {"min": np.array(low), "max": np.array(high)} for name, (low, high) in ranges.items()}
    with warnings.catch_warnings():
        # It looks the tensors up in an interpreter that keeps them all, and never runs it.
        warnings.filterwarnings("ignore", ".*experimental_preserve_all_tensors", UserWarning)
        return _content(quantizer, values)


def _content(quantizer: Any, ranges: dict[str, Any] | None = None) -> bytes:
    made = quantizer.quantize(ranges, enable_progress_bar=False, enable_progress_report=False)
    return bytes(made.quantized_model)
