import contextlib
import dataclasses
import gzip
import json
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from components.artifacts import Promise
from components.delivery.proof import Kernel, Proof, check, match, read_proof
from components.delivery.zeros import Zeros
from components.errors import ContractError
from tests.components.delivery.conftest import pack

TYPES = {"float32": 0, "float16": 1, "int8": 9, "int4": 17}


def dense_file(path, kernel, dtype="float32", scales=None, zero_points=None, custom=None, packed=None):
    """A `.tflite` file of one FULLY_CONNECTED with `kernel` (out, in), built with the schema's own classes."""
    out, width = kernel.shape

    def tensor(name, shape, type_name, buffer, quantization=None):
        made = schema.TensorT()
        made.name, made.shape, made.type, made.buffer = name, list(shape), TYPES[type_name], buffer
        made.quantization = quantization
        return made

    quantization = None
    if scales is not None:
        quantization = schema.QuantizationParametersT()
        quantization.scale, quantization.zeroPoint = scales, zero_points
    graph = schema.SubGraphT()
    graph.tensors = [
        tensor("x", (1, width), "float32", 0),
        tensor("model/head/MatMul", kernel.shape, dtype, 1, quantization),
        tensor("y", (1, out), "float32", 0),
    ]
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = [0, 1, -1], [2]
    graph.inputs, graph.outputs, graph.operators = [0], [2], [operator]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.FULLY_CONNECTED
    if custom:
        code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
        code.customCode = custom
    data = schema.BufferT()
    data.data = np.frombuffer((kernel if packed is None else packed).tobytes(), np.uint8)
    model = schema.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT(), data]
    path.write_bytes(pack(model))
    return path


def converted(model, shape, path, *, format="float32"):
    """What TensorFlow's converter makes of a Keras model."""

    def serve(x):
        return {"logits": model(x, training=False)}

    serving = tf.function(serve, autograph=False)
    function = serving.get_concrete_function(tf.TensorSpec((1, *shape), tf.float32, name="x"))
    holder = tf.Module()
    holder.serving, holder.tracked = serving, list(function.graph.variables)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function], holder)
    if format == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    if format == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([np.full((1, *shape), n, np.float32)] for n in range(3))
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    path.write_bytes(converter.convert())
    return path


def kernel(name="model/a/Conv2D", operator="CONV_2D", used_as="out", shape=(4, 3, 3, 2), **facts):
    facts = {"dtype": "float32", "sparsity": 0.0, "distinct": 72, "distinct_per_channel": 18, "scales": 0, **facts}
    return Kernel(name=name, operator=operator, used_as=used_as, shape=shape, **facts)


def proof(*weights, **facts):
    empty = {field.name: 0 for field in dataclasses.fields(Proof)}
    empty |= {"flex": (), "custom": (), "float_operators": (), "weights": weights}
    return Proof(**{**empty, **facts})


@settings(max_examples=50, deadline=None)
@given(
    weights=arrays.arrays(
        np.float32,
        st.tuples(st.integers(1, 6), st.integers(1, 9)),
        elements=st.sampled_from([-1.5, -0.0, 0.0, 0.25, 3.0]),
    )
)
def test_a_float_kernel_is_told_as_numpy_counts_it(weights, tmp_path_factory):
    path = dense_file(tmp_path_factory.mktemp("dense") / "m.tflite", weights)
    found = read_proof(path).weights[0]
    assert found.sparsity == pytest.approx(np.mean(weights == 0), abs=1e-12)
    assert found.distinct == len(set(weights.reshape(-1).tolist()))
    assert found.distinct_per_channel == max(len(set(row)) for row in weights.tolist())
    assert (found.shape, found.dtype, found.scales) == (weights.shape, "float32", 0)


@settings(max_examples=50, deadline=None)
@given(
    codes=arrays.arrays(np.int8, st.tuples(st.integers(2, 6), st.integers(1, 9)), elements=st.integers(-3, 3)),
    zero=st.integers(-2, 2),
)
def test_a_zero_of_an_integer_kernel_is_the_code_that_equals_the_zero_point(codes, zero, tmp_path_factory):
    path = tmp_path_factory.mktemp("int8") / "m.tflite"
    dense_file(path, codes, "int8", scales=[0.1], zero_points=[zero])
    assert read_proof(path).sparsity == pytest.approx(np.mean(codes == zero), abs=1e-12)
    points = np.arange(len(codes)) % 2
    dense_file(path, codes, "int8", scales=[0.1] * len(codes), zero_points=points.tolist())
    assert read_proof(path).sparsity == pytest.approx(np.mean(codes == points[:, np.newaxis]), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(codes=arrays.arrays(np.int8, st.tuples(st.integers(1, 5), st.just(6)), elements=st.integers(-8, 7)))
def test_two_int4_codes_share_a_byte_low_half_first(codes, tmp_path_factory):
    halves = (codes.reshape(-1) & 0x0F).astype(np.uint8)
    packed = halves[0::2] | (halves[1::2] << 4)
    path = tmp_path_factory.mktemp("int4") / "m.tflite"
    found = read_proof(dense_file(path, codes, "int4", scales=[0.1], zero_points=[0], packed=packed)).weights[0]
    assert found.distinct == len(np.unique(codes))
    assert found.sparsity == pytest.approx(np.mean(codes == 0), abs=1e-12)
    dense_file(path, codes, "int4", scales=[0.1], zero_points=[-8], packed=packed)
    assert read_proof(path).sparsity == pytest.approx(np.mean(codes == -8), abs=1e-12)


def test_zeros_and_shared_weights_survive_folding_of_batch_normalization(tmp_path):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            keras.layers.Conv2D(5, 3, use_bias=False, name="stem"),
            keras.layers.BatchNormalization(gamma_initializer="random_normal", name="bn"),
            keras.layers.ReLU(),
            keras.layers.DepthwiseConv2D(3, use_bias=False, name="depth"),
            keras.layers.BatchNormalization(gamma_initializer="random_normal", name="bn2"),
        ]
    )
    rng = np.random.default_rng(0)
    stem = rng.choice([0, 0, 0.5, -1], (3, 3, 2, 5)).astype("float32")
    depth = rng.choice([0, 0.25, 2], (3, 3, 5, 1)).astype("float32")
    model.get_layer("stem").set_weights([stem])
    model.get_layer("depth").set_weights([depth])
    found = read_proof(converted(model, (8, 8, 2), tmp_path / "m.tflite")).weights
    assert [w.operator for w in found] == ["CONV_2D", "DEPTHWISE_CONV_2D"]
    assert [w.shape for w in found] == [(5, 3, 3, 2), (1, 3, 3, 5)]
    assert [w.sparsity for w in found] == pytest.approx([np.mean(stem == 0), np.mean(depth == 0)])
    assert [w.distinct_per_channel for w in found] == [3, 3]
    assert found[0].distinct > 3  # each channel was scaled by a factor of its own


def test_a_float16_kernel_is_found_behind_its_dequantize(tmp_path):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(40, name="d1"), keras.layers.Dense(3, name="d2")])
    found = read_proof(converted(model, (6,), tmp_path / "m.tflite", format="float16"))
    assert found.weight_dtypes == {"float16": 2}
    assert [w.operator for w in found.weights] == ["FULLY_CONNECTED", "FULLY_CONNECTED"]
    assert check(found, [], "float16") == []
    assert check(found, [], "float32") == []


def test_totals_count_biases_and_sizes_but_not_shapes(tmp_path):
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            keras.layers.Conv2D(3, 3, bias_initializer="ones"),
            keras.layers.Flatten(),
            keras.layers.Dense(2, bias_initializer="ones"),
        ]
    )
    path = converted(model, (4, 4, 1), tmp_path / "m.tflite")
    found = read_proof(path)
    assert found.parameters == model.count_params() == 3 * 9 + 3 + 12 * 2 + 2
    assert found.bytes == path.stat().st_size
    assert found.gzip_bytes == len(gzip.compress(path.read_bytes(), 9, mtime=0))
    assert found.operators == {"CONV_2D": 1, "FULLY_CONNECTED": 1, "RESHAPE": 1}
    assert (found.input_dtype, found.output_dtype, found.flex, found.custom) == ("float32", "float32", (), ())


@pytest.mark.filterwarnings("ignore:Statistics for quantized inputs were expected:UserWarning")
def test_biases_of_an_int8_file_count_though_they_are_int32_as_shapes_are(tmp_path):
    layers = [keras.Input((4, 4, 1)), keras.layers.Conv2D(3, 3, bias_initializer="ones"), keras.layers.Flatten()]
    found = read_proof(converted(keras.Sequential(layers), (4, 4, 1), tmp_path / "m.tflite", format="int8"))
    assert found.weight_dtypes == {"int8": 1}
    assert found.parameters == 3 * 9 + 3


def test_a_proof_is_json_and_its_summary_leaves_the_kernels_out(tmp_path):
    found = read_proof(dense_file(tmp_path / "m.tflite", np.eye(3, dtype="float32")))
    assert json.loads(json.dumps(found.to_json()))["weights"][0]["shape"] == [3, 3]
    assert found.summary()["distinct_weights_max"] == 2
    assert found.summary()["sparsity"] == pytest.approx(6 / 9)
    assert "weights" not in found.summary()


@pytest.mark.parametrize(("code", "flex", "custom"), [("FlexErf", ("Erf",), ()), ("Mine", (), ("Mine",))])
def test_operators_that_are_not_built_in_break_the_promise(code, flex, custom, tmp_path):
    found = read_proof(dense_file(tmp_path / "m.tflite", np.ones((2, 2), "float32"), custom=code))
    assert (found.flex, found.custom) == (flex, custom)
    assert len(check(found, [], "float32")) == 1
    assert (flex + custom)[0] in check(found, [], "float32")[0]


def test_a_scalar_without_a_shape_is_one_parameter(tmp_path):
    path = dense_file(tmp_path / "m.tflite", np.ones((3, 4), np.float32))
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    (graph,) = model.subgraphs
    scalar, data = schema.TensorT(), schema.BufferT()
    scalar.name, scalar.type, scalar.buffer = "model/scale", TYPES["float32"], len(model.buffers)
    data.data = np.frombuffer(np.float32(2).tobytes(), np.uint8)
    graph.operators[0].inputs = np.array([0, 1, len(graph.tensors)], np.int32)
    graph.tensors.append(scalar)
    model.buffers.append(data)
    path.write_bytes(pack(model))
    assert read_proof(path).parameters == 13


def test_bytes_that_are_no_flatbuffer_are_refused_in_words(tmp_path):
    (tmp_path / "a").write_bytes(b"PK\x03\x04 this is a zip")
    with pytest.raises(ContractError, match=r"a: a \.tflite file holds 'TFL3' at byte 4, got b' thi'; pass a TFLite"):
        read_proof(tmp_path / "a")
    with pytest.raises(ContractError, match=r"absent: a \.tflite file was promised, got No such file"):
        read_proof(tmp_path / "absent")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_but_never_a_surprise(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    content = bytearray(dense_file(folder / "m.tflite", np.arange(12, dtype="float32").reshape(3, 4)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "m.tflite").write_bytes(content[: data.draw(st.integers(8, len(content)))])
    with contextlib.suppress(ContractError):  # anything else fails the test
        read_proof(folder / "m.tflite")


def test_lost_sparsity_is_named_by_layer_and_tensor():
    broken = check(
        proof(kernel(sparsity=0.5)), [Promise(layer="a", kind="conv2d", shape=(4, 3, 3, 2), sparsity=0.75)], "float32"
    )
    assert broken == [
        "layer 'a' (tensor 'model/a/Conv2D'): sparsity 0.7500 was promised, the file holds 0.5000",
    ]


def test_more_zeros_and_fewer_values_than_promised_are_fine():
    promise = Promise(layer="a", kind="conv2d", shape=(4, 3, 3, 2), sparsity=54 / 72, distinct=16, quantized=True)
    held = kernel(sparsity=round(54 / 72, 6), distinct_per_channel=15, dtype="int8")
    assert check(proof(held), [promise], "int8") == []


@pytest.mark.parametrize(
    ("promise", "words"),
    [
        ({"pattern": "2:4", "sparsity": 0.5}, "2 zeros in each 4 inputs were promised, the file holds a group with 1"),
        ({"pattern": "3:8", "sparsity": 0.375}, None),
        ({"pattern": "1x4", "sparsity": 0.6}, "sparsity 0.6000 in blocks of 1x4 was promised, the file holds 0.2500"),
        ({"pattern": "1x4", "sparsity": 0.25}, None),
    ],
)
def test_a_broken_pattern_is_named_by_layer_and_tensor(promise, words):
    held = Zeros(groups={"4": 1, "8": 3}, blocks={"1x4": 0.25})
    found = kernel("model/a/MatMul", "FULLY_CONNECTED", shape=(4, 16), sparsity=0.6, zeros=held)
    broken = check(proof(found), [Promise(layer="a", kind="dense", shape=(4, 16), **promise)], "float32")
    assert broken == ([] if words is None else [f"layer 'a' (tensor 'model/a/MatMul'): {words}"])


def test_lost_clusters_and_float_where_int8_was_promised_are_named():
    promise = Promise(layer="a", kind="conv2d", shape=(4, 3, 3, 2), distinct=16, quantized=True)
    assert check(proof(kernel(distinct_per_channel=17)), [promise], "int8") == [
        "tensor 'model/a/Conv2D' is float32, int8 was promised",
        "layer 'a' (tensor 'model/a/Conv2D'): at most 16 distinct weights in an output channel were promised, the file holds 17",
        "layer 'a' (tensor 'model/a/Conv2D'): int8 was promised, the file holds float32",
    ]


def test_a_kernel_that_is_not_in_the_file_breaks_its_promise():
    promise = Promise(layer="a", kind="conv2d", shape=(4, 5, 5, 2), sparsity=0.5)
    assert check(proof(kernel(sparsity=0.9)), [promise], "float32") == [
        "layer 'a': no conv2d kernel of shape (4, 5, 5, 2) in the file"
    ]


def test_dynamic_range_may_leave_small_kernels_in_float_but_not_all():
    small, large = kernel(shape=(4, 9)), kernel(name="model/b", shape=(64, 64))
    assert check(proof(small), [], "dynamic") == []
    assert check(proof(small, kernel(shape=(64, 64), dtype="int8")), [], "dynamic") == []
    assert check(proof(small, large), [], "dynamic") == [
        "tensor 'model/b' and all other kernels are float32, int8 was promised"
    ]


def test_kernels_of_one_shape_are_told_apart_by_name_before_order():
    kernels = [kernel("model/b/Conv2D"), kernel("model/quant_a/Conv2D;model/b_bn/x"), kernel("arith.constant3")]
    promises = [Promise(layer=name, kind="conv2d", shape=(4, 3, 3, 2)) for name in ("a", "b", "c")]
    assert [found.name[:13] for _, found in match(kernels, promises)] == [
        "model/quant_a",
        "model/b/Conv2",
        "arith.constan",
    ]


def test_a_layer_whose_name_begins_another_one_gets_its_own_kernel():
    kernels = [kernel("m/conv_1/Conv2D"), kernel("m/conv/Conv2D")]
    promises = [Promise(layer=name, kind="conv2d", shape=(4, 3, 3, 2)) for name in ("conv", "conv_1")]
    assert [found.name for _, found in match(kernels, promises)] == ["m/conv/Conv2D", "m/conv_1/Conv2D"]


def test_a_folded_kernel_is_found_by_the_name_of_its_output():
    kernels = [kernel("arith.constant", used_as="m/b/Relu;m/a_bn/mul"), kernel("arith.constant1", used_as="m/a/Relu")]
    promises = [Promise(layer=name, kind="conv2d", shape=(4, 3, 3, 2)) for name in ("a", "b")]
    assert [found.name for _, found in match(kernels, promises)] == ["arith.constant1", "arith.constant"]


def test_the_name_of_an_output_goes_before_a_name_with_a_number():
    kernels = [kernel("m/a_1/Conv2D"), kernel("arith.constant", used_as="m/a/Relu")]
    assert match(kernels, [Promise(layer="a", kind="conv2d", shape=(4, 3, 3, 2))])[0][1] is kernels[1]
    assert match(kernels[:1], [Promise(layer="a", kind="conv2d", shape=(4, 3, 3, 2))])[0][1] is kernels[0]


def test_a_1d_convolution_is_found_in_its_2d_kernel():
    held = kernel("m/a/Conv1D", shape=(4, 1, 3, 2))
    assert match([held], [Promise(layer="a", kind="conv1d", shape=(4, 3, 2))])[0][1] is held


def test_reading_a_proof_needs_no_tensorflow(tmp_path):
    path = dense_file(tmp_path / "m.tflite", np.eye(2, dtype="float32"))
    code = (
        "import pathlib, sys\n"
        "from components.delivery import measure, proof, select\n"
        "print(proof.read_proof(pathlib.Path(sys.argv[1])).parameters)\n"
        "assert not {'tensorflow', 'keras', 'tf_keras'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, "4"), run.stderr


@pytest.mark.parametrize(
    ("name", "parameters", "gzipped"),
    [("pretrainedResnet_quant", 77_706, 81_310), ("kws_ref_model", 22_604, 34_821), ("ad01_fp32", 265_864, 990_900)],
)
def test_the_mlperf_tiny_references_hold_what_is_published(name, parameters, gzipped):
    data = pathlib.Path(__file__).parents[3].parent / "shared" / "data" / "mlperf_tiny"
    files = list(data.rglob(f"{name}.tflite"))
    if not files:
        pytest.skip(f"{name}.tflite of MLPerf Tiny is not in ../shared/data")
    found = read_proof(files[0])
    assert (found.parameters, found.gzip_bytes) == (parameters, gzipped)
