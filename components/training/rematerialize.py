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
    """Calls a layer so that its gradient calls it again; only tensors are inputs of the custom gradient."""
    leaves = tf.nest.flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if tf.is_tensor(leaf)]

    def computed(*tensors: Tensor) -> Any:
        for place, tensor in zip(places, tensors, strict=True):
            leaves[place] = tensor
        again, named = tf.nest.pack_sequence_as((args, kwargs), leaves)
        return call(*again, **named)

    tensors = [leaves[place] for place in places]
    if tf.__internal__.get_enclosing_xla_context() is None:
        return tf.recompute_grad(computed)(*tensors)
    return _behind_a_barrier(computed)(*tensors)


def _behind_a_barrier(computed: Any) -> Any:
    """As `tf.recompute_grad`, whose order XLA undoes on a GPU: it sees two equal calls there and keeps what the first one made.

    What the second call gets depends on the gradient that comes from above, and is nothing equal: on a GPU by a barrier,
    which XLA drops on a CPU, there by a zero that it cannot know.
    """

    @tf.custom_gradient
    def twice(*tensors: Tensor) -> Any:
        def gradient(*above: Tensor, variables: list[Any] | None = None) -> Any:
            first = tf.reshape(above[0], [-1])[0]
            zero = tf.where(
                tf.equal(first, first), tf.zeros_like(first), first
            )  # but for NaN, whose gradient is NaN anyway
            tied = (each + tf.cast(zero, each.dtype) if each.dtype.is_floating else each for each in tensors)
            held = optimization_barrier(*tied, *above)
            again, above_held = held[: len(tensors)], held[len(tensors) :]
            with tf.GradientTape() as tape:
                tape.watch(again)
                made = tf.nest.flatten(computed(*again))
            found = tape.gradient(made, [*again, *(variables or [])], output_gradients=above_held)
            return found[: len(again)], found[len(again) :]

        return computed(*tensors), gradient

    return twice
