"""Integers: a model as a file whose activations are integers, calibrated, by layer in another precision where asked.

    convert + rows --in_integers()--> content, what calibration found, promises

The TFLite converter writes files of one precision; those of several are quantized by ai-edge-quantizer from the float file
and the same ranges.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from components.artifacts import Promise
from components.delivery.activations import Activations
from components.delivery.calibration import CALIBRATION_LIMIT, Calibration, Rows, coverage, settle
from components.delivery.edge_quantizer import mixed
from components.delivery.owners import RETYPES
from components.delivery.precision import kept_in_float, precisions, promised
from components.delivery.proof import Kernel, read_proof
from components.delivery.scales import as_asked
from components.errors import ConfigError
from components.options import ExportOptions

BITS = {"int8": 8, "int16x8": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Integers:
    """A file and what is to be said of it.

    Attributes:
      content: The flatbuffer.
      calibration: For `calibration.json`.
      promises: Those given, with the precisions that options ask for.
      untreated: Those given, and layers that options keep in float.
    """

    content: bytes
    calibration: dict[str, Any]
    promises: list[Promise]
    untreated: list[dict[str, Any]]


def in_integers(
    convert: Callable[..., bytes],
    format: str,
    rows: Rows,
    options: ExportOptions,
    classes: Mapping[str, str],
    promises: Sequence[Promise],
    untreated: Sequence[dict[str, Any]],
    *,
    trained: bool,
) -> Integers:
    """Writes the model as 'int8' or 'int16x8'.

    Args:
      convert: (format, examples or None) -> flatbuffer, the converter.
      format: One of `components.recipe.IO`.
      rows: To calibrate with.
      options: Count of rows, input and output, precision by layer.
      classes: Name -> class of all Keras layers of the model.
      promises: Of the compression steps.
      untreated: By them.
      trained: The model carries fake quantization: it brings its ranges, and no layer can have another precision.

    Raises:
      ConfigError: A layer that options name is not there, or stands in the way of `options.io`.
    """
    if trained:
        if options.keep_float or options.int16:
            raise ConfigError(
                f"export.keep_float and export.int16 are for models without qat, got {options.keep_float + options.int16} for one with; name the layers in compress.qat.exclude."
            )
        taken = np.sort(rows.order[: options.calibration_examples or CALIBRATION_LIMIT])
        found = {"ranges": "trained", "rows": len(taken)}
        content = as_asked(convert(format, rows.inputs[taken]), options)
        return Integers(content=content, calibration=found, promises=list(promises), untreated=list(untreated))
    float_content = convert("float32")
    float_file = Activations(float_content, list(classes))
    chosen = precisions(float_file.operations, classes, options)
    calibration = settle(float_file, rows, options.calibration_examples)
    if chosen:
        content = _with_ends(mixed(float_content, calibration.ranges, BITS[format], chosen), options, classes)
        promises = promised(promises, float_file.operations, _kernels(float_content), chosen)
        untreated = [*untreated, *kept_in_float(float_file.operations, chosen, classes)]
    else:
        content = convert(format, rows.inputs[calibration.rows])
    content = as_asked(content, options)
    return Integers(
        content=content,
        calibration=_found(calibration, Activations(content, list(classes)), float_file, rows),
        promises=list(promises),
        untreated=list(untreated),
    )


def _found(calibration: Calibration, file: Activations, float_file: Activations, rows: Rows) -> dict[str, Any]:
    return {
        "ranges": "calibrated",
        "rows": len(calibration.rows),
        "steps": list(calibration.steps),
        "settled": calibration.settled,
        "tensors": coverage(file, float_file, calibration, rows),
    }


def _kernels(content: bytes) -> Sequence[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "float.tflite"
        path.write_bytes(content)
        return read_proof(path).weights


def _with_ends(content: bytes, options: ExportOptions, classes: Mapping[str, str]) -> bytes:
    """A file with float ends, with input and output as `options.io` says.

    Raises:
      ConfigError: The first or last operator stays in float, so there is no integer to take or give.
    """
    if options.io == "float32":
        return content
    operations = Activations(content, list(classes)).operations
    for end, operation in (("input", operations[0]), ("output", operations[-1])):
        if operation.kind not in RETYPES:
            raise ConfigError(
                f"export.io={options.io}: the {end} belongs to layer '{operation.layer}', which stays float32; set export.io: float32, or take the layer out of export.keep_float."
            )
    import tensorflow as tf
    from tensorflow.lite.python.util import modify_model_io_type

    dtype = tf.as_dtype(options.io)
    return bytes(modify_model_io_type(content, dtype, dtype))
