"""Maker: the compiled update of one model, in any precision and for whatever trains just now; and how long it takes."""

from __future__ import annotations

import dataclasses
import pathlib
import time
from collections.abc import Callable
from typing import Any, Literal

import keras
import tensorflow as tf

from components.artifacts import Batches
from components.distillation import Lesson
from components.options import TrainOptions
from components.training.epochs import assign
from components.training.loop import Loop, Totals, make_loss
from components.training.optimizer import Schedule, make_optimizer
from components.training.precision import FLOAT16, computed_in, kind_of
from components.training.privacy import Privacy, noise_key
from components.training.split import beside_their_weights

_SECONDS_TIMED = 0.25  # of updates, each time that a precision is tried
_PAUSE = 0.05  # seconds between two looks for data that are being written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maker:
    """What an update is made of, but for precision and optimizer.

    Attributes:
      options: Of the training.
      model: Built under `strategy`.
      variables: All that will ever be trained.
      batches: The data.
      strategy: See `pipeline.strategy`.
      steps: Updates of an epoch.
      outputs: What a classifier returns.
      lesson: What a teacher adds.
      seed: Fixes the order of the examples.
      folder: Of the training; keeps the key of private noise.
      home: See `Prepared`; not None where the layers are placed on several devices.
    """

    options: TrainOptions
    model: keras.Model
    variables: list[Any]
    batches: Batches
    strategy: tf.distribute.Strategy
    steps: int
    outputs: Literal["logits", "probabilities"]
    lesson: Lesson | None
    seed: int
    folder: pathlib.Path
    home: str | None = None
    _timed: dict[str, tuple[keras.optimizers.Optimizer, Loop]] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def kind(self) -> str:
        """'CPU', 'GPU' or 'TPU'."""
        return kind_of(self.strategy)

    def optimizer(self, precision: str) -> keras.optimizers.Optimizer:
        """One that made no update yet, for all that will ever be trained."""
        options = self.options
        transfer, drop = options.transfer, (0, 1.0)
        if transfer is not None and transfer.unfreeze_epoch is not None:
            drop = ((transfer.unfreeze_epoch - 1) * self.steps, transfer.unfreeze_rate)
        with self.strategy.scope():
            rate = Schedule(options.optimizer, self.steps, max(1, options.epochs), drop)
            made = make_optimizer(
                options.optimizer, self.steps, max(1, options.epochs), scaled=precision == FLOAT16, rate=rate
            )
            if self.home is not None:
                beside_their_weights(made)
            made.build(self.variables)
        return made

    def loop(self, optimizer: keras.optimizers.Optimizer) -> Loop:
        """The update of what is trainable now, in the precision that the model computes in now."""
        options, task = self.options, self.batches.spec.task
        privacy = None
        if options.privacy is not None:
            replicas = self.strategy.num_replicas_in_sync
            privacy = Privacy(options.privacy, options.batch_size, replicas, noise_key(self.folder))
        return Loop(
            self.model,
            optimizer,
            make_loss(task, self.outputs, options.label_smoothing),
            task,
            self.strategy,
            self.lesson,
            accumulate=options.accumulate,
            xla=self._xla,
            privacy=privacy,
            home=self.home,
        )

    @property
    def _xla(self) -> bool:
        if self.kind == "TPU":
            return False  # its strategy compiles whatever it runs
        return self.kind == "GPU" and self.home is None if self.options.xla == "auto" else self.options.xla

    def take(self, precision: str) -> tuple[keras.optimizers.Optimizer, Loop]:
        """An optimizer that made no update yet, and its loop: those that were timed, if any, as compiling takes long on a GPU."""
        found = self._timed.get(precision)
        self._timed.clear()
        if found is not None:
            return found
        optimizer = self.optimizer(precision)
        return optimizer, self.loop(optimizer)

    def timer(self, precision: str) -> Callable[[], float]:
        """See `choose`. The model has its weights back after each use, and the optimizer has made no update.

        On a CPU by processor time: another program beside must not decide which precision is the faster one. Not while
        data are being written by a thread of this process, whose time would be in it.
        """
        arriving = self.batches.arriving
        clock = time.process_time if self.kind == "CPU" and arriving is None else time.perf_counter
        while arriving is not None and not arriving.batches(self.options.batch_size):
            time.sleep(_PAUSE)
        batch = self.batches.training(self.options.batch_size, self.seed, 0).take(1).cache().repeat()
        with computed_in(self.model, precision, self.kind):
            optimizer = self.optimizer(precision)
            changed = [*self.model.variables, *optimizer.variables]
            before = [variable.numpy() for variable in changed]
            loop = self.loop(optimizer)
            iterator = loop.iterator(batch)
            loop.advance(iterator, 2, Totals.START)  # traced here, while the model computes in this precision
        assign(changed, before)
        self._timed[precision] = optimizer, loop
        count = 1

        def seconds() -> float:
            nonlocal count
            started = clock()
            loop.advance(iterator, count, Totals.START)
            each = loop.agreed(clock() - started) / count
            count = max(1, int(_SECONDS_TIMED / each))
            assign(changed, before)
            return each

        return seconds
