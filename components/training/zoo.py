"""The model zoo: small architectures that prune, cluster and quantize well, each a set of options and one method.

Every model is functional, has static shapes and named layers, and is made of layers that tfmot treats: convolution,
then batch normalization, then ReLU; dense layers with their activation; global average pooling before the head. Of the
transformer's layers it leaves attention alone.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Protocol

import keras
from keras import layers
from pydantic import Field

from components.artifacts import DataSpec
from components.errors import ConfigError
from components.options import Count, Fraction, Options
from components.training.tokens import CausalLm, TextEncoder

Tensor = Any  # a symbolic keras.KerasTensor; Keras ships no usable types
Widths = Annotated[list[Count], Field(min_length=1)]


class Architecture(Protocol):
    """What every entry of the zoo can do."""

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """Connects `inputs` (batch, *spec.input_shape) to outputs of shape (batch, spec.outputs)."""
        ...


class Linear(Options):
    """One dense layer on the flattened input: logistic or linear regression."""

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        return _head(_flat(inputs), spec)


class Mlp(Options):
    """Dense layers with ReLU on the flattened input."""

    units: Widths = [64, 32]
    dropout: Fraction = Field(0.0, description="After each hidden layer.")

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        return _head(_dense_stack(_flat(inputs), self.units, self.dropout), spec)


class WideAndDeep(Options):
    """A linear model and a deep one on the same features, their logits added (Cheng et al. 2016, arXiv 1606.07792)."""

    units: Widths = [64, 32]
    dropout: Fraction = Field(0.0, description="After each hidden layer of the deep path.")

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        features = _flat(inputs)
        deep = layers.Dense(spec.outputs, name="deep_head")(_dense_stack(features, self.units, self.dropout))
        return layers.Add(name="wide_and_deep")([_head(features, spec), deep])


class Cnn(Options):
    """3 x 3 convolutions, each stage halving the picture while it is larger than 4 pixels, then a dense head."""

    filters: Widths = [16, 32, 32]
    pool: Literal["average", "flatten"] = Field("average", description="How the last picture becomes a vector.")
    units: list[Count] = Field([], description="Hidden dense layers before the head.")
    dropout: Fraction = Field(0.0, description="Before the head, and after each hidden dense layer.")

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        _need_picture("cnn", spec)
        x = inputs
        for index, filters in enumerate(self.filters, 1):
            x = _conv(x, filters, f"conv{index}")
            if min(x.shape[1:3]) > 4 and index < len(self.filters):
                x = layers.MaxPooling2D(name=f"pool{index}")(x)
        x = layers.GlobalAveragePooling2D(name="average")(x) if self.pool == "average" else _flat(x)
        if self.dropout:
            x = layers.Dropout(self.dropout, name="dropout")(x)
        return _head(_dense_stack(x, self.units, self.dropout), spec)


class Resnet8(Options):
    """ResNet-8 of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597): a stem and three residual stages."""

    filters: Count = Field(16, description="Of the first stage; each next one doubles them and halves the picture.")
    dropout: Fraction = Field(0.0, description="Before the head.")

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        _need_picture("resnet8", spec)
        x = _conv(inputs, self.filters, "stem")
        for index in (1, 2, 3):
            x = _residual(x, self.filters * 2 ** (index - 1), 1 if index == 1 else 2, f"stage{index}")
        return _average_head(x, self.dropout, spec)


class Mobilenet(Options):
    """Depthwise-separable convolutions (Howard et al. 2017, arXiv 1704.04861), scaled by a width multiplier."""

    width: Annotated[float, Field(gt=0, le=4)] = Field(1.0, description="Multiplies every block's channels.")
    stem: Count = Field(16, description="Channels of the first convolution, before `width`.")
    blocks: Widths = Field([32, 64, 64, 128, 128], description="Channels of each block, before `width`.")
    strides: list[Annotated[int, Field(ge=1, le=2)]] = Field([1, 2, 1, 2, 1], description="One per block.")
    dropout: Fraction = Field(0.0, description="Before the head.")

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        _need_picture("mobilenet", spec)
        if len(self.strides) != len(self.blocks):
            raise ConfigError(
                f"model.options.strides has {len(self.strides)} entries for {len(self.blocks)} blocks; give one stride a block."
            )
        x = _conv(inputs, self._scaled(self.stem), "stem")
        for index, (channels, stride) in enumerate(zip(self.blocks, self.strides, strict=True), 1):
            x = layers.DepthwiseConv2D(
                3, stride, "same", use_bias=False, depthwise_initializer="he_normal", name=f"block{index}_depthwise"
            )(x)
            x = _normed(x, f"block{index}_depthwise", relu=True)
            x = _conv(x, self._scaled(channels), f"block{index}_pointwise", kernel=1)
        return _average_head(x, self.dropout, spec)

    def _scaled(self, channels: int) -> int:
        return max(1, math.floor(channels * self.width + 0.5))


class Transformer(Options):
    """An encoder of self-attention blocks, normalized before each part (Xiong et al. 2020, arXiv 2002.04745).

    Its tokens are patches of a picture (Dosovitskiy et al. 2021, arXiv 2010.11929) that learn from a depthwise convolution
    where they are (Chu et al. 2021, arXiv 2102.10882), or, for rows, mixtures of the features.
    """

    width: Count = Field(32, description="Length of a token's vector; a multiple of `heads`.")
    depth: Count = Field(2, description="Blocks.")
    heads: Count = 2
    hidden: Count = Field(64, description="Units between the two dense layers of a block.")
    patch: Count = Field(4, description="Pictures: side of a patch, pixels.")
    tokens: Count = Field(8, description="Rows: how many tokens are made of the features.")
    dropout: Fraction = Field(0.0, description="On each branch, and before the head.")

    def logits(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """See `Architecture`."""
        if self.width % self.heads:
            raise ConfigError(
                f"model.options.width={self.width} must be a multiple of heads={self.heads}; use {self.width - self.width % self.heads + self.heads}."
            )
        x = self._tokens(inputs, spec)
        for index in range(1, self.depth + 1):
            x = self._block(x, f"block{index}")
        x = layers.LayerNormalization(epsilon=1e-6, name="norm")(x)
        x = layers.GlobalAveragePooling1D(name="average")(x)
        return _head(layers.Dropout(self.dropout, name="dropout")(x) if self.dropout else x, spec)

    def _tokens(self, inputs: Tensor, spec: DataSpec) -> Tensor:
        """(batch, tokens, width)."""
        if len(spec.input_shape) != 3:
            x = layers.Dense(self.tokens * self.width, name="tokens")(_flat(inputs))
            return layers.Reshape((self.tokens, self.width), name="sequence")(x)
        if min(spec.input_shape[:2]) < self.patch:
            raise ConfigError(
                f"model.options.patch={self.patch} must fit into pictures of {spec.input_shape[0]} x {spec.input_shape[1]}; use {min(spec.input_shape[:2])} or less."
            )
        x = layers.Conv2D(self.width, self.patch, self.patch, name="patches")(inputs)
        place = layers.DepthwiseConv2D(3, padding="same", name="place")(x)
        x = layers.Add(name="placed")([x, place])
        return layers.Reshape((x.shape[1] * x.shape[2], self.width), name="sequence")(x)

    def _block(self, x: Tensor, name: str) -> Tensor:
        y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_attention_norm")(x)
        attention = layers.MultiHeadAttention(self.heads, self.width // self.heads, name=f"{name}_attention")
        x = self._joined(x, attention(y, y), f"{name}_attention")
        y = layers.LayerNormalization(epsilon=1e-6, name=f"{name}_dense_norm")(x)
        # Not gelu, for which TFLite has no int8 kernel of its own.
        y = layers.Dense(self.hidden, "relu", kernel_initializer="he_normal", name=f"{name}_dense1")(y)
        return self._joined(x, layers.Dense(self.width, name=f"{name}_dense2")(y), f"{name}_dense")

    def _joined(self, x: Tensor, branch: Tensor, name: str) -> Tensor:
        if self.dropout:
            branch = layers.Dropout(self.dropout, name=f"{name}_dropout")(branch)
        return layers.Add(name=f"{name}_add")([x, branch])


ZOO: dict[str, type[Architecture]] = {
    "linear": Linear,
    "mlp": Mlp,
    "cnn": Cnn,
    "resnet8": Resnet8,
    "mobilenet": Mobilenet,
    "transformer": Transformer,
    "wide_and_deep": WideAndDeep,
    "text_encoder": TextEncoder,
    "causal_lm": CausalLm,
}


def assemble(architecture: Architecture, spec: DataSpec) -> keras.Model:
    """Makes the Keras model of one entry of the zoo: input named `spec.input_name`, output logits named 'logits'.

    Raises:
      ConfigError: The architecture needs pictures and the data are rows, or its options contradict each other.
    """
    inputs = keras.Input(spec.input_shape, name=spec.input_name, dtype="float32")
    return keras.Model(inputs, architecture.logits(inputs, spec), name=type(architecture).__name__.lower())


def _need_picture(name: str, spec: DataSpec) -> None:
    if len(spec.input_shape) != 3:
        raise ConfigError(
            f"model.name={name} takes pictures (height, width, channels), got rows of shape {spec.input_shape}; use mlp, wide_and_deep or linear."
        )


def _flat(x: Tensor) -> Tensor:
    return layers.Flatten(name="flatten")(x) if len(x.shape) > 2 else x


def _head(x: Tensor, spec: DataSpec) -> Tensor:
    return layers.Dense(spec.outputs, name="logits")(x)


def _average_head(x: Tensor, dropout: float, spec: DataSpec) -> Tensor:
    x = layers.GlobalAveragePooling2D(name="average")(x)
    return _head(layers.Dropout(dropout, name="dropout")(x) if dropout else x, spec)


def _dense_stack(x: Tensor, units: list[int], dropout: float) -> Tensor:
    for index, width in enumerate(units, 1):
        x = layers.Dense(width, "relu", kernel_initializer="he_normal", name=f"dense{index}")(x)
        if dropout:
            x = layers.Dropout(dropout, name=f"dense{index}_dropout")(x)
    return x


def _conv(x: Tensor, filters: int, name: str, *, kernel: int = 3, stride: int = 1, relu: bool = True) -> Tensor:
    """Convolution, batch normalization, ReLU. No bias: the normalization's offset takes its place."""
    x = layers.Conv2D(
        filters, kernel, stride, "same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
    )(x)
    return _normed(x, name, relu=relu)


def _normed(x: Tensor, name: str, *, relu: bool) -> Tensor:
    # Momentum 0.9, not Keras's 0.99: with a few hundred updates an epoch the moving statistics must keep up.
    x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
    return layers.ReLU(name=f"{name}_relu")(x) if relu else x


def _residual(x: Tensor, filters: int, stride: int, name: str) -> Tensor:
    """Two convolutions and a shortcut, projected by a 1 x 1 convolution where the shape changes."""
    y = _conv(x, filters, f"{name}_a", stride=stride)
    y = _conv(y, filters, f"{name}_b", relu=False)
    if stride != 1 or x.shape[-1] != filters:
        x = layers.Conv2D(filters, 1, stride, "same", kernel_initializer="he_normal", name=f"{name}_shortcut_conv")(x)
    return layers.ReLU(name=f"{name}_relu")(layers.Add(name=f"{name}_add")([x, y]))
