"""Privacy: updates that no single example can move far, and what they promise to each example.

DP-SGD (Abadi et al. 2016, arXiv 1607.00133): the gradient of every example is shortened to a greatest norm, and Gaussian
noise is added to the sum. What comes out is (epsilon, delta) differential privacy of the training split.
"""

from __future__ import annotations

import json
import pathlib
import secrets
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from components.artifacts import write_json
from components.errors import ConfigError, ModelError
from components.options import PrivacyOptions

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types

KEY = "noise-key.json"

_MIXES = (keras.layers.BatchNormalization,)


class Privacy:
    """How gradients become private ones.

    Args:
      options: Noise and clipping.
      batch_size: Examples of one update, over all replicas.
      replicas: Each adds its share of the noise.
      key: Two 64-bit numbers that the noise is drawn by, with the number of the update: a training that goes on after a
        kill draws what it would have drawn. Whoever knows them can take the noise away.
    """

    def __init__(self, options: PrivacyOptions, batch_size: int, replicas: int, key: tuple[int, int]) -> None:
        self._options = options
        self._deviation = options.noise * options.clip / batch_size / replicas**0.5
        self._key = tf.constant(key, tf.int64)

    def clipped(self, gradients_of: Callable[[Tensor, Tensor], list[Tensor]], x: Tensor, y: Tensor) -> list[Tensor]:
        """Mean over the examples of a batch of their gradients, each shortened to norm `clip` where it is longer.

        Args:
          gradients_of: (inputs (1, *shape), labels (1, ...)) -> the gradient of that example's loss, by variable.
          x: Inputs (batch, *shape).
          y: Labels (batch, ...).
        """

        def one(example: tuple[Tensor, Tensor]) -> list[Tensor]:
            x, y = example
            gradients = [tf.cast(tf.convert_to_tensor(each), tf.float32) for each in gradients_of(x[None], y[None])]
            clipped, _ = tf.clip_by_global_norm(gradients, self._options.clip)
            return clipped

        return [tf.reduce_mean(each, axis=0) for each in tf.vectorized_map(one, (x, y))]

    def noised(self, gradients: list[Tensor], update: Tensor, replica: Tensor | int) -> list[Tensor]:
        """Adds this replica's share of the noise of update number `update`."""
        key = tf.random.fold_in(tf.random.fold_in(self._key, tf.cast(update, tf.int64)), tf.cast(replica, tf.int64))
        return [
            each
            + tf.random.stateless_normal(
                tf.shape(each), tf.random.fold_in(key, tf.constant(place, tf.int64)), stddev=self._deviation
            )
            for place, each in enumerate(gradients)
        ]


def check_private(model: keras.Model) -> None:
    """Refuses a model in which the gradient of one example depends on the others of its batch.

    Raises:
      ModelError: It has a batch normalization that trains; named.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, _MIXES) and layer.trainable:
            raise ModelError(
                f"train.privacy: layer '{layer.name}' ({type(layer).__name__}) mixes the examples of a batch, so no gradient is one "
                "example's own; use LayerNormalization or GroupNormalization, or freeze it."
            )


def noise_key(folder: pathlib.Path) -> tuple[int, int]:
    """A secret of the operating system's, the same for all attempts at the training in `folder`.

    Not the run's seed: that is written in configurations, and noise that anyone can draw again hides nothing. It is
    removed with the checkpoints.
    """
    path = folder / KEY
    if not path.exists():
        write_json(path, [secrets.randbits(63), secrets.randbits(63)])
    first, second = json.loads(path.read_text(encoding="utf-8"))
    return first, second


def promise(options: PrivacyOptions, *, rows: int, batch_size: int, updates: int) -> dict[str, Any]:
    """What the training promises to each row of the training split.

    Args:
      options: Noise, clipping, delta.
      rows: Of the training split.
      batch_size: Examples of one update.
      updates: Of the whole training.

    Returns:
      {"epsilon", "delta", "noise", "clip", "batch_size", "rows", "updates", "accountant"}: epsilon by Renyi differential
      privacy (Mironov et al. 2019, arXiv 1908.10530), as Google's dp-accounting counts it, for adding or removing a row.

    Raises:
      ConfigError: dp-accounting is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError as error:
        raise ConfigError(
            f"train.privacy: dp-accounting was expected, got '{error}'; install it: pip install 'trimline[privacy]'."
        ) from error
    delta = options.delta if options.delta is not None else 0.1 / rows
    sampled = dp_accounting.PoissonSampledDpEvent(batch_size / rows, dp_accounting.GaussianDpEvent(options.noise))
    accountant = RdpAccountant().compose(sampled, updates)
    return {
        "epsilon": float(accountant.get_epsilon(delta)),
        "delta": delta,
        "noise": options.noise,
        "clip": options.clip,
        "batch_size": batch_size,
        "rows": rows,
        "updates": updates,
        "accountant": "Renyi differential privacy, adding or removing one row, batches taken as Poisson samples",
    }
