"""Shards: which blocks of a streamed training split one of several processes reads in an epoch.

The files of an epoch, shuffled alike in every process, stand one after the other; each process takes a run of their rows,
all of the same length. So no row goes to two, each reads the blocks of its own run only (one on the border is read by
both, and each takes its rows of it), and every epoch a process meets other files.

    3 files of 5, 4 and 6 rows in the order 2, 0, 1; two processes of 7 rows:
    process 0: file 2 rows 0-5, file 0 row 0        process 1: file 0 rows 1-4, file 1 rows 0-2
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import tensorflow as tf

from components.artifacts import PreparedData, Share
from components.errors import ContractError

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types


@dataclasses.dataclass(frozen=True)
class Shards:
    """The training split as one process of several sees it.

    Attributes:
      paths: string (files,).
      rows: int64 (files,), of each file.
      block_rows: Of every block but a file's last.
      first: First row of this process's run.
      wanted: Its length.
    """

    paths: Tensor
    rows: Tensor
    block_rows: int
    first: int
    wanted: int

    @classmethod
    def of(cls, data: PreparedData, share: Share, wanted: int) -> Shards | None:
        """The run of `wanted` rows; None where one process takes all.

        Raises:
          ContractError: A file holds another number of blocks than its rows make.
        """
        if share.count == 1:
            return None
        size, files = data.manifest["block_rows"], data.manifest["splits"]["train"]["files"]
        for file in files:
            if file["blocks"] != math.ceil(file["rows"] / size):
                raise ContractError(
                    f"{data.folder / file['name']}: {file['rows']} rows must lie in {math.ceil(file['rows'] / size)} blocks of {size} to be shared "
                    f"out, got {file['blocks']}; run preprocess again with --force preprocess."
                )
        paths = tf.constant([str(path) for path in data.files("train")], tf.string)
        return cls(paths, tf.constant([file["rows"] for file in files], tf.int64), size, share.index * wanted, wanted)

    def blocks(self, order: Tensor) -> tf.data.Dataset:
        """(path, where it begins in the split, first row, row after the last) of the files in this run, with the files in `order`, int32 (files,)."""
        rows = tf.gather(self.rows, order)
        starts = tf.cumsum(rows, exclusive=True)
        first = tf.clip_by_value(self.first - starts, 0, rows)
        last = tf.clip_by_value(self.first + self.wanted - starts, 0, rows)
        mine = tf.where(last > first)[:, 0]
        begins = tf.gather(tf.cumsum(self.rows, exclusive=True), order)
        parts = (tf.gather(self.paths, order), begins, first, last)
        return tf.data.Dataset.from_tensor_slices(tuple(tf.gather(part, mine) for part in parts))

    def read(self, path: Tensor, begins: Tensor, first: Tensor, last: Tensor) -> tf.data.Dataset:
        """(record, its place in the split, its first row that counts, the row after its last) of one file."""
        size = self.block_rows
        begin, end = first // size, (last + size - 1) // size
        records = tf.data.TFRecordDataset(path).skip(begin).take(end - begin).enumerate()

        def with_rows(number: Tensor, record: Tensor) -> tuple[Tensor, ...]:
            start = (begin + number) * size
            return record, begins + start, tf.maximum(first - start, 0), tf.minimum(last - start, size)

        return records.map(with_rows)
