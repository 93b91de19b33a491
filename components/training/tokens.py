"""Models of token sequences, in the zoo: a text classifier and a causal language model; and the blocks of every encoder.

Both take rows of whole numbers (batch, length) as float32, as every table is handed over: token numbers from 0 on, exact
below 2**24. A number of `vocabulary` or more counts as the last one, so that no row can stop a training.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from keras import layers, ops
from pydantic import Field

from components.artifacts import DataSpec
from components.errors import ConfigError
from components.options import Count, Fraction, Options

Tensor = Any  # a symbolic keras.KerasTensor; Keras ships no usable types

BOUND = 8.0  # of attention scores in the causal model
HIDDEN = 32.0  # how far below zero the scores of later tokens are put


class Encoder(Options):
    """Blocks of self-attention on tokens (batch, length, width), normalized before each part (Xiong et al. 2020, arXiv 2002.04745)."""

    width: Count = Field(64, description="Length of a token's vector; a multiple of `heads`.")
    depth: Count = Field(2, description="Blocks.")
    heads: Count = 2
    hidden: Count = Field(128, description="Units between the two dense layers of a block.")
    dropout: Fraction = Field(0.0, description="On each branch, and before the head.")

    def _check_heads(self) -> None:
        if self.width % self.heads:
            raise ConfigError(
                f"model.options.width={self.width} must be a multiple of heads={self.heads}; use {self.width - self.width % self.heads + self.heads}."
            )

    def _encoded(self, x: Tensor, *, causal: bool) -> Tensor:
        """The blocks in their order, and the last normalization."""
        for index in range(1, self.depth + 1):
            x = self._block(x, f"block{index}", causal)
        return layers.LayerNormalization(epsilon=1e-6, name="norm")(x)

    def _block(self, x: Tensor, name: str, causal: bool) -> Tensor:
        y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_attention_norm")(x)
        if causal:
            attended = self._causal_attention(y, f"{name}_attention")
        else:
            attention = layers.MultiHeadAttention(self.heads, self.width // self.heads, name=f"{name}_attention")
            attended = attention(y, y)
        x = self._joined(x, attended, f"{name}_attention")
        y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_dense_norm")(x)
        # Not gelu, for which TFLite has no int8 kernel of its own.
        y = layers.Dense(self.hidden, "relu", kernel_initializer="he_normal", name=f"{name}_dense1")(y)
        return self._joined(x, layers.Dense(self.width, name=f"{name}_dense2")(y), f"{name}_dense")

    def _causal_attention(self, x: Tensor, name: str) -> Tensor:
        """Not MultiHeadAttention, whose mask of -1e9 stretches the int8 range of the scores until nothing else is left.

        Scores are bounded by a tanh (Gemma 2, arXiv 2408.00118), so that a mask not far below them does: together, n hidden
        tokens weigh n * exp(BOUND - HIDDEN) at most, less than float32 resolves up to n = 1500.
        """
        length, each = x.shape[1], self.width // self.heads

        def split(part: str) -> Tensor:
            parts = layers.Dense(self.width, name=f"{name}_{part}")(x)
            parts = layers.Reshape((length, self.heads, each), name=f"{name}_{part}_heads")(parts)
            return layers.Permute((2, 1, 3), name=f"{name}_{part}_first")(parts)

        query, key, value = split("query"), split("key"), split("value")
        scores = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2))) * (1 / (BOUND * math.sqrt(each)))
        seen = np.tril(np.ones((1, 1, length, length), np.float32))
        scores = ops.tanh(scores) * (BOUND * seen) + (seen - 1) * HIDDEN
        x = ops.matmul(layers.Softmax(name=f"{name}_softmax")(scores), value)
        x = layers.Reshape((length, self.width), name=f"{name}_joined")(
            layers.Permute((2, 1, 3), name=f"{name}_last")(x)
        )
        return layers.Dense(self.width, name=f"{name}_output")(x)

    def _joined(self, x: Tensor, branch: Tensor, name: str) -> Tensor:
        if self.dropout:
            branch = layers.Dropout(self.dropout, name=f"{name}_dropout")(branch)
        return layers.Add(name=f"{name}_add")([x, branch])

    def _head(self, x: Tensor, spec: DataSpec) -> Tensor:
        x = layers.Dropout(self.dropout, name="dropout")(x) if self.dropout else x
        return layers.Dense(spec.outputs, name="logits")(x)


class _Tokens(Encoder):
    vocabulary: Count = Field(257, description="Different token numbers; 257 are the bytes and the padding, 0.")

    def _states(self, inputs: Tensor, spec: DataSpec, *, causal: bool) -> Tensor:
        """(batch, length, width)."""
        self._check_heads()
        if len(spec.input_shape) != 1:
            raise ConfigError(
                f"the model takes rows of token numbers, got examples of shape {spec.input_shape}; use a text source, or cnn for pictures."
            )
        # As int32 before anything may round it: bfloat16 would merge numbers above 256, int8 all of them.
        tokens = ops.clip(ops.cast(inputs, "int32"), 0, self.vocabulary - 1)
        x = layers.Embedding(self.vocabulary, self.width, name="tokens")(tokens)
        # A bias for each place says where a token stands.
        shape = (spec.input_shape[0], self.width)
        x = layers.EinsumDense("bnd,de->bne", output_shape=shape, bias_axes="ne", name="places")(x)
        return self._encoded(x, causal=causal)


class TextEncoder(_Tokens):
    """Every token sees every other, their mean is classified. Padding is a token like others, at places of its own."""

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        x = self._states(inputs, spec, causal=False)
        return self._head(layers.GlobalAveragePooling1D(name="average")(x), spec)


class CausalLm(_Tokens):
    """A token sees those before it; the last one's state gives the logits of the next token.

    A row is a window of text, its label the token behind it: one prediction a row.
    """

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        x = self._states(inputs, spec, causal=True)
        x = layers.Cropping1D((spec.input_shape[0] - 1, 0), name="last")(x)
        return self._head(layers.Flatten(name="flatten")(x), spec)
