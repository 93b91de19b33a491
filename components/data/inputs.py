"""Inputs: how the columns that blocks store become what a model gets, inside TensorFlow.

record --parse()--> columns --Inputs.expand()--> (inputs, labels)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf

from components.artifacts import PreparedData
from components.data.blocks import Layout
from components.data.transform import in_range
from components.errors import ContractError

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types
Columns = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """How stored columns become a model's input and labels; the TensorFlow side of `Transform.to_inputs`."""

    layout: Layout
    depths: tuple[int, ...]
    input_shape: tuple[int, ...]
    regression: bool
    pixels: str

    @classmethod
    def of(cls, data: PreparedData) -> Inputs:
        """Those of `data`.

        Raises:
          ContractError: Manifest and transform do not agree.
        """
        layout = Layout.from_json(data.manifest["columns"])
        depths = tuple(data.transform["inputs"].get("depths", ()))
        shapes = {column.name: column.shape for column in layout.columns}
        width = shapes.get("numbers", (0,))[0] + sum(depths)
        found = shapes.get("image", (width,))
        if found != data.spec.input_shape or len(depths) != shapes.get("ids", (0,))[0]:
            raise ContractError(
                f"{data.folder}: the stored columns {shapes} with one-hot widths {depths} must make inputs of shape {data.spec.input_shape}; run preprocess again with --force preprocess."
            )
        pixels = data.transform["inputs"].get("pixels", "")
        return cls(layout, depths, found, data.spec.task == "regression", pixels)

    def expand(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some rows; bit-equal to the NumPy definition, because only one product is rounded."""
        labels = columns["label"]
        pictures = "image" in columns
        x = in_range(tf.cast(columns["image"], tf.float32), self.pixels) if pictures else self._features(columns)
        return x, labels[:, tf.newaxis] if self.regression else labels

    def _features(self, columns: Columns) -> Tensor:
        parts = [columns["numbers"]] if "numbers" in columns else []
        parts += [tf.one_hot(columns["ids"][:, place], depth) for place, depth in enumerate(self.depths)]
        return tf.concat(parts, axis=1)


def parse(layout: Layout, record: Tensor) -> Columns:
    """Slices one record into columns of shape (rows, ...), inside TensorFlow.

    Args:
      layout: Of all blocks of the data set.
      record: string (), as `components.data.blocks.encode` made it.

    Raises:
      tf.errors.InvalidArgumentError: The record has another layout.
    """
    header = layout.header(0)
    rows = tf.io.decode_raw(tf.strings.substr(record, 8, 4), tf.int32)[0]
    # All of the header but the rows, which are bytes 8 to 11, is known beforehand.
    known = tf.strings.substr(record, 0, 8) + tf.strings.substr(record, 12, len(header) - 12)
    size = len(header) + rows * layout.row_bytes
    fits = tf.logical_and(known == header[:8] + header[12:], tf.strings.length(record) == size)
    told = "A block has another layout than the manifest tells; run preprocess again with --force preprocess."
    with tf.control_dependencies([tf.debugging.Assert(fits, [told, rows, tf.strings.length(record)])]):
        start = tf.constant(len(header))
    columns = {}
    for column in layout.columns:
        values = tf.io.decode_raw(tf.strings.substr(record, start, rows * column.row_bytes), column.dtype)
        columns[column.name] = tf.reshape(values, (-1, *column.shape))
        start += rows * column.row_bytes
    return columns
