"""Quantize: training that sees int8 rounding, so that the int8 file loses less.

    twin --quantize()--> model with fake quantization --calibrate(), train--> converted as it is

tfmot's quantize_apply with its default 8-bit scheme (Jacob et al. 2018, arXiv 1712.05877), with these corrections:

- Zeros and clusters of earlier steps are kept by `Keeping`. tfmot's own schemes for that share one quantizer object
  between all layers, so one layer without zeros switches sparsity off for every later one, and they forget kernels
  whose layer feeds a Concatenate or a separate ReLU.
- Layers that tfmot does not know are quantized where TFLite has the kernels, and a kernel with a separate ReLU behind it,
  which tfmot leaves in float (`components.compression.quantize_layers`).
- A layer whose activation tfmot does not know is left alone, also in front of one that is quantized; tfmot refuses the
  whole model then (`Registry`).
- Ranges start from data (`calibrate`), not from [-6, 6]: at tfmot's decay of 0.999 these need thousands of updates to fade
  (tensorflow/model-optimization issue 368).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras import quantize_wrapper
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import default_8bit_quantize_scheme
from tensorflow_model_optimization.python.core.quantization.keras.graph_transformations import model_transformer
from tensorflow_model_optimization.python.core.quantization.keras.quantize_layout_transform import (
    QuantizeLayoutTransform,
)
from tensorflow_model_optimization.python.core.quantization.keras.quantizers import Quantizer

from components.compression.kernels import Kernel, Untreated, check_excluded
from components.compression.quantize_layers import Registry, fresh, layout_transforms, taken_into
from components.compression.twin_layers import FUSED
from components.errors import ModelError
from components.options import QatOptions

_DECAY = 0.999  # of tfmot's moving averages
_CALIBRATION_BATCHES = 20
_CALIBRATION_ROUNDS = 2  # the second sees what the first one's [-6, 6] had clipped


# --- which layers ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Annotated:
    """The layers that are quantized, and those that are not."""

    names: tuple[str, ...]
    untreated: list[Untreated]


def choose_quantizable(twin: tf_keras.Model, options: QatOptions) -> Annotated:
    """Which layers are quantized: all that `Registry` supports and the user does not exclude.

    Raises:
      ConfigError: `options.exclude` names an unknown layer.
    """
    check_excluded("qat", options.exclude, twin)
    names, untreated = [], []
    for layer in twin.layers:
        if isinstance(layer, tf_keras.layers.InputLayer):
            continue
        reason = _refusal(layer, options)
        if reason is None:
            names.append(layer.name)
        else:
            untreated.append(Untreated(layer.name, type(layer).__name__, reason))
    return Annotated(tuple(names), untreated)


def _refusal(layer: Any, options: QatOptions) -> str | None:
    if layer.name in options.exclude:
        return "excluded by compress.qat.exclude"
    if len(layer._inbound_nodes) > 1:
        return "tfmot cannot quantize a layer that is called more than once"
    if isinstance(layer, tf_keras.layers.BatchNormalization):
        return _refusal_of_normalization(layer, options)
    activation = getattr(getattr(layer, "activation", None), "__name__", "linear")
    supported = Registry().supports(layer)
    if isinstance(layer, tf_keras.layers.Activation):
        known = supported
    elif supported:
        known = activation in FUSED
    else:
        return f"neither tfmot nor trimline has a quantization for {type(layer).__name__}"
    return None if known else f"neither tfmot nor trimline has a quantization for the activation '{activation}'"


def _refusal_of_normalization(layer: Any, options: QatOptions) -> str | None:
    """Batch normalization is folded into the kernel before it wherever that can be, and then shares its fate."""
    before = taken_into(layer)
    if before is None or _refusal(before, options) is None:
        return None
    return f"'{before.name}', into which it would be folded, is not quantized"


# --- what earlier steps left -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kept:
    """What quantization-aware training must not undo in one kernel.

    Attributes:
      mask: Same shape as the kernel, 0 where the weight stays zero, else 1; None where nothing was pruned.
      index: int32, same shape: weights with one number stay equal; None where nothing was clustered.
      groups: How many numbers there are.
      one_range: True where the whole kernel shares its values, so that all channels must be rounded alike.
    """

    mask: np.ndarray | None = None
    index: np.ndarray | None = None
    groups: int = 0
    one_range: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `like_json` needs; the arrays themselves are among the model's weights."""
        return {"mask": self.mask is not None, "groups": self.groups, "one_range": self.one_range}


def kept(kernel: Kernel, *, pruned: bool, distinct: int) -> Kept:
    """Reads zeros and equal weights off a kernel.

    Args:
      kernel: As the earlier steps left it.
      pruned: Whether its zeros must stay.
      distinct: How many values clustering left it, 0 where it is not clustered. Where the whole kernel holds no more,
        they stay shared by the whole kernel; else each output channel has its own.
    """
    values = kernel.values
    mask = (values != 0).astype(np.float32) if pruned else None
    if not distinct:
        return Kept(mask)
    found, index = np.unique(values, return_inverse=True)
    if len(found) <= distinct:
        return Kept(mask, index.reshape(values.shape).astype(np.int32), len(found), one_range=True)
    return Kept(mask, *_index_by_channel(values))


def _index_by_channel(values: np.ndarray) -> tuple[np.ndarray, int]:
    columns = values.reshape(-1, values.shape[-1])
    index = np.empty(columns.shape, np.int32)
    groups = 0
    for channel in range(columns.shape[1]):
        found, numbers = np.unique(columns[:, channel], return_inverse=True)
        index[:, channel] = numbers.reshape(-1) + groups
        groups += len(found)
    return index.reshape(values.shape), groups


def like_json(kernel: Kernel, value: Mapping[str, Any]) -> Kept:
    """A `Kept` of the right shapes whose arrays are about to be loaded."""
    shape = kernel.values.shape
    return Kept(
        np.ones(shape, np.float32) if value["mask"] else None,
        np.zeros(shape, np.int32) if value["groups"] else None,
        value["groups"],
        value["one_range"],
    )


class Keeping(Quantizer):
    """Quantizes a kernel as `inner` does, with zeros kept zero and equal weights kept equal.

    The forward pass sees each weight replaced by the mean of its group, so all of a group receive the same gradient, and
    the kernel itself stays clustered and sparse, update for update: at inference it is taken as it is. No extra
    centroids are trained, and nothing is re-assigned.

    A kernel that shares its values across channels gets one range: with a range a channel, as tfmot has it, n values
    become n codes in each channel but up to 255 in the file, and nothing is left for gzip to find.
    """

    def __init__(self, inner: Quantizer, keep: Kept) -> None:
        self.inner = inner
        self.keep = keep

    def build(self, tensor_shape: Any, name: str, layer: Any) -> dict[str, Any]:
        """Adds mask and index to the layer's weights, beside the inner quantizer's ranges."""
        made = dict(self.inner.build(tensor_shape, name, layer))
        for key, values in (("mask", self.keep.mask), ("index", self.keep.index)):
            if values is not None:
                made[key] = layer.add_weight(
                    f"{name}_{key}",
                    shape=values.shape,
                    dtype=values.dtype.name,
                    initializer=tf_keras.initializers.Constant(values),
                    trainable=False,
                )
        return made

    def __call__(self, inputs: tf.Tensor, training: bool, weights: dict[str, Any], **_: Any) -> tf.Tensor:
        """Quantized `inputs`, of the same shape."""
        if training:
            if "mask" in weights:
                inputs = inputs * weights["mask"]
            if "index" in weights:
                inputs = self._share(inputs, weights["index"])
        return (
            self._one_range(inputs, training, weights) if self.keep.one_range else self.inner(inputs, training, weights)
        )

    def _share(self, inputs: tf.Tensor, index: tf.Tensor) -> tf.Tensor:
        return tf.gather(tf.math.unsorted_segment_mean(inputs, index, self.keep.groups), index)

    def _one_range(self, inputs: tf.Tensor, training: bool, weights: dict[str, Any]) -> tf.Tensor:
        """int8, symmetric, narrow, as tfmot's weight quantizers; the range is that of the last update's largest weight."""
        if inputs.shape.rank == 3:  # a Conv1D: what its own quantizer does, see `RowConv1D`
            inputs = inputs[tf.newaxis]
        low, high = weights["min_var"], weights["max_var"]
        if training:
            largest = tf.reduce_max(tf.abs(inputs))
            low, high = (
                variable.assign(tf.fill(variable.shape, sign * largest))
                for variable, sign in ((low, -1.0), (high, 1.0))
            )
        round_off = (
            tf.quantization.fake_quant_with_min_max_vars_per_channel
            if len(weights["min_var"].shape)
            else tf.quantization.fake_quant_with_min_max_vars
        )
        return round_off(inputs, low, high, num_bits=8, narrow_range=True)

    def get_config(self) -> dict[str, Any]:
        """Not used: the model is rebuilt from its twin, never from this configuration."""
        raise NotImplementedError("Keeping is rebuilt by quantize(), not from a configuration")


# --- tfmot's scheme, corrected -----------------------------------------------------------------------------------


class _Layout(QuantizeLayoutTransform):
    """Where rounding takes place, and how each kernel that holds zeros or clusters is rounded."""

    def __init__(self, keep: Mapping[str, Kept]) -> None:
        self.keep = keep

    def apply(self, model: Any, layer_quantize_map: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """See tfmot's `QuantizeLayoutTransform`."""
        made, layers = model_transformer.ModelTransformer(
            model, layout_transforms(), set(layer_quantize_map), layer_quantize_map
        ).transform()
        registry = Registry()
        for name, keep in self.keep.items():
            given = layers[name].get("quantize_config") or registry.get_quantize_config(made.get_layer(name))
            config = copy.copy(given)  # the registry hands one object to all layers of a class
            config.weight_quantizer = Keeping(given.weight_quantizer, keep)
            layers[name]["quantize_config"] = config
        return made, layers


class _Scheme(default_8bit_quantize_scheme.Default8BitQuantizeScheme):
    def __init__(self, keep: Mapping[str, Kept]) -> None:
        super().__init__()
        self.keep = keep

    def get_layout_transformer(self) -> _Layout:
        return _Layout(self.keep)

    def get_quantize_registry(self) -> Registry:
        return Registry()


def quantize(twin: tf_keras.Model, names: Iterable[str], keep: Mapping[str, Kept]) -> tf_keras.Model:
    """Puts fake quantization into a copy of `twin`.

    Args:
      twin: Without wrappers; left as it is.
      names: Layers to quantize, as `choose_quantizable` gave them.
      keep: By layer name, what earlier steps left in kernels among `names`.

    Returns:
      A model whose layers are named 'quant_<name>'. Weights and ranges are taken as they are when `training` is False.

    Raises:
      ModelError: tfmot refuses the model as a whole.
    """
    chosen = frozenset(names)
    annotate = tfmot.quantization.keras.quantize_annotate_layer
    try:
        annotated = tf_keras.models.clone_model(
            twin, clone_function=lambda each: annotate(fresh(each)) if each.name in chosen else fresh(each)
        )
        annotated.set_weights(twin.get_weights())
        return tfmot.quantization.keras.quantize_apply(annotated, scheme=_Scheme(keep))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(
            f"qat: tfmot cannot quantize model '{twin.name}': {first[:300]}; name the layer in compress.qat.exclude, or drop the recipes with qat."
        ) from error


# --- ranges ------------------------------------------------------------------------------------------------------


def calibrate(model: tf_keras.Model, batches: Iterable[tuple[Any, Any]], strategy: tf.distribute.Strategy) -> None:
    """Sets the ranges of all activations from data, before the first update.

    Runs `model` as in training and undoes the share that the start at [-6, 6] still has in each moving average, exactly:
    after n updates at decay d that share is d^n. Batch statistics and all else are put back.

    Args:
      model: What `quantize` gave.
      batches: At least one batch (inputs, labels); the first _CALIBRATION_BATCHES are read, in each round again.
      strategy: The model's.
    """
    ranges = _activation_ranges(model)
    own = {id(variable) for variable in ranges}
    others = [variable for variable in model.non_trainable_variables if id(variable) not in own]
    before = [variable.numpy() for variable in others]

    @tf.function(reduce_retracing=True)
    def observe(x: tf.Tensor) -> None:
        strategy.run(lambda each: model(each, training=True), args=(x,))

    for _ in range(_CALIBRATION_ROUNDS):
        start = [variable.numpy() for variable in ranges]
        seen = 0
        for x, _labels in itertools.islice(iter(batches), _CALIBRATION_BATCHES):
            observe(x)
            seen += 1
        share = _DECAY**seen
        for variable, first in zip(ranges, start, strict=True):
            variable.assign((variable.numpy() - share * first) / (1 - share))
    for variable, value in zip(others, before, strict=True):
        variable.assign(value)


def _activation_ranges(model: tf_keras.Model) -> list[Any]:
    """Variables that follow activations by a moving average; those of kernels and of the input do not."""
    return [
        variable
        for layer in model.layers
        if isinstance(layer, quantize_wrapper.QuantizeWrapper)
        for variable in layer.non_trainable_weights
        if re.search(r"(activation|output)_(min|max)(:0)?$", variable.name)
    ]


def trained_kernels(model: tf_keras.Model) -> dict[str, np.ndarray]:
    """Kernels of a quantized model by layer name, in the layout of Keras: what was trained, before rounding."""
    return {
        layer.layer.name: layer._weight_vars[0][0].numpy()
        for layer in model.layers
        if isinstance(layer, quantize_wrapper.QuantizeWrapper) and layer._weight_vars
    }
