"""Loop: the compiled heart of training, many updates in one call so that Python costs nothing per step.

An own loop rather than `Model.fit`: it runs any number of updates per call without retracing, keeps its sums on the
device until someone looks, and is the plain `strategy.run` form that every tf.distribute strategy takes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from components.artifacts import Task
from components.distillation import Lesson
from components.training.privacy import Privacy
from components.training.split import beside_their_inputs, gradients
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


def _or_zeros(gradients: list[Tensor | None], variables: list[Any]) -> list[Tensor]:
    """Dense gradients, zero for variables that the loss does not depend on."""
    return [
        tf.zeros(variable.shape, variable.dtype) if each is None else tf.convert_to_tensor(each)
        for each, variable in zip(gradients, variables, strict=True)
    ]


class Totals:
    """Running sums of a pass over data, as five float64 numbers that live on the device: see `START`."""

    # Loss summed over examples, metric summed over examples, examples, updates with a finite loss, seconds that updates
    # waited for their batch.
    START = np.zeros(5)

    def __init__(self, task: Task, values: np.ndarray) -> None:
        self._task = task
        self.loss = float(values[0] / values[2])
        mean = float(values[1] / values[2])
        self.metric = mean if task == "classification" else mean**0.5 if mean >= 0 else float("nan")
        self.finite_updates = int(values[3])
        self.waited = float(values[4])

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
      accumulate: Parts into which each replica cuts its share of a batch, one after the other, so that only a part's
        activations are held at a time; their gradients are averaged before the one update. Batch normalization sees a
        part at a time.
      xla: Compile the update with XLA, or, where there are several replicas, the gradients of each one.
      privacy: Shortens the gradient of each example and adds noise; penalties on weights, which no example has a part
        in, are left out of both.
      home: Where what belongs to no layer is computed, if the layers of `model` are placed on several devices; not with
        `xla` or `privacy`, which know one.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        loss: LossFunction,
        task: Task,
        strategy: tf.distribute.Strategy,
        lesson: Lesson | None = None,
        accumulate: int = 1,
        xla: bool = False,
        privacy: Privacy | None = None,
        home: str | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._task: Task = task
        self._strategy = strategy
        self._lesson = lesson
        self._accumulate = accumulate
        self._privacy = privacy
        self._home = home
        self._update, self._differentiate = self._train_step, self._of_this_replica
        if xla and strategy.num_replicas_in_sync == 1:
            self._update = tf.function(self._train_step, jit_compile=True)
        elif xla:  # an XLA program knows one device: where replicas meet is outside of it
            self._differentiate = tf.function(self._of_this_replica, jit_compile=True)
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
        with self._at_home():
            return self._advance(iterator, tf.constant(updates), tf.constant(totals)).numpy()

    def evaluate(self, iterator: Any, batches: int, totals: np.ndarray) -> np.ndarray:
        """Returns `totals` with loss and metric over the next `batches` batches added; the last one may be smaller."""
        with self._at_home():
            return self._evaluate(iterator, tf.constant(batches), tf.constant(totals)).numpy()

    def _at_home(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._home is None else tf.device(self._home)

    # The two bodies below are read by autograph: their `for` becomes a loop inside the graph.

    def _advance_steps(self, iterator: Any, updates: Tensor, totals: Tensor) -> Tensor:
        for _ in tf.range(updates):
            asked = tf.timestamp()
            with tf.control_dependencies([asked]):
                batch = next(iterator)
            with tf.control_dependencies(tf.nest.flatten(self._strategy.experimental_local_results(batch))):
                waited = tf.timestamp() - asked
            sums = self._summed(self._strategy.run(self._update, args=batch))
            finite = tf.cast(tf.math.is_finite(totals[0] + sums[0]), tf.float64)
            totals = totals + tf.concat([sums, [finite, waited]], 0)
        return totals

    def _evaluate_batches(self, iterator: Any, batches: Tensor, totals: Tensor) -> Tensor:
        for _ in tf.range(batches):
            sums = self._summed(self._strategy.run(self._test_step, args=next(iterator)))
            totals = totals + tf.concat([sums, [0.0, 0.0]], 0)
        return totals

    @property
    def update(self) -> Callable[[Tensor, Tensor], Tensor]:
        """One update of one replica: (inputs, labels) of its share of a batch -> float32 (3,), the first of `Totals`."""
        return self._train_step

    @tf.autograph.experimental.do_not_convert
    def _train_step(self, x: Tensor, y: Tensor) -> Tensor:
        gradients, sums = self._differentiate(x, y)
        if self._privacy is not None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            gradients = self._privacy.noised(gradients, self._optimizer.iterations, replica)
        with self._in_place():
            self._optimizer.apply(gradients, self._model.trainable_variables)
        return sums

    def _in_place(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._home is None else beside_their_inputs()

    @tf.autograph.experimental.do_not_convert
    def _of_this_replica(self, x: Tensor, y: Tensor) -> tuple[list[Tensor | None], Tensor]:
        if self._accumulate == 1:
            return self._share(x, y)
        return self._averaged(x, y) if self._home is None else self._averaged_in_place(x, y)

    def _share(self, x: Tensor, y: Tensor) -> tuple[list[Tensor | None], Tensor]:
        return self._gradients(x, y) if self._privacy is None else self._private(self._privacy, x, y)

    def _private(self, privacy: Privacy, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `_gradients`, example by example; the sums are those of the batch."""
        variables, replicas = self._model.trainable_variables, self._strategy.num_replicas_in_sync

        def of_one(x: Tensor, y: Tensor) -> list[Tensor]:
            with tf.GradientTape() as tape:
                loss = self._loss(y, tf.cast(self._model(x, training=True), tf.float32))
            return _or_zeros(tape.gradient(loss, variables), variables)

        clipped = privacy.clipped(of_one, x, y)
        with tf.GradientTape() as tape:
            given = tf.cast(self._model(x, training=True), tf.float32)
            extra = tf.add_n([tf.cast(loss, tf.float32) for loss in self._model.losses] or [tf.zeros(())])
        pulls = _or_zeros(tape.gradient(extra, variables), variables)
        gradients = [(one + two) / replicas for one, two in zip(clipped, pulls, strict=True)]
        return gradients, self._sums(y, given, self._loss(y, given) + extra)

    def _gradients(self, x: Tensor, y: Tensor) -> tuple[list[Tensor | None], Tensor]:
        """Of the loss by the trainable variables, as the optimizer wants them, and the sums of this share of a batch."""
        variables = self._model.trainable_variables
        answers = None if self._lesson is None else self._lesson.answers(x)
        with tf.GradientTape() as tape:
            given = tf.cast(self._model(x, training=True), tf.float32)
            each = self._loss(y, given)
            extra = tf.add_n([tf.cast(loss, each.dtype) for loss in self._model.losses] or [tf.zeros((), each.dtype)])
            guided = each
            if self._lesson is not None:
                guided = self._lesson.mixed(each, self._lesson.distance(answers, given))
            # Replicas' gradients are summed, so each counts for its share of the global mean.
            share = (tf.reduce_mean(guided) + extra) / self._strategy.num_replicas_in_sync
            share = self._optimizer.scale_loss(share)  # in mixed_float16; the optimizer divides what it gets
        found = tape.gradient(share, variables) if self._home is None else gradients(share, variables)
        return found, self._sums(y, given, each + extra)

    def _averaged(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `_gradients`, part by part."""
        parts = self._accumulate
        xs, ys = (tf.reshape(each, (parts, each.shape[0] // parts, *each.shape[1:])) for each in (x, y))

        def add(part: Tensor, total: list[Tensor], sums: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
            gradients, more = self._share(xs[part], ys[part])
            total = [
                before if each is None else before + tf.convert_to_tensor(each) / parts
                for before, each in zip(total, gradients, strict=True)
            ]
            return part + 1, total, sums + more

        zeros = [tf.zeros(variable.shape, variable.dtype) for variable in self._model.trainable_variables]
        start = (tf.constant(0), zeros, tf.zeros(3))
        # One at a time: in parallel they would need the memory that cutting is there to save.
        _, total, sums = tf.while_loop(lambda part, *_: part < parts, add, start, parallel_iterations=1)
        return total, sums

    def _averaged_in_place(self, x: Tensor, y: Tensor) -> tuple[list[Tensor], Tensor]:
        """As `_averaged`, each sum beside its weight: not in a loop, whose variables would all be on one device."""
        parts, variables = self._accumulate, self._model.trainable_variables
        total: list[Tensor] = []
        for variable in variables:
            with tf.device(variable.value.device):
                total.append(tf.zeros(variable.shape, variable.dtype))
        sums = tf.zeros(3)
        for xs, ys in zip(tf.split(x, parts), tf.split(y, parts), strict=True):
            with tf.control_dependencies([*total, sums]):  # one after the other, as there
                gradients, more = self._share(tf.identity(xs), tf.identity(ys))
            with self._in_place():
                given = _or_zeros(gradients, variables)
                total = [before + each / parts for before, each in zip(total, given, strict=True)]
            sums += more
        return total, sums

    @tf.autograph.experimental.do_not_convert
    def _test_step(self, x: Tensor, y: Tensor) -> Tensor:
        given = tf.cast(self._model(x, training=False), tf.float32)
        return self._sums(y, given, self._loss(y, given))

    def _sums(self, y: Tensor, given: Tensor, each: Tensor) -> Tensor:
        score = _score(self._task, y, given)
        # float32 within a batch: a TPU has nothing wider, and nothing is lost. Over batches they add up in float64.
        return tf.stack([tf.reduce_sum(tf.cast(part, tf.float32)) for part in (each, score, tf.ones_like(each))])

    def _summed(self, per_replica: Any) -> Tensor:
        return tf.cast(self._strategy.reduce(tf.distribute.ReduceOp.SUM, per_replica, axis=None), tf.float64)
