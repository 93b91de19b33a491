"""Which layers are quantized in training, and how: tfmot's 8-bit registry and transforms, with what they lack.

tfmot's registry stops at the layers that it was tested with. TFLite has int8 kernels for more of them, and the file rounds
what training left in float all the same, with ranges that training never saw. Learnt here, each read back from the file by
a test:

| layer | in the int8 file | rounded in training |
|---|---|---|
| Conv1D, a batch normalization and a ReLU behind it taken in | CONV_2D between two RESHAPE | kernel by output channel, output |
| BatchNormalization that stands alone | MUL, ADD | output |
| Rescaling; Normalization | MUL, ADD; SUB, MUL | output |
| LayerNormalization | MEAN, SQUARED_DIFFERENCE, RSQRT, MUL, SUB, ADD | output |
| Multiply, Subtract | MUL, SUB | output |
| Scores, what an attention has between its kernels | BATCH_MATMUL, SOFTMAX, MUL, TRANSPOSE, RESHAPE | output |
| Activation: hard_silu (hard swish); hard_sigmoid | HARD_SWISH; ADD, MUL | output |
| MaxPooling1D | MAX_POOL_2D between two RESHAPE | nothing, its output has the range of its input |
| AveragePooling2D, whose output tfmot rounds | AVERAGE_POOL_2D, which has one range for both sides | nothing; behind a rounded one that is concatenated the converter (TF 2.21) has no operator: DenseNet |

"Output" alone: what lies between several operators takes its range from the rows that the converter sees.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras import quantize_aware_activation
from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
    default_8bit_quantize_configs,
    default_8bit_quantize_registry,
    default_8bit_quantizers,
    default_8bit_transforms,
)
from tensorflow_model_optimization.python.core.quantization.keras.graph_transformations import transforms

from components.compression.attention import Scores

_layers = tf_keras.layers
_THEIR_ACTIVATIONS = (
    "relu",
    "swish",
    "gelu",
    "relu6",
    "linear",
    "softmax",
    "sigmoid",
    "tanh",
)  # of an Activation layer
_OUR_ACTIVATIONS = ("hard_silu", "hard_sigmoid")
_OUTPUT_ONLY = (
    _layers.BatchNormalization,
    _layers.LayerNormalization,
    _layers.Multiply,
    _layers.Normalization,
    _layers.Rescaling,
    _layers.Subtract,
    Scores,
)
# The converter takes a batch normalization into these.
_INTO_KERNEL = (_layers.Conv1D, _layers.Conv2D, _layers.DepthwiseConv2D, _layers.Dense)


@tf_keras.saving.register_keras_serializable("trimline")
class RowConv1D(tf_keras.layers.Conv1D):
    """A Conv1D computed as a Conv2D over pictures of one row, as TFLite does.

    Conv1D itself reshapes its kernel on the way, where the converter (TF 2.21) loses the axis of the channels' ranges and
    gives up: "'tfl.transpose' op has mismatched quantized axes of input and output".
    """

    def convolution_op(self, inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        """`kernel` is (1, size, inputs, outputs) once it is rounded, else without the 1."""
        row = 2 if self.data_format == "channels_first" else 1
        outputs = tf.nn.convolution(
            tf.expand_dims(inputs, row),
            kernel if kernel.shape.rank == 4 else kernel[tf.newaxis],
            strides=(1, *self.strides),
            padding="VALID" if self.padding == "causal" else self.padding.upper(),
            data_format="NCHW" if row == 2 else "NHWC",
            dilations=(1, *self.dilation_rate),
        )
        return tf.squeeze(outputs, row)


class _RowWeights(default_8bit_quantizers.Default8BitConvWeightsQuantizer):
    """A range for each output channel; TensorFlow rounds by channel in one, two and four axes, not in three."""

    def __call__(self, inputs: tf.Tensor, training: bool, weights: dict[str, Any], **kwargs: Any) -> tf.Tensor:
        return super().__call__(inputs[tf.newaxis], training, weights, **kwargs)


class _RowConfig(default_8bit_quantize_registry.Default8BitConvQuantizeConfig):
    def __init__(self) -> None:
        super().__init__(["kernel"], ["activation"], False)
        self.weight_quantizer = _RowWeights()

    def set_quantize_weights(self, layer: Any, quantize_weights: list[tf.Tensor]) -> None:
        """Puts the rounded kernel in, one axis longer than the variable; tfmot insists on the same shape."""
        (layer.kernel,) = quantize_weights


class Registry(default_8bit_quantize_registry.Default8BitQuantizeRegistry):
    """tfmot's, with the layers of the table above.

    tfmot looks at an Activation layer's class and not at its function. It rounds what a layer that is left alone hands to one
    that is not, and refuses the whole model where it does not know that layer's function; here the range of such a tensor is
    left to the converter.
    """

    def supports(self, layer: Any) -> bool:
        """Whether the layer can be quantized."""
        if isinstance(layer, _layers.Activation):
            return layer.activation.__name__ in _THEIR_ACTIVATIONS + _OUR_ACTIVATIONS
        ours = (*_OUTPUT_ONLY, _layers.Conv1D, RowConv1D, _layers.MaxPooling1D)
        return type(layer) in ours or bool(super().supports(layer))

    def get_quantize_config(self, layer: Any) -> Any:
        """What of the layer is rounded, for a layer that `supports` accepts."""
        ours = isinstance(layer, _layers.Activation) and layer.activation.__name__ in _OUR_ACTIVATIONS
        if ours or type(layer) in _OUTPUT_ONLY:
            return default_8bit_quantize_configs.Default8BitOutputQuantizeConfig()
        if isinstance(layer, _layers.Conv1D):
            return _RowConfig()
        if type(layer) in (_layers.MaxPooling1D, _layers.AveragePooling2D):
            return default_8bit_quantize_configs.NoOpQuantizeConfig()
        return super().get_quantize_config(layer)


def fresh(layer: Any) -> Any:
    """A layer of the same configuration, without weights, that can be wrapped."""
    kind = RowConv1D if type(layer) is _layers.Conv1D else type(layer)
    return kind.from_config(layer.get_config())


def taken_into(normalization: Any) -> Any | None:
    """The layer with a kernel into which a batch normalization is folded; None where it stands alone."""
    before = normalization._inbound_nodes[0].inbound_layers
    if not isinstance(before, _INTO_KERNEL) or isinstance(before, _layers.Conv2DTranspose):
        return None
    linear = before.activation is tf_keras.activations.linear
    return before if linear and len(before._outbound_nodes) == 1 else None


# --- tfmot's transforms, corrected -------------------------------------------------------------------------------


_ROW = f"trimline>{RowConv1D.__name__}"  # its class name in a configuration


class _RowBatchNorm(default_8bit_transforms.Conv2DBatchNormQuantize):
    """Conv1D, then a batch normalization, as tfmot has it for Conv2D."""

    def pattern(self) -> Any:
        kernel = transforms.LayerPattern(_ROW, config={"activation": "linear"})
        return transforms.LayerPattern("BatchNormalization", inputs=[kernel])


class _KernelReLU(transforms.Transform):
    """Kernel, then a separate ReLU: no rounding between them, and the kernel quantized as usual."""

    def __init__(self, relu: str, config: dict[str, str]) -> None:
        self.relu = relu
        self.config = config

    def pattern(self) -> Any:
        kernel = transforms.LayerPattern(f"{_ROW}|Conv2D|DepthwiseConv2D|Dense", config={"activation": "linear"})
        return transforms.LayerPattern(self.relu, config=self.config, inputs=[kernel])

    def replacement(self, match_layer: Any) -> Any:
        match_layer.input_layers[0].layer["config"]["activation"] = tf_keras.activations.serialize(
            quantize_aware_activation.NoOpActivation(), use_legacy_format=True
        )
        return match_layer

    def custom_objects(self) -> dict[str, Any]:
        return {"NoOpActivation": quantize_aware_activation.NoOpActivation}


class _ElementwiseReLU(default_8bit_transforms.LayerReLUQuantize):
    """Arithmetic, then a separate ReLU: the file computes both at once, so only what the ReLU gives is rounded."""

    def __init__(self, relu: str, config: dict[str, str]) -> None:
        self.relu = relu
        self.config = config

    def pattern(self) -> Any:
        first = transforms.LayerPattern("Add|BatchNormalization|Multiply|Subtract")
        return transforms.LayerPattern(self.relu, config=self.config, inputs=[first])


def layout_transforms() -> list[Any]:
    """Those of tfmot's default scheme that a twin can need, in its order, with the two corrections."""
    theirs = default_8bit_transforms
    return [
        theirs.InputLayerQuantize(),
        theirs.Conv2DBatchNormReLUQuantize(),
        theirs.Conv2DBatchNormActivationQuantize(),
        theirs.Conv2DBatchNormQuantize(),
        _RowBatchNorm(),
        theirs.ConcatTransform6Inputs(),
        theirs.ConcatTransform5Inputs(),
        theirs.ConcatTransform4Inputs(),
        theirs.ConcatTransform3Inputs(),
        theirs.ConcatTransform(),
        theirs.DenseBatchNormQuantize(),
        theirs.DenseBatchNormReLUQuantize(),
        theirs.DenseBatchNormActivationQuantize(),
        _KernelReLU("ReLU", {}),
        _KernelReLU("Activation", {"activation": "relu"}),
        _ElementwiseReLU("ReLU", {}),
        _ElementwiseReLU("Activation", {"activation": "relu"}),
    ]
