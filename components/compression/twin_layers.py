"""How single layers, operations and activations of Keras 3 are said in tf_keras.

Most layers carry over by their configuration (`translate`). `LAYERS` holds those that do not, `OPERATIONS` what a user
writes on tensors without a layer (`x + y`, `keras.ops.mean`), `ACTIVATIONS` functions that tf_keras lacks or means
otherwise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

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


def translate(layer: keras.Layer, kind: type, name: str) -> dict[str, Any]:
    """Arguments for the constructor of `kind`, from the configuration of a Keras 3 layer.

    Initializers are left out, since the weights are copied; seeds are, since fine-tuning resets random generators by
    epoch; arguments that tf_keras does not have are, since the outputs are compared afterwards.
    """
    accepted = _accepted(kind)
    made: dict[str, Any] = {"name": name, "trainable": layer.trainable, "dtype": "float32"}
    for key, value in layer.get_config().items():
        if key in made or key not in accepted or key == "seed" or key.endswith("_initializer"):
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
    """
    kind = getattr(tf_keras.layers, type(layer).__name__)
    options = translate(layer, kind, name)
    function = options.get("activation")
    if not issubclass(kind, _WITH_KERNEL) or function is None or function.__name__ in FUSED:
        return [kind(**options)]
    options["activation"] = None
    return [kind(**options), tf_keras.layers.Activation(function, name=f"{name}_activation")]


_WITH_KERNEL = (tf_keras.layers.Dense, tf_keras.layers.Conv2D, tf_keras.layers.DepthwiseConv2D)


def _leaky_relu(layer: Any, name: str) -> list[TwinLayer]:
    return [tf_keras.layers.LeakyReLU(alpha=float(layer.negative_slope), name=name)]


def _separable(layer: Any, name: str) -> list[TwinLayer]:
    """As two layers: so the pointwise kernel, which holds most weights, can be pruned, clustered and quantized."""
    common = translate(layer, tf_keras.layers.SeparableConv2D, name)
    both = {key: common[key] for key in ("trainable", "data_format")}
    depthwise = tf_keras.layers.DepthwiseConv2D(
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
    pointwise = tf_keras.layers.Conv2D(
        layer.filters,
        1,
        activation=common["activation"],
        use_bias=layer.use_bias,
        kernel_regularizer=common["pointwise_regularizer"],
        bias_regularizer=common["bias_regularizer"],
        name=name,
        **both,
    )
    return [depthwise, pointwise]


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


LAYERS: dict[str, Maker] = {
    "LeakyReLU": _leaky_relu,
    "SeparableConv2D": _separable,
    "Normalization": _normalization,
    "TimeDistributed": _wrapped,
    "Bidirectional": _bidirectional,
}


# --- operations --------------------------------------------------------------------------------------------------


def _merged(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Two tensors of one shape become a merging layer, which tfmot knows; anything else an operation."""

    def make(operation: Any, a: Any, b: Any) -> Any:
        shapes = [getattr(each, "shape", None) for each in (a, b)]
        if None not in shapes and shapes[0] == shapes[1]:
            return getattr(tf_keras.layers, kind)(name=operation.name)([a, b])
        return function(a, b)

    return make


def _activated(name: str) -> Callable[..., Any]:
    def make(operation: Any, x: Any) -> Any:
        function = tf_keras.activations.get(ACTIVATIONS.get(name, name))
        return tf_keras.layers.Activation(function, name=operation.name)(x)

    return make


OPERATIONS: dict[str, Callable[..., Any]] = {
    "Add": _merged("Add", tf.add),
    "Subtract": _merged("Subtract", tf.subtract),
    "Multiply": _merged("Multiply", tf.multiply),
    "Maximum": _merged("Maximum", tf.maximum),
    "Minimum": _merged("Minimum", tf.minimum),
    "Divide": lambda op, a, b: tf.divide(a, b),
    "TrueDivide": lambda op, a, b: tf.divide(a, b),
    "Negative": lambda op, x: tf.negative(x),
    "Square": lambda op, x: tf.square(x),
    "Sqrt": lambda op, x: tf.sqrt(x),
    "Absolute": lambda op, x: tf.abs(x),
    "Exp": lambda op, x: tf.exp(x),
    "Log": lambda op, x: tf.math.log(x),
    "Relu": _activated("relu"),
    "Relu6": _activated("relu6"),
    "Sigmoid": _activated("sigmoid"),
    "Silu": _activated("silu"),
    "HardSigmoid": _activated("hard_sigmoid"),
    "HardSilu": _activated("hard_silu"),
    "Tanh": _activated("tanh"),
    "Softmax": lambda op, x: tf.nn.softmax(x, axis=op.axis),
    "Mean": lambda op, x: tf.reduce_mean(x, axis=op.axis, keepdims=op.keepdims),
    "Sum": lambda op, x: tf.reduce_sum(x, axis=op.axis, keepdims=op.keepdims),
    "Max": lambda op, x: tf.reduce_max(x, axis=op.axis, keepdims=op.keepdims),
    "Reshape": lambda op, x: tf_keras.layers.Reshape(op.newshape[1:], name=op.name)(x),
    "Transpose": lambda op, x: tf.transpose(x, op.axes),
    "Squeeze": lambda op, x: tf.squeeze(x, op.axis),
    "ExpandDims": lambda op, x: tf.expand_dims(x, op.axis),
    "Concatenate": lambda op, x: tf_keras.layers.Concatenate(op.axis, name=op.name)(list(x)),
    "GetItem": lambda op, x, key: x[key],
    "NotEqual": lambda op, a, b: tf.not_equal(a, b),  # how Keras 3 writes down the mask of an embedding
}
"""By class name of the Keras operation: (operation, its arguments) -> tensor."""
