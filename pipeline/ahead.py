"""Ahead: preprocessing in a thread of its own, while the first training reads what it has written so far."""

from __future__ import annotations

import contextlib
import pathlib
import random
import sys
import threading
import time
from collections.abc import Callable

from components.artifacts import PreparedData
from components.data.opened import OPENING, OpenedData
from components.errors import ContractError

_PAUSE = 0.05
_FAREWELL = 10.0  # seconds that a stopped run waits for the thread


class _CancelledError(Exception):
    """The run has ended otherwise."""


def _draw_apart() -> None:
    """Gives Beam a generator of random numbers of its own.

    Its counters draw from Python's, which all threads share, and Keras draws the seeds of initial weights from the same: what a
    model starts from would depend on how far the other thread is. One pass has run, so Beam's modules are loaded.
    """
    own = random.Random()
    for name, module in list(sys.modules.items()):
        if name.startswith("apache_beam.") and getattr(module, "random", None) is random:
            vars(module)["random"] = own


class Ahead:
    """A preprocessing under way.

    Args:
      work: Carries it out; calls what it is given now and then, which raises where nobody wants it any more.
      folder: Of the artifact.
      partial: Where it lies until it is one.
      seed: Of the run.
    """

    def __init__(
        self, work: Callable[[Callable[[], None]], object], folder: pathlib.Path, partial: pathlib.Path, seed: int
    ) -> None:
        self._work = work
        self._unwanted = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="preprocess", daemon=True)
        self.data = OpenedData(folder, partial, self.ended, seed)

    def start(self) -> bool:
        """Begins, and returns True as soon as a training may read; False where all was over before it could.

        Raises:
          TrimlineError: What the preprocessing raised before.
        """
        # One of an earlier attempt, or of another process that is building, says the same: the fingerprint is the same.
        opening = self.data.partial / OPENING
        self._thread.start()
        try:
            while True:
                over = self.ended()
                # Read now, once: the file is gone when the artifact is there.
                with contextlib.suppress(ContractError):
                    if opening.exists() and self.data.manifest:
                        _draw_apart()
                        return True
                if over:
                    return False
                time.sleep(_PAUSE)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def ended(self) -> bool:
        """Whether the artifact is there; raises what the preprocessing raised, and, once it is let go, for readers too."""
        if self._unwanted.is_set():
            raise _CancelledError
        if self._thread.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    @property
    def over(self) -> bool:
        """Whether it ended, well or not."""
        return not self._thread.is_alive()

    def finish(self) -> PreparedData:
        """The artifact, when it is there; raises what the preprocessing raised."""
        try:
            while not self.ended():
                time.sleep(_PAUSE)
        except KeyboardInterrupt:
            self.cancel()
            raise
        return PreparedData(self.data.folder)

    def cancel(self) -> None:
        """Lets it go: it ends after the wave that it is at."""
        self._unwanted.set()
        self._thread.join(_FAREWELL)

    def _run(self) -> None:
        try:
            self._work(self._pulse)
        except BaseException as error:  # noqa: BLE001 - raised where it is asked for
            self._error = error

    def _pulse(self) -> None:
        if self._unwanted.is_set():
            raise _CancelledError
