"""Workers: what a stage that trains must do when several processes share one `tf.distribute` strategy.

    batches of one worker --shared()--> batches of its replicas

With one process every function here leaves things as they are, so stages call them without asking.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import tensorflow as tf

from components.artifacts import Batches
from components.errors import ContractError

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types


def several(strategy: tf.distribute.Strategy) -> bool:
    """True where the strategy spans more than this process."""
    return bool(strategy.extended._in_multi_worker_mode())  # the public names tell one worker from none nowhere


def check_share(strategy: tf.distribute.Strategy, batches: Batches) -> None:
    """Looks whether `batches` are cut for as many workers as the strategy has: else rows would count twice.

    Raises:
      ContractError: They are not.
    """
    workers = strategy.extended._num_workers if several(strategy) else 1
    if batches.share.count != workers:
        raise ContractError(
            f"batches must be cut for the {workers} workers of the strategy, got a share of 1 in {batches.share.count}; "
            "make them with make_batches(..., share=Share(index, count))."
        )


def shared(strategy: tf.distribute.Strategy, dataset: tf.data.Dataset) -> Any:
    """Deals batches out to replicas.

    Args:
      strategy: Whose replicas take them.
      dataset: Of one process: global batches. Of several: this worker's share of each, see `Batches`.

    Returns:
      A distributed data set; each step takes one batch of `dataset`, cut among the replicas of this process.
    """
    if not several(strategy):
        return strategy.experimental_distribute_dataset(dataset)
    local = strategy.num_replicas_in_sync // strategy.extended._num_workers
    cut = dataset if local == 1 else dataset.flat_map(functools.partial(_pieces, local))
    # With a function there is no automatic sharding, which would cut this worker's share once more.
    return strategy.distribute_datasets_from_function(lambda _: cut)


def _pieces(count: int, x: Tensor, y: Tensor) -> tf.data.Dataset:
    """The rows of one batch as `count` batches, in order; of equal size where they divide."""
    size = x.shape[0]
    rows = tf.cast(tf.shape(x)[0], tf.int64)

    def piece(number: Tensor) -> tuple[Tensor, Tensor]:
        first, last = rows * number // count, rows * (number + 1) // count
        parts = x[first:last], y[first:last]
        if size is None or size % count:
            return parts
        fixed = [tf.ensure_shape(part, (size // count, *part.shape[1:])) for part in parts]
        return fixed[0], fixed[1]

    return tf.data.Dataset.range(count).map(piece)


def agreed(strategy: tf.distribute.Strategy, value: float) -> float:
    """The mean of what the workers measured, the same number in all of them.

    What one worker decides alone must not change which collective operation comes next: the others would wait for ever.
    """
    if not several(strategy):
        return value
    return float(strategy.reduce(tf.distribute.ReduceOp.MEAN, tf.constant(value, tf.float64), axis=None))


class Statistics:
    """What each replica gathers alone, as batch normalization does, and how all come to have the same.

    A moving average is linear, so that the mean of the replicas' averages is the average that their means would have
    given.

    Args:
      strategy: Whose replicas hold the variables.
      variables: Keras 3 or tf_keras; those that replicas keep in step anyway, and whole numbers, are left alone.
    """

    def __init__(self, strategy: tf.distribute.Strategy, variables: Iterable[Any]) -> None:
        self._strategy = strategy
        alone = strategy.num_replicas_in_sync == 1
        self._variables = [] if alone else [raw for raw in map(_raw, variables) if _apart(raw)]
        self._means = tf.function(self._mean_values, jit_compile=False)

    def settle(self) -> None:
        """Gives every replica the mean. Called before validation and checkpoint: a resumed run starts from the same."""
        if self._variables:
            for variable, value in zip(self._variables, self._means(), strict=True):
                variable.assign(value)

    @tf.autograph.experimental.do_not_convert
    def _mean_values(self) -> list[Tensor]:
        own = self._strategy.run(lambda: [tf.identity(variable) for variable in self._variables])
        return [self._strategy.reduce(tf.distribute.ReduceOp.MEAN, each, axis=None) for each in own]


def _raw(variable: Any) -> Any:
    """The TensorFlow variable of a Keras 3 one; tf_keras has those themselves."""
    value = getattr(variable, "value", variable)
    return variable if callable(value) else value


def _apart(variable: Any) -> bool:
    """Whether replicas may hold different values."""
    if not variable.dtype.is_floating or variable.trainable:
        return False
    return bool(
        variable.aggregation == tf.VariableAggregation.NONE
        or variable.synchronization == tf.VariableSynchronization.ON_READ
    )
