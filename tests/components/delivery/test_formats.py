"""Every format as a real file, run in ai-edge-litert on a problem that the model has learned."""

import keras
import numpy as np
import pytest

from components.artifacts import DataSpec, Promise
from components.delivery.bundle import MACHINE_TOLERANCE, machine_tolerance
from components.delivery.card import FORMATS as WORDS
from components.delivery.export import export
from components.delivery.formats import WEIGHT_BITS, check_format, weight_dtype
from components.delivery.measure import predict
from components.delivery.proof import check, read_proof
from components.delivery.skew import KERAS_TOLERANCE
from components.options import ExportOptions
from components.recipe import FORMATS, IO
from components.tracing import Trace
from tests.components.delivery.test_proof import kernel

# (root mean square from the float answers as a share of their spread, bytes as a share of float32, kernels by type)
HOLDS = {
    "float16": (0.002, 0.6, {"float16": 5}),
    "dynamic": (0.01, 0.4, {"float32": 4, "int8": 1}),
    "int8": (0.05, 0.45, {"int8": 5}),
    "int16x8": (0.03, 0.45, {"int8": 5}),
    "int8_weights": (0.01, 0.4, {"int8": 5}),
    "int4_weights": (0.1, 0.3, {"int4": 4, "int8": 1}),
}


@pytest.mark.parametrize("format", HOLDS)
def test_a_file_is_smaller_answers_alike_and_holds_what_its_format_promises(format, toy, tmp_path):
    difference, share, dtypes = HOLDS[format]
    whole = toy.export(tmp_path / "float32", "float32")
    file = toy.export(tmp_path / "file", format)
    outputs = predict(file.file, toy.held)
    proof = read_proof(file.file)
    assert toy.difference(outputs) <= difference <= KERAS_TOLERANCE[format]
    assert toy.accuracy(outputs) >= toy.accuracy(predict(whole.file, toy.held)) - 0.02
    assert proof.bytes <= share * whole.facts["bytes"]
    assert proof.weight_dtypes == dtypes
    assert check(proof, [], format) == []


def test_integer_activations_are_told_from_float_ones(toy, tmp_path):
    computed = {
        format: {each.computes for each in read_proof(toy.export(tmp_path / format, format).file).weights}
        for format in ("int8", "int16x8", "int8_weights")
    }
    assert computed == {"int8": {"int8"}, "int16x8": {"int16"}, "int8_weights": {"float32"}}


def test_what_has_no_4_bit_kernel_is_kept_in_8_and_told(toy, tmp_path):
    assert toy.export(tmp_path, "int4_weights").facts["untreated"] == [
        {
            "layer": "depthwise",
            "class": "DepthwiseConv2D",
            "reason": "int4_weights: a DEPTHWISE_CONV_2D kernel of 4 bits is not to be had, it is int8",
        }
    ]
    assert toy.export(tmp_path, "int8_weights").facts["untreated"] == []


def test_a_kernel_that_no_weight_format_treats_stays_float_and_is_told(tmp_path, toy):
    layers = [keras.Input((12, 12, 1)), keras.layers.Reshape((12, 3, 4, 1)), keras.layers.Conv3D(2, 3, name="cube")]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(4, name="head")])
    file = toy.export(tmp_path, "int8_weights", model=model)
    assert [each["layer"] for each in file.facts["untreated"]] == ["cube"]
    proof = read_proof(file.file)
    assert proof.weight_dtypes == {"float32": 1, "int8": 1}
    assert check(proof, [], "int8_weights") == []
    wanted = model(toy.held[:8], training=False).numpy()
    assert np.abs(predict(file.file, toy.held[:8]) - wanted).max() <= 0.02 * np.ptp(wanted)


@pytest.mark.parametrize("format", ["int16x8", "int8_weights", "int4_weights"])
def test_a_transposed_convolution_is_carried_by_the_new_formats(format, toy, tmp_path):
    layers = [keras.Input((12, 12, 1)), keras.layers.Conv2DTranspose(2, 3, strides=2, name="up")]
    model = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(4, name="head")])
    file = toy.export(tmp_path, format, model=model)
    proof = read_proof(file.file)
    assert {each.operator: each.dtype for each in proof.weights}["TRANSPOSE_CONV"] == "int8"
    assert check(proof, [], format) == []
    wanted = model(toy.held[:8], training=False).numpy()
    assert np.abs(predict(file.file, toy.held[:8]) - wanted).max() <= 0.15 * np.ptp(wanted)


@pytest.mark.parametrize("format", WEIGHT_BITS)
def test_empty_output_channels_and_shared_weights_survive_weights_in_few_bits(format, toy, tmp_path):
    model = keras.models.clone_model(toy.model)
    model.set_weights(toy.model.get_weights())
    hidden, bias = model.get_layer("hidden").get_weights()
    hidden = np.sign(hidden) * 0.25 * (np.abs(hidden) > np.quantile(np.abs(hidden), 0.7))
    hidden[:, :3] = 0
    model.get_layer("hidden").set_weights([hidden, bias])
    held = float(np.mean(hidden == 0))
    promise = Promise(layer="hidden", kind="dense", shape=hidden.T.shape, sparsity=held, distinct=3)
    file = toy.export(tmp_path, format, model=model, recipe=f"prune@0.7+cluster@3+{format}", promises=[promise])
    assert check(read_proof(file.file), [promise], format) == []
    wanted = model(toy.held, training=False).numpy()
    assert np.sqrt(np.mean((predict(file.file, toy.held) - wanted) ** 2)) <= 0.2 * wanted.std()


@pytest.mark.parametrize(
    ("format", "facts", "words"),
    [
        ("int16x8", {"dtype": "int8", "computes": "int8"}, "the CONV_2D of tensor 'model/a/Conv2D' computes in int8, int16 was promised"),
        ("int16x8", {"dtype": "float32", "computes": "int16"}, "tensor 'model/a/Conv2D' is float32, int8 was promised"),
        ("int8_weights", {"dtype": "int8", "computes": "int8"}, "the CONV_2D of tensor 'model/a/Conv2D' computes in int8, float32 was promised"),
        ("int8_weights", {"dtype": "float32"}, "tensor 'model/a/Conv2D' is float32, int8 was promised"),
        ("int4_weights", {"dtype": "int8"}, "tensor 'model/a/Conv2D' is int8, int4 was promised"),
    ],
)  # fmt: skip
def test_a_kernel_that_breaks_its_format_is_named(format, facts, words):
    assert check_format([kernel(**facts)], format) == [words]


def test_a_depthwise_kernel_may_take_8_bits_in_a_4_bit_file_and_no_more():
    assert weight_dtype("DEPTHWISE_CONV_2D", 4) == "int8"
    assert check_format([kernel(operator="DEPTHWISE_CONV_2D", dtype="int8")], "int4_weights") == []
    assert check_format([kernel(operator="DEPTHWISE_CONV_2D", dtype="float32")], "int4_weights") == [
        "tensor 'model/a/Conv2D' is float32, int8 was promised"
    ]


def test_every_format_has_its_words_and_tolerances(toy, tmp_path):
    assert set(WORDS) == set(KERAS_TOLERANCE) == set(FORMATS)
    assert set(MACHINE_TOLERANCE) | set(IO) == set(FORMATS)


@pytest.mark.parametrize("format", IO)
def test_answers_of_an_integer_file_may_move_by_one_step_on_another_machine(format, toy, tmp_path):
    file = toy.export(tmp_path, format).file
    outputs = predict(file, toy.held)
    step, why = machine_tolerance(file, format, outputs)
    assert why == "one quantization step of the output"
    gaps = np.diff(np.unique(outputs.reshape(-1)))
    assert step == pytest.approx(gaps.min(), rel=1e-3)


def test_operators_without_an_int16_kernel_are_told(toy, tmp_path):
    heard = []
    layers = [keras.Input((12, 12, 1)), keras.layers.Flatten(), keras.layers.Dense(8), keras.layers.Activation("elu")]
    model = keras.Sequential([*layers, keras.layers.Dense(4)])
    toy.export(tmp_path, "int16x8", model=model, trace=Trace(on_warning=heard.append))
    assert heard == [
        "int16x8: operators without an int16x8 kernel run in float inside the file, expect it to be slower: ELU."
    ]


@pytest.mark.parametrize(
    ("format", "dtype", "listed"),
    [
        ("float16", "float16", False),
        ("dynamic", "int8", False),
        ("int8", "int8", False),
        ("int8_weights", "float32", True),
    ],
)
def test_the_table_of_an_embedding_counts_as_a_kernel(format, dtype, listed, tmp_path):
    words = keras.Input((8,), name="words")
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(200, 16, name="table")(words))
    model = keras.Model(words, keras.layers.Dense(2, name="head")(x))
    spec = DataSpec(task="classification", input_name="words", input_shape=(8,), labels=("a", "b"))
    rows = np.random.default_rng(0).integers(0, 200, (32, 8)).astype(np.float32)
    given = (format, format, model, spec, "logits", ExportOptions(), rows, tmp_path)
    file = export(*given, seed=0, trace=Trace())
    (table,) = [each for each in read_proof(file.file).weights if each.operator == "GATHER"]
    assert (table.shape, table.dtype) == ((200, 16), dtype)
    reason = f"{format}: a GATHER kernel of 8 bits is not to be had, it is float32"
    assert file.facts["untreated"] == [{"layer": "table", "class": "Embedding", "reason": reason}] * listed
    wanted = model(rows, training=False).numpy()
    np.testing.assert_allclose(predict(file.file, rows), wanted, atol=0.05 * np.ptp(wanted))
