"""What the user sees of a run: live progress on a terminal, plain lines elsewhere, nothing from a library call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import rich.console
import rich.progress


class Screen:
    """Progress of one run.

    Args:
      console: Where to; None shows nothing.
      bar: False shows lines only.
    """

    def __init__(self, console: rich.console.Console | None, *, bar: bool = True) -> None:
        self._console = console
        self._wants_bar = bar
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None
        self._steps = 0
        self._note = ""

    @classmethod
    def silent(cls) -> Screen:
        """A screen that shows nothing."""
        return cls(None)

    def beside(self) -> Screen:
        """For a step that is carried out at the same time as the one that has the bar: lines on the same console."""
        return Screen(self._console, bar=False)

    def start(self, steps: int) -> None:
        """Says how many steps the plan has."""
        self._steps = steps

    def line(self, text: str, style: str | None = None) -> None:
        """Prints one line above any progress bar."""
        if self._console is not None:
            self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)

    def cached(self, name: str) -> None:
        """The step's artifact was there already."""
        self.line(f"  cached   {name}", "dim")

    def waiting(self, name: str) -> None:
        """Another process builds this artifact."""
        self.line(f"  waiting  {name}: another run is building it just now")

    def failed(self, name: str, reason: str) -> None:
        """The step failed, the run goes on."""
        self.line(f"  FAILED   {name}: {reason}", "red")

    def skipped(self, name: str, reason: str) -> None:
        """The step's time was up, the run goes on."""
        self.line(f"  skipped  {name}: {reason}", "yellow")

    def trial(self, recipe: str, why: str, left: str) -> None:
        """A search begins with a recipe."""
        self.line(f"  trial    {recipe}: {why} ({left})", "bold")

    def warn(self, text: str) -> None:
        """A warning that matters to the user."""
        self.line(f"  note     {text}", "yellow")

    def tell(self, text: str) -> None:
        """Something was chosen or found."""
        self.line(f"           {text}")

    def progress(self, done: float, total: float, note: str) -> None:
        """How far the current step is, in its own unit."""
        self._note = note
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)

    @contextlib.contextmanager
    def step(self, name: str, number: int) -> Iterator[None]:
        """Shows one step while the body works at it; a line stays when it is done.

        A step inside a step moves the bar of the outer one, under lines of its own.
        """
        clock, self._note = time.monotonic(), ""
        if self._console is None:
            yield
            return
        if self._console.is_terminal and self._bar is None and self._wants_bar:
            with self._live(f"{number + 1}/{self._steps} {name}"):
                yield
        else:
            self.line(f"  start    {name}")
            yield
        note = f"  ({self._note})" if self._note else ""
        self.line(f"  done     {name}  {time.monotonic() - clock:.1f} s{note}")

    @contextlib.contextmanager
    def _live(self, title: str) -> Iterator[None]:
        columns = (
            rich.progress.SpinnerColumn(),
            rich.progress.TextColumn("{task.description}", markup=False),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TimeRemainingColumn(compact=True),
            rich.progress.TextColumn("{task.fields[note]}", style="dim", markup=False),
        )
        with rich.progress.Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task(title, total=None, note="")
            try:
                yield
            finally:
                self._bar, self._task = None, None
