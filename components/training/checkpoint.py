"""Checkpoint: all that a training needs to go on after a kill, in one folder, written whole or not at all.

Some are kept: should the newest be damaged (a power cut, a full disk), the one before it is read. Large models are
written in several files, variable by variable, so that writing one needs little memory beside the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

_NAME = re.compile(r"checkpoint-(\d{9})")
_KEPT = 3
_SHARD_BYTES = 512 << 20


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """State after some updates.

    Attributes:
      updates: Made since the training began, 1 or more.
      arrays: Groups of arrays by name ('model', 'optimizer', 'best'), each in a fixed order; generators are read once.
      facts: JSON-able values (history, best loss, seconds).
    """

    updates: int
    arrays: Mapping[str, Iterable[np.ndarray]]
    facts: dict[str, Any]

    def save(self, folder: pathlib.Path, shard_bytes: int = _SHARD_BYTES) -> pathlib.Path:
        """Writes it and removes all but the newest three.

        No fsync: a killed process loses nothing that it wrote, and after a power cut the zips' checksums tell.

        Args:
          folder: Where checkpoints are.
          shard_bytes: A file is closed once it holds this many.

        Raises:
          OSError: The disk refused; older checkpoints are as they were.
        """
        path = folder / f"checkpoint-{self.updates:09d}"
        temporary = folder / f".{path.name}.{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            count = 0
            for count, shard in enumerate(_shards(self.arrays, shard_bytes), 1):
                with (temporary / f"{count:03d}.npz").open("wb") as file:
                    np.savez(file, **shard)
            facts = {"updates": self.updates, "shards": count, "groups": list(self.arrays), "facts": self.facts}
            (temporary / "facts.json").write_text(json.dumps(facts), encoding="utf-8")
            if path.exists():  # an interrupted training stands where it stood before
                _remove(path)
            temporary.rename(path)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in _found(folder)[_KEPT:]:
            _remove(old)
        return path


def newest(folder: pathlib.Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest whole checkpoint in `folder`; None where there is none.

    Half-written folders of a killed attempt are removed; a damaged checkpoint is named to `warn`, removed and passed over.
    """
    for leftover in folder.glob(".checkpoint-*"):
        shutil.rmtree(leftover)
    for path in _found(folder):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            warn(f"{path.name} is damaged ({error}); training resumes from the one before it.")
            _remove(path)
    return None


def latest(folder: pathlib.Path) -> str | None:
    """Name of the newest checkpoint in `folder`."""
    return next((path.name for path in _found(folder)), None)


def remove(folder: pathlib.Path) -> None:
    """Removes every checkpoint in `folder`."""
    for path in _found(folder):
        _remove(path)


def _remove(path: pathlib.Path) -> None:
    """Under another name first: a kill in the middle must not leave half of it under its trusted one."""
    doomed = path.with_name(f".{path.name}.doomed")
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(doomed)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
    """Newest first."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _shards(arrays: Mapping[str, Iterable[np.ndarray]], most: int) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    held = 0
    for group, values in arrays.items():
        for index, value in enumerate(values):
            shard[f"{group}/{index:05d}"] = value
            held += value.nbytes
            if held >= most:
                yield shard
                shard, held = {}, 0
    if shard:
        yield shard


def _read(path: pathlib.Path) -> Checkpoint:
    about = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    arrays: dict[str, list[np.ndarray]] = {group: [] for group in about["groups"]}
    for number in range(1, about["shards"] + 1):
        with (path / f"{number:03d}.npz").open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            for name in sorted(file.files):  # np.load leaves a damaged file open, hence `raw`
                arrays[name.partition("/")[0]].append(file[name])
    return Checkpoint(about["updates"], arrays, about["facts"])
