"""Calibration on real files: which rows are drawn, when ranges have settled, and what they clip."""

import collections

import keras
import numpy as np
import pytest

from components.artifacts import DataSpec, read_json
from components.delivery.activations import Activations
from components.delivery.calibration import (
    CALIBRATION_LIMIT,
    CLIPPED,
    FIRST,
    SETTLED,
    STRATA,
    Rows,
    coverage,
    observe,
    order,
    settle,
    worst_clipped,
)
from components.delivery.owners import layer_classes
from components.options import ExportOptions
from components.tracing import Trace

CLASSES = DataSpec(task="classification", input_name="x", input_shape=(1,), labels=tuple("abc"))
VALUES = DataSpec(task="regression", input_name="x", input_shape=(1,))


@pytest.fixture(scope="module")
def float_file(toy, tmp_path_factory):
    content = toy.export(tmp_path_factory.mktemp("float32"), "float32").file.read_bytes()
    return Activations(content, list(layer_classes(toy.model)))


def rows_of(toy, inputs, labels, **more):
    return Rows(inputs, order(len(inputs), labels, toy.spec, seed=0), **more)


def test_every_beginning_holds_each_class_in_its_share():
    labels = np.repeat([0, 1, 2], [700, 250, 50]).astype(np.int32)
    drawn = labels[order(1000, labels, CLASSES, seed=3)]
    assert set(drawn[:3]) == {0, 1, 2}
    for count in (20, 100, 200, 1000):
        shares = np.bincount(drawn[:count], minlength=3) / count
        np.testing.assert_allclose(shares, [0.7, 0.25, 0.05], atol=2 / count)


def test_values_are_drawn_from_each_tenth():
    labels = (np.random.default_rng(0).exponential(1, (400, 1)) ** 3).astype(np.float32)
    edges = np.quantile(labels, np.arange(1, STRATA) / STRATA)
    drawn = np.searchsorted(edges, labels[order(400, labels, VALUES, seed=0)].reshape(-1), side="right")
    assert sorted(collections.Counter(drawn[:40].tolist()).values()) == [4] * STRATA


def test_the_order_follows_the_seed_and_loses_no_row():
    labels = np.arange(90, dtype=np.int32) % 3
    first, again, other = (order(90, labels, CLASSES, seed=seed).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(90))
    assert sorted(order(5, None, CLASSES, seed=0).tolist()) == [0, 1, 2, 3, 4]


def test_rows_are_added_until_no_range_grows_any_more(toy, float_file):
    found = settle(float_file, rows_of(toy, toy.inputs, toy.labels), None)
    sizes = [step["rows"] for step in found.steps]
    assert sizes == [64, 128, 256, 512][: len(sizes)]
    assert found.steps[0]["growth"] is None
    assert all(step["growth"] > SETTLED for step in found.steps[1:-1])
    assert found.settled is (found.steps[-1]["growth"] <= SETTLED)
    assert len(found.rows) == sizes[-1] <= CALIBRATION_LIMIT
    assert found.ranges == observe(float_file, toy.inputs[found.rows], {})


def test_rows_that_are_all_alike_settle_at_once_and_growing_ones_never(toy, float_file):
    alike = np.repeat(toy.inputs[:1], 300, axis=0)
    found = settle(float_file, Rows(alike, np.arange(300)), None)
    assert ([step["rows"] for step in found.steps], found.settled) == ([FIRST, 2 * FIRST], True)
    few = settle(float_file, Rows(alike, np.arange(70)), None)
    assert (few.steps[-1], few.settled) == ({"rows": 70, "growth": 0.0}, False)
    growing = alike * np.linspace(1, 50, 300, dtype=np.float32)[:, None, None, None]
    found = settle(float_file, Rows(growing, np.arange(300)), None)
    assert ([step["rows"] for step in found.steps], found.settled) == ([64, 128, 256, 300], False)
    many = np.concatenate([growing, growing[-1:] * np.arange(2, 302)[:, None, None, None].astype(np.float32)])
    assert settle(float_file, Rows(many, np.arange(600)), None).steps[-1]["rows"] == CALIBRATION_LIMIT


def test_a_fixed_count_is_taken_as_it_is(toy, float_file):
    found = settle(float_file, rows_of(toy, toy.inputs, toy.labels), 70)
    assert (len(found.rows), found.steps, found.settled) == (70, ({"rows": 70, "growth": None},), False)
    assert sorted(np.bincount(toy.labels[found.rows])) == pytest.approx([17.5] * 4, abs=3)


def test_ranges_are_those_of_the_model_itself(toy, float_file):
    outputs = toy.model(toy.inputs[:20], training=False).numpy()
    ranges = observe(float_file, toy.inputs[:20], {})
    assert ranges["StatefulPartitionedCall:0"] == pytest.approx((outputs.min(), outputs.max()), rel=1e-5)
    hidden = toy.model.get_layer("hidden").output
    values = keras.Model(toy.model.inputs[0], hidden)(toy.inputs[:20], training=False).numpy()
    (name,) = [each.name for each in float_file.tensors if each.layer == "hidden"]
    assert ranges[name] == pytest.approx((0, values.max()), rel=1e-5)


@pytest.mark.parametrize(
    ("format", "io"), [("int8", "float32"), ("int8", "uint8"), ("int16x8", "float32"), ("int16x8", "int16")]
)
def test_every_range_of_the_file_is_found_by_layer_and_covers_what_calibration_saw(format, io, toy, tmp_path):
    file = toy.export(tmp_path, format, options=ExportOptions(io=io), held_out=toy.held[:50])
    found = read_json(file.calibration)
    assert (found["ranges"], found["rows"]) == ("calibrated", 96)
    layers = [each["layer"] for each in found["tensors"]]
    assert layers == ["input", "stem", "depthwise", "pointwise", "flat", "hidden", "head"]
    for each in found["tensors"]:
        assert each["clipped"]["calibration"] == 0
        assert 0 <= each["clipped"]["validation"] < CLIPPED
        # Symmetric 16-bit ranges spend half their codes on the side where a ReLU has no values.
        assert each["covered"] > (0.95 if format == "int8" else 0.45)


def test_what_lies_outside_a_range_is_counted(toy, float_file, tmp_path):
    made = toy.export(tmp_path, "int8").file.read_bytes()
    file = Activations(made, list(layer_classes(toy.model)))
    found = settle(float_file, rows_of(toy, toy.inputs[:96], toy.labels[:96]), None)
    wild = toy.held[:30] * 3
    report = coverage(file, float_file, found, Rows(toy.inputs[:96], np.arange(96), wild))
    first = report[0]
    step = (first["high"] - first["low"]) / 255
    outside = (wild < first["low"] - step / 2) | (wild > first["high"] + step / 2)
    assert (first["tensor"], first["clipped"]["validation"]) == ("serving_default_image:0", np.mean(outside))
    assert np.mean(outside) > 0.02
    assert worst_clipped(report, "validation")["clipped"]["validation"] >= np.mean(outside)
    assert worst_clipped(report, "calibration") is None
    assert worst_clipped([], "validation") is None


def test_clipped_validation_rows_are_warned_of_in_one_line(toy, tmp_path):
    heard = []
    toy.export(tmp_path / "fine", "int8", held_out=toy.held[:50], trace=Trace(on_warning=heard.append))
    assert heard == []
    toy.export(tmp_path / "wild", "int8", held_out=toy.held[:50] * 3, trace=Trace(on_warning=heard.append))
    worst = max(
        read_json(tmp_path / "wild" / "calibration.json")["tensors"], key=lambda each: each["clipped"]["validation"]
    )
    assert heard == [
        f"int8: {worst['clipped']['validation']:.3f} of what layer '{worst['layer']}' makes of the validation split lies outside the "
        "range that 96 calibration rows gave it, at most 0.01 is usual; raise preprocess.splits.calibration."
    ]


def test_formats_without_ranges_leave_no_calibration_behind(toy, tmp_path):
    assert toy.export(tmp_path, "int8").calibration.exists()
    assert not toy.export(tmp_path, "dynamic").calibration.exists()


def test_coverage_goes_to_tensorboard(toy, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trace(tmp_path / "log") as trace:
        toy.export(tmp_path / "file", "int8", held_out=toy.held[:10], trace=trace)
    events = EventAccumulator(str(tmp_path / "log"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"export/calibration_rows", "export/covered_by_tensor", "export/clipped_validation_by_tensor"} <= set(tags)
    assert len(events.Tensors("export/covered_by_tensor")) == 7
    table = events.Tensors("export/calibration")[0].tensor_proto.string_val[0].decode()
    assert table.startswith("96 rows; the ranges had ")
    assert "| hidden | 0 | " in table
