"""Insight: what a training spent its time on, in numbers and in words."""

from __future__ import annotations

import resource
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

# Of the time of an update spent waiting for its batch. Below the first the input is no matter, from the second on it is
# the matter.
_LITTLE, _MUCH = 0.05, 0.25

_ADVICE = "the device waits for data: lighter preprocess.columns or train.augmentation, a larger train.batch_size, or more cores help"


def insight(history: Mapping[str, Sequence[float]], batch_size: int, memory: int) -> dict[str, Any]:
    """Speed of a training from the rows of its epochs; the first, which traces, is left out where there are more.

    Args:
      history: By epoch: 'examples_per_second' and 'waiting_share'.
      batch_size: Examples of one update.
      memory: Greatest use so far, bytes.

    Returns:
      {"examples_per_second", "update_ms", "waiting_share": of the time of updates, spent waiting for a batch, "bound":
      'compute', 'input' or 'both', "memory_bytes"}: medians.
    """
    speed = statistics.median(history["examples_per_second"][1:] or history["examples_per_second"])
    share = statistics.median(history["waiting_share"][1:] or history["waiting_share"])
    return {
        "examples_per_second": speed,
        "update_ms": 1e3 * batch_size / speed,
        "waiting_share": share,
        "bound": "compute" if share < _LITTLE else "input" if share >= _MUCH else "both",
        "memory_bytes": memory,
    }


def in_words(found: Mapping[str, Any]) -> str:
    """One line for the user.

    >>> in_words({"examples_per_second": 1520.4, "update_ms": 42.1, "waiting_share": 0.01, "bound": "compute",
    ...           "memory_bytes": 1.5e9})
    'speed: 1,520 examples/s, 42.1 ms an update, 1 % of it waiting for data: compute-bound; at most 1,431 MiB of memory'
    """
    bound = {"compute": "compute-bound", "input": f"input-bound ({_ADVICE})", "both": "some of each"}[found["bound"]]
    return (
        f"speed: {found['examples_per_second']:,.0f} examples/s, {found['update_ms']:.1f} ms an update, "
        f"{found['waiting_share']:.0%} of it waiting for data: {bound}; at most {found['memory_bytes'] / 2**20:,.0f} MiB of memory"
    ).replace("%", " %")


def peak_memory() -> int:
    """Greatest use so far, bytes: of the fullest GPU, or of this process where there is none."""
    gpus = tf.config.list_logical_devices("GPU")
    if gpus:
        return max(tf.config.experimental.get_memory_info(each.name.removeprefix("/device:"))["peak"] for each in gpus)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


class Profiler:
    """TensorBoard's profile of some updates of a training.

    Args:
      span: First and last update, 1 is the first of the training; None profiles none.
      folder: Of the event files; None writes none.
    """

    def __init__(self, span: tuple[int, int] | None, folder: Any) -> None:
        self._span = span if folder is not None else None
        self._folder = str(folder)
        self._runs = False

    def most(self, done: int, count: int) -> int:
        """How many of the next `count` updates to make at once, after `done`, so that the span begins and ends with a call."""
        if self._span is None:
            return count
        begin, end = self._span[0] - 1, self._span[1]
        edge = begin if done < begin else end if done < end else done + count
        return min(count, edge - done)

    def at(self, done: int) -> None:
        """To be told before and after each call how many updates are done."""
        if self._span is None:
            return
        inside = self._span[0] - 1 <= done < self._span[1]
        if inside and not self._runs:
            tf.profiler.experimental.start(self._folder)
        elif self._runs and not inside:
            tf.profiler.experimental.stop()
        self._runs = inside

    def close(self) -> None:
        """Ends a profile that an error or a signal cut short."""
        if self._runs:
            tf.profiler.experimental.stop()
            self._runs = False
