"""Epochs: one training under way, from where a checkpoint left it to its end or to a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

from components.artifacts import Batches
from components.errors import ModelError
from components.fields import in_seconds
from components.options import TrainOptions
from components.tracing import Trace
from components.training import checkpoint
from components.training.checkpoint import Checkpoint
from components.training.insight import Profiler, insight, peak_memory
from components.training.loop import Loop, Totals
from components.training.stop import Stop
from components.training.transfer import Stages

# How often progress is told and a signal heard; a call's fixed cost of 2 to 5 ms stays below 1 percent of it.
_SECONDS_PER_CALL = 1.0
_PAUSE = 0.05  # seconds between two looks for data that are being written
_QUICK = 0.1  # seconds; a checkpoint that takes no longer is written at the end of each epoch
_SAVING_PAYS = 20  # seconds of training for each that a checkpoint takes: before them the end of an epoch writes none
_GUESS = 1.2  # a model below this many times the accuracy of a guess is fed wrongly rather than bad
_ROWS_TOLD = 8


class _Asked(KeyboardInterrupt):
    """A signal asked for the end, and the training stands between two updates."""


@dataclasses.dataclass
class Training:
    """What is fixed comes first, then what a checkpoint holds beside weights and optimizer.

    `done` updates of the epoch after `epoch` whole ones are made, and `sums` are theirs.
    """

    options: TrainOptions
    model: keras.Model
    optimizer: keras.optimizers.Optimizer
    loop: Loop
    batches: Batches
    folder: pathlib.Path
    steps: int
    seed: int
    trace: Trace
    epoch: int = 0
    done: int = 0
    sums: np.ndarray = dataclasses.field(default_factory=Totals.START.copy)
    seconds: float = 0.0
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    best_epoch: int = 0
    best: list[np.ndarray] = dataclasses.field(default_factory=list)
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    saving: float = 0.0  # seconds that the last checkpoint took
    unsaved: float = 0.0  # seconds of training since then, the same in all processes
    stages: Stages | None = None
    remake: Callable[[], Loop] | None = None  # a loop that sees what `stages` changed

    def __post_init__(self) -> None:
        self._profiler = Profiler(self.options.profile, self.trace.folder)

    def resume(self) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        found = checkpoint.newest(self.folder, self.trace.warn)
        if found is None:
            return
        if found.facts["rows"] != self.batches.rows["train"]:
            self.trace.warn(
                "Rows that were counted turned out malformed, so the epoch has another order: the training starts again."
            )
            checkpoint.remove(self.folder)
            return
        arrays = {name: list(values) for name, values in found.arrays.items()}
        assign(self.model.variables, arrays["model"])
        assign(self.optimizer.variables, arrays["optimizer"])
        self.best = arrays.get("best", [])
        facts = found.facts
        self.epoch, self.done, self.seconds = facts["epoch"], facts["done"], facts["seconds"]
        self.sums = np.array(facts["sums"])
        self.history, self.best_epoch = facts["history"], facts["best_epoch"]

    def to_the_end(self) -> None:
        """Trains epoch by epoch, each followed by validation and, if that pays, a checkpoint, until the last or until patience ends.

        Raises:
          KeyboardInterrupt: A signal asked for the end; a checkpoint of this very moment is written.
          ModelError: Loss or weights are not finite.
        """
        if self._over():
            return
        iterator = self._iterator()
        with Stop() as stop:
            try:
                while not self._over():
                    self._one_epoch(iterator, stop)
                    if self._over() or self._saving_pays():
                        self.save()
                    if self.batches.first_apart and self.epoch == 1 and not self._over():
                        iterator = self._iterator()
            except _Asked:  # a second signal is no _Asked: it may come in the middle of an update
                self.save()
                raise
            finally:
                self._profiler.close()

    def _iterator(self) -> Any:
        """From the next update on."""
        data = self.batches.training(self.options.batch_size, self.seed, self.epoch)
        return self.loop.iterator(data.skip(self.done) if self.done else data)

    def learned(self) -> dict[str, Any]:
        """Facts of a training: those of the epoch whose weights are kept."""
        at, names = self.best_epoch - 1, ("loss", self._metric_name)
        return {
            "train": {name: self.history[name][at] for name in names},
            "validation": {name: self.history[f"val_{name}"][at] for name in names if "val_loss" in self.history},
            "seconds": sum(self.history["seconds"]),
            "speed": insight(self.history, self.options.batch_size, peak_memory()),
        }

    def taken_over(self) -> dict[str, Any]:
        """Facts of a model that came trained. Says so where it is no better than a guess: it is fed in another way then."""
        found = self._validate(Stop())
        classes = self.batches.spec.outputs
        if found.get("accuracy", 1.0) < _GUESS / classes:
            self.trace.warn(
                f"The model answers {found['accuracy']:.4f} of the validation rows rightly, a guess among {classes} classes {1 / classes:.4f}: "
                "it may be fed in another way than it was trained; see preprocess.pixels, preprocess.columns and the order of the labels."
            )
        return {"train": {}, "validation": found, "seconds": self.seconds}

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the moving averages of its weights inside the block, where `optimizer.ema` asks for them."""
        if self.options.optimizer.ema is None or not self.options.epochs:
            yield
            return
        weights = self.model.trainable_variables if self.stages is None else self.stages.variables
        before = [variable.numpy() for variable in weights]
        self.optimizer.finalize_variable_values(weights)
        try:
            yield
        finally:
            assign(weights, before)

    def save(self) -> None:
        """Writes a checkpoint of this moment.

        Raises:
          OSError: The disk refused; the checkpoint before is as it was.
        """
        begun = time.monotonic()
        # A checkpoint holds one value of each variable, so what goes on from here must have that one everywhere.
        self.loop.settle()
        arrays: dict[str, Any] = {
            "model": (variable.numpy() for variable in self.model.variables),
            "optimizer": (variable.numpy() for variable in self.optimizer.variables),
        }
        if self.best:
            arrays["best"] = self.best
        facts = {
            "epoch": self.epoch,
            "done": self.done,
            "rows": self.batches.rows["train"],
            "sums": self.sums.tolist(),
            "seconds": self.seconds,
            "history": self.history,
            "best_epoch": self.best_epoch,
        }
        Checkpoint(self.epoch * self.steps + self.done, arrays, facts).save(self.folder)
        self.saved_at = time.monotonic()
        self.saving, self.unsaved = self.saved_at - begun, 0.0

    def _saving_pays(self) -> bool:
        took = self.loop.agreed(self.saving)
        often = in_seconds(self.options.checkpoint_every)
        return took <= _QUICK or self.unsaved >= took * _SAVING_PAYS or self._since_saved() >= often

    def _since_saved(self) -> float:
        """Seconds; of several processes all must save together, whatever each one's clock says."""
        return self.loop.agreed(time.monotonic() - self.saved_at)

    def _over(self) -> bool:
        stopping = self.options.early_stopping
        out_of_patience = stopping is not None and self.best and self.epoch - self.best_epoch >= stopping.patience
        return bool(self.epoch >= self.options.epochs or out_of_patience)

    def _one_epoch(self, iterator: Any, stop: Stop) -> None:
        if self.stages is not None and self.remake is not None and self.stages.enter(self.epoch):
            self.loop = self.remake()
        row = self._train_epoch(iterator, stop)
        if self.batches.arriving is not None:
            self.seconds += self._await(self.batches.arriving.complete, stop)
        self.loop.settle()
        row["learning_rate"] = float(self.optimizer.learning_rate)
        row["examples_per_second"] = self.steps * self.options.batch_size / self.seconds
        row["waiting_share"] = Totals(self.batches.spec.task, self.sums).waited / self.seconds
        with self.averaged():
            row |= {f"val_{name}": value for name, value in self._validate(stop).items()}
            row["seconds"] = self.seconds
            self._remember(row)
        self._trace_epoch(row)

    def _in_calls(
        self,
        total: int,
        stop: Stop,
        call: Callable[[int], None],
        done: int = 0,
        most: Callable[[int, int], int] = lambda done, count: count,
    ) -> None:
        """Does `total` things in calls of about _SECONDS_PER_CALL; `call` is told how many to do next.

        `most` may lower that number; it is asked with what is done since the training began.
        """
        count = 1
        while done < total:
            started = time.perf_counter()
            count = most(self.epoch * self.steps + done, min(count, total - done))
            call(count)
            done += count
            # Of several processes all must do the same next, whatever each one's clock and signals say.
            taken = self.loop.agreed(time.perf_counter() - started)
            self.seconds += taken
            self.unsaved += taken
            if self.loop.agreed(float(stop.asked)):
                raise _Asked
            count = max(1, int(count * _SECONDS_PER_CALL / taken))

    def _train_epoch(self, iterator: Any, stop: Stop) -> dict[str, float]:
        often = in_seconds(self.options.checkpoint_every)
        arriving, size = self.batches.arriving, self.options.batch_size

        def most(done: int, count: int) -> int:
            count = self._profiler.most(done, count)
            if arriving is None or self.epoch:
                return count
            self._await(lambda: arriving.batches(size) > self.done, stop)
            return min(count, arriving.batches(size) - self.done)

        def advance(updates: int) -> None:
            before = self.epoch * self.steps + self.done
            self._profiler.at(before)
            self.sums = self.loop.advance(iterator, updates, self.sums)
            self.done += updates
            self._profiler.at(before + updates)
            totals = Totals(self.batches.spec.task, self.sums)
            if totals.finite_updates < self.done:
                raise self._diverged("training loss", totals.finite_updates)
            self._tell(totals)
            if self.done < self.steps and self._since_saved() >= often:
                self._refuse_infinite_weights()
                self.save()

        self._in_calls(self.steps, stop, advance, self.done, most)
        return Totals(self.batches.spec.task, self.sums).named()

    def _await(self, there: Callable[[], bool], stop: Stop) -> float:
        """Waits for data here rather than inside TensorFlow, where no signal is heard; returns for how long, seconds."""
        begun = time.perf_counter()
        while not there():
            if stop.asked:
                raise _Asked
            time.sleep(_PAUSE)
        waited = time.perf_counter() - begun
        self.sums = self.sums + np.array([0.0, 0.0, 0.0, 0.0, waited])
        return waited

    def _tell(self, totals: Totals) -> None:
        note = f"epoch {self.epoch + 1}/{self.options.epochs} loss {totals.loss:.3f} {totals.metric_name} {totals.metric:.3f}"
        if "val_loss" in self.history:
            note += f" (validation {self.history[f'val_{totals.metric_name}'][-1]:.3f})"
        self.trace.progress(self.epoch + self.done / self.steps, self.options.epochs, note)

    def _validate(self, stop: Stop) -> dict[str, float]:
        if not self.batches.rows.get("validation", 0):
            return {}
        data = self.batches.ordered("validation", self.options.batch_size)
        iterator = self.loop.iterator(data)
        sums = Totals.START

        def evaluate(count: int) -> None:
            nonlocal sums
            sums = self.loop.evaluate(iterator, count, sums)

        self._in_calls(int(data.cardinality()), stop, evaluate)
        totals = Totals(self.batches.spec.task, sums)
        if not math.isfinite(totals.loss):
            raise self._diverged("validation loss")
        return totals.named()

    def _remember(self, row: dict[str, float]) -> None:
        """The epoch is over: its row joins the history, its weights may be the best."""
        self._refuse_infinite_weights()
        self.epoch, self.done, self.sums, self.seconds = self.epoch + 1, 0, Totals.START, 0.0
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        if self.options.early_stopping is None:
            self.best_epoch = self.epoch
        elif not self.best or row["val_loss"] < self.history["val_loss"][self.best_epoch - 1]:
            self.best_epoch, self.best = self.epoch, [variable.numpy() for variable in self.model.variables]

    def _refuse_infinite_weights(self) -> None:
        """A checkpoint must never hold what no training can go on from."""
        if not all(np.isfinite(variable.numpy()).all() for variable in self.model.variables):
            raise self._diverged("model", of="in its weights ")

    def _diverged(self, what: str, step: int | None = None, of: str = "") -> ModelError:
        """What is wrong, where, and what is there to find out why: the batch's rows, and the state before it."""
        rate = self.options.optimizer.learning_rate
        if not self.options.epochs:
            return ModelError(
                "train: the validation loss of the model that was given is not finite; feed it as it was trained (preprocess.pixels, preprocess.columns)."
            )
        when = f"{of}after step {self.done} of {self.steps}"
        if step is not None:
            when = f"at step {step + 1} of {self.steps}{self._rows_at(step)}"
        kept = checkpoint.latest(self.folder)
        state = f" The state before is kept in {self.folder / kept}." if kept else ""
        return ModelError(
            f"train: the {what} is not finite in epoch {self.epoch + 1}, {when}; lower train.optimizer.learning_rate={rate:g} "
            f"(try {rate / 10:g}), or look for extreme values in the data.{state}"
        )

    def _rows_at(self, step: int) -> str:
        """Writes all row numbers to a file and names the first ones."""
        if self.batches.rows_of is None:
            return ""
        rows = self.batches.rows_of(self.options.batch_size, self.seed, self.epoch, step)
        path = self.folder / "diverged.txt"
        path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        told = ", ".join(map(str, rows[:_ROWS_TOLD])) + (", ..." if len(rows) > _ROWS_TOLD else "")
        return f" (rows {told} of the training split, all in {path})"

    def _trace_epoch(self, row: dict[str, float]) -> None:
        """Training and validation of one quantity stand side by side in TensorBoard."""
        speed = {"learning_rate": "learning_rate", "seconds": "speed/epoch_seconds"}
        speed |= {name: f"speed/{name}" for name in ("examples_per_second", "waiting_share")}
        for name, value in row.items():
            split = "validation" if name.startswith("val_") else "train"
            self.trace.scalar(speed.get(name) or f"{name.removeprefix('val_')}/{split}", value, self.epoch)
        self.trace.scalar("speed/update_ms", 1e3 * self.options.batch_size / row["examples_per_second"], self.epoch)
        self.trace.scalar("speed/memory_bytes", peak_memory(), self.epoch)

    @property
    def _metric_name(self) -> str:
        return "accuracy" if self.batches.spec.task == "classification" else "rmse"


def assign(variables: list[Any], values: list[np.ndarray]) -> None:
    """Gives each of `variables` its value."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
