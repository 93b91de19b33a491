"""The store: fingerprint -> artifact folder, written whole or not at all.

    workspace/store/<stage>/<fingerprint>/            an artifact; counts because its COMPLETED marker is inside
    workspace/store/<stage>/<fingerprint>.partial/    an attempt; a resuming stage finds its checkpoints here
    workspace/store/<stage>/<fingerprint>.lock        held by the process that builds; the kernel frees it on a kill

The marker is written last inside the attempt, then the folder gets its name by one rename. A kill at any moment leaves
either an attempt, which the next run goes on with, or a complete artifact.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import filelock

from components.artifacts import read_json, write_json
from components.errors import ContractError

MARKER = "COMPLETED"
FAILED = "failed.json"
EVENTS = "tensorboard"
DISK_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


@dataclasses.dataclass(frozen=True)
class Key:
    """Address of an artifact."""

    stage: str
    fingerprint: str


class Store:
    """Artifacts below `root`, shared by every run of a workspace and safe for several at once."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root

    def folder(self, key: Key) -> pathlib.Path:
        """Where the artifact is, or will be."""
        return self.root / key.stage / key.fingerprint

    def partial(self, key: Key) -> pathlib.Path:
        """Where an attempt at the artifact is, or would be."""
        return self.root / key.stage / f"{key.fingerprint}.partial"

    def completed(self, key: Key) -> bool:
        """True where the artifact may be trusted."""
        return (self.folder(key) / MARKER).is_file()

    def seconds(self, key: Key) -> float:
        """How long the stage worked for this artifact, over all attempts that it took, seconds."""
        return float(read_json(self.folder(key) / MARKER)["seconds"])

    def spent(self, key: Key) -> float:
        """How long an attempt that came to no artifact worked, seconds; 0 where there is none."""
        return self._spent(self.partial(key))

    def fail(self, key: Key, reason: str) -> None:
        """Remembers beside an attempt that another would end in the same way."""
        write_json(self.partial(key) / FAILED, {"reason": reason})

    def failure(self, key: Key) -> str | None:
        """What `fail` remembered."""
        path = self.partial(key) / FAILED
        return str(read_json(path)["reason"]) if path.exists() else None

    def remove(self, key: Key) -> None:
        """Forgets the artifact and any attempt at it, so that the next run builds it anew."""
        with self._lock(key, lambda: None):
            retract(self.folder(key))
            retract(self.partial(key))

    def build(
        self,
        key: Key,
        work: Callable[[pathlib.Path], Any],
        *,
        resumes: bool,
        waiting: Callable[[], None] = lambda: None,
    ) -> pathlib.Path:
        """Returns the artifact's folder, after `work(folder)` has filled it if nobody had before.

        Args:
          key: Where it goes.
          work: Fills the folder that it is given.
          resumes: True keeps what a killed attempt left; False starts from an empty folder.
          waiting: Called once if another process is building the same artifact just now.

        Raises:
          ContractError: The disk refused (full, read-only); what was there before is untouched.
        """
        with self._lock(key, waiting):
            if self.completed(key):
                return self.folder(key)
            partial, clock = self.partial(key), time.monotonic()
            if not resumes:
                retract(partial)
            try:
                partial.mkdir(parents=True, exist_ok=True)
                spent = self._spent(partial)
                try:
                    work(partial)
                except BaseException:
                    with contextlib.suppress(OSError):  # the disk may be what failed
                        write_json(partial / "spent.json", {"seconds": spent + time.monotonic() - clock})
                    raise
                return self._commit(key, partial, spent + time.monotonic() - clock)
            except OSError as error:
                if error.errno not in DISK_REFUSALS:
                    raise
                raise ContractError(
                    f"store: {key.stage} could not be written to {error.filename or partial}, got "
                    f"'{error.strerror or error}'; free space or choose another workspace, then run again."
                ) from error

    def _commit(self, key: Key, partial: pathlib.Path, seconds: float) -> pathlib.Path:
        for name in ("spent.json", FAILED):
            (partial / name).unlink(missing_ok=True)
        write_json(partial / MARKER, {"stage": key.stage, "fingerprint": key.fingerprint, "seconds": round(seconds, 3)})
        folder = self.folder(key)
        retract(folder)  # a folder without marker is not an artifact
        partial.rename(folder)
        _sync(folder.parent)
        return folder

    @contextlib.contextmanager
    def _lock(self, key: Key, waiting: Callable[[], None]) -> Iterator[None]:
        path = self.root / key.stage / f"{key.fingerprint}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                waiting()
                lock.acquire()
        except OSError as error:
            raise ContractError(
                f"store: the workspace must be writable, got '{error.strerror}' for {error.filename}; "
                "choose another with --set workspace=FOLDER."
            ) from error
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    def _spent(partial: pathlib.Path) -> float:
        path = partial / "spent.json"
        return float(read_json(path)["seconds"]) if path.exists() else 0.0


def publish(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file or an artifact's folder to `target` by a rename at the end, replacing what was there.

    What the store and TensorBoard added to an artifact stays behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    if source.is_dir():
        shutil.copytree(source, temporary, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MARKER, EVENTS))
        retract(target)
    else:
        shutil.copy2(source, temporary)
    temporary.rename(target)


def retract(folder: pathlib.Path) -> None:
    """Removes a folder so that a kill in the middle never leaves half of it under its trusted name."""
    if folder.exists():
        doomed = folder.with_name(f"{folder.name}.doomed-{os.getpid()}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync(folder: pathlib.Path) -> None:
    """Makes a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
