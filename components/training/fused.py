"""Fused: batch normalization on TensorFlow's fused kernel, in the place of Keras 3's own chain of operations.

Keras 3 computes the moments, the scaling and the moving averages with some twenty small operations a layer, each of
which reads the whole activation; `FusedBatchNormV3` reads it twice. The numbers are the same to float32's rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types

_LARGEST_RANK = 5


@keras.saving.register_keras_serializable(package="trimline")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization` that trains on the fused kernel; same arguments, weights and results.

    The kernel normalizes over all axes but the last. What it cannot do (another axis, masks, renormalization, moments
    over all replicas, float64) and all that is not training is left to Keras.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def call(self, inputs: Tensor, training: bool | None = None, mask: Tensor | None = None) -> Tensor:
        """As the layer that this one stands for: inputs (batch, ..., channels) to outputs of the same shape."""
        if not (training and self.trainable and mask is None and self._fits(inputs)):
            return super().call(inputs, training=training, mask=mask)
        channels = inputs.shape[-1]
        # The kernel knows pictures only; the moments of (n, 1, 1, c) are those of (batch, ..., c), and no byte moves.
        pictures = inputs if len(inputs.shape) == 4 else tf.reshape(inputs, (-1, 1, 1, channels))
        made, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=pictures,
            scale=tf.ones(channels) if self.gamma is None else tf.convert_to_tensor(self.gamma),
            offset=tf.zeros(channels) if self.beta is None else tf.convert_to_tensor(self.beta),
            mean=tf.constant([], tf.float32),
            variance=tf.constant([], tf.float32),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The kernel gives the sample's variance, Keras averages that of the population: n - 1 over n.
        count = tf.cast(tf.size(pictures) // channels, tf.float32)
        variance *= (count - 1.0) / count
        for moving, found in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * self.momentum + tf.stop_gradient(found) * (1.0 - self.momentum))
        return made if pictures is inputs else tf.reshape(made, tf.shape(inputs))

    def _fits(self, inputs: Tensor) -> bool:
        rank = len(inputs.shape)
        return (
            self.axis in (-1, rank - 1)
            and 2 <= rank <= _LARGEST_RANK
            and inputs.dtype in (tf.float32, tf.bfloat16, tf.float16)
            and self.variable_dtype == "float32"
            and not (self.renorm or self.synchronized)
        )


@contextlib.contextmanager
def fused_normalization(model: keras.Model) -> Iterator[int]:
    """Batch normalizations of `model`, nested ones too, use the fused kernel inside the block, and are as before after it.

    The model keeps its layers, weights and names, so what is traced inside trains it, and what is saved after it names
    the standard class. A subclass of the user's is left alone.

    Yields:
      How many layers were changed.
    """
    standard = [layer for layer in model._flatten_layers() if type(layer) is keras.layers.BatchNormalization]
    for layer in standard:
        layer.__class__ = FusedBatchNormalization
    try:
        yield len(standard)
    finally:
        for layer in standard:
            layer.__class__ = keras.layers.BatchNormalization
