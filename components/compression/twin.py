"""Twin: the tf_keras copy of a Keras 3 model on which tfmot works; and the way back.

    keras.Model --to_twin()--> tf_keras.Model --from_twin()--> keras.Model

tfmot refuses Keras 3 (tensorflow/model-optimization issue 1119). A twin is rebuilt layer by layer from each layer's
configuration, takes over the weights, and must give the same outputs. It is always one flat functional model: nested
models are laid out in place, since quantization-aware training refuses a model inside a model. What tf_keras lacks runs
inside the twin as Keras 3 has it (`components.compression.hosted`).

Only this package imports tf_keras and tfmot. Importing tfmot sets TF_USE_LEGACY_KERAS, which changes what `tf.keras`
means in the whole process; `import keras` keeps meaning Keras 3.
"""

from __future__ import annotations

import collections
import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from components.compression.attention import Attention, Scores
from components.compression.hosted import Hosted, carried, host, is_symbolic
from components.compression.twin_layers import LAYERS, OPERATIONS, TwinLayer, plain
from components.errors import ModelError

# Largest difference of the outputs over their largest magnitude, with `same_kernels`.
TOLERANCE = 1e-5
# The same where the model computes in bfloat16 or float16, of which the twin, in float32, is free.
REDUCED_TOLERANCE = 5e-2
# The same where every layer alone is within TOLERANCE: float32 rounding that a deep or ill-conditioned model adds up.
ROUNDING_TOLERANCE = 1e-3

TWINS: dict[str, Callable[[Any, str], list[TwinLayer]]] = dict(LAYERS)
"""Layers that their configuration alone does not carry over, by class name; yours may be added.

(Keras 3 layer, name for the twin) -> tf_keras layers that, called one after the other, do the same. Their weights taken
together, in order, must be those of the Keras 3 layer, or none at all; axes that stand side by side may be one. A tf_keras
class of your own must be registered with `tf_keras.saving.register_keras_serializable`, because compressed models are saved.

A layer of yours without an entry is hosted: it trains and is exported, but tfmot leaves its weights alone. An entry that
says it in layers that tfmot knows opens them to pruning, clustering and quantization.
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
      ModelError: A layer has no twin, or it differs by more than TOLERANCE (REDUCED_TOLERANCE); names layer and class.
    """
    twins = _Twins(model)
    inputs = [tf_keras.Input(x.shape[1:], dtype=x.dtype, name=name) for x, name in _inputs(model)]
    outputs = _run(model, inputs, twins.call)
    twin = tf_keras.Model(_one_or_all(inputs), _one_or_all(outputs), name=model.name)
    for layer, chain in twins.pairs():
        _set_weights(layer, chain, [np.asarray(keras.ops.convert_to_numpy(weight)) for weight in layer.weights])
        for each in chain:
            each.trainable = layer.trainable
    with same_kernels(twin):
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
        chain = [present.get(name) for name in twins.names_in(present, layer)]
        values = [weight.numpy() for weight in carried(each for each in chain if each is not None)]
        if not values and None not in chain:
            continue  # the twin carries them in its configuration
        laid_out = None if None in chain else _laid_out(values, layer.weights)
        if laid_out is None:
            raise ModelError(
                f"twin of layer '{layer.name}' ({type(layer).__name__}): expected weights {_shapes(layer.weights)}, "
                f"got {_shapes(values)}; pass a twin without wrappers, made from this very model."
            )
        target.set_weights(laid_out)
    return made


def for_integers(model: keras.Model) -> Any:
    """What an integer file should be made of: `model`, or its twin where that keeps a range for the scores of a masked attention.

    Keras 3 masks with -1e9 and less, so that all scores that count share one code. Over random rows, 12 places, the int8 file of
    a causal attention is off by 0.40 of the outputs' spread, that of its twin by 0.03.

    Args:
      model: Built.
    """
    if not _is_graph(model) or not any(_has_mask(operation) for operation, _ in _walk(model)):
        return model
    try:
        twin = to_twin(model)
    except ModelError:  # nothing that the file needs: it is written as Keras 3 has it
        return model
    return twin if any(isinstance(layer, Scores) for layer in twin.layers) else model


def _has_mask(operation: Any) -> bool:
    if not isinstance(operation, keras.layers.MultiHeadAttention):
        return False
    calls = [node.arguments.kwargs for node in operation._inbound_nodes]
    return any(each.get("use_causal_mask") or each.get("attention_mask") is not None for each in calls)


@contextlib.contextmanager
def same_kernels(twin: tf_keras.Model) -> Iterator[None]:
    """Inside the block batch normalizations of `twin` compute as Keras 3 does, operation by operation.

    Outside they use TensorFlow's fused kernel, which is several times as fast in training and rounds in another order: a deep
    model turns that into 1e-5 of its output, an ill-conditioned one into all of it.
    """
    kind = tf_keras.layers.BatchNormalization
    fused = {layer: layer.fused for layer in twin._flatten_layers() if isinstance(layer, kind)}
    for layer in fused:
        layer.fused = False
    try:
        yield
    finally:
        for layer, before in fused.items():
            layer.fused = before


def _one_or_all(values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]


def _inputs(model: keras.Model) -> Iterator[tuple[Any, str]]:
    for number, tensor in enumerate(model.inputs):
        yield tensor, tensor.name or f"input_{number}"


class _Twins:
    """The twin layers of one model, made when first called."""

    def __init__(self, model: keras.Model) -> None:
        if not _is_graph(model):
            raise ModelError(
                f"model '{model.name}' ({type(model).__name__}) is not a built functional or sequential model, so its layers cannot be walked; "
                "build it with keras.Input and keras.Model(inputs, outputs)."
            )
        self.names = _names(model)
        self.taken = {*self.names.values(), *(name for _, name in _inputs(model))}
        self.operations = {id(operation): operation for operation, _ in _walk(model)}
        self.made: dict[int, list[TwinLayer]] = {}

    def pairs(self) -> Iterator[tuple[keras.Layer, list[TwinLayer]]]:
        """Each Keras 3 layer with the twin layers that take over its weights."""
        for key, chain in self.made.items():
            if carried(chain):
                yield self.operations[key], chain

    def weighted(self) -> list[keras.Layer]:
        """Layers whose weights travel, in the order of the graph."""
        return [each for each in self.operations.values() if isinstance(each, keras.Layer) and each.weights]

    def names_in(self, twin: Mapping[str, TwinLayer], layer: keras.Layer) -> list[str]:
        """How the twin layers of `layer` are called."""
        name = self.names[id(layer)]
        native = [] if isinstance(twin.get(name), Hosted) else _native(layer, name)
        return [each.name for each in native] or [name]

    def call(self, operation: Any, args: Any, kwargs: Any) -> Any:
        """Calls the twin layers of `operation`; the same ones each time, so a shared layer stays shared.

        Raises:
          ModelError: It has no twin.
        """
        try:
            if id(operation) in self.made:
                return _through(self.made[id(operation)], operation, args, kwargs)
            return self._first_call(operation, args, kwargs)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise _no_twin(operation, _first_line(error)) from error

    def _first_call(self, operation: Any, args: Any, kwargs: Any) -> Any:
        name = self.names[id(operation)]
        chain = [] if _gains_mask(operation, args, kwargs) else _native(operation, name)
        if any(each.name in self.taken for each in chain if each.name != name):
            chain = []  # a part of it would have the name of another layer
        try:
            value = _through(chain, operation, args, kwargs) if chain else None
        except (TypeError, ValueError):
            if _is_yours(operation):
                raise
            chain = []  # tf_keras has a layer of that name, but it takes other inputs
        if not chain:
            chain = [host(operation, name, args, kwargs)]
            value = _through(chain, operation, args, kwargs)
        self.made[id(operation)] = chain
        return value


def _run(model: keras.Model, inputs: list[Any], call: Callable[[Any, Any, Any], Any]) -> list[Any]:
    """Walks the graph, nested models included, and computes each node by `call(operation, args, kwargs)`; outputs, flat."""

    def visit(operation: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(operation, keras.Model) and _is_graph(operation):
            outputs = _run(operation, keras.tree.flatten(args), call)
            return keras.tree.pack_sequence_as(operation._outputs_struct, outputs) if len(outputs) > 1 else outputs[0]
        kwargs.pop("training", None)  # written down by Keras 3 as it was while the model was built; obeyed by tf_keras
        return call(operation, args, kwargs)

    return keras.tree.flatten(_graph(model)._run_through_graph(inputs, call_fn=visit))


def _through(chain: list[TwinLayer], operation: Any, args: Any, kwargs: Any) -> Any:
    """Calls the twin layers of `operation`, mostly one after the other, on tensors with values or without."""
    if isinstance(chain, Attention):
        return chain(*args, **_without_masks(args, kwargs))
    first, *rest = chain
    if isinstance(first, Hosted):
        value = first(_one_or_all(first.inputs_among(args, kwargs)))
    elif isinstance(operation, keras.Layer):
        value = first(*args, **_without_masks(args, kwargs))
    else:
        value = first(_one_or_all(_tensors([args, kwargs])))
    for layer in rest:
        value = layer(value)
    return value


def _tensors(arguments: Any) -> list[Any]:
    return [each for each in keras.tree.flatten(arguments) if is_symbolic(each) or tf.is_tensor(each)]


def _masked(arguments: Any) -> bool:
    return any(getattr(tensor, "_keras_mask", None) is not None for tensor in _tensors(arguments))


def _without_masks(args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by keyword, without masks that tf_keras hands from layer to layer by itself."""
    by_itself = ("mask", "query_mask", "value_mask", "key_mask") if _masked([args, kwargs]) else ()
    return {key: value for key, value in kwargs.items() if value is not None and key not in by_itself}


def _graph(model: keras.Model) -> Any:
    return model._functional if isinstance(model, keras.Sequential) else model


def _is_graph(model: Any) -> bool:
    if isinstance(model, keras.Sequential):
        return model.built and model._functional is not None
    return hasattr(model, "_run_through_graph")


def _walk(model: keras.Model, outer: tuple[str, ...] = ()) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every layer and operation of nested models, with the names of the models around it."""
    for operation in _graph(model).operations:
        if isinstance(operation, keras.Model) and _is_graph(operation):
            yield from _walk(operation, (*outer, operation.name))
        elif not isinstance(operation, keras.layers.InputLayer):
            yield operation, outer


def _names(model: keras.Model) -> dict[int, str]:
    """A name for each layer that is unique in the flat model, and equal to the layer's own wherever possible."""
    found = {id(operation): (operation.name, outer) for operation, outer in _walk(model)}
    inputs = {name for _, name in _inputs(model)}
    often = collections.Counter(name for name, _ in found.values())
    return {
        key: name if often[name] == 1 and name not in inputs else "_".join((*outer, name))
        for key, (name, outer) in found.items()
    }


def _is_yours(operation: Any) -> bool:
    kind = type(operation).__name__
    return kind in TWINS and TWINS[kind] is not LAYERS.get(kind)


def _gains_mask(operation: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether tf_keras would hand a mask on that Keras 3 does not.

    Operations drop masks, and a layer that is called with several tensors gets none.
    """
    if not _masked([args, kwargs]):
        return False
    if isinstance(operation, keras.Layer) and "mask" not in inspect.signature(operation.call).parameters:
        return False
    return kwargs.get("mask") is None


def _native(operation: Any, name: str) -> list[TwinLayer]:
    """The same in layers of tf_keras; none where it has nothing, or not with that configuration."""
    kind = type(operation).__name__
    if not isinstance(operation, keras.Layer):
        return OPERATIONS[kind](operation, name) if kind in OPERATIONS else []
    if _is_yours(operation):
        return TWINS[kind](operation, name)
    if not type(operation).__module__.startswith(("keras.", "components.")):
        return []
    try:
        return LAYERS.get(kind, plain)(operation, name)
    except (TypeError, ValueError):
        return []


def _no_twin(layer: Any, reason: str) -> ModelError:
    return ModelError(
        f"layer '{layer.name}' ({type(layer).__name__}) has no tf_keras twin, so tfmot cannot compress the model: {reason}; "
        "replace the layer, add it to components.compression.twin.TWINS, or keep to recipes without prune, cluster and qat."
    )


def _set_weights(layer: keras.Layer, chain: list[TwinLayer], values: list[np.ndarray]) -> None:
    targets = carried(chain)
    laid_out = _laid_out(values, targets)
    if laid_out is None:
        raise _no_twin(layer, f"its weights are {_shapes(values)}, those of tf_keras {_shapes(targets)}")
    for weight, value in zip(targets, laid_out, strict=True):
        weight.assign(value)


def _laid_out(values: list[np.ndarray], weights: Any) -> list[np.ndarray] | None:
    """`values` in the shapes of `weights`, which may merge axes: heads of an attention are one of their own in Keras 3.

    None: other shapes.
    """
    shapes = [tuple(weight.shape) for weight in weights]
    if len(values) != len(shapes) or not all(map(_agree, (value.shape for value in values), shapes)):
        return None
    return [value.reshape(shape) for value, shape in zip(values, shapes, strict=True)]


def _agree(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the shapes are equal but for axes side by side that one of them takes together: (6, 2, 4) and (6, 8)."""
    few, many = sorted((one, other), key=len)
    if len(few) == len(many):
        return few == many
    few_ends, many_ends = (set(np.cumprod(shape).tolist()) for shape in (few, many))
    return bool(np.prod(few) == np.prod(many)) and few_ends <= many_ends


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
    exact = all(getattr(each, "compute_dtype", None) in (None, "float32") for each, _ in _walk(model))
    tolerance = TOLERANCE if exact else REDUCED_TOLERANCE
    if worst <= tolerance:
        return
    where = _first_difference(model, twins, examples, tolerance)
    if where is not None:
        raise ModelError(
            f"the twin of model '{model.name}' differs by {worst:.1e} of its largest output, {tolerance:g} is allowed; first at {where}: "
            "replace that layer, or correct its entry in components.compression.twin.TWINS."
        )
    if worst > ROUNDING_TOLERANCE:
        raise ModelError(
            f"the twin of model '{model.name}' differs by {worst:.1e} of its largest output, {ROUNDING_TOLERANCE:g} is allowed, though no layer does "
            "on its own: the model blows rounding up; train it further, or look at its normalization (variances near zero)."
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


def _first_difference(model: keras.Model, twins: _Twins, examples: list[np.ndarray], tolerance: float) -> str | None:
    """Name and class of the first layer that, given the same inputs, differs from its twin; None: rounding adds up."""
    found: list[str] = []

    def compare(operation: Any, args: Any, kwargs: Any) -> Any:
        ours = operation(*args, **kwargs)
        theirs = _through(twins.made[id(operation)], operation, args, kwargs)
        if max(map(_difference, keras.tree.flatten(ours), tf.nest.flatten(theirs))) > tolerance:
            found.append(f"layer '{operation.name}' ({type(operation).__name__})")
        return ours

    _run(model, [keras.ops.convert_to_tensor(each) for each in examples], compare)
    return found[0] if found else None
