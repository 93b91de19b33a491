"""Attention: the layers of a twin that do what `MultiHeadAttention` does, in kernels that tfmot knows.

    query, key, value --three dense layers--> Scores --a dense layer--> output

`components.compression.twin_layers` says which attentions are told so.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras


@tf_keras.saving.register_keras_serializable("trimline")
class Scores(tf_keras.__internal__.layers.BaseRandomLayer):
    """softmax(Q K^T / sqrt(d)) V by head (Vaswani et al. 2017, arXiv 1706.03762): the part of an attention without weights."""

    def __init__(
        self, heads: int, causal: bool = False, dropout: float = 0.0, allowed: Any = None, **kwargs: Any
    ) -> None:
        """Takes, beside what the attention is called with, a mask that is the same for all examples, as nested lists."""
        super().__init__(**kwargs)
        self.heads, self.causal, self.dropout, self.allowed = heads, causal, dropout, allowed

    def call(self, inputs: Any, training: Any = None) -> tf.Tensor:
        """Attends.

        Args:
          inputs: Queries float32 (batch, n, heads x d), keys (batch, m, heads x d), values (batch, m, heads x e), and perhaps
            a mask (batch, n, m), (batch, 1, m) or with an axis for heads, True where a place may be looked at.
          training: Whether a share `dropout` of the scores is dropped.

        Returns:
          float32 (batch, n, heads x e).
        """
        query, key, value = (self._by_head(each) for each in inputs[:3])
        # Not before: the converter would fold the factor into the kernel of the query, and call it its own.
        scores = tf.einsum("bnhd,bmhd->bhnm", query, key) * query.shape[-1] ** -0.5
        mask = tf.cast(inputs[3], tf.bool) if len(inputs) > 3 else None
        if self.allowed is not None:
            mask = tf.constant(self.allowed, tf.bool)
        if mask is not None and mask.shape.rank == 3:
            mask = mask[:, tf.newaxis]
        if self.causal:
            places = tf.range(tf.shape(scores)[-1]), tf.range(tf.shape(scores)[-2])
            before = places[0][tf.newaxis] <= places[1][:, tf.newaxis]
            mask = before if mask is None else mask & before
        if mask is not None:
            # Not -1e9, as Keras has it, which would leave int8 no range; exp(-20) is nothing beside any other place.
            scores = tf.where(mask, scores, tf.reduce_min(scores, -1, keepdims=True) - 20.0)
        scores = tf.nn.softmax(scores)
        if training and self.dropout:
            kept = self._random_generator.random_uniform(tf.shape(scores)) >= self.dropout
            scores = tf.where(kept, scores / (1 - self.dropout), 0.0)
        found = tf.einsum("bhnm,bmhe->bnhe", scores, value)
        return tf.reshape(found, [-1, tf.shape(found)[1], self.heads * value.shape[-1]])

    def _by_head(self, x: tf.Tensor) -> tf.Tensor:
        return tf.reshape(x, [-1, tf.shape(x)[1], self.heads, x.shape[-1] // self.heads])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        own = {"heads": self.heads, "causal": self.causal, "dropout": self.dropout, "allowed": self.allowed}
        own["rng_type"] = "stateful"
        return super().get_config() | own


class Attention(list[Any]):
    """Twin layers of an attention: the four kernels as dense layers, which tfmot knows, and what is between them."""

    def __call__(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        attention_mask: Any = None,
        use_causal_mask: bool = False,
        **others: Any,
    ) -> Any:
        """Calls them as Keras 3 calls the one layer; whether it is causal the layers know already.

        Raises:
          ValueError: Masks of single tensors, or the scores as a second output.
        """
        given = [query, value if key is None else key, value]
        masked = any(getattr(each, "_keras_mask", None) is not None for each in given)
        if masked or any(each is not None and each is not False for each in others.values()):
            raise ValueError("the attention masks single places, or returns its scores")
        *projections, scores, output = self
        found = [project(each) for project, each in zip(projections, given, strict=True)]
        if attention_mask is not None and scores.allowed is None:
            found.append(attention_mask)
        return output(scores(found))
