"""Twin: the tf_keras copy of a Keras 3 model on which tfmot works; and the way back.

    keras.Model --to_twin()--> tf_keras.Model --from_twin()--> keras.Model

tfmot refuses Keras 3 (tensorflow/model-optimization issue 1119). A twin is rebuilt layer by layer from each layer's
configuration, takes over the weights, and must give the same outputs. It is always one flat functional model: nested
models are laid out in place, since quantization-aware training refuses a model inside a model.

Only this package imports tf_keras and tfmot. Importing tfmot sets TF_USE_LEGACY_KERAS, which changes what `tf.keras`
means in the whole process; `import keras` keeps meaning Keras 3.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from components.compression.twin_layers import LAYERS, OPERATIONS, TwinLayer, plain
from components.errors import ModelError

# Largest difference of the outputs over their largest magnitude. Measured on ten of keras.applications: at most 6e-7.
TOLERANCE = 1e-5
# The same where the model computes in bfloat16 or float16, of which the twin, in float32, is free.
REDUCED_TOLERANCE = 5e-2

TWINS: dict[str, Callable[[Any, str], list[TwinLayer]]] = dict(LAYERS)
"""Layers that their configuration alone does not carry over, by class name; yours may be added.

(Keras 3 layer, name for the twin) -> tf_keras layers that, called one after the other, do the same. Their weights taken
together, in order, must be those of the Keras 3 layer, or none at all. A tf_keras class of your own must be registered
with `tf_keras.saving.register_keras_serializable`, because compressed models are saved.
"""


def to_twin(model: keras.Model) -> tf_keras.Model:
    """Rebuilds a Keras 3 model in tf_keras.

    Args:
      model: Built, functional or sequential, any nesting; several inputs, outputs and shared layers are fine.

    Returns:
      A flat functional model in float32 with the same weights, names (a name that occurs twice in nested models gets
      the outer one in front) and flags `trainable`. Its dropout draws from generators that can be reset, so that a
      resumed training repeats.

    Raises:
      ModelError: A layer has no twin, or the outputs differ by more than TOLERANCE (REDUCED_TOLERANCE); names layer and class.
    """
    twins = _Twins(model)
    inputs = [tf_keras.Input(x.shape[1:], dtype=x.dtype, name=name) for x, name in _inputs(model)]
    outputs = twins.lay_out(model, inputs)
    twin = tf_keras.Model(_one_or_all(inputs), _one_or_all(outputs), name=model.name)
    for layer, chain in twins.pairs():
        _set_weights(layer, chain, [np.asarray(keras.ops.convert_to_numpy(weight)) for weight in layer.weights])
        for each in chain:
            each.trainable = layer.trainable
    _check_same(model, twin, twins)
    return twin


def from_twin(twin: tf_keras.Model, like: keras.Model) -> keras.Model:
    """The way back: a copy of `like` with the weights of `twin`.

    Args:
      twin: What `to_twin(like)` gave, trained or compressed since; without wrappers of tfmot.
      like: The Keras 3 model that the twin was made from; left as it is.

    Raises:
      ModelError: A layer of `like` is missing in `twin`, or has other shapes there.
    """
    made = keras.models.clone_model(like)
    made.set_weights(like.get_weights())
    present = {layer.name: layer for layer in twin.layers}
    twins = _Twins(like)
    for layer, target in zip(twins.weighted(), _Twins(made).weighted(), strict=True):
        chain = [present.get(name) for name in twins.chain_names(layer)]
        values = [weight.numpy() for each in chain if each is not None for weight in each.weights]
        if not values and None not in chain:
            continue  # the twin carries them in its configuration
        if None in chain or [each.shape for each in values] != [tuple(weight.shape) for weight in layer.weights]:
            raise ModelError(
                f"twin of layer '{layer.name}' ({type(layer).__name__}): expected weights {_shapes(layer.weights)}, "
                f"got {_shapes(values)}; pass a twin without wrappers, made from this very model."
            )
        target.set_weights(values)
    return made


def _one_or_all(values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]


def _inputs(model: keras.Model) -> Iterator[tuple[Any, str]]:
    for number, tensor in enumerate(model.inputs):
        yield tensor, tensor.name or f"input_{number}"


class _Twins:
    """The twin layers of one model, made when first asked for."""

    def __init__(self, model: keras.Model) -> None:
        if not _is_graph(model):
            raise ModelError(
                f"model '{model.name}' ({type(model).__name__}) is not a built functional or sequential model, so its layers cannot be walked; "
                "build it with keras.Input and keras.Model(inputs, outputs)."
            )
        self.names = _names(model)
        self.layers = {id(layer): layer for layer, _ in _walk(model)}
        self.made: dict[int, list[TwinLayer]] = {}

    def pairs(self) -> Iterator[tuple[keras.Layer, list[TwinLayer]]]:
        """Each Keras 3 layer with the twin layers that take over its weights."""
        for key, chain in self.made.items():
            if any(each.weights for each in chain):
                yield self.layers[key], chain

    def weighted(self) -> list[keras.Layer]:
        """Layers whose weights travel, in the order of the graph."""
        return [layer for layer in self.layers.values() if layer.weights]

    def chain_names(self, layer: keras.Layer) -> list[str]:
        """Names of the twin layers of `layer`."""
        return [each.name for each in self.of(layer)]

    def of(self, layer: keras.Layer) -> list[TwinLayer]:
        """The twin layers of `layer`; the same ones each time, so a shared layer stays shared."""
        if id(layer) not in self.made:
            self.made[id(layer)] = _make(layer, self.names[id(layer)])
        return self.made[id(layer)]

    def lay_out(self, model: keras.Model, inputs: list[Any]) -> list[Any]:
        """Calls the twins of all of the model's layers on `inputs`; returns the outputs, flat."""
        graph = model._functional if isinstance(model, keras.Sequential) else model
        outputs = graph._run_through_graph(inputs, call_fn=self._call)
        return keras.tree.flatten(outputs)

    def _call(self, operation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operation, keras.Model):
            if not _is_graph(operation):
                _Twins(operation)  # raises
            outputs = self.lay_out(operation, keras.tree.flatten(args))
            return keras.tree.pack_sequence_as(operation._outputs_struct, outputs) if len(outputs) > 1 else outputs[0]
        # tf_keras hands masks along by itself.
        given = {key: value for key, value in kwargs.items() if value is not None and not key.endswith("mask")}
        if not isinstance(operation, keras.Layer):
            return _operate(operation, args, given)
        first, *rest = self.of(operation)
        try:
            value = first(*args, **given)
        except (TypeError, ValueError) as error:
            raise _no_twin(operation, f"tf_keras refuses its inputs: {_first_line(error)}") from error
        for layer in rest:
            value = layer(value)
        return value


def _is_graph(model: Any) -> bool:
    if isinstance(model, keras.Sequential):
        return model.built and model._functional is not None
    return hasattr(model, "_run_through_graph")


def _walk(model: keras.Model, outer: tuple[str, ...] = ()) -> Iterator[tuple[keras.Layer, tuple[str, ...]]]:
    """Every layer of nested models, with the names of the models around it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model) and _is_graph(layer):
            yield from _walk(layer, (*outer, layer.name))
        elif not isinstance(layer, keras.layers.InputLayer):
            yield layer, outer


def _names(model: keras.Model) -> dict[int, str]:
    """A name for each layer that is unique in the flat model, and equal to the layer's own wherever possible."""
    layers = {id(layer): (layer.name, outer) for layer, outer in _walk(model)}
    inputs = {name for _, name in _inputs(model)}
    often = collections.Counter(name for name, _ in layers.values())
    return {
        key: name if often[name] == 1 and name not in inputs else "_".join((*outer, name))
        for key, (name, outer) in layers.items()
    }


def _make(layer: keras.Layer, name: str) -> list[TwinLayer]:
    maker = TWINS.get(type(layer).__name__)
    if maker is not None:
        return maker(layer, name)
    kind = getattr(tf_keras.layers, type(layer).__name__, None)
    if kind is None or not type(layer).__module__.startswith("keras."):
        raise _no_twin(layer, "tf_keras has no layer of that name")
    try:
        return plain(layer, name)
    except (TypeError, ValueError) as error:
        raise _no_twin(layer, _first_line(error)) from error


def _operate(operation: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    function = OPERATIONS.get(type(operation).__name__)
    if function is None:
        raise _no_twin(operation, "no twin is known for this operation")
    return function(operation, *args, **kwargs)


def _no_twin(layer: Any, reason: str) -> ModelError:
    return ModelError(
        f"layer '{layer.name}' ({type(layer).__name__}) has no tf_keras twin, so tfmot cannot compress the model: {reason}; "
        "replace the layer, add it to components.compression.twin.TWINS, or keep to recipes without prune, cluster and qat."
    )


def _set_weights(layer: keras.Layer, chain: list[TwinLayer], values: list[np.ndarray]) -> None:
    targets = [weight for each in chain for weight in each.weights]
    if [tuple(weight.shape) for weight in targets] != [value.shape for value in values]:
        raise _no_twin(layer, f"its weights are {_shapes(values)}, those of tf_keras {_shapes(targets)}")
    for weight, value in zip(targets, values, strict=True):
        weight.assign(value)


def _shapes(weights: Any) -> str:
    return ", ".join(str(tuple(weight.shape)) for weight in weights) or "none"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --- the check ---------------------------------------------------------------------------------------------------


def _check_same(model: keras.Model, twin: tf_keras.Model, twins: _Twins) -> None:
    examples = _examples(model)
    expected = keras.tree.flatten(model(_one_or_all(examples), training=False))
    got = tf.nest.flatten(twin(_one_or_all(examples), training=False))
    worst = max(map(_difference, expected, got))
    exact = all(layer.compute_dtype in (None, "float32") for layer, _ in _walk(model))
    tolerance = TOLERANCE if exact else REDUCED_TOLERANCE
    if worst > tolerance:
        where = _first_difference(model, twin, twins, examples, tolerance)
        raise ModelError(
            f"the twin of model '{model.name}' differs by {worst:.1e} of its largest output, {tolerance:g} is allowed; first at {where}: "
            "replace that layer, or correct its entry in components.compression.twin.TWINS."
        )


def _examples(model: keras.Model) -> list[np.ndarray]:
    """Two seeded examples an input: floats in [0, 1), integers 0 or 1 (valid in any vocabulary), free sides of 32."""
    random = np.random.default_rng(0)
    made = []
    for tensor in model.inputs:
        shape = (2, *(side or 32 for side in tensor.shape[1:]))
        floats = keras.backend.is_float_dtype(tensor.dtype)
        made.append(random.random(shape, np.float32) if floats else random.integers(0, 2, shape).astype(tensor.dtype))
    return made


def _difference(expected: Any, got: Any) -> float:
    ours = np.asarray(keras.ops.convert_to_numpy(expected), np.float64)
    theirs = np.asarray(got, np.float64)
    if ours.shape != theirs.shape or not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return float("inf")
    largest = np.abs(ours).max(initial=0.0)
    return float(np.abs(ours - theirs).max(initial=0.0) / (largest if largest > 0 else 1.0))


def _first_difference(
    model: keras.Model, twin: tf_keras.Model, twins: _Twins, examples: list[np.ndarray], tolerance: float
) -> str:
    """Name and class of the first layer of the outermost model that differs; layers of nested models count as one."""
    ours = [layer for layer in model.layers if id(layer) in twins.made]
    theirs = [twins.of(layer)[-1] for layer in ours]
    feed = _one_or_all(examples)
    expected = keras.Model(_one_or_all(model.inputs), [layer._inbound_nodes[0].outputs[0] for layer in ours])(
        feed, training=False
    )
    got = tf_keras.Model(_one_or_all(twin.inputs), [layer.get_output_at(0) for layer in theirs])(feed, training=False)
    for layer, mine, other in zip(ours, expected, tf.nest.flatten(got), strict=True):
        if _difference(mine, other) > tolerance:
            return f"layer '{layer.name}' ({type(layer).__name__})"
    return "a layer inside a nested model"
