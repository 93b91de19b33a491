"""Optimizer: the algorithm, and its learning rate as a function of the update."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from components.errors import ConfigError
from components.options import OptimizerOptions


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Learning rate of each update: a linear warm-up, then constant, cosine, exponential or step.

    With base rate r, warm-up of w updates, T updates in all, d updates between factors and u = update - w:

        update < w     r * (update + 1) / w          (the first update is not lost on a rate of zero)
        constant       r
        cosine         r * (1 + cos(pi * u / (T - w))) / 2      (Loshchilov and Hutter 2017, arXiv 1608.03983)
        exponential    r * decay ** (u / d)
        step           r * decay ** floor(u / d)

    From update `drop[0]` on all of it times `drop[1]`.

    Args:
      options: The rates; epochs in them count as `steps_per_epoch` updates.
      steps_per_epoch: Updates in one epoch.
      epochs: Length of the training; the cosine reaches zero at its end.
      drop: (update, factor).
    """

    def __init__(
        self, options: OptimizerOptions, steps_per_epoch: int, epochs: int, drop: tuple[int, float] = (0, 1.0)
    ) -> None:
        self.drop = drop
        self.options = options
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs
        self._warmup = round(options.warmup_epochs * steps_per_epoch)
        self._rest = max(1, epochs * steps_per_epoch - self._warmup)
        self._between = max(1.0, options.decay_epochs * steps_per_epoch)

    def __call__(self, step: Any) -> Any:
        """The rate of update `step` (0 is the first), float32 scalar."""
        after = tf.cast(step, tf.float32) - float(self._warmup)
        rate = self.options.learning_rate * self._shape(tf.maximum(after, 0.0))
        if self.drop[1] != 1.0:
            rate = tf.where(tf.cast(step, tf.int64) >= self.drop[0], rate * self.drop[1], rate)
        if not self._warmup:
            return rate
        rise = self.options.learning_rate * (after + 1.0 + self._warmup) / self._warmup
        return tf.where(after < 0, rise, rate)

    def _shape(self, after: Any) -> Any:
        if self.options.schedule == "cosine":
            return (1.0 + tf.cos(math.pi * tf.minimum(after / self._rest, 1.0))) / 2.0
        if self.options.schedule == "exponential":
            return tf.pow(self.options.decay, after / self._between)
        if self.options.schedule == "step":
            return tf.pow(self.options.decay, tf.floor(after / self._between))
        return tf.ones_like(after)

    def get_config(self) -> dict[str, Any]:
        """The arguments as JSON-able values."""
        return {
            "options": self.options.model_dump(),
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
            "drop": self.drop,
        }


def make_optimizer(
    options: OptimizerOptions, steps_per_epoch: int, epochs: int, *, scaled: bool = False, rate: Any = None
) -> keras.optimizers.Optimizer:
    """Makes the optimizer; decay leaves biases and normalization alone, as it regularises kernels only.

    SGD: w -= rate * g, with momentum v = momentum * v - rate * g. Adam: Kingma and Ba 2015 (arXiv 1412.6980), their
    epsilon hat 1e-7. AdamW: Loshchilov and Hutter 2019 (arXiv 1711.05101), w -= rate * weight_decay * w beside Adam's update.

    Args:
      options: Algorithm and rates.
      steps_per_epoch: Updates in one epoch.
      epochs: Length of the training.
      scaled: Multiply the loss by a factor that follows the gradients' range, and leave out updates that overflow
        (Micikevicius et al. 2018, arXiv 1710.03740): float16 would lose small gradients.
      rate: Another schedule in the place of the options'.

    Raises:
      ConfigError: An option that this optimizer does not have, or a warm-up as long as the training.
    """
    _check(options, epochs)
    rate = Schedule(options, steps_per_epoch, epochs) if rate is None else rate
    decay = options.weight_decay or None
    average = {"use_ema": options.ema is not None, "ema_momentum": options.ema or 0.99}
    optimizer: keras.optimizers.Optimizer
    if options.name == "sgd":
        optimizer = keras.optimizers.SGD(rate, momentum=options.momentum, weight_decay=decay, **average)
    elif options.name == "adam":
        optimizer = keras.optimizers.Adam(rate, **average)
    else:
        optimizer = keras.optimizers.AdamW(rate, weight_decay=options.weight_decay, **average)
    if decay:
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer


def _check(options: OptimizerOptions, epochs: int) -> None:
    if options.momentum and options.name != "sgd":
        raise ConfigError(
            f"optimizer.momentum={options.momentum:g} belongs to sgd, got optimizer.name={options.name}; drop it, or use sgd."
        )
    if options.weight_decay and options.name == "adam":
        raise ConfigError(
            f"optimizer.weight_decay={options.weight_decay:g} belongs to adamw and sgd, got optimizer.name=adam; use adamw."
        )
    if options.warmup_epochs >= epochs:
        raise ConfigError(
            f"optimizer.warmup_epochs={options.warmup_epochs:g} must be below epochs={epochs}; lower it or train longer."
        )
