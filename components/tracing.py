"""What a stage tells the outside: numbers and pictures to TensorBoard, progress and warnings to whoever listens.

A stage receives one `Trace` and knows neither the terminal nor where the event files end up. `Trace()` is silent, so
every stage verb can be called on its own.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def _ignore(*_: Any) -> None:
    pass


class Trace:
    """One stage's voice. TensorFlow is imported on the first event only, so that a cached run never pays for it.

    Args:
      folder: Where the event file goes; None writes none.
      on_progress: Called with (done, total, note); `total` is in the stage's own unit (epochs, rows, files).
      on_warning: Called with one line that matters to the user, in our words.
      on_pulse: Called by steps that train before each update; what it raises ends the step.
      on_telling: Called with one line on what was chosen or found, which is no cause for concern.
    """

    def __init__(
        self,
        folder: pathlib.Path | None = None,
        on_progress: Callable[[float, float, str], None] = _ignore,
        on_warning: Callable[[str], None] = _ignore,
        on_pulse: Callable[[], None] = _ignore,
        on_telling: Callable[[str], None] = _ignore,
    ) -> None:
        self.folder = folder
        self.progress = on_progress
        self.warn = on_warning
        self.pulse = on_pulse
        self.tell = on_telling
        self._writer: Any = None

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _summary(self) -> Any:
        """`tf.summary` with this trace's writer as the default one, or None when nothing is to be written."""
        if self.folder is None:
            return None
        import tensorflow as tf

        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = tf.summary.create_file_writer(str(self.folder))
        return tf.summary

    def scalar(self, name: str, value: float, step: int = 0) -> None:
        """Writes one number; `step` counts in the stage's own unit."""
        if summary := self._summary():
            with self._writer.as_default():
                summary.scalar(name, value, step=step)

    def histogram(self, name: str, values: np.ndarray, step: int = 0) -> None:
        """Writes the distribution of `values` (any shape, numeric)."""
        if summary := self._summary():
            with self._writer.as_default():
                summary.histogram(name, np.asarray(values).reshape(-1), step=step)

    def images(self, name: str, pictures: np.ndarray, step: int = 0, most: int = 16) -> None:
        """Writes pictures of shape (count, height, width, 1 | 3 | 4), uint8 or float in [0, 1]."""
        if summary := self._summary():
            with self._writer.as_default():
                summary.image(name, pictures, step=step, max_outputs=most)

    def text(self, name: str, markdown: str, step: int = 0) -> None:
        """Writes Markdown."""
        if summary := self._summary():
            with self._writer.as_default():
                summary.text(name, markdown, step=step)

    def graph(self, name: str, function: Any) -> None:
        """Writes the graph of a `tf.function`'s concrete function `function`."""
        if summary := self._summary():
            with self._writer.as_default():
                summary.graph(function.graph)
                summary.text("graph", f"graph of `{name}`", step=0)

    def hparams(self, choices: Mapping[str, str | float | bool], results: Mapping[str, float]) -> None:
        """Writes one row of the HParams dashboard: what was chosen, and the numbers that it led to."""
        if summary := self._summary():
            from tensorboard.plugins.hparams import api

            with self._writer.as_default():
                api.hparams(dict(choices))
                for name, value in results.items():
                    summary.scalar(name, value, step=0)

    def flush(self) -> None:
        """Makes what was written visible to a TensorBoard that is already open."""
        if self._writer is not None:
            self._writer.flush()
