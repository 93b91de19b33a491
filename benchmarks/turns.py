"""Turns: ways of doing the same, each in a process of its own that stands still while another one works.

A shared machine is now faster, now slower, for seconds at a time, so ways take turns epoch by epoch and a ratio is the
median of those of epochs side by side.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

MARK = "turn "  # what a way says, among all that its libraries print; torch_resnet8.py has it, too
Epochs = list[dict[str, float]]


class Runner(contextlib.AbstractContextManager["Runner"]):
    """One way in a process of its own: the first epoch done, it makes another when asked.

    It says what it was told, a JSON list, and after each epoch {"wall", "processor": microseconds an example}.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def told(self) -> list[str]:
        """Waits for the end of the first epoch."""
        told: list[str] = self._heard()
        return told

    def epoch(self) -> dict[str, float]:
        """Asks for one more."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"a process ended early: {' '.join(self._command)}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Turns:
    """The side of the one who trains: to be called at the end of each epoch; returns when the next is asked for."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._since: tuple[float, float] | None = None

    def __call__(self, told: list[str]) -> None:
        """`told` is said once."""
        if self._since is None:
            said: Any = told
        else:
            took = (now - then for now, then in zip(_clocks(), self._since, strict=True))
            said = dict(zip(("wall", "processor"), (1e6 * each / self._rows for each in took), strict=True))
        print(MARK + json.dumps(said), flush=True)
        sys.stdin.readline()
        self._since = _clocks()


def take_turns(
    commands: Mapping[str, Sequence[str]], epochs: int, at_once: bool = False
) -> tuple[dict[str, Epochs], dict[str, list[str]]]:
    """By way: its epochs, and what it was told. Each way comes first as often as last.

    They start one after the other, as some measure while they do, or `at_once`.
    """
    found: dict[str, Epochs] = {way: [] for way in commands}
    told: dict[str, list[str]] = {}
    with contextlib.ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for way, command in commands.items():
            runners[way] = stack.enter_context(Runner(command))
            if not at_once:
                told[way] = runners[way].told()
        if at_once:
            told = {way: runner.told() for way, runner in runners.items()}
        print(f"{len(runners)} ways are ready", file=sys.stderr, flush=True)
        for epoch in range(epochs):
            for way in runners if epoch % 2 else reversed(runners):
                found[way].append(runners[way].epoch())
                speed = 1e6 / found[way][-1]["wall"]
                print(f"epoch {epoch + 1}/{epochs}: {way} {speed:.0f} examples/s", file=sys.stderr, flush=True)
    return found, told


def ratios(theirs: Epochs, ours: Epochs, clock: str = "wall") -> tuple[float, float, float]:
    """How many times as fast ours are: the median of the pairs, the lowest and the highest."""
    pairs = sorted(one[clock] / other[clock] for one, other in zip(theirs, ours, strict=True))
    return statistics.median(pairs), pairs[0], pairs[-1]


def _clocks() -> tuple[float, float]:
    """Wall and processor time, seconds."""
    return time.perf_counter(), time.process_time()
