import hashlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from components.artifacts import DataSpec, Promise, TFLiteFile, read_json
from components.delivery.export import export
from components.delivery.measure import predict
from components.delivery.proof import check, read_proof
from components.errors import ConfigError, ContractError, ModelError
from components.options import ExportOptions
from components.recipe import FORMATS, IO
from components.tracing import Trace
from tests.components.delivery.conftest import answers

SPEC = DataSpec(task="classification", input_name="image", input_shape=(8, 8, 1), labels=("a", "b", "c"))


def network(library=keras):
    layers = library.layers
    return library.Sequential(
        [
            library.layers.InputLayer((8, 8, 1)),
            layers.Conv2D(4, 3, use_bias=False, name="stem"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(name="relu"),
            layers.Flatten(name="flat"),
            layers.Dense(16, activation="relu", name="hidden"),
            layers.Dense(3, name="head"),
        ]
    )


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    return network()


@pytest.fixture(scope="module")
def pictures():
    return np.random.default_rng(0).random((24, 8, 8, 1), dtype=np.float32)


def write(model, folder, format="float32", *, calibration=None, options=None, spec=SPEC, seed=0, **more):
    folder.mkdir(exist_ok=True)
    more = {"recipe": format, "outputs": "logits", "trace": Trace(), **more}
    recipe, outputs, trace = more.pop("recipe"), more.pop("outputs"), more.pop("trace")
    options = options or ExportOptions()
    return export(recipe, format, model, spec, outputs, options, calibration, folder, seed=seed, trace=trace, **more)


def run(file, inputs):
    return answers(file.file.read_bytes(), inputs)


@pytest.mark.parametrize(
    ("format", "tolerance", "dtypes"),
    [
        ("float32", 1e-6, {"float32": 3}),
        ("float16", 2e-3, {"float16": 3}),
        ("dynamic", 2e-2, {"float32": 2, "int8": 1}),
        ("int8", 5e-2, {"int8": 3}),
    ],
)
def test_a_file_answers_as_the_model_does_within_its_format(format, tolerance, dtypes, model, pictures, tmp_path):
    file = write(model, tmp_path, format, calibration=pictures)
    wanted = model(pictures, training=False).numpy()
    assert np.abs(run(file, pictures) - wanted).max() <= tolerance * np.ptp(wanted)
    proof = read_proof(file.file)
    assert proof.weight_dtypes == dtypes
    assert check(proof, [], format) == []


def test_the_face_says_what_was_written(model, pictures, tmp_path):
    promise = Promise(layer="head", kind="dense", shape=(3, 16), sparsity=0.0)
    untreated = [{"layer": "flat", "class": "Flatten", "reason": "no kernel"}]
    file = write(model, tmp_path, "int8", calibration=pictures, promises=[promise], untreated=untreated)
    content = file.file.read_bytes()
    assert file.facts == {
        "recipe": "int8",
        "format": "int8",
        "outputs": "logits",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "promises": [
            {
                "layer": "head",
                "kind": "dense",
                "shape": [3, 16],
                "sparsity": 0.0,
                "distinct": 0,
                "quantized": False,
                "pattern": "",
                "precision": "",
            }
        ],
        "untreated": untreated,
    }


@pytest.mark.parametrize(
    ("spec", "outputs", "name"),
    [
        (SPEC, "probabilities", "probabilities"),
        (DataSpec(task="regression", input_name="features", input_shape=(5,)), "logits", "value"),
    ],
)
def test_the_signature_names_input_and_output_and_takes_one_example(spec, outputs, name, tmp_path):
    layers = [keras.Input(spec.input_shape), keras.layers.Flatten(), keras.layers.Dense(spec.outputs)]
    file = write(keras.Sequential(layers), tmp_path, spec=spec, outputs=outputs)
    interpreter = Interpreter(str(file.file))
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": [spec.input_name], "outputs": [name]}}
    assert interpreter.get_input_details()[0]["shape"].tolist() == [1, *spec.input_shape]


@pytest.mark.parametrize(("format", "io"), [(format, io) for format, allowed in IO.items() for io in allowed])
def test_an_integer_file_takes_and_gives_what_was_asked_for_and_answers_alike(format, io, toy, tmp_path):
    file = toy.export(tmp_path, format, options=ExportOptions(io=io)).file
    proof = read_proof(file)
    assert (proof.input_dtype, proof.output_dtype) == (io, io)
    outputs = predict(file, toy.held)
    assert toy.difference(outputs) < 0.1
    assert toy.accuracy(outputs) >= toy.accuracy(toy.model(toy.held, training=False).numpy()) - 0.01


@pytest.mark.parametrize(
    ("format", "io", "allowed"),
    [("int8", "int16", "float32 or int8 or uint8"), ("int16x8", "int8", "float32 or int16")],
)
def test_an_input_dtype_that_the_format_does_not_have_is_refused(format, io, allowed, toy, tmp_path):
    with pytest.raises(ConfigError, match=rf"export\.io must be {allowed} for {format}, got {io}; change it or leave"):
        toy.export(tmp_path, format, options=ExportOptions(io=io))


def test_a_tf_keras_model_is_converted_as_well(pictures, tmp_path):
    tf_keras.utils.set_random_seed(2)
    twin = network(tf_keras)
    wanted = twin(pictures, training=False).numpy()
    assert np.abs(run(write(twin, tmp_path), pictures) - wanted).max() <= 1e-6 * np.ptp(wanted)


def test_zeros_and_clusters_reach_every_format(pictures, tmp_path):
    keras.utils.set_random_seed(4)
    model = network()
    kernel = np.random.default_rng(5).choice([0, 0, 0, 0.5, -0.25], (144, 16)).astype("float32")
    model.get_layer("hidden").set_weights([kernel, np.zeros(16, "float32")])
    held = float(np.mean(kernel == 0))
    promise = Promise(layer="hidden", kind="dense", shape=(16, 144), sparsity=held, distinct=3)
    for format in FORMATS:
        proof = read_proof(write(model, tmp_path, format, calibration=pictures).file)
        assert check(proof, [promise], format) == []
        hidden = next(weights for weights in proof.weights if weights.shape == (16, 144))
        assert (hidden.sparsity, hidden.distinct_per_channel) == (pytest.approx(held, abs=1e-12), 3)


def sparse_network(pattern):
    """Two dense layers of 64 inputs, pruned to four fifths (2:4: one half) along the inputs, and a head left alone."""
    keras.utils.set_random_seed(4)
    layers = [keras.layers.Dense(64, activation="relu", name=name) for name in ("first", "second")]
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), *layers, keras.layers.Dense(3)])
    random = np.random.default_rng(0)
    for layer in layers:
        kernel = random.normal(size=(64, 64)).astype("float32")
        if pattern == "2:4":
            groups = np.abs(kernel).reshape(16, 4, 64)
            keep = (groups >= np.sort(groups, axis=1)[:, 2:3]).reshape(64, 64)
        else:
            side = int((pattern or "1x1")[2:])
            keep = np.repeat(random.random((64 // side, 64)) > 0.8, side, axis=0)
        layer.set_weights([kernel * keep, np.zeros(64, "float32")])
    return model


@pytest.mark.parametrize(
    ("format", "pattern", "stored"),
    [
        ("float32", "", "sparse"),
        ("float32", "2:4", "sparse"),
        ("float32", "1x4", "sparse 1x4"),
        ("float32", "1x16", "sparse 1x4"),
        ("float16", "", "sparse"),
        ("float16", "2:4", "sparse"),
        ("int8", "1x16", "sparse 1x16"),
    ],
)
def test_a_file_without_zeros_is_smaller_answers_alike_and_is_read_as_the_dense_one(
    format, pattern, stored, pictures, tmp_path
):
    model = sparse_network(pattern)
    dense = write(model, tmp_path / "dense", format, calibration=pictures)
    sparse = write(model, tmp_path / "sparse", format, calibration=pictures, sparse=True)
    wanted = run(dense, pictures)
    assert np.abs(run(sparse, pictures) - wanted).max() <= 0.02 * np.ptp(wanted)
    assert sparse.facts["bytes"] < 0.85 * dense.facts["bytes"]
    before, after = read_proof(dense.file), read_proof(sparse.file)
    held = [np.mean(model.get_layer(name).kernel.numpy() == 0) for name in ("first", "second")]
    for name, zeros in zip(("first", "second"), held, strict=True):
        one, other = (
            next(k for k in proof.weights if f"/{name}_" in k.name or f"/{name}/" in k.name)
            for proof in (before, after)
        )
        assert other.storage == stored
        assert one.storage == "dense"
        assert one.zeros == other.zeros
        assert other.zeros.pattern == pattern
        assert (one.sparsity, one.distinct, one.distinct_per_channel) == (
            other.sparsity,
            other.distinct,
            other.distinct_per_channel,
        )
        promise = Promise(layer=name, kind="dense", shape=(64, 64), sparsity=zeros, pattern=pattern)
        assert check(before, [promise], format) == check(after, [promise], format) == []


@pytest.mark.parametrize("pattern", ["", "2:4", "1x4"])
def test_int8_that_xnnpack_would_not_load_is_never_produced(pattern, pictures, tmp_path):
    with pytest.raises(
        ModelError, match=r"tensor '\S+' sparse, since 0\.\d\d of it are zero, and XNNPACK loads .* drop '\+sparse'"
    ):
        write(sparse_network(pattern), tmp_path, "int8", calibration=pictures, sparse=True)
    assert not (tmp_path / "exported.json").exists()
    interpreter = Interpreter(str(tmp_path / "model.tflite"))
    with pytest.raises(RuntimeError, match="failed to delegate FULLY_CONNECTED"):
        interpreter.allocate_tensors()


@pytest.mark.parametrize("pattern", ["1x4", "1x16"])
def test_float16_blocks_that_make_nan_are_never_produced(pattern, pictures, tmp_path):
    with pytest.raises(
        ModelError, match=r"tensor '\S+' sparse 1x4, since .* and TFLite makes NaN of float16 blocks; drop"
    ):
        write(sparse_network(pattern), tmp_path, "float16", sparse=True)
    assert not (tmp_path / "exported.json").exists()
    assert np.isnan(run(TFLiteFile(tmp_path), pictures)).any()


def test_dynamic_with_sparse_storage_which_the_grammar_refuses_answers_nonsense(pictures, tmp_path):
    model = sparse_network("1x16")
    wanted = model(pictures, training=False).numpy()
    got = run(write(model, tmp_path, "dynamic", sparse=True), pictures)
    assert not np.abs(got - wanted).max() <= 0.5 * np.ptp(wanted)


class FakelyQuantized(keras.layers.Layer):
    """A dense layer that was trained for int8: fake quantization of kernel and answer, as tfmot inserts it."""

    def build(self, input_shape):
        self.kernel = self.add_weight(shape=(input_shape[-1], 3), initializer="glorot_uniform", name="kernel")

    def call(self, inputs):
        fake = tf.quantization.fake_quant_with_min_max_args
        kernel = fake(self.kernel, -0.5, 0.5, narrow_range=True)
        return fake(tf.matmul(fake(inputs, 0, 2), kernel), -16, 16)


def test_a_quantization_aware_model_keeps_its_own_ranges(pictures, tmp_path):
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), FakelyQuantized(name="aware")]
    file = write(keras.Sequential(layers), tmp_path, "int8", calibration=pictures, options=ExportOptions(io="int8"))
    interpreter = Interpreter(str(file.file))
    # The pictures reach 1.0 and the answers about 2; their ranges say 2 and 16.
    assert interpreter.get_input_details()[0]["quantization"][0] == pytest.approx(2 / 255, rel=1e-3)
    assert interpreter.get_output_details()[0]["quantization"][0] == pytest.approx(32 / 255, rel=1e-3)
    promise = Promise(layer="aware", kind="dense", shape=(3, 64), quantized=True)
    assert check(read_proof(file.file), [promise], "int8") == []


@pytest.mark.parametrize("format", FORMATS)
def test_equal_arguments_give_equal_bytes(format, model, pictures, tmp_path):
    first = write(model, tmp_path / "a", format, calibration=pictures)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "model.tflite").write_bytes(b"left by an attempt that was killed")
    again = write(model, tmp_path / "b", format, calibration=pictures)
    assert first.file.read_bytes() == again.file.read_bytes()
    assert first.facts == again.facts


def test_another_process_writes_the_same_bytes(model, pictures, tmp_path):
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "x.npy", pictures)
    here = write(keras.models.load_model(tmp_path / "m.keras"), tmp_path / "here", "int8", calibration=pictures)
    (tmp_path / "there").mkdir()
    code = (
        "import keras, numpy, pathlib, sys\n"
        "from tests.components.delivery.test_export import write\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "keras.layers.Dense(3); keras.Sequential()\n"  # another past: Keras numbers what it names itself
        "model = keras.models.load_model(folder / 'm.keras')\n"
        "write(model, folder / 'there', 'int8', calibration=numpy.load(folder / 'x.npy'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    assert (tmp_path / "there" / "model.tflite").read_bytes() == here.file.read_bytes()


def test_the_seed_draws_the_calibration_examples_from_the_whole_split(model, pictures, tmp_path):
    # Sorted by brightness, as a folder of classes would be: the first ones alone would give too small a range.
    scaled = (pictures * np.linspace(0.01, 1, len(pictures), dtype=np.float32)[:, None, None, None]).copy()
    options = ExportOptions(calibration_examples=6, io="int8")
    scales = []
    for seed in (0, 0, 1):
        file = write(model, tmp_path, "int8", calibration=scaled, options=options, seed=seed)
        scales.append(Interpreter(str(file.file)).get_input_details()[0]["quantization"][0])
    assert scales[0] == scales[1] != scales[2]
    assert min(scales) > scaled[:6].max() / 255 * 1.5


def test_a_small_calibration_split_is_used_as_a_whole(model, pictures, tmp_path):
    heard = []
    file = write(
        model, tmp_path, "int8", calibration=pictures, trace=Trace(on_progress=lambda *said: heard.append(said))
    )
    assert heard[-1] == (len(pictures), len(pictures), "calibrating int8")
    assert read_json(file.calibration)["rows"] == len(pictures)


def test_a_model_with_ranges_of_its_own_is_not_calibrated_anew(pictures, tmp_path):
    layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), FakelyQuantized(name="aware")]
    file = write(keras.Sequential(layers), tmp_path, "int8", calibration=pictures)
    assert read_json(file.calibration) == {"ranges": "trained", "rows": len(pictures)}


@pytest.mark.parametrize("nothing", [None, np.zeros((0, 8, 8, 1), np.float32)])
def test_int8_without_calibration_examples_is_refused(nothing, model, tmp_path):
    with pytest.raises(ContractError, match=r"int8 needs examples .* got 0; raise preprocess\.splits\.calibration"):
        write(model, tmp_path, "int8", calibration=nothing)
    assert list(tmp_path.iterdir()) == []


def test_calibration_examples_that_are_not_what_the_model_is_fed_are_refused(model, pictures, tmp_path):
    with pytest.raises(ContractError, match=r"float32 of shape \(8, 8, 1\), got uint8 \(8, 8, 1\)"):
        write(model, tmp_path, "int8", calibration=(pictures * 255).astype(np.uint8))
    with pytest.raises(ContractError, match=r"got float32 \(8, 8\); pass them as the model is fed"):
        write(model, tmp_path, "int8", calibration=pictures[..., 0])
    holes = pictures.copy()
    holes[7, 0, 0] = np.nan
    with pytest.raises(ContractError, match="calibration example 7 holds NaN or infinity"):
        write(model, tmp_path, "int8", calibration=holes)


def test_more_calibration_examples_than_there_are_is_a_config_error(model, pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"export\.calibration_examples=25: the calibration split holds 24; lower"):
        write(model, tmp_path, "int8", calibration=pictures, options=ExportOptions(calibration_examples=25))


def test_an_unknown_format_is_a_config_error(model, tmp_path):
    with pytest.raises(ConfigError, match="must be one of float32, .*, int4_weights, got 'int4'"):
        write(model, tmp_path, "int4")


def test_a_model_of_other_data_is_refused(model, tmp_path):
    two = DataSpec(task="classification", input_name="image", input_shape=(8, 8, 1), labels=("a", "b"))
    with pytest.raises(ModelError, match=r"returns float32 \(batch, 2\), got float32 \(1, 3\)"):
        write(model, tmp_path, spec=two)


class Cholesky(keras.layers.Layer):
    def call(self, inputs):
        return tf.linalg.cholesky(inputs[:, :3, :3, 0] + 3 * tf.eye(3))[:, 0]


def test_an_operator_that_needs_tensorflow_is_named_with_its_layer(tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 1)), Cholesky(name="odd_one")])
    with pytest.raises(
        ModelError, match=r"export 'float32': no built-in TFLite operator for Cholesky in layer 'odd_one'; replace"
    ):
        write(model, tmp_path)
    assert not (tmp_path / "exported.json").exists()


class ArcTangent(keras.layers.Layer):
    def call(self, inputs):
        return tf.atan2(inputs, inputs + 1)


def test_operators_that_stay_in_float_inside_an_int8_file_are_told(tmp_path, pictures):
    heard = []
    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), ArcTangent(), keras.layers.Dense(3)])
    write(model, tmp_path, "int8", calibration=pictures, trace=Trace(on_warning=heard.append))
    assert heard == [
        "int8: operators without an int8 kernel run in float inside the file, expect it to be slower: ATAN2."
    ]


def test_sizes_and_operators_go_to_tensorboard(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trace(tmp_path / "log") as trace:
        file = write(model, tmp_path, trace=trace)
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"export/bytes", "export/gzip_bytes", "export/parameters", "export/operators"} <= set(tags)
    written = tf.make_ndarray(events.Tensors("export/bytes")[0].tensor_proto)
    assert written == file.facts["bytes"]
