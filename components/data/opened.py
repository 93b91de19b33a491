"""Opened: prepared data that a training reads while they are still being written.

    preprocess --opening.json, then file by file--> OpenedData --records()--> the first epoch

How many rows each file will have is known from the statistics before any file is there (less those that only writing finds to
be malformed), and files are written and read in the same order, which depends on the seed alone: what is learned does
not depend on who was faster.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from components.artifacts import PreparedData, read_json
from components.data.blocks import read_records
from components.errors import ContractError

OPENING = "opening.json"
"""Manifest and transform as they will be, but for the bytes of the files; gone when the manifest is there."""
WAVES = 4
"""Pipelines, one after the other, that write the files; of several workers each takes some of a wave."""
_PAUSE = 0.05  # seconds between two looks for a file

T = TypeVar("T")


def in_order(files: Sequence[T], seed: int, index: Callable[[T], int]) -> list[T]:
    """`files` in the order in which they are written and read: by a hash of seed and number, so that neighbours part."""

    def place(file: T) -> bytes:
        return hashlib.blake2b(f"{seed}/{index(file)}".encode(), digest_size=8).digest()

    return sorted(files, key=place)


def waves(cuts: Sequence[T]) -> Iterator[list[T]]:
    """`cuts` in up to WAVES runs."""
    size = -(-len(cuts) // WAVES)
    return (list(cuts[start : start + size]) for start in range(0, len(cuts), size))


@dataclasses.dataclass(frozen=True)
class OpenedData(PreparedData):
    """Prepared data of which some are there.

    Attributes:
      folder: Where they will be when all are there.
      partial: Where they are until then.
      ended: Whether the preprocessing has ended; raises what ended it.
      seed: Of the order in which files are written.
    """

    partial: pathlib.Path
    ended: Callable[[], bool]
    seed: int

    @functools.cached_property
    def _opening(self) -> dict[str, Any]:
        return read_json(self.partial / OPENING)

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """As it will be, but for what only a written file has."""
        return self._opening["manifest"]

    @property
    def transform(self) -> dict[str, Any]:
        """The serialised transform."""
        return self._opening["transform"]

    @functools.cached_property
    def _missing(self) -> collections.deque[tuple[str, int]]:
        """(name, rows) of the training files that were not seen yet, in the reader's order."""
        files = in_order(self.manifest["splits"]["train"]["files"], self.seed, lambda each: number(each["name"]))
        return collections.deque((each["name"], each["rows"]) for each in files)

    def rows_there(self) -> int:
        """Training rows that can be read without waiting."""
        while self._missing and any((folder / self._missing[0][0]).exists() for folder in (self.partial, self.folder)):
            self._missing.popleft()
        return self.rows("train") - sum(rows for _, rows in self._missing)

    def whole(self) -> PreparedData:
        """All of it, as soon as it is there.

        Raises:
          ContractError: It has other training rows than the statistics promised.
        """
        while not self.ended():
            time.sleep(_PAUSE)
        made = PreparedData(self.folder)
        if made.rows("train") != self.rows("train"):
            raise ContractError(
                f"{self.folder}: {self.rows('train')} training rows were promised, {made.rows('train')} are sound; train again without --overlap."
            )
        return made


def records(data: PreparedData, seed: int) -> Iterator[tuple[bytes, int]]:
    """Each block of the training split once, and the place of its first row in the split, 0 is the first.

    Waits for what is not there yet.

    Raises:
      ContractError: A file is damaged.
    """
    files = data.manifest["splits"]["train"]["files"]
    begins = itertools.accumulate((file["rows"] for file in files), initial=0)
    placed = list(zip((file["name"] for file in files), begins, strict=False))
    for name, begin in in_order(placed, seed, lambda each: number(each[0])):
        for count, record in enumerate(_blocks(data, name)):
            yield record, begin + count * data.manifest["block_rows"]


def number(name: str) -> int:
    """Number of the source's part in a file's name: 7 of 'train-00007.tfrecord'."""
    return int(name.split("-")[1].split(".")[0])


def _blocks(data: PreparedData, name: str) -> Iterator[bytes]:
    if not isinstance(data, OpenedData):
        yield from read_records(data.folder / name)
        return
    while True:
        over = data.ended()  # before the look: what is not there afterwards never comes
        for folder in (data.partial, data.folder):
            if not (folder / name).exists():
                continue
            blocks = read_records(folder / name)
            try:
                first = next(blocks)
            except ContractError:
                if (folder / name).exists():
                    raise
                continue  # the folder got its own name just now
            yield first
            yield from blocks
            return
        if over:
            return  # every row of it turned out malformed
        time.sleep(_PAUSE)
