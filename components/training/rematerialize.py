"""Rematerialize: activations inside layers are computed again for the gradient rather than kept.

Not `keras.RematScope`, which hands keyword arguments on: inside a graph TensorFlow's custom gradients refuse them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.variables import AutocastScope, get_autocast_scope
from tensorflow.compiler.tf2xla.python.xla import optimization_barrier

from components.errors import ModelError

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types


@contextlib.contextmanager
def rematerialized(model: keras.Model) -> Iterator[list[str]]:
    """Layers of `model` with weights keep only their inputs for the gradient inside the block, and all after it.

    A layer that contains others (attention, a block that is a model of its own) is computed again as a whole. One that
    draws random numbers or updates statistics (dropout, batch normalization), itself or in its inside, is left as it is:
    computed twice it would be another layer the second time.

    Yields:
      Names of the layers that are computed again.

    Raises:
      ModelError: There are none.

    Source: Chen et al. 2016, arXiv 1604.06174.
    """
    chosen = [layer for layer in model.layers if layer.trainable_variables and not layer.non_trainable_variables]
    if not chosen:
        raise ModelError(
            f"train.rematerialize: every layer of model '{model.name}' with weights draws random numbers or updates statistics, "
            "and computed twice it would be another; drop the option."
        )
    for layer in chosen:
        layer.call = functools.partial(_twice, layer.call)
    try:
        yield [layer.name for layer in chosen]
    finally:
        for layer in chosen:
            del layer.call  # the class's own shows again


def _twice(call: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a layer so that its gradient calls it again; only tensors are inputs of the custom gradient.

    As `tf.recompute_grad`, which forgets in what precision the layer computes, refuses masks, and saved nothing under XLA on a
    GPU. What the second call gets here depends on the gradient that comes from above, so that the two are not one to a
    compiler: by a zero that it may not fold and, under XLA, by a barrier. On a CPU that saves memory; on a GPU it is not shown.
    """
    leaves = tf.nest.flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if tf.is_tensor(leaf)]
    scope = get_autocast_scope()

    def computed(*tensors: Tensor) -> Any:
        for place, tensor in zip(places, tensors, strict=True):
            leaves[place] = tensor
        again, named = tf.nest.pack_sequence_as((args, kwargs), leaves)
        # When the gradient is computed, the layer's own scope is over.
        with AutocastScope(None if scope is None else scope.dtype):
            return call(*again, **named)

    @tf.custom_gradient
    def twice(*tensors: Tensor) -> Any:
        def gradient(*above: Tensor, variables: list[Any] | None = None) -> Any:
            first = tf.reduce_max(tf.reshape(above[0], [-1])[:1])
            # But for NaN, whose gradient is NaN anyway.
            zero = tf.where(tf.equal(first, first), tf.zeros_like(first), first)
            held = [each + tf.cast(zero, each.dtype) if each.dtype.is_floating else each for each in tensors]
            if tf.__internal__.get_enclosing_xla_context() is not None:
                held = optimization_barrier(*held, *above)[: len(held)]
            with tf.GradientTape() as tape:
                tape.watch([each for each in held if each.dtype.is_floating])
                made = tf.nest.flatten(computed(*held))
            found = tape.gradient(made, [*held, *(variables or [])], output_gradients=above)
            return found[: len(held)], found[len(held) :]

        return computed(*tensors), gradient

    return twice(*(leaves[place] for place in places))
