"""How single layers, operations and activations of Keras 3 are said in tf_keras.

Most layers carry over by their configuration (`translate`). `LAYERS` holds those that do not, `OPERATIONS` what a user
writes on tensors without a layer (`x + y`, `keras.ops.mean`) and tf_keras says in layers, `ACTIVATIONS` functions that
tf_keras lacks or means otherwise. All else is hosted (`components.compression.hosted`).
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from components.artifacts import attention_parts
from components.compression.attention import Attention, Scores
from components.compression.hosted import host

TwinLayer = Any  # a tf_keras.layers.Layer; tf_keras ships no types
Maker = Callable[[Any, str], list[TwinLayer]]

_PACKAGE = "trimline"


# --- activations -------------------------------------------------------------------------------------------------


def _registered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function` known to tf_keras, so that a model that uses it can be saved."""
    return tf_keras.saving.register_keras_serializable(_PACKAGE)(function)


@_registered
def relu6(x: tf.Tensor) -> tf.Tensor:
    """min(max(x, 0), 6)."""
    return tf.nn.relu6(x)


@_registered
def hard_sigmoid(x: tf.Tensor) -> tf.Tensor:
    """relu6(x + 3) / 6, as Keras 3 has it; tf_keras's own is another function, clip(0.2 x + 0.5)."""
    return tf.nn.relu6(x + 3.0) * (1.0 / 6.0)


@_registered
def hard_silu(x: tf.Tensor) -> tf.Tensor:
    """x relu6(x + 3) / 6, also called hard swish (Howard et al. 2019, arXiv 1905.02244)."""
    return x * (tf.nn.relu6(x + 3.0) * (1.0 / 6.0))


@_registered
def leaky_relu(x: tf.Tensor) -> tf.Tensor:
    """x where positive, else 0.2 x: the slope of Keras 3's function."""
    return tf.nn.leaky_relu(x, alpha=0.2)


@_registered
def log_softmax(x: tf.Tensor) -> tf.Tensor:
    """Logarithm of the softmax over the last axis."""
    return tf.nn.log_softmax(x)


@_registered
def hard_tanh(x: tf.Tensor) -> tf.Tensor:
    """x clipped to [-1, 1]."""
    return tf.clip_by_value(x, -1.0, 1.0)


ACTIVATIONS: dict[str, Callable[..., Any] | str] = {
    "relu6": relu6,
    "hard_sigmoid": hard_sigmoid,
    "hard_silu": hard_silu,
    "hard_swish": hard_silu,
    "leaky_relu": leaky_relu,
    "log_softmax": log_softmax,
    "hard_tanh": hard_tanh,
    "silu": "swish",
}


def activation(function: Any) -> Any:
    """The tf_keras twin of a Keras 3 activation function.

    Raises:
      ValueError: tf_keras knows no function of that name, or it belongs to the user.
    """
    if function is None:
        return None
    name = getattr(function, "__name__", type(function).__name__)
    if not getattr(function, "__module__", "").startswith("keras."):
        raise ValueError(f"the activation '{name}' is not one of Keras's own")
    return tf_keras.activations.get(ACTIVATIONS.get(name, name))


FUSED = ("linear", "relu", "swish", "gelu", "softmax", "sigmoid", "tanh")
"""Activations that tfmot can quantize inside a layer with a kernel."""


# --- configurations ----------------------------------------------------------------------------------------------


def translate(layer: keras.Layer, kind: type, name: str, without: str = "") -> dict[str, Any]:
    """Arguments for the constructor of `kind`, from the configuration of a Keras 3 layer.

    Initializers are left out, since the weights are copied; seeds are, since fine-tuning resets random generators by
    epoch; arguments that tf_keras does not have are, since the outputs are compared afterwards; and so is `without`.
    """
    accepted = _accepted(kind)
    made: dict[str, Any] = {"name": name, "trainable": layer.trainable, "dtype": "float32"}
    for key, value in layer.get_config().items():
        if key in made or key not in accepted or key in ("seed", without) or key.endswith("_initializer"):
            continue
        made[key] = _value(layer, key, value)
    if issubclass(kind, tf_keras.__internal__.layers.BaseRandomLayer):
        made["rng_type"] = "stateful"  # a tf.random.Generator, the only kind that can be reset
    return made


def _value(layer: keras.Layer, key: str, value: Any) -> Any:
    if value is None:
        return None
    if key.endswith("activation"):
        return activation(getattr(layer, key))
    if key.endswith("regularizer"):
        return _same_class(tf_keras.regularizers, value)
    if key.endswith("constraint"):
        return _same_class(tf_keras.constraints, value)
    return value


def _same_class(module: Any, value: dict[str, Any]) -> Any:
    kind = getattr(module, value["class_name"], None)
    if kind is None:
        raise ValueError(f"tf_keras has no '{value['class_name']}'")
    return kind(**value["config"])


@functools.cache
def _accepted(kind: type) -> frozenset[str]:
    names = {"name", "trainable", "dtype"}
    for each in kind.__mro__:
        if each is not tf_keras.layers.Layer and "__init__" in vars(each):
            names |= set(inspect.signature(vars(each)["__init__"]).parameters)
    return frozenset(names - {"self", "kwargs", "args"})


# --- layers ------------------------------------------------------------------------------------------------------


def plain(layer: keras.Layer, name: str) -> list[TwinLayer]:
    """The tf_keras layer of the same class name and configuration.

    An activation that tfmot does not know inside a layer comes out as a layer of its own, so that the kernel can still
    be quantized.

    Raises:
      ValueError: tf_keras has no such layer, or not with that configuration.
    """
    kind = getattr(tf_keras.layers, type(layer).__name__, None)
    if kind is None:
        raise ValueError("tf_keras has no layer of that name")
    if not issubclass(kind, _WITH_KERNEL):
        return [kind(**translate(layer, kind, name))]
    inside, behind = _activation_of(layer, name)
    return [kind(**translate(layer, kind, name, without="activation"), activation=inside), *behind]


_WITH_KERNEL = (
    tf_keras.layers.Dense,
    tf_keras.layers.Conv1D,
    tf_keras.layers.Conv2D,
    tf_keras.layers.Conv3D,
    tf_keras.layers.DepthwiseConv2D,
)


def _activation_of(layer: Any, name: str) -> tuple[Any, list[TwinLayer]]:
    """The activation of a layer with a kernel: a function to go inside, or a layer to go behind it."""
    behind = f"{name}_activation"
    try:
        function = activation(layer.activation)
    except ValueError:  # one of the user's own
        outputs = layer._inbound_nodes[0].outputs
        return None, [host(keras.layers.Activation(layer.activation), behind, outputs, {})]
    if function is None or function.__name__ in FUSED:
        return function, []
    return None, [tf_keras.layers.Activation(function, name=behind)]


def _fused(layer: Any, name: str) -> list[TwinLayer]:
    """Keras 3's batch normalization on the fused kernel, which is tf_keras's own way."""
    kind = tf_keras.layers.BatchNormalization
    return [kind(**translate(layer, kind, name))]


def _leaky_relu(layer: Any, name: str) -> list[TwinLayer]:
    return [tf_keras.layers.LeakyReLU(alpha=float(layer.negative_slope), name=name)]


def _separable(layer: Any, name: str) -> list[TwinLayer]:
    """As two layers: so the pointwise kernel, which holds most weights, can be pruned, clustered and quantized."""
    if layer.padding == "causal":
        return plain(layer, name)
    one, two = tf_keras.layers.DepthwiseConv1D, tf_keras.layers.DepthwiseConv2D
    across, along = (one, tf_keras.layers.Conv1D) if layer.rank == 1 else (two, tf_keras.layers.Conv2D)
    common = translate(layer, getattr(tf_keras.layers, type(layer).__name__), name, without="activation")
    both = {key: common[key] for key in ("trainable", "data_format")}
    inside, behind = _activation_of(layer, name)
    depthwise = across(
        layer.kernel_size,
        strides=layer.strides,
        padding=layer.padding,
        depth_multiplier=layer.depth_multiplier,
        dilation_rate=layer.dilation_rate,
        depthwise_regularizer=common["depthwise_regularizer"],
        use_bias=False,
        name=f"{name}_depthwise",
        **both,
    )
    pointwise = along(
        layer.filters,
        1,
        activation=inside,
        use_bias=layer.use_bias,
        kernel_regularizer=common["pointwise_regularizer"],
        bias_regularizer=common["bias_regularizer"],
        name=name,
        **both,
    )
    return [depthwise, pointwise, *behind]


def _einsum_dense(layer: Any, name: str) -> list[TwinLayer]:
    """A sum over the last axis alone is a dense layer, which tfmot knows."""
    found = re.fullmatch(r"(\.\.\.|[a-z]+)([a-z]),\2([a-z])->\1\3", layer.equation)
    if found is None or layer.bias_axes not in (None, found[3]):
        return plain(layer, name)
    inside, behind = _activation_of(layer, name)
    kind = tf_keras.layers.Dense
    made = translate(layer, kind, name, without="activation")
    made |= {"units": layer.kernel.shape[-1], "use_bias": layer.bias is not None, "activation": inside}
    return [kind(**made), *behind]


def _normalization(layer: Any, name: str) -> list[TwinLayer]:
    mean, variance = (np.asarray(keras.ops.convert_to_numpy(each)) for each in (layer.mean, layer.variance))
    return [
        tf_keras.layers.Normalization(
            axis=layer.axis, mean=mean.squeeze(), variance=variance.squeeze(), invert=layer.invert, name=name
        )
    ]


def _wrapped(layer: Any, name: str) -> list[TwinLayer]:
    """TimeDistributed: a layer around another."""
    (inner,) = LAYERS.get(type(layer.layer).__name__, plain)(layer.layer, layer.layer.name)
    return [tf_keras.layers.TimeDistributed(inner, name=name)]


def _bidirectional(layer: Any, name: str) -> list[TwinLayer]:
    (forward,) = plain(layer.forward_layer, layer.forward_layer.name)
    (backward,) = plain(layer.backward_layer, layer.backward_layer.name)
    return [tf_keras.layers.Bidirectional(forward, merge_mode=layer.merge_mode, backward_layer=backward, name=name)]


@tf_keras.saving.register_keras_serializable(_PACKAGE)
class StochasticDepth(tf_keras.__internal__.layers.BaseRandomLayer):
    """Drops whole examples of a residual branch in training (Huang et al. 2016, arXiv 1603.09382), as ConvNeXt does.

    Not hosted, because Keras 3's draws from a generator that all layers share.
    """

    def __init__(self, drop_path_rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.drop_path_rate = drop_path_rate

    def call(self, x: tf.Tensor, training: Any = None) -> tf.Tensor:
        """`x` as it is; in training each example, with probability `drop_path_rate`, as zeros, else larger by as much."""
        if not training:
            return x
        keep = 1.0 - self.drop_path_rate
        shape = tf.concat([tf.shape(x)[:1], tf.ones([x.shape.rank - 1], tf.int32)], 0)
        return x / keep * tf.floor(keep + self._random_generator.random_uniform(shape))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return super().get_config() | {"drop_path_rate": self.drop_path_rate, "rng_type": "stateful"}


def _attention(layer: Any, name: str) -> list[TwinLayer]:
    """Over the places of a sequence, in dense layers; anything else as tf_keras has it."""
    config = layer.get_config()
    calls = [node.arguments.kwargs for node in layer._inbound_nodes]
    causal = {bool(each.get("use_causal_mask")) for each in calls}
    masks = [each["attention_mask"] for each in calls if each.get("attention_mask") is not None]
    constant = [mask for mask in masks if not isinstance(mask, keras.KerasTensor)]
    unusual = (
        layer._query_dense.equation != "abc,cde->abde",
        layer._key_dense.equation != "abc,cde->abde",
        layer._output_dense.equation != "abcd,cde->abe",
        getattr(layer, "_use_gate", False),
        getattr(layer, "_sliding_window", None) is not None,
        len(causal) > 1,
        len(calls) > 1 and constant,
        any(each.get("return_attention_scores") for each in calls),
        any(len(mask.shape) < 3 for mask in masks if isinstance(mask, keras.KerasTensor)),
        *(config.get(key) is not None for key in ("activity_regularizer", "kernel_constraint", "bias_constraint")),
    )
    if any(unusual):
        return plain(layer, name)
    common = {key: _value(layer, key, config[key]) for key in ("kernel_regularizer", "bias_regularizer")}
    common |= {"use_bias": config["use_bias"], "trainable": layer.trainable, "dtype": "float32"}
    heads, width = config["num_heads"], config["key_dim"]
    sizes = (heads * width, heads * width, heads * (config["value_dim"] or width))
    *parts, between = attention_parts(name)
    dense = tf_keras.layers.Dense
    scores = Scores(
        heads,
        causal.pop(),
        config["dropout"],
        _allowed(constant[0]) if constant else None,
        name=between,
        dtype="float32",
        rng_type="stateful",
    )
    kernels = [dense(size, name=part, **common) for part, size in zip(parts, sizes, strict=True)]
    return Attention([*kernels, scores, dense(layer._output_dense.kernel.shape[-1], name=name, **common)])


def _allowed(mask: Any) -> Any:
    """A constant mask (n, m), (1, n, m) or with an axis for heads, as nested lists with the axes of the scores."""
    values = np.asarray(keras.ops.convert_to_numpy(mask)).astype(bool)
    while values.ndim < 4:  # as Keras does
        values = np.expand_dims(values, -3)
    return values.tolist()


def _stochastic_depth(layer: Any, name: str) -> list[TwinLayer]:
    return [StochasticDepth(layer.drop_path_rate, rng_type="stateful", name=name)]


def _hosted(layer: Any, name: str) -> list[TwinLayer]:
    """tf_keras means something else by that name."""
    return []


LAYERS: dict[str, Maker] = {
    "Bidirectional": _bidirectional,
    "EinsumDense": _einsum_dense,
    "FusedBatchNormalization": _fused,
    "Lambda": _hosted,
    "LeakyReLU": _leaky_relu,
    "MultiHeadAttention": _attention,
    "Normalization": _normalization,
    "SeparableConv1D": _separable,
    "SeparableConv2D": _separable,
    "StochasticDepth": _stochastic_depth,
    "TimeDistributed": _wrapped,
}


# --- operations --------------------------------------------------------------------------------------------------


def _merging(kind: str) -> Maker:
    """Two tensors of one shape make a merging layer; broadcasting and constants do not."""

    def make(operation: Any, name: str) -> list[TwinLayer]:
        shapes = _shapes(operation)
        return [getattr(tf_keras.layers, kind)(name=name)] if len(shapes) == 2 and shapes[0] == shapes[1] else []

    return make


def _activated(function: str) -> Maker:
    def make(operation: Any, name: str) -> list[TwinLayer]:
        return [tf_keras.layers.Activation(tf_keras.activations.get(ACTIVATIONS.get(function, function)), name=name)]

    return make


def _pooled(kind: str) -> Maker:
    """A reduction over height and width."""

    def make(operation: Any, name: str) -> list[TwinLayer]:
        picture = len(_shapes(operation)[0]) == 4 and tuple(operation.axis or ()) in ((1, 2), (-3, -2))
        return [getattr(tf_keras.layers, kind)(keepdims=operation.keepdims, name=name)] if picture else []

    return make


def _reshaped(operation: Any, name: str) -> list[TwinLayer]:
    """Where the batch stays as it is."""
    (shape,), (batch, *rest) = _shapes(operation), operation.newshape
    return [tf_keras.layers.Reshape(tuple(rest), name=name)] if shape[0] is None and batch == -1 else []


def _permuted(operation: Any, name: str) -> list[TwinLayer]:
    axes = operation.axes
    return [tf_keras.layers.Permute(tuple(axes[1:]), name=name)] if axes and axes[0] == 0 else []


def _shapes(operation: Any) -> list[tuple[int | None, ...]]:
    return [tuple(tensor.shape) for tensor in operation._inbound_nodes[0].input_tensors]


OPERATIONS: dict[str, Maker] = {
    "Add": _merging("Add"),
    "Subtract": _merging("Subtract"),
    "Multiply": _merging("Multiply"),
    "Maximum": _merging("Maximum"),
    "Minimum": _merging("Minimum"),
    "Concatenate": lambda operation, name: [tf_keras.layers.Concatenate(operation.axis, name=name)],
    "Relu": _activated("relu"),
    "Relu6": _activated("relu6"),
    "Sigmoid": _activated("sigmoid"),
    "Silu": _activated("silu"),
    "HardSigmoid": _activated("hard_sigmoid"),
    "HardSilu": _activated("hard_silu"),
    "Tanh": _activated("tanh"),
    "Mean": _pooled("GlobalAveragePooling2D"),
    "Max": _pooled("GlobalMaxPooling2D"),
    "Reshape": _reshaped,
    "Transpose": _permuted,
}
"""Operations that are layers of tf_keras, which tfmot can quantize, by class name; Keras 3 runs all others."""
