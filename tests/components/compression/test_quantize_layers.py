"""Each layer that tfmot does not know: what the int8 file makes of it, and whether training saw the same."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from components.compression.kernels import kernels
from components.compression.quantize import calibrate, choose_quantizable, kept, quantize, trained_kernels
from components.compression.quantize_layers import Registry, RowConv1D, fresh
from components.compression.twin_layers import LAYERS, hard_sigmoid, hard_silu
from components.delivery.proof import Proof, read_proof
from components.options import QatOptions

from .conftest import write_int8

layers = tf_keras.layers
PICTURE, ROW = (8, 8, 3), (16, 3)
AROUND = {"QUANTIZE": 1, "FULLY_CONNECTED": 1, "DEQUANTIZE": 1}  # of every model here


@dataclasses.dataclass(frozen=True)
class Made:
    """A quantized model and its file, and what both answer to the same rows."""

    twin: tf_keras.Model
    model: tf_keras.Model
    file: pathlib.Path
    proof: Proof
    trained: np.ndarray
    shipped: np.ndarray

    @property
    def off(self) -> np.ndarray:
        """How far the file is from the model that was trained, in steps of its int8 output."""
        levels = np.unique(self.shipped)
        return np.abs(self.shipped - self.trained) / np.diff(levels).min()


def make(shape: tuple[int, ...], body: Callable[[Any], Any], folder: pathlib.Path, *, keep: bool = False) -> Made:
    """Quantizes a model of `body` and a dense head, calibrates and writes it; with zeros and clusters it is trained too."""
    tf_keras.utils.set_random_seed(0)
    inputs = layers.Input(shape, name="x")
    twin = tf_keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten()(body(inputs))))
    random = np.random.default_rng(0)
    for weight in twin.weights:
        if "norm" in weight.name:
            weight.assign(random.uniform(0.5, 1.5, weight.shape))
    for kernel in kernels(twin) if keep else ():
        values = np.round(kernel.values * 8) / 8
        kernel.variable.assign(np.where(np.abs(values) < 0.2, 0, values))
    rows = random.uniform(-1, 1, (128, *shape)).astype(np.float32)
    chosen = choose_quantizable(twin, QatOptions())
    assert chosen.untreated == []
    held = {each.name: kept(each, pruned=True, distinct=64) for each in kernels(twin)} if keep else {}
    model = quantize(twin, chosen.names, held)
    calibrate(model, [(rows[start : start + 32], None) for start in (0, 32, 64, 96)], tf.distribute.get_strategy())
    if keep:
        model.compile(tf_keras.optimizers.SGD(0.01), "mse")
        model.fit(rows, np.ones((128, 4)), batch_size=32, verbose=0)
    model(rows[:32], training=True)  # sets the ranges of kernels
    file = write_int8(model, rows, 4, folder)
    interpreter = Interpreter(str(file))
    runner = interpreter.get_signature_runner()
    shipped = np.concatenate([runner(x=row[np.newaxis])["logits"] for row in rows[:64]])
    return Made(twin, model, file, read_proof(file), model(rows[:64], training=False).numpy(), shipped)


def conv(name: str = "after") -> Any:
    return layers.Conv2D(4, 3, name=name)


def squeeze_and_excite(x: Any) -> Any:
    weights = layers.Conv2D(4, 1, activation="sigmoid")(layers.GlobalAveragePooling2D(keepdims=True)(x))
    return layers.Multiply()([x, weights])


def transition(x: Any) -> Any:
    """Of a DenseNet: what was averaged is concatenated with what is made of it."""
    x = layers.AveragePooling2D()(conv("before")(x))
    return layers.Concatenate()([x, layers.Conv2D(4, 3, padding="same", name="after")(x)])


PICTURES = {
    "averages that are concatenated": (
        transition,
        # Both go to the range of the concatenation.
        {"CONV_2D": 2, "AVERAGE_POOL_2D": 1, "CONCATENATION": 1, "QUANTIZE": 3},
    ),
    "normalization that stands alone": (
        lambda x: conv()(layers.BatchNormalization(name="norm")(x)),
        {"MUL": 1, "ADD": 1, "CONV_2D": 1},
    ),
    "normalization and ReLU, as in ResNetV2": (
        lambda x: conv()(layers.ReLU()(layers.BatchNormalization(name="norm")(layers.MaxPooling2D()(x)))),
        {"MAX_POOL_2D": 1, "MUL": 1, "ADD": 1, "CONV_2D": 1},  # the ReLU is part of ADD
    ),
    "normalization behind a transposed convolution": (
        lambda x: layers.BatchNormalization(name="norm")(layers.Conv2DTranspose(4, 3)(x)),
        {"TRANSPOSE_CONV": 1, "MUL": 1, "ADD": 1},
    ),
    "rescaling": (lambda x: conv()(layers.Rescaling(1 / 2, offset=-0.5)(x)), {"MUL": 1, "ADD": 1, "CONV_2D": 1}),
    "hard swish": (
        lambda x: conv()(layers.Activation(hard_silu)(layers.BatchNormalization(name="norm")(conv("before")(x)))),
        {"CONV_2D": 2, "HARD_SWISH": 1},
    ),
    "hard sigmoid": (
        lambda x: conv()(layers.Activation(hard_sigmoid)(conv("before")(x))),
        {"CONV_2D": 2, "ADD": 1, "MUL": 1},
    ),
    "swish": (
        lambda x: conv()(layers.Activation("swish")(layers.BatchNormalization(name="norm")(conv("before")(x)))),
        {"CONV_2D": 2, "LOGISTIC": 1, "MUL": 1},
    ),
    "product": (
        lambda x: squeeze_and_excite(conv("before")(x)),
        {"CONV_2D": 2, "MEAN": 1, "LOGISTIC": 1, "MUL": 1},
    ),
    "difference": (lambda x: layers.Subtract()([conv("a")(x), conv("b")(x)]), {"CONV_2D": 2, "SUB": 1}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_file_computes_the_layer_in_int8_as_training_saw_it(name, tmp_path):
    body, operators = PICTURES[name]
    made = make(PICTURE, body, tmp_path)
    assert made.proof.operators == AROUND | {"RESHAPE": 1} | operators
    assert made.proof.float_operators == ()
    assert set(made.proof.weight_dtypes) == {"int8"}
    assert made.off.mean() < 1.2
    assert made.off.max() < 8


def test_a_normalization_of_the_input_is_int8_behind_one_more_rounding(tmp_path):
    made = make(
        PICTURE, lambda x: conv()(layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])(x)), tmp_path
    )
    assert made.proof.operators == {**AROUND, "QUANTIZE": 2, "DEQUANTIZE": 2, "RESHAPE": 1} | {
        "SUB": 1,
        "MUL": 1,
        "CONV_2D": 1,
    }
    assert made.proof.float_operators == ()
    assert made.off.mean() < 1.2


def test_layer_normalization_is_int8_all_through_with_ranges_of_the_converter_inside(tmp_path):
    made = make(PICTURE, lambda x: conv()(layers.LayerNormalization(name="norm")(conv("before")(x))), tmp_path)
    inside = {"MEAN", "SQUARED_DIFFERENCE", "RSQRT", "MUL", "SUB", "ADD", "TRANSPOSE"}
    assert set(made.proof.operators) == {*AROUND, "RESHAPE", "CONV_2D"} | inside
    assert made.proof.float_operators == ()
    assert made.off.mean() < 2


def attend(x: Any, **options: Any) -> Any:
    """A self-attention as the twin of a model has it."""
    layer = keras.layers.MultiHeadAttention(2, 4, name="attention")
    symbolic = keras.Input(x.shape[1:])
    layer(symbolic, symbolic, **options)
    return LAYERS["MultiHeadAttention"](layer, "attention")(x, x)


def test_an_attention_is_int8_all_through_with_ranges_of_the_converter_inside(tmp_path):
    made = make(ROW, attend, tmp_path)
    inside = {"BATCH_MATMUL", "SOFTMAX", "MUL", "TRANSPOSE", "RESHAPE"}
    assert set(made.proof.operators) - inside == set(AROUND)
    assert made.proof.operators["FULLY_CONNECTED"] == 5
    assert made.proof.float_operators == ()
    assert set(made.proof.weight_dtypes) == {"int8"}
    assert made.off.mean() < 2


@pytest.mark.parametrize("call", [{"use_causal_mask": True}, {"attention_mask": np.tri(16, dtype=bool)}])
def test_an_attention_that_looks_back_alone_keeps_a_range_for_its_scores(call, tmp_path):
    made = make(ROW, lambda x: attend(x, **call), tmp_path)
    assert made.proof.float_operators == ()
    assert {"BATCH_MATMUL", "SOFTMAX", "SELECT_V2", "REDUCE_MIN"} <= set(made.proof.operators)
    assert made.off.mean() < 2


def test_the_kernels_of_an_attention_keep_zeros_and_clusters(tmp_path):
    made = make(ROW, attend, tmp_path, keep=True)
    trained = trained_kernels(made.model)
    for name in ("attention_query", "attention_key", "attention_value", "attention"):
        before, after = made.twin.get_layer(name).kernel.numpy(), trained[name]
        np.testing.assert_array_equal(after == 0, before == 0)
        assert 0 < np.mean(before == 0) < 1
        assert len(np.unique(after)) <= len(np.unique(before))
        (found,) = (each for each in made.proof.weights if f"quant_{name}/" in each.name)
        assert found.sparsity >= np.mean(before == 0) - 1e-9
        assert found.distinct <= len(np.unique(before))


ROWS = {
    "activation inside": lambda x: layers.Conv1D(8, 3, activation="relu", name="row")(x),
    "normalization, ReLU": lambda x: layers.ReLU()(
        layers.BatchNormalization(name="norm")(layers.Conv1D(8, 3, name="row")(x))
    ),
    "normalization, activation": lambda x: layers.Activation("relu")(
        layers.BatchNormalization(name="norm")(
            layers.Conv1D(8, 3, strides=2, padding="same", use_bias=False, name="row")(x)
        )
    ),
    "normalization": lambda x: layers.BatchNormalization(name="norm")(
        layers.Conv1D(8, 3, padding="same", name="row")(x)
    ),
    "separate ReLU, pooling": lambda x: layers.MaxPooling1D()(layers.ReLU()(layers.Conv1D(8, 3, name="row")(x))),
}


@pytest.mark.parametrize("name", ROWS)
def test_conv1d_is_a_conv_2d_with_a_range_a_channel_that_takes_in_what_follows(name, tmp_path):
    made = make(ROW, ROWS[name], tmp_path)
    pooled = {"MAX_POOL_2D": 1} if "pooling" in name else {}
    assert made.proof.operators == AROUND | {"CONV_2D": 1, "RESHAPE": 2 + len(pooled)} | pooled
    assert made.proof.float_operators == ()
    (row,) = (each for each in made.proof.weights if each.operator == "CONV_2D")
    assert (row.dtype, row.scales, row.shape) == ("int8", 8, (8, 1, 3, 3))
    assert made.off.mean() < 0.05  # the file computes what was trained, up to ties


def test_the_file_holds_the_codes_and_the_scales_that_conv1d_was_trained_with(tmp_path):
    made = make(ROW, ROWS["activation inside"], tmp_path)
    wrapper = made.model.get_layer("quant_row")
    ranges = next(each.numpy() for each in wrapper.weights if each.name.endswith("kernel_max:0"))
    interpreter = Interpreter(str(made.file))
    interpreter.allocate_tensors()
    (found,) = (
        each
        for each in interpreter.get_tensor_details()
        if tuple(each["shape"]) == (8, 1, 3, 3) and each["dtype"] is np.int8
    )
    scales = found["quantization_parameters"]["scales"]
    np.testing.assert_allclose(scales, ranges / 127, rtol=1e-5)
    codes = interpreter.get_tensor(found["index"])[:, 0].transpose(1, 2, 0)
    values = np.clip(trained_kernels(made.model)["row"], -ranges, ranges)
    np.testing.assert_allclose(codes * scales, values, atol=0.51 * scales.max())
    assert len(np.unique(codes)) > 20


def test_conv1d_keeps_zeros_and_clusters_down_to_the_codes(tmp_path):
    made = make(ROW, ROWS["normalization, ReLU"], tmp_path, keep=True)
    before = made.twin.get_layer("row").kernel.numpy()
    after = trained_kernels(made.model)["row"]
    assert not np.array_equal(after, before), "it did not learn"
    assert 0.1 < np.mean(before == 0) < 0.9
    np.testing.assert_array_equal(after == 0, before == 0)
    assert all(len(np.unique(after[before == value])) == 1 for value in np.unique(before))
    (row,) = (each for each in made.proof.weights if each.operator == "CONV_2D")
    assert row.sparsity >= np.mean(before == 0)
    assert row.distinct <= len(np.unique(before))


@pytest.mark.parametrize("relu", ["layer", "activation"])
@pytest.mark.parametrize("kind", ["Add", "Multiply", "Subtract", "BatchNormalization"])
def test_only_what_a_relu_gives_is_rounded_and_not_what_it_takes(kind, relu):
    image = layers.Input(PICTURE)
    one = layers.MaxPooling2D()(image)  # into which no normalization can be folded
    given = one if kind == "BatchNormalization" else [one, layers.AveragePooling2D()(image)]
    x = getattr(layers, kind)(name="first")(given)
    made = layers.ReLU(name="relu") if relu == "layer" else layers.Activation("relu", name="relu")
    twin = tf_keras.Model(image, layers.Dense(2)(layers.Flatten()(made(x))))
    model = quantize(twin, choose_quantizable(twin, QatOptions()).names, {})
    first, last = (model.get_layer(name).weights for name in ("quant_first", "quant_relu"))
    assert [each.name for each in first if "output_m" in each.name] == []
    assert len([each.name for each in last if "output_m" in each.name]) == 2


@pytest.mark.parametrize(
    "options",
    [{"strides": 2}, {"padding": "same", "dilation_rate": 2}, {"padding": "causal", "dilation_rate": 3}, {"groups": 2}],
)
def test_the_row_computes_what_conv1d_does(options):
    given = layers.Conv1D(4, 3, name="row", **options)
    values = np.random.default_rng(0).random((2, 16, 2), np.float32)
    expected = given(values)
    made = fresh(given)
    made.build(values.shape)
    made.set_weights(given.get_weights())
    assert type(made) is RowConv1D
    np.testing.assert_allclose(made(values), expected, rtol=1e-5, atol=1e-6)


def test_what_the_registry_does_not_know_it_refuses():
    registry = Registry()
    assert not registry.supports(layers.DepthwiseConv1D(3))
    assert not registry.supports(layers.Activation("softplus"))
    assert registry.supports(layers.Activation("tanh"))
    with pytest.raises(ValueError, match="unsupported layer"):
        registry.get_quantize_config(layers.DepthwiseConv1D(3))
