"""Team: the processes of a `multi_worker` run. The chief walks the plan; the others train with it when it says so.

    TF_CONFIG --place()--> Place --join()--> Team

Number 0 is the chief. It alone plans, reads the store's state, and writes artifacts, results and TensorBoard. Steps that
train are carried out by all at once: the chief announces each one, everyone enters it with the chief's checkpoints, and what
the others write goes to a folder of their own that is thrown away (saving takes part of the team, so that they cannot
leave it out). All workers read the workspace, so it lies on a disk that they share.

What is said goes through the key-value store of TensorFlow's coordination service, which lives in the chief. A lost process
shows as an error of whatever waits for it; TensorFlow cannot take a new process into a running team, so every one that
is left starts again: `WorkerError`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from components.artifacts import Share
from components.errors import ConfigError, ContractError, TrimlineError, WorkerError
from components.options import StrategyOptions
from pipeline.store import EVENTS

log = logging.getLogger("trimline")

TOGETHER = ("train", "compress")
"""Stages that all workers carry out at once."""

JOIN_SECONDS = 600.0  # long enough for a machine that boots; a name that is wrong shows before lunch
_POLL_SECONDS = 0.5  # how long a wait keeps Ctrl-C waiting
_CONFIRM_SECONDS = 60.0  # within it, a fault that lies in the model has shown in every worker
_FAREWELL_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Place:
    """Who this process is among those that TF_CONFIG names.

    Attributes:
      index: 0 is the chief.
      addresses: 'host:port' of each.
    """

    index: int
    addresses: tuple[str, ...]

    @property
    def chief(self) -> bool:
        """True for the one that writes."""
        return self.index == 0

    @property
    def share(self) -> Share:
        """What this process takes of every batch."""
        return Share(self.index, len(self.addresses))


ALONE = Place(0, ("",))


def place(options: StrategyOptions, environment: Mapping[str, str] = os.environ) -> Place:
    """Reads TF_CONFIG; `ALONE` for every strategy but multi_worker.

    Raises:
      ConfigError: TF_CONFIG is absent, cannot be read, or does not agree with `options.workers`.
    """
    if options.name != "multi_worker":
        return ALONE
    text = environment.get("TF_CONFIG")
    if not text:
        raise ConfigError(
            "strategy.name=multi_worker must find the workers in the variable TF_CONFIG, which is not set; set it on every "
            f"machine, or run them all on this one: trimline launch CONFIG --workers {options.workers}."
        )
    try:
        value = json.loads(text)
        cluster, task = value["cluster"], value["task"]
        addresses = tuple(str(each) for job in ("chief", "worker") for each in cluster.get(job, ()))
        kind, index = task["type"], int(task["index"])
        found = index + (len(cluster.get("chief", ())) if kind == "worker" else 0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"TF_CONFIG must be JSON with the worker list of a cluster and the type and index of a task, got {text[:80]!r} ({type(error).__name__}: {error}); "
            'for instance {"cluster": {"worker": ["host0:2222", "host1:2222"]}, "task": {"type": "worker", "index": 0}}.'
        ) from error
    if not all(re.fullmatch(r".+:\d+", each) for each in addresses):
        raise ConfigError(f"TF_CONFIG: each worker must be 'host:port', got {', '.join(addresses)}; add the port.")
    if kind not in ("chief", "worker") or not 0 <= found < len(addresses):
        raise ConfigError(
            f"TF_CONFIG: the task must be one of the {len(addresses)} of chief and worker, got {kind} {index}; correct task."
        )
    if len(addresses) != options.workers:
        raise ConfigError(
            f"strategy.workers={options.workers} must be the number of workers in TF_CONFIG, got {len(addresses)}; correct one of them."
        )
    return Place(found, addresses)


@dataclasses.dataclass
class Team:
    """The joined processes.

    Attributes:
      place: Of this one.
      strategy: That spans them.
      broken: True once this process failed where the others did not: they no longer stand at the same operation.
    """

    place: Place
    strategy: Any
    broken: bool = False
    _number: int = 0

    @classmethod
    def join(cls, where: Place, options: StrategyOptions, seconds: float = JOIN_SECONDS) -> Team:
        """Waits until every process is there.

        Raises:
          ConfigError: After `seconds` some were not.
          WorkerError: They were, and one left at once.
        """
        from pipeline.strategy import make_strategy

        until = time.monotonic() + seconds
        if where.chief:
            # The others open their ports and wait for the chief. TensorFlow's wait for them would hold Python's lock.
            for address in where.addresses[1:]:
                if not _opens(address, until):
                    raise ConfigError(_nobody(where, seconds, f"{address} did not answer"))
        made: list[Any] = []

        def make() -> None:
            try:
                made.append(make_strategy(options))
            except Exception as error:
                made.append(error)

        # In a thread: TensorFlow waits in C++, where Ctrl-C is not heard.
        thread = threading.Thread(target=make, daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < until:
            thread.join(_POLL_SECONDS)
        if not made:
            raise ConfigError(_nobody(where, seconds, f"the chief, {where.addresses[0]}, did not answer"))
        if isinstance(made[0], Exception):
            raise WorkerError(f"the team could not be joined: {_first_line(made[0])}.") from made[0]
        return cls(where, made[0])

    # --- the chief ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def led(self, step: str, folder: pathlib.Path, recipes: list[str]) -> Iterator[None]:
        """Announces a step that all carry out; the body is the chief's own part.

        Args:
          step: Its name in the plan.
          folder: Where the chief builds; the others start from a copy.
          recipes: Of the plan in which the step stands.

        Raises:
          WorkerError: Another process was lost on the way.
        """
        number = self._say({"step": step, "folder": str(folder), "recipes": recipes})
        try:
            with self._losses():
                self._meet()  # all have their copy
            with self._losses():
                yield
        except WorkerError:
            raise
        except Exception:
            self.broken = not self._all_failed(number)
            self._put(f"{number}/outcome", "failed")
            raise
        self._put(f"{number}/outcome", "done")

    def dismiss(self, error: BaseException | None) -> None:
        """Tells the others that the run is over, and why; waits a moment until they have heard."""
        with contextlib.suppress(WorkerError):
            number = self._say({"end": None if error is None else _first_line(error)})
            until = time.monotonic() + _FAREWELL_SECONDS
            for index in range(1, len(self.place.addresses)):
                self._get(f"{number}/bye/{index}", max(0.1, until - time.monotonic()))

    def _all_failed(self, number: int) -> bool:
        until = time.monotonic() + _CONFIRM_SECONDS
        others = range(1, len(self.place.addresses))
        return all(self._get(f"{number}/failed/{index}", max(0.1, until - time.monotonic())) for index in others)

    def _say(self, message: dict[str, Any]) -> int:
        self._number += 1
        self._put(f"{self._number}/message", json.dumps(message))
        return self._number

    # --- the others --------------------------------------------------------------------------------------------------

    def orders(self) -> Iterator[dict[str, Any]]:
        """What the chief says, until it says that the run is over.

        Raises:
          WorkerError: The chief is gone.
        """
        while True:
            self._number += 1
            text = None
            while text is None:
                text = self._get(f"{self._number}/message", _POLL_SECONDS)
            message = json.loads(text)
            if "end" in message:
                self._put(f"{self._number}/bye/{self.place.index}", "bye")
            yield message
            if "end" in message:
                return

    @contextlib.contextmanager
    def followed(self, order: Mapping[str, Any]) -> Iterator[pathlib.Path]:
        """Gives the body a folder that starts as the chief's and is thrown away; the body is this worker's part.

        A fault that the chief has too is swallowed: the chief records it.

        Raises:
          WorkerError: Another process was lost on the way.
        """
        number = self._number
        with tempfile.TemporaryDirectory(prefix="trimline-worker-") as scratch:
            folder = pathlib.Path(scratch)
            try:
                _copy(pathlib.Path(order["folder"]), folder)
                with self._losses():
                    self._meet()
                with self._losses():
                    yield folder
            except WorkerError:
                raise
            except Exception as error:
                log.exception("%s failed", order["step"], exc_info=error)
                self._put(f"{number}/failed/{self.place.index}", _first_line(error))
                if self._get(f"{number}/outcome", 1.5 * _CONFIRM_SECONDS) is None:
                    raise  # the chief waits for this worker: leaving sets it free

    # --- how it is said ----------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        from components.workers import agreed

        agreed(self.strategy, 0.0)

    def _put(self, key: str, value: str) -> None:
        from tensorflow.python.eager import context  # the coordination service has no public name

        with self._losses():
            context.context().set_config_key_value(f"trimline/{key}", value)

    def _get(self, key: str, seconds: float) -> str | None:
        """The value once it is there; None where it is not after `seconds`."""
        import tensorflow as tf
        from tensorflow.python.eager import context

        until = time.monotonic() + seconds
        while True:
            left = min(_POLL_SECONDS, max(0.01, until - time.monotonic()))
            try:
                with self._losses():
                    return str(context.context().get_config_key_value(f"trimline/{key}", max(1, int(left * 1000))))
            except tf.errors.DeadlineExceededError:
                if time.monotonic() >= until:
                    return None

    @contextlib.contextmanager
    def _losses(self) -> Iterator[None]:
        """A peer that is gone is met as one of several errors of TensorFlow, all of which mean: start again."""
        import tensorflow as tf

        try:
            yield
        except TrimlineError:
            raise
        except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
            raise WorkerError(self._lost(error)) from error
        except tf.errors.OpError as error:
            if "Collective ops is aborted" not in str(error):
                raise
            raise WorkerError(self._lost(error)) from error

    def _lost(self, error: BaseException) -> str:
        who = "worker" if self.place.chief else "the chief or another worker"
        log.error("lost: %s", error)
        return f"{who} of the {len(self.place.addresses)} was lost ({type(error).__name__}); the run goes on from its last checkpoint once all are back."


def _opens(address: str, until: float) -> bool:
    """Waits until somebody listens there; False where nobody did in time."""
    host, _, port = address.rpartition(":")
    while time.monotonic() < until:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_POLL_SECONDS).close()
        except OSError:
            time.sleep(_POLL_SECONDS)
        else:
            return True
    return False


def _nobody(where: Place, seconds: float, what: str) -> str:
    return (
        f"strategy.name=multi_worker: all {len(where.addresses)} workers must come together within {seconds:g} s, and {what}; start "
        "trimline run on each, and see that they reach each other."
    )


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    if not source.is_dir():
        raise ContractError(
            f"{source}: every worker must see the chief's workspace, and this one does not; put it on a disk that they share "
            "(--set workspace=FOLDER)."
        )
    shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(EVENTS, ".*"))


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
