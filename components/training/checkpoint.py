"""Checkpoint: all that a training needs to go on after a kill, in one file per epoch, written whole or not at all.

Two are kept: should the newest be damaged (a power cut, a full disk), the one before it is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

_NAME = re.compile(r"checkpoint-(\d{6})\.npz")
_KEPT = 2


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """State after `epoch` whole epochs.

    Attributes:
      epoch: Epochs done, 1 or more.
      arrays: Groups of arrays by name ('model', 'optimizer', 'best'), each in a fixed order.
      facts: JSON-able values (history, best loss, seconds).
    """

    epoch: int
    arrays: dict[str, list[np.ndarray]]
    facts: dict[str, Any]

    def save(self, folder: pathlib.Path) -> pathlib.Path:
        """Writes it and removes all but the newest two.

        No fsync: a killed process loses nothing that it wrote, and after a power cut the zip's checksums tell.
        """
        path = folder / f"checkpoint-{self.epoch:06d}.npz"
        temporary = folder / f".{path.name}.{os.getpid()}"
        facts = json.dumps({"epoch": self.epoch, **self.facts}).encode()
        flat: dict[str, Any] = {"facts": np.frombuffer(facts, np.uint8)}
        for group, values in self.arrays.items():
            flat |= {f"{group}/{index:05d}": value for index, value in enumerate(values)}
        with temporary.open("wb") as file:
            np.savez(file, **flat)
        temporary.replace(path)
        for old in _found(folder)[_KEPT:]:
            old.unlink()
        return path


def newest(folder: pathlib.Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Reads the newest whole checkpoint in `folder`; None where there is none.

    Half-written files of a killed attempt are removed; a damaged checkpoint is named to `warn`, removed and passed over.
    """
    for leftover in folder.glob(".checkpoint-*"):
        leftover.unlink()
    for path in _found(folder):
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            warn(f"{path.name} is damaged ({error}); training resumes from the one before it.")
            path.unlink()
    return None


def remove(folder: pathlib.Path) -> None:
    """Removes every checkpoint in `folder`."""
    for path in _found(folder):
        path.unlink()


def _found(folder: pathlib.Path) -> list[pathlib.Path]:
    """Newest first."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)


def _read(path: pathlib.Path) -> Checkpoint:
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves a damaged file open
        facts = json.loads(file["facts"].tobytes())
        arrays: dict[str, list[np.ndarray]] = {}
        for name in sorted(file.files):
            if name != "facts":
                arrays.setdefault(name.partition("/")[0], []).append(file[name])
    return Checkpoint(facts.pop("epoch"), arrays, facts)
