import json
import pathlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

from components.artifacts import DataSpec, TFLiteFile, read_json, sha256, write_json
from components.delivery.measure import (
    confusion,
    confusion_picture,
    dequantized,
    latency,
    measure,
    metric,
    predict,
    quantized,
)
from components.delivery.select import drops
from components.errors import ContractError, DataError
from components.machine import processor
from components.options import MeasureOptions
from components.tracing import Trace

SPEC = DataSpec(task="classification", input_name="features", input_shape=(4,), labels=("a", "b", "c"))
NUMBER = DataSpec(task="regression", input_name="features", input_shape=(4,))
QUICK = MeasureOptions(warmup=1, runs=5)


def exported(folder, kernel, *, format="float32", io="float32", promises=(), recipe=None, calibration=None):
    """The artifact of an export of y = x @ kernel, made without the export stage."""
    holder = tf.Module()
    holder.kernel = tf.Variable(kernel)

    @tf.function(input_signature=[tf.TensorSpec((1, len(kernel)), tf.float32, name="features")], autograph=False)
    def serve(features):
        return {"logits": tf.matmul(features, holder.kernel)}

    holder.serve = serve
    converter = tf.lite.TFLiteConverter.from_concrete_functions([serve.get_concrete_function()], holder)
    if format == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[np.newaxis]] for row in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        if io == "int8":
            converter.inference_input_type = converter.inference_output_type = tf.int8
    folder.mkdir()
    file = TFLiteFile(folder)
    file.file.write_bytes(converter.convert())
    face = {"recipe": recipe or format, "format": format, "outputs": "logits", "sha256": sha256(file.file)}
    write_json(folder / "exported.json", {**face, "bytes": 0, "promises": list(promises), "untreated": []})
    return file


@pytest.fixture
def kernel():
    return np.random.default_rng(0).normal(size=(4, 3)).astype("float32")


@pytest.fixture
def rows():
    return np.random.default_rng(1).normal(size=(150, 4)).astype("float32")


def labels_of(rows, kernel, wrong=0):
    labels = (rows @ kernel).argmax(axis=1).astype("int32")
    labels[:wrong] = (labels[:wrong] + 1) % 3
    return labels


def test_a_variant_is_an_entry_of_results_json(kernel, rows, tmp_path):
    labels = labels_of(rows, kernel, wrong=15)
    file = exported(tmp_path / "export", kernel)
    made = measure(file, lambda: (rows, labels), lambda: (rows[:20], labels[:20]), SPEC, QUICK, tmp_path, trace=Trace())
    variant = made.variant
    assert (variant["metric_name"], variant["metric"], variant["validation_metric"]) == ("accuracy", 0.9, 0.25)
    assert (variant["recipe"], variant["status"], variant["reason"]) == ("float32", "ok", None)
    assert variant["sha256"] == sha256(file.file)
    assert (variant["bytes"], variant["parameters"]) == (file.file.stat().st_size, 12)
    assert set(variant["latency_ms"]) == {"p50", "p90", "threads", "warmup", "runs", "cpu"}
    assert {"sparsity", "distinct_weights_max", "weight_dtypes", "operators", "flex"} <= set(variant["proof"])
    assert drops([variant])[0]["metric_drop"] == 0
    kept = np.load(tmp_path / "predictions.npz")
    np.testing.assert_allclose(kept["outputs"], rows @ kernel, atol=1e-5)
    np.testing.assert_array_equal(kept["labels"], labels)
    assert read_json(tmp_path / "proof.json")["weights"][0]["shape"] == [3, 4]


def test_all_but_the_latency_is_the_same_when_measured_again(kernel, rows, tmp_path):
    file = exported(tmp_path / "export", kernel)
    kept = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made = measure(
            file,
            lambda: (rows, labels_of(rows, kernel)),
            lambda: (rows[:0], np.zeros(0, "int32")),
            SPEC,
            QUICK,
            tmp_path / name,
            trace=Trace(),
        )
        kept.append(({**made.variant, "latency_ms": None}, (tmp_path / name / "predictions.npz").read_bytes()))
    assert kept[0] == kept[1]
    assert kept[0][0]["validation_metric"] is None


def test_a_broken_promise_fails_the_variant_and_names_the_tensor(kernel, rows, tmp_path):
    kernel[:2] = 0
    promise = {"layer": "head", "kind": "dense", "shape": [3, 4], "sparsity": 0.75, "distinct": 0, "quantized": False}
    file = exported(tmp_path / "export", kernel, promises=[promise], recipe="prune@0.75")
    test = (rows, labels_of(rows, kernel))
    variant = measure(file, lambda: test, lambda: test, SPEC, QUICK, tmp_path, trace=Trace()).variant
    assert variant["status"] == "failed"
    assert variant["reason"].startswith("layer 'head' (tensor '")
    assert variant["reason"].endswith("sparsity 0.7500 was promised, the file holds 0.5000")
    assert variant["metric"] == 1.0  # measured all the same: the report shows what was lost
    assert read_json(tmp_path / "proof.json")["broken"] == [variant["reason"]]


def test_many_broken_promises_are_counted_not_listed(kernel, rows, tmp_path):
    promises = [
        {"layer": f"l{n}", "kind": "dense", "shape": [9, n], "sparsity": 0.5, "distinct": 0, "quantized": False}
        for n in range(5)
    ]
    file = exported(tmp_path / "export", kernel, promises=promises)
    test = (rows, labels_of(rows, kernel))
    variant = measure(file, lambda: test, lambda: test, SPEC, QUICK, tmp_path, trace=Trace()).variant
    assert variant["reason"].endswith("layer 'l2': no dense kernel of shape (9, 2) in the file; and 2 more")
    assert len(read_json(tmp_path / "proof.json")["broken"]) == 5


def test_the_metric_of_a_regression_is_the_root_of_the_mean_squared_error(tmp_path, rows):
    kernel = np.ones((4, 1), "float32")
    file = exported(tmp_path / "export", kernel)
    labels = (rows @ kernel).reshape(-1) + np.where(np.arange(150) % 2, 3, -3).astype("float32")
    test = (rows, labels)
    variant = measure(file, lambda: test, lambda: test, NUMBER, QUICK, tmp_path, trace=Trace()).variant
    assert (variant["metric_name"], variant["metric"]) == ("rmse", pytest.approx(3, abs=1e-5))
    assert metric(np.array([[1.0], [3.0]]), np.array([[1.0], [1.0]]), NUMBER) == pytest.approx(2**0.5)


def test_an_empty_test_split_is_a_data_error(kernel, tmp_path):
    file = exported(tmp_path / "export", kernel)
    nothing = (np.zeros((0, 4), "float32"), np.zeros(0, "int32"))
    with pytest.raises(DataError, match=r"test split holds 0 rows; raise preprocess\.splits\.test"):
        measure(file, lambda: nothing, lambda: nothing, SPEC, QUICK, tmp_path, trace=Trace())
    assert not (tmp_path / "variant.json").exists()


@pytest.mark.parametrize("count", [1, 63, 64, 200])
def test_every_example_is_answered_in_order_on_however_many_cores(count, kernel, tmp_path):
    rows = np.random.default_rng(2).normal(size=(count, 4)).astype("float32")
    file = exported(tmp_path / "export", kernel)
    np.testing.assert_allclose(predict(file.file, rows), rows @ kernel, atol=1e-5)


def test_a_file_with_integer_input_and_output_answers_in_real_numbers(kernel, rows, tmp_path):
    real = exported(tmp_path / "real", kernel, format="int8", calibration=rows)
    whole = exported(tmp_path / "whole", kernel, format="int8", io="int8", calibration=rows)
    wanted = rows @ kernel
    answers = predict(whole.file, rows)
    assert answers.dtype == np.float32
    assert np.abs(answers - wanted).max() < 0.02 * np.ptp(wanted)
    np.testing.assert_array_equal(answers, predict(real.file, rows))


@given(
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20),
    st.sampled_from([0.01, 0.02, 0.5]),
    st.integers(-20, 20),
)
def test_a_value_survives_quantization_within_half_a_step(values, scale, zero_point):
    details = {"dtype": np.int8, "quantization": (scale, zero_point)}
    values = np.array(values, np.float32)
    low, high = (-128 - zero_point) * scale, (127 - zero_point) * scale
    back = dequantized(quantized(values, details), details)
    assert np.abs(back - np.clip(values, low, high)).max() <= scale * 0.5001


def test_the_runtime_refuses_a_damaged_file_in_words(kernel, rows, tmp_path):
    file = exported(tmp_path / "export", kernel)
    file.file.write_bytes(file.file.read_bytes()[:300])
    with pytest.raises(ContractError, match=r"model\.tflite: ai-edge-litert cannot load the file: "):
        predict(file.file, rows)


def test_examples_of_another_shape_are_refused(kernel, tmp_path):
    file = exported(tmp_path / "export", kernel)
    with pytest.raises(ContractError, match=r"takes examples of shape \(4,\), got \(5,\)"):
        predict(file.file, np.zeros((3, 5), "float32"))


def test_latency_carries_its_protocol(kernel, rows, tmp_path):
    file = exported(tmp_path / "export", kernel)
    took = latency(file.file, rows[0], MeasureOptions(threads=2, warmup=3, runs=50))
    assert 0 < took["p50"] <= took["p90"]
    assert {key: took[key] for key in ("threads", "warmup", "runs", "cpu")} == {
        "threads": 2,
        "warmup": 3,
        "runs": 50,
        "cpu": processor(),
    }


def test_a_confusion_matrix_counts_true_classes_in_rows():
    outputs = np.array([[9, 0], [9, 0], [0, 9]], "float32")
    assert confusion(outputs, np.array([0, 1, 1], "int32"), 2).tolist() == [[1, 0], [1, 1]]


def test_the_picture_of_a_confusion_matrix_is_darkest_where_most_answers_fall():
    picture = confusion_picture(np.array([[5, 0], [0, 5]]), ("yes", "no"))
    assert (picture.dtype, picture.ndim, picture.shape[2]) == (np.uint8, 3, 3)
    assert picture.min() < 60
    assert picture.max() == 255
    assert confusion_picture(np.zeros((40, 40), int), tuple(map(str, range(40)))).shape[0] > picture.shape[0]


def test_figures_and_pictures_go_to_tensorboard(kernel, rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    file = exported(tmp_path / "export", kernel)
    test = (rows, labels_of(rows, kernel))
    with Trace(tmp_path / "log") as trace:
        variant = measure(file, lambda: test, lambda: test, SPEC, QUICK, tmp_path, trace=trace).variant
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"measure/accuracy", "measure/validation_accuracy", "measure/gzip_bytes"} <= tags
    assert {"measure/latency_ms_p50", "measure/confusion", "_hparams_/session_start_info"} <= tags
    assert tf.make_ndarray(events.Tensors("measure/bytes")[0].tensor_proto) == variant["bytes"]


def test_progress_is_told_by_step(kernel, rows, tmp_path):
    heard = []
    file = exported(tmp_path / "export", kernel)
    test = (rows, labels_of(rows, kernel))
    trace = Trace(on_progress=lambda *said: heard.append(said))
    measure(file, lambda: test, lambda: test, SPEC, QUICK, tmp_path, trace=trace)
    assert [note for _, _, note in heard] == ["validation split", "test split", "latency", "float32"]
    assert heard[-1][:2] == (3, 3)


def test_the_mlperf_tiny_keyword_spotter_runs_on_integers():
    data = pathlib.Path(__file__).parents[3].parent / "shared" / "data" / "mlperf_tiny"
    files = list(data.rglob("kws_ref_model.tflite"))
    if not files:
        pytest.skip("kws_ref_model.tflite of MLPerf Tiny is not in ../shared/data")
    answers = predict(files[0], np.random.default_rng(0).random((4, 49, 10, 1), dtype=np.float32))
    assert answers.shape == (4, 12)
    np.testing.assert_allclose(answers.sum(axis=1), 1, atol=0.05)
    assert json.dumps(latency(files[0], np.zeros((49, 10, 1), "float32"), QUICK))
