"""The skew gate: whole data passes, and of the seams the broken one is named."""

import copy

import numpy as np
import pytest

from components.artifacts import read_json, write_json
from components.delivery.skew import KERAS_TOLERANCE, delivered, golden_features, neighbours, skew_gate
from components.errors import ContractError


def golden_of(toy):
    return read_json(toy.data.folder / "golden.json")


@pytest.fixture
def gate(made, tmp_path):
    """Runs the gate on a sound bundle, with some of what it is given changed."""

    def run(kind, *, golden=None, transform=None, **changed):
        toy = made(kind)
        folder = toy.bundle(tmp_path / "bundle")
        if transform is not None:
            write_json(folder / "transform.json", transform)
        given = {
            "format": toy.file.facts["format"],
            "keras_outputs": toy.keras_outputs,
            "tf_inputs": delivered(toy.batches, golden_of(toy)),
        }
        return skew_gate(folder, toy.file.file, golden or golden_of(toy), **(given | changed))

    return run


@pytest.mark.parametrize("kind", ["table", "digits", "values"])
def test_sound_data_passes_every_seam(gate, made, kind):
    found = gate(kind)
    seams = found["seams"]
    assert found["records"] == 8
    assert (seams["beam"], seams["tf.data"], seams["bundle"]) == ("exact", "exact", "exact")
    assert seams["keras"]["tolerance"] == KERAS_TOLERANCE[made(kind).file.facts["format"]]
    assert 0 <= seams["keras"]["difference"] < (0.15 if kind == "digits" else 1e-6)
    assert found["outputs"].shape == (8, made(kind).data.spec.outputs)


def test_seams_that_nobody_can_check_are_said_to_be_so(gate):
    seams = gate("table", keras_outputs=None, tf_inputs=None)["seams"]
    assert seams == {"beam": "exact", "tf.data": "not checked", "keras": "not checked", "bundle": "exact"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda age, income, job: age.update(mean=age["mean"] + 0.25), "column 'age'"),
        (lambda age, income, job: age.update(std=age["std"] * 1.001), "column 'age'"),
        (lambda age, income, job: income["boundaries"].insert(0, -1e9), "column 'income'"),
        (lambda age, income, job: job["vocabulary"].reverse(), "column 'job'"),
    ],
)
def test_a_changed_transform_breaks_the_seam_to_beam_at_its_column(gate, made, change, message):
    facts = made("table").data.transform
    columns = {column["name"]: column for column in facts["columns"]}
    change(columns["age"], columns["income"], columns["job"])
    with pytest.raises(
        ContractError, match=rf"seam beam: record \d, {message}: the transform makes -?\d.*, the blocks hold"
    ):
        gate("table", transform=facts)


def test_a_changed_mean_of_rows_of_numbers_is_found_at_its_place(gate, made):
    facts = made("values").data.transform
    facts["mean"][2] += 1e-3
    with pytest.raises(
        ContractError, match=r"seam beam: record 0, value 2: the transform makes .*8 of 24 values differ"
    ):
        gate("values", transform=facts)


def test_a_transform_of_another_size_is_found(gate, made):
    facts = {**made("digits").data.transform, "size": [4, 4]}
    with pytest.raises(
        ContractError,
        match=r"seam beam: the transform makes uint8 \(8, 4, 4, 1\), the blocks hold uint8 \(8, 8, 8, 1\)",
    ):
        gate("digits", transform=facts)


def test_a_golden_record_that_the_transform_refuses_is_told(gate, made):
    golden = golden_of(made("table"))
    golden[3]["raw"]["age"] = "old"
    with pytest.raises(
        ContractError, match=r"seam beam: the bundle's transform refuses .*record 3, column 'age': .* got 'old'"
    ):
        gate("table", golden=golden)


@pytest.mark.parametrize(
    ("kind", "place", "name"),
    [
        ("table", 0, "column 'age'"),
        ("table", 2, r"column 'job', id 1"),
        ("table", 10, r"column 'income', id \d"),
        ("values", 1, "value 1"),
        ("digits", (3, 5, 0), "row 3, column 5, channel 0"),
    ],
)
def test_tf_data_that_delivers_other_inputs_is_named_down_to_the_column(gate, made, kind, place, name):
    inputs = delivered(made(kind).batches, golden_of(made(kind)))
    at = (4, *np.atleast_1d(place))
    inputs[at] = np.nextafter(inputs[at], np.float32(9))
    with pytest.raises(
        ContractError, match=rf"seam tf\.data: record 4, {name}: tf\.data delivers .*, the blocks hold .*\(1 of"
    ):
        gate(kind, tf_inputs=inputs)


def test_tf_data_that_delivers_another_dtype_is_found(gate, made):
    inputs = delivered(made("digits").batches, golden_of(made("digits"))).astype(np.float64)
    with pytest.raises(
        ContractError, match=r"seam tf\.data: tf\.data delivers float64 \(8, 8, 8, 1\), the blocks hold float32"
    ):
        gate("digits", tf_inputs=inputs)


def test_a_keras_model_that_is_fed_pixels_of_another_scale_is_found(gate, made):
    toy = made("digits")
    with pytest.raises(
        ContractError,
        match=r"seam keras: int8 answers may differ by 0\.3 of their spread, got .*; worst is record \d, output \d",
    ):
        gate("digits", keras_outputs=lambda inputs: toy.keras_outputs(inputs * 2 - 1))


def test_a_float_file_is_held_to_more(gate, made):
    toy = made("values")
    with pytest.raises(ContractError, match=r"seam keras: float32 answers may differ by 0\.005"):
        gate("values", keras_outputs=lambda inputs: toy.keras_outputs(inputs) * 1.02)


def test_one_record_is_weighed_against_the_usual_answers_not_against_itself(gate, made):
    toy = made("values")
    one = golden_of(toy)[:1]
    given = {
        "golden": one,
        "tf_inputs": delivered(toy.batches, one),
        "format": "int8",
        "keras_outputs": lambda inputs: toy.keras_outputs(inputs) * 1.05,
    }
    with pytest.raises(ContractError, match=r"got 0\.95"):  # 0.05 of the answer, where 0.05 of the answer is the spread
        gate("values", **given)
    found = gate("values", **given, more_inputs=neighbours(toy.batches, one))
    assert found["seams"]["keras"]["difference"] < 0.06


def test_answers_that_are_not_numbers_fail(gate, made):
    toy = made("values")
    with pytest.raises(ContractError, match=r"seam keras: .* got nan"):
        gate("values", keras_outputs=lambda inputs: toy.keras_outputs(inputs) * np.nan)


def test_a_bundle_whose_file_was_swapped_answers_otherwise(made, tmp_path):
    toy = made("values")
    folder = toy.bundle(tmp_path / "bundle")
    content = bytearray((folder / "model.tflite").read_bytes())
    kernel = toy.model.layers[1].kernel.numpy().T.tobytes()
    at = bytes(content).index(kernel)
    content[at : at + 4] = np.float32(7).tobytes()
    (folder / "model.tflite").write_bytes(bytes(content))
    with pytest.raises(
        ContractError, match=r"seam bundle: record \d, output 0: the bundle answers .*, the measured file answers"
    ):
        skew_gate(folder, toy.file.file, golden_of(toy), format="float32", keras_outputs=None, tf_inputs=None)


def test_a_broken_seam_leaves_no_manifest(made, tmp_path):
    toy = made("values")
    with pytest.raises(ContractError, match="seam keras"):
        toy.bundle(tmp_path / "b", keras_outputs=lambda inputs: -toy.keras_outputs(inputs))
    assert not (tmp_path / "b" / "manifest.json").exists()


def test_golden_rows_are_found_in_the_data_wherever_they_lie(made):
    toy = made("digits")
    golden = golden_of(toy)
    rows = delivered(toy.batches, golden[::-1])
    features = golden_features(golden[::-1])["image"]
    np.testing.assert_array_equal(rows, features.astype(np.float32) * np.float32(1 / 255))


def test_a_golden_row_beyond_its_split_is_told(made):
    golden = copy.deepcopy(golden_of(made("table")))
    golden[1]["index"] = 10_000
    with pytest.raises(ContractError, match=r"names row 10000 of split '\w+', but tf\.data delivers fewer rows"):
        delivered(made("table").batches, golden)


def test_golden_records_without_features_are_refused():
    with pytest.raises(
        ContractError, match=r"records with features of one width are needed, got 1 records and KeyError"
    ):
        golden_features([{"raw": {}}])
    with pytest.raises(ContractError, match="got 0 records"):
        golden_features([])
