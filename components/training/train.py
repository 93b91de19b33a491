"""Train: an untrained model and batches become a trained model, checkpointed each epoch.

    TrainOptions, model, Batches --train()--> TrainedModel

A run that was killed and is started again in the same folder goes on after its last whole epoch and ends with the same
bits as a run that was never disturbed: order and augmentation depend on (seed, epoch) only, and the checkpoint holds
weights, optimizer and the random states of the layers.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from components.artifacts import Batches, TrainedModel, write_json
from components.distillation import Teacher, make_lesson
from components.errors import ConfigError, DataError, ModelError
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training import checkpoint
from components.training.checkpoint import Checkpoint
from components.training.loop import Loop, Totals, make_loss
from components.training.model import outputs_of
from components.training.optimizer import make_optimizer
from components.training.replicas import check_batch
from components.workers import check_share, several

_GUESS = 1.2  # a model below this many times the accuracy of a guess is fed wrongly rather than bad
_SECONDS_PER_CALL = 0.25  # how often progress is told; a call's fixed cost of some 2 ms stays below 1 percent of it


def train(
    options: TrainOptions,
    build_model: Callable[[], keras.Model],
    model_options: ModelOptions,
    batches: Batches,
    folder: pathlib.Path,
    *,
    strategy: tf.distribute.Strategy,
    seed: int,
    trace: Trace,
    teachers: Callable[[], tuple[Teacher, ...]] = tuple,
) -> TrainedModel:
    """Trains and writes `model.keras`, `history.json` and, last, `trained.json`.

    Args:
      options: Epochs, global batch size, optimizer, early stopping; 0 epochs take the model as it is.
      build_model: Returns a built model with the same initial weights each time; called under the strategy's scope.
      model_options: Says whether a classifier returns logits or probabilities.
      batches: Augmentation is theirs; only the splits train and validation are read.
      folder: Exists; checkpoints of a killed attempt in it are resumed from.
      strategy: See `pipeline.strategy`.
      seed: Fixes the order of the examples.
      trace: Progress counts epochs; steps of the scalars are epochs, 1 is the first.
      teachers: Loads those that `options.distill` names; called under the strategy's scope.

    Returns:
      The folder's artifact. Its facts: outputs, parameters, epochs, best_epoch (whose weights these are; 1 is the
      first, 0 are those that the model came with), train and validation {"loss", "accuracy" | "rmse"}, seconds.

    Raises:
      ConfigError: The batch does not divide by the replicas or exceeds the training split; an optimizer option is wrong.
      DataError: Early stopping without a validation split.
      ModelError: The loss is not finite, or nothing can be trained.
    """
    steps = _check(options, batches, strategy, trace)
    with strategy.scope():
        model = build_model()
        optimizer = make_optimizer(options.optimizer, steps, max(1, options.epochs))
        if options.epochs and not model.trainable_variables:
            raise ModelError(
                f"model '{model.name}' has no trainable weights; set layer.trainable = True on some layer."
            )
        optimizer.build(model.trainable_variables)
        outputs = outputs_of(model, model_options)
        lesson = make_lesson(options.distill, teachers, batches.spec.task, outputs)
    loss = make_loss(batches.spec.task, outputs, options.label_smoothing)
    loop = Loop(model, optimizer, loss, batches.spec.task, strategy, lesson)
    run = _Run(options, model, optimizer, loop, batches, folder, steps, seed, trace)
    run.resume()
    _trace_graph(trace, model)
    run.to_the_end()
    return _finish(run, outputs, run.taken_over() if not options.epochs else run.learned())


def _check(options: TrainOptions, batches: Batches, strategy: tf.distribute.Strategy, trace: Trace) -> int:
    """Returns the updates of one epoch."""
    check_batch(options.batch_size, strategy.num_replicas_in_sync, _strategy_name(strategy))
    check_share(strategy, batches)
    steps = batches.steps_per_epoch(options.batch_size)
    if steps == 0:
        rows = batches.rows["train"]
        raise ConfigError(
            f"train.batch_size={options.batch_size} exceeds the {rows} rows of the training split, and a batch must be whole: use {rows} or less."
        )
    if batches.rows.get("validation", 0):
        return steps
    if options.early_stopping is not None:
        raise DataError(
            "train.early_stopping looks at the validation loss, and the validation split has 0 rows; raise preprocess.splits.validation, or drop it."
        )
    trace.warn("The validation split has 0 rows: training runs blind; raise preprocess.splits.validation to see it.")
    return steps


def _strategy_name(strategy: tf.distribute.Strategy) -> str:
    if several(strategy):
        return "multi_worker"
    return "mirrored" if isinstance(strategy, tf.distribute.MirroredStrategy) else "default"


@dataclasses.dataclass
class _Run:
    """One training under way: what is fixed first, then what a checkpoint holds beside weights and optimizer."""

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
    history: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    best_epoch: int = 0
    best: list[np.ndarray] = dataclasses.field(default_factory=list)

    def resume(self) -> None:
        """Takes up the newest whole checkpoint, if there is one."""
        found = checkpoint.newest(self.folder, self.trace.warn)
        if found is None:
            return
        _assign(self.model.variables, found.arrays["model"])
        _assign(self.optimizer.variables, found.arrays["optimizer"])
        self.epoch = found.epoch
        self.history = found.facts["history"]
        self.best_epoch = found.facts["best_epoch"]
        self.best = found.arrays.get("best", [])

    def to_the_end(self) -> None:
        """Trains epoch by epoch, each followed by validation and a checkpoint, until the last or until patience ends."""
        if self._over():
            return
        iterator = self.loop.iterator(self.batches.training(self.options.batch_size, self.seed, self.epoch))
        while not self._over():
            started = time.perf_counter()
            row = self._train_epoch(iterator)
            self.loop.settle()
            row["learning_rate"] = float(self.optimizer.learning_rate)
            row["examples_per_second"] = self.steps * self.options.batch_size / (time.perf_counter() - started)
            row |= {f"val_{name}": value for name, value in self._validate().items()}
            row["seconds"] = time.perf_counter() - started
            self.epoch += 1
            for name, value in row.items():
                self.history.setdefault(name, []).append(value)
            self._trace_epoch(row)
            self._keep(row)

    def learned(self) -> dict[str, Any]:
        """Facts of a training: those of the epoch whose weights are kept."""
        at, names = self.best_epoch - 1, ("loss", _metric_name(self.batches))
        return {
            "train": {name: self.history[name][at] for name in names},
            "validation": {name: self.history[f"val_{name}"][at] for name in names if "val_loss" in self.history},
            "seconds": sum(self.history["seconds"]),
        }

    def taken_over(self) -> dict[str, Any]:
        """Facts of a model that came trained. Says so where it is no better than a guess: it is fed in another way then."""
        started = time.perf_counter()
        found = self._validate()
        classes = self.batches.spec.outputs
        if found.get("accuracy", 1.0) < _GUESS / classes:
            self.trace.warn(
                f"The model answers {found['accuracy']:.4f} of the validation rows rightly, a guess among {classes} classes {1 / classes:.4f}: "
                "it may be fed in another way than it was trained; see preprocess.pixels, preprocess.columns and the order of the labels."
            )
        return {"train": {}, "validation": found, "seconds": time.perf_counter() - started}

    def _over(self) -> bool:
        stopping = self.options.early_stopping
        out_of_patience = stopping is not None and self.best and self.epoch - self.best_epoch >= stopping.patience
        return bool(self.epoch >= self.options.epochs or out_of_patience)

    def _train_epoch(self, iterator: Any) -> dict[str, float]:
        done, updates, sums = 0, 1, Totals.START
        while done < self.steps:
            started = time.perf_counter()
            updates = min(updates, self.steps - done)
            sums = self.loop.advance(iterator, updates, sums)
            done += updates
            totals = Totals(self.batches.spec.task, sums)
            if totals.finite_updates < done:
                raise self._diverged(
                    self.epoch + 1, "training loss", f"at step {totals.finite_updates + 1} of {self.steps}"
                )
            self._tell(done, totals)
            updates = max(1, int(updates * _SECONDS_PER_CALL / self.loop.agreed(time.perf_counter() - started)))
        return totals.named()

    def _tell(self, done: int, totals: Totals) -> None:
        note = f"epoch {self.epoch + 1}/{self.options.epochs} loss {totals.loss:.3f} {totals.metric_name} {totals.metric:.3f}"
        if "val_loss" in self.history:
            note += f" (validation {self.history[f'val_{totals.metric_name}'][-1]:.3f})"
        self.trace.progress(self.epoch + done / self.steps, self.options.epochs, note)

    def _validate(self) -> dict[str, float]:
        if not self.batches.rows.get("validation", 0):
            return {}
        size = self.options.batch_size
        count = math.ceil(self.batches.rows["validation"] / size)
        totals = self.loop.evaluate(self.batches.ordered("validation", size), count)
        if not math.isfinite(totals.loss):
            raise self._diverged(self.epoch + 1, "validation loss", "after its last step")
        return totals.named()

    def _diverged(self, epoch: int, what: str, when: str) -> ModelError:
        rate = self.options.optimizer.learning_rate
        if not self.options.epochs:
            return ModelError(
                "train: the validation loss of the model that was given is not finite; feed it as it was trained (preprocess.pixels, preprocess.columns)."
            )
        return ModelError(
            f"train: the {what} is not finite in epoch {epoch}, {when}; lower train.optimizer.learning_rate={rate:g} "
            f"(try {rate / 10:g}), or look for extreme values in the data."
        )

    def _keep(self, row: dict[str, float]) -> None:
        """Remembers the best weights and writes the checkpoint."""
        weights = [variable.numpy() for variable in self.model.variables]
        if not all(np.isfinite(each).all() for each in weights):
            raise self._diverged(self.epoch, "model", "in its weights after the last step")
        if self.options.early_stopping is None:
            self.best_epoch = self.epoch
        elif not self.best or row["val_loss"] < self.history["val_loss"][self.best_epoch - 1]:
            self.best_epoch, self.best = self.epoch, weights
        arrays = {"model": weights, "optimizer": [variable.numpy() for variable in self.optimizer.variables]}
        if self.best:
            arrays["best"] = self.best
        Checkpoint(self.epoch, arrays, {"history": self.history, "best_epoch": self.best_epoch}).save(self.folder)

    def _trace_epoch(self, row: dict[str, float]) -> None:
        """Training and validation of one quantity stand side by side in TensorBoard."""
        speed = {"learning_rate": "learning_rate", "seconds": "speed/epoch_seconds"}
        speed["examples_per_second"] = "speed/examples_per_second"
        for name, value in row.items():
            split = "validation" if name.startswith("val_") else "train"
            self.trace.scalar(speed.get(name) or f"{name.removeprefix('val_')}/{split}", value, self.epoch)


def _assign(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _trace_graph(trace: Trace, model: keras.Model) -> None:
    if trace.folder is None:
        return
    spec = tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype)
    trace.graph(model.name, tf.function(lambda x: model(x, training=False)).get_concrete_function(spec))


def _metric_name(batches: Batches) -> str:
    return "accuracy" if batches.spec.task == "classification" else "rmse"


def _finish(run: _Run, outputs: str, learned: dict[str, Any]) -> TrainedModel:
    """Writes the files, the face last, and removes the checkpoints."""
    if run.best:
        _assign(run.model.variables, run.best)
    made = TrainedModel(run.folder)
    temporary = run.folder / ".model.keras"
    run.model.save(temporary)
    temporary.replace(made.file)
    write_json(run.folder / "history.json", run.history)
    facts = {
        "outputs": outputs,
        "parameters": run.model.count_params(),
        "epochs": run.epoch,
        "best_epoch": run.best_epoch,
        **learned,
    }
    write_json(run.folder / "trained.json", facts)
    checkpoint.remove(run.folder)
    return made
