"""Launch: several `trimline run` on one machine, and what brings a broken team together again.

    arguments, number --launch()--> exit code of the chief

TensorFlow takes no new process into a running team. So when one dies, the others notice (`WorkerError`) and each replaces
itself with a fresh process of the same number, `start_again`; the dead one is started here, or by whoever watches over the
machines. All meet anew and go on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from components.errors import WorkerError

_AGAIN = "TRIMLINE_STARTED_AGAIN"  # how often this process has replaced itself
_MOST = 50
_LONGEST_PAUSE = 30.0
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 15.0  # for a stop on request: longer than a step of training takes
_END_SECONDS = 30.0  # for the others, once one has ended
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start_again(error: WorkerError) -> NoReturn:
    """Replaces this process with a fresh one of the same arguments, after a pause that grows; `--force` is dropped.

    Raises:
      WorkerError: It has done so too often.
    """
    before = int(os.environ.get(_AGAIN, "0"))
    if before >= _MOST:
        raise WorkerError(f"{error} Given up after {_MOST} times; look at the logs of all workers.") from error
    print(f"trimline: {error} Starting again ({before + 1} of {_MOST}).", file=sys.stderr, flush=True)
    time.sleep(min(_LONGEST_PAUSE, 2.0 ** min(before, 10) / 2))
    os.environ[_AGAIN] = str(before + 1)
    os.execv(sys.executable, [sys.executable, *_unforced(sys.orig_argv[1:])])


def _unforced(arguments: Sequence[str]) -> list[str]:
    """What was forced is out of the store by now, and a second time would throw the checkpoints away."""
    kept, skip = [], False
    for each in arguments:
        if not skip and each != "--force" and not each.startswith("--force="):
            kept.append(each)
        skip = not skip and each == "--force"
    return kept


def launch(arguments: Sequence[str], force: Sequence[str], folder: pathlib.Path, *, workers: int, restarts: int) -> int:
    """Runs `trimline run` in `workers` processes until all have ended.

    Args:
      arguments: Of `run`.
      force: Further ones, for the first start only.
      folder: The run's; takes worker-N.out of all but the chief.
      workers: How many.
      restarts: How often a worker that was killed is started again.

    Returns:
      0, or the exit code of the first that ended in an error.

    Raises:
      WorkerError: A worker was killed more often than `restarts`.
      KeyboardInterrupt: After all were stopped.
    """
    crew = _Crew(arguments, folder, _free_ports(workers), restarts)
    with crew.stopped_at_the_end():
        for index in range(workers):
            crew.start(index, force)
        return crew.watch()


class _Crew:
    """The processes under way."""

    def __init__(self, arguments: Sequence[str], folder: pathlib.Path, ports: Sequence[int], restarts: int) -> None:
        self._arguments = list(arguments)
        self._folder = folder
        self._addresses = [f"127.0.0.1:{port}" for port in ports]
        self._restarts = restarts
        self._deaths = [0] * len(ports)
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, index: int, force: Sequence[str] = ()) -> None:
        """Starts worker `index`; the chief has this screen, the others a file."""
        task = {"cluster": {"worker": self._addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, "TF_CONFIG": json.dumps(task), **_devices(index, len(self._addresses))}
        command = [sys.executable, "-m", "pipeline", "run", *self._arguments, *force]
        with contextlib.ExitStack() as stack:
            output = None if index == 0 else stack.enter_context((self._folder / f"worker-{index}.out").open("ab"))
            # Sessions of their own: Ctrl-C comes through here, once, and to each.
            self._running[index] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def watch(self) -> int:
        """Waits for the end; starts again what was killed."""
        while self._running:
            for index, process in list(self._running.items()):
                code = process.poll()
                if code is None:
                    continue
                del self._running[index]
                if code < 0:
                    self._died(index, -code)
                elif code or index == 0:
                    return self._last_words(index, code)
            time.sleep(_POLL_SECONDS)
        return 0

    def _died(self, index: int, number: int) -> None:
        self._deaths[index] += 1
        name = "the chief" if index == 0 else f"worker {index}"
        what = f"{name} was killed by {signal.Signals(number).name}"
        if self._deaths[index] > self._restarts:
            raise WorkerError(
                f"{what} {self._deaths[index]} times, --restarts={self._restarts} allows no more; free memory, or look into {self._folder}."
            )
        print(
            f"trimline: {what}; started again ({self._deaths[index]} of {self._restarts}).", file=sys.stderr, flush=True
        )
        self.start(index)

    def _last_words(self, index: int, code: int) -> int:
        """One has ended: the others should, too. The chief's error is on the screen, another's is in its file."""
        until = time.monotonic() + _END_SECONDS
        while time.monotonic() < until and any(each.poll() is None for each in self._running.values()):
            if code and index == 0:
                break  # nobody is left to tell them
            time.sleep(_POLL_SECONDS)
        chief = self._running.get(0)
        if chief is not None and (chief.poll() or 0) > 0:
            return int(chief.returncode)  # its error is what ended the others
        if index:
            print(
                f"trimline: worker {index} ended with code {code}: {_tail(self._folder / f'worker-{index}.out')}",
                file=sys.stderr,
            )
        return code

    @contextlib.contextmanager
    def stopped_at_the_end(self) -> Iterator[None]:
        """Leaves no process behind, however the body ends."""
        try:
            yield
        finally:
            self._signal(signal.SIGINT)
            until = time.monotonic() + _GRACE_SECONDS
            while time.monotonic() < until and any(each.poll() is None for each in self._running.values()):
                time.sleep(_POLL_SECONDS)
            self._signal(signal.SIGKILL)
            for process in self._running.values():
                process.wait()

    def _signal(self, which: signal.Signals) -> None:
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(which)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _devices(index: int, count: int) -> dict[str, str]:
    """GPUs of this machine that CUDA_VISIBLE_DEVICES lists, dealt out: two processes must not take the same one."""
    listed = [each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    return {"CUDA_VISIBLE_DEVICES": ",".join(listed[index::count])} if len(listed) >= count else {}


def _die_with_parent() -> None:
    """In the child: a launcher that is killed leaves nobody behind. Linux only; elsewhere they end when the chief does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _tail(path: pathlib.Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1]} ({path})" if lines else str(path)
