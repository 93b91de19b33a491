"""Loop: the compiled heart of training, many updates in one call so that Python costs nothing per step.

An own loop rather than `Model.fit`: it runs any number of updates per call without retracing, keeps its sums on the
device until someone looks, and is the plain `strategy.run` form that every tf.distribute strategy takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from components.artifacts import Task
from components.distillation import Lesson
from components.workers import Statistics, agreed, shared

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types
LossFunction = Callable[[Tensor, Tensor], Tensor]


def make_loss(task: Task, outputs: Literal["logits", "probabilities"], smoothing: float = 0.0) -> LossFunction:
    """The loss of each example as (labels, outputs) -> float32 (batch,).

    Classification: cross-entropy of int labels (batch,) against (batch, classes), the one-hot target mixed with the
    uniform distribution by `smoothing` in [0, 1) (Szegedy et al. 2016, arXiv 1512.00567). Regression: squared error of
    (batch, 1) against (batch, 1).
    """
    if task == "regression":
        return lambda y, given: tf.reduce_sum(tf.square(given - tf.reshape(y, (-1, 1))), axis=1)
    from_logits = outputs == "logits"
    if not smoothing:
        return lambda y, given: keras.losses.sparse_categorical_crossentropy(y, given, from_logits=from_logits)

    def smoothed(y: Tensor, given: Tensor) -> Tensor:
        target = tf.one_hot(y, given.shape[-1])
        return keras.losses.categorical_crossentropy(target, given, from_logits=from_logits, label_smoothing=smoothing)

    return smoothed


def _score(task: Task, y: Tensor, given: Tensor) -> Tensor:
    """What the metric sums over examples: hits (classification) or squared errors (regression), (batch,)."""
    if task == "regression":
        return tf.reduce_sum(tf.square(given - tf.reshape(y, (-1, 1))), axis=1)
    return tf.cast(tf.equal(tf.argmax(given, axis=-1, output_type=tf.int32), tf.cast(y, tf.int32)), tf.float32)


class Totals:
    """Running sums of a pass over data, as four float64 numbers that live on the device: see `START`."""

    START = np.zeros(4)  # loss summed over examples, metric summed over examples, examples, updates with a finite loss

    def __init__(self, task: Task, values: np.ndarray) -> None:
        self._task = task
        self.loss = float(values[0] / values[2])
        mean = float(values[1] / values[2])
        self.metric = mean if task == "classification" else mean**0.5 if mean >= 0 else float("nan")
        self.finite_updates = int(values[3])

    @property
    def metric_name(self) -> str:
        """'accuracy' or 'rmse'."""
        return "accuracy" if self._task == "classification" else "rmse"

    def named(self) -> dict[str, float]:
        """{"loss": ..., "accuracy" | "rmse": ...}."""
        return {"loss": self.loss, self.metric_name: self.metric}


class Loop:
    """Training and evaluation of one model as two compiled functions.

    Args:
      model: Built under `strategy`'s scope.
      optimizer: Built for the model's trainable variables, under the same scope.
      loss: See `make_loss`.
      task: Chooses the metric.
      strategy: Each of its replicas takes an equal share of every training batch.
      lesson: What a teacher adds to the loss in training; the sums are those of `loss` alone.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        loss: LossFunction,
        task: Task,
        strategy: tf.distribute.Strategy,
        lesson: Lesson | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._task: Task = task
        self._strategy = strategy
        self._lesson = lesson
        self._statistics = Statistics(strategy, model.non_trainable_variables)
        self._advance = tf.function(self._advance_steps, jit_compile=False)
        self._evaluate = tf.function(self._evaluate_batches, jit_compile=False)

    def iterator(self, dataset: tf.data.Dataset) -> Any:
        """An iterator over the batches of this process, shared out to its replicas."""
        return iter(shared(self._strategy, dataset))

    def settle(self) -> None:
        """Lets all replicas have the same statistics; see `components.workers`."""
        self._statistics.settle()

    def agreed(self, seconds: float) -> float:
        """What the workers took on average: each must cut its updates into calls as the others do."""
        return agreed(self._strategy, seconds)

    def advance(self, iterator: Any, updates: int, totals: np.ndarray) -> np.ndarray:
        """Makes `updates` updates and returns `totals` with their sums added; the same numbers however they are cut."""
        return self._advance(iterator, tf.constant(updates), tf.constant(totals)).numpy()

    def evaluate(self, dataset: tf.data.Dataset, batches: int) -> Totals:
        """Loss and metric over the first `batches` batches of `dataset`; the last one may be smaller."""
        return Totals(self._task, self._evaluate(self.iterator(dataset), tf.constant(batches)).numpy())

    # The two bodies below are read by autograph: their `for` becomes a loop inside the graph.

    def _advance_steps(self, iterator: Any, updates: Tensor, totals: Tensor) -> Tensor:
        for _ in tf.range(updates):
            sums = self._summed(self._strategy.run(self._train_step, args=next(iterator)))
            finite = tf.cast(tf.math.is_finite(totals[0] + sums[0]), tf.float64)
            totals = totals + tf.concat([sums, [finite]], 0)
        return totals

    def _evaluate_batches(self, iterator: Any, batches: Tensor) -> Tensor:
        totals = tf.zeros(4, tf.float64)
        for _ in tf.range(batches):
            sums = self._summed(self._strategy.run(self._test_step, args=next(iterator)))
            totals = totals + tf.concat([sums, [0.0]], 0)
        return totals

    @tf.autograph.experimental.do_not_convert
    def _train_step(self, x: Tensor, y: Tensor) -> Tensor:
        variables = self._model.trainable_variables
        answers = None if self._lesson is None else self._lesson.answers(x)
        with tf.GradientTape() as tape:
            given = self._model(x, training=True)
            each = self._loss(y, given)
            extra = tf.add_n([tf.cast(loss, each.dtype) for loss in self._model.losses] or [tf.zeros((), each.dtype)])
            guided = each
            if self._lesson is not None:
                guided = self._lesson.mixed(each, self._lesson.distance(answers, given))
            # Replicas' gradients are summed, so each counts for its share of the global mean.
            share = (tf.reduce_mean(guided) + extra) / self._strategy.num_replicas_in_sync
        self._optimizer.apply(tape.gradient(share, variables), variables)
        return self._sums(y, given, each + extra)

    @tf.autograph.experimental.do_not_convert
    def _test_step(self, x: Tensor, y: Tensor) -> Tensor:
        given = self._model(x, training=False)
        return self._sums(y, given, self._loss(y, given))

    def _sums(self, y: Tensor, given: Tensor, each: Tensor) -> Tensor:
        score = _score(self._task, y, given)
        return tf.stack([tf.reduce_sum(tf.cast(part, tf.float64)) for part in (each, score, tf.ones_like(each))])

    def _summed(self, per_replica: Any) -> Tensor:
        return self._strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None)
