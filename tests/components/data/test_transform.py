import ast
import pathlib
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from components.data import csvfile, transform
from components.data.transform import Coded, Transform, coded, parse_cells, raw_columns, resize, to_channels

LABEL = {"kind": "classes", "names": ["no", "yes"], "strip": "."}
TABLE = {
    "schema": 1,
    "kind": "table",
    "inputs": {"kind": "features", "depths": [4, 4]},
    "missing": ["", "?"],
    "label": LABEL,
    "columns": [
        {"name": "age", "kind": "number", "rule": "standardise", "mean": 40.0, "std": 10.0},
        {"name": "fare", "kind": "number", "rule": "none", "mean": 7.5},
        {"name": "hour", "kind": "number", "rule": "bucketise", "boundaries": [6.0, 12.0]},
        {"name": "job", "kind": "category", "vocabulary": ["clerk", "cook"]},
    ],
}
RAW = {"age": [" 50", "?"], "fare": ["1.25", ""], "hour": ["12", "?"], "job": [" cook", "pilot"]}


def test_a_table_becomes_numbers_and_ids_as_its_rules_say():
    features = Transform(TABLE).apply(RAW)
    assert features["numbers"].tolist() == [[1.0, 1.25], [0.0, 7.5]]
    assert features["ids"].tolist() == [[3, 3], [0, 1]]
    assert (features["numbers"].dtype, features["ids"].dtype) == (np.float32, np.int32)


def test_the_model_input_is_the_numbers_then_each_one_hot():
    made = Transform(TABLE)
    assert made.to_inputs(made.apply(RAW)).tolist() == [
        [1.0, 1.25, 0, 0, 0, 1, 0, 0, 0, 1],
        [0.0, 7.5, 1, 0, 0, 0, 0, 1, 0, 0],
    ]


def test_text_bytes_codes_and_parsed_numbers_give_the_same_features():
    made = Transform(TABLE)
    expected = made.apply(RAW)
    as_bytes = {name: np.array([cell.encode() for cell in cells], object) for name, cells in RAW.items()}
    as_codes = {name: coded(cells) for name, cells in RAW.items()}
    as_numbers = RAW | {name: parse_cells(RAW[name], ["?", ""])[0] for name in ("age", "fare", "hour")}
    for other in (as_bytes, as_codes, as_numbers):
        features = made.apply(other)
        assert all(np.array_equal(features[name], expected[name]) for name in expected)


def test_one_row_at_a_time_gives_the_same_bits_as_all_at_once():
    draw = np.random.default_rng(1)
    columns = {name: draw.normal(30, 20, 50) for name in ("age", "fare", "hour")}
    columns["job"] = Coded(draw.integers(0, 3, 50).astype(np.int32), ("cook", "clerk", "?"))
    made = Transform(TABLE)
    whole = made.apply(columns)
    for row in range(50):
        one = {"job": Coded(columns["job"].codes[row : row + 1], columns["job"].values)}
        one |= {name: columns[name][row : row + 1] for name in ("age", "fare", "hour")}
        for name, values in made.apply(one).items():
            assert values.tobytes() == whole[name][row : row + 1].tobytes()


def test_labels_lose_their_ending_and_unknown_ones_are_minus_one():
    assert Transform(TABLE).labels([" yes.", "no", "maybe"]).tolist() == [1, 0, -1]


def test_number_labels_are_float32_and_nan_where_they_are_none():
    labels = Transform(TABLE | {"label": {"kind": "number"}}).labels(["1.5", "x"])
    assert labels.dtype == np.float32
    assert np.array_equal(labels, np.array([1.5, np.nan], np.float32), equal_nan=True)


def test_a_cell_that_is_no_number_is_named_with_its_record_and_column():
    with pytest.raises(ValueError, match="record 1, column 'age': a number or a missing cell is needed, got 'old'"):
        Transform(TABLE).apply(RAW | {"age": ["1", "old"]})


def test_an_absent_column_is_named():
    with pytest.raises(ValueError, match="the records lack column 'job'; got age, fare, hour"):
        Transform(TABLE).apply({name: RAW[name] for name in ("age", "fare", "hour")})


def test_a_record_without_a_column_that_others_have_is_named():
    with pytest.raises(ValueError, match="record 1 lacks column 'b'"):
        raw_columns([{"a": "1", "b": "2"}, {"a": "1"}])


def test_json_round_trip_keeps_the_transform():
    assert Transform.from_json(Transform(TABLE).to_json()).to_json() == TABLE


def test_another_schema_version_is_refused():
    with pytest.raises(ValueError, match=r"transform.schema must be 1, got 2"):
        Transform({"schema": 2})


@pytest.mark.parametrize("cell", ["1e400", "inf", "nan", "0x10", "1_0", "1 2", "", "-", ".", "e5", "１２", b"\xff"])
def test_what_is_no_finite_decimal_number_is_bad(cell):
    values, bad = parse_cells([cell])
    assert bad.tolist() == [True]
    assert np.isnan(values[0])


@pytest.mark.parametrize(("cell", "value"), [(" 39\t", 39.0), ("+1", 1.0), (".5", 0.5), ("5.", 5.0), ("1E-3", 0.001)])
def test_numbers_may_have_blanks_signs_and_exponents(cell, value):
    values, bad = parse_cells([cell])
    assert (values[0], bad[0]) == (value, False)


CELLS = st.one_of(
    st.floats(width=64).map(repr),
    st.integers(-(10**20), 10**20).map(str),
    st.text("0123456789.eE+-_ xnaif?", max_size=12),
    st.sampled_from(["", "?", " ?", "NaN", "nan", "inf", "-0", "+1", ".5", "5.", "1e400", " 7 "]),
)


@given(st.lists(CELLS, max_size=8), st.sampled_from([("", "?"), ("", "?", "NaN"), ("-1",), ("7",)]))
def test_the_fast_reader_of_numbers_is_bit_equal_to_the_definition(cells, missing):
    fast, fast_bad = csvfile.numbers(pa.array([cell.encode() for cell in cells], pa.binary()), missing)
    slow, slow_bad = parse_cells(cells, missing)
    assert fast_bad.tolist() == slow_bad.tolist()
    assert np.array_equal(fast.view(np.int64)[~np.isnan(slow)], slow.view(np.int64)[~np.isnan(slow)])
    assert np.isnan(fast).tolist() == np.isnan(slow).tolist()


@pytest.mark.parametrize("before", [(50, 70), (300, 200), (7, 7), (28, 28), (33, 47), (1, 9)])
@pytest.mark.parametrize("after", [(96, 96), (28, 10), (1, 1), (7, 40)])
def test_resizing_gives_the_bytes_of_pillow(before, after):
    picture = np.random.default_rng(0).integers(0, 256, (*before, 3), np.uint8)
    theirs = np.asarray(Image.fromarray(picture).resize(after[::-1], Image.Resampling.BILINEAR))
    assert np.array_equal(resize(picture, *after), theirs)


def test_grey_gives_the_bytes_of_pillow_and_colour_repeats_grey():
    picture = np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8)
    grey = to_channels(picture, 1)
    assert np.array_equal(grey[:, :, 0], np.asarray(Image.fromarray(picture).convert("L")))
    assert np.array_equal(to_channels(grey, 3), np.repeat(grey, 3, axis=2))


def test_pictures_of_any_size_become_one_array_in_range():
    facts = {"schema": 1, "kind": "image", "label": LABEL, "size": [4, 5], "channels": 1}
    facts["inputs"] = {"kind": "image", "pixels": "zero_to_one"}
    made = Transform(facts)
    features = made.apply({"pixels": [np.full((8, 8, 3), 255, np.uint8), np.zeros((2, 3), np.uint8)]})
    inputs = made.to_inputs(features)
    assert (features["image"].shape, features["image"].dtype) == ((2, 4, 5, 1), np.uint8)
    assert inputs.dtype == np.float32
    assert (inputs[0] == np.float32(255) * np.float32(1 / 255)).all()
    assert (inputs[1] == 0).all()


def test_a_float_picture_is_refused():
    with pytest.raises(ValueError, match=r"must be uint8 .*, got float64 \(2, 2\)"):
        to_channels(np.zeros((2, 2)), 1)


def test_rows_of_numbers_are_standardised_by_place():
    facts = {"schema": 1, "kind": "values", "inputs": {"kind": "features", "depths": []}, "label": {"kind": "number"}}
    made = Transform(facts | {"mean": [1.0, 0.0], "std": [2.0, 1.0]})
    features = made.apply(raw_columns([{"values": [3.0, 4.0]}]))
    assert made.to_inputs(features).tolist() == [[1.0, 4.0]]
    with pytest.raises(ValueError, match=r"must have shape \(rows, 2\), got \(1, 3\)"):
        made.apply({"values": np.zeros((1, 3))})


def test_the_file_needs_numpy_and_the_standard_library_only():
    tree = ast.parse(pathlib.Path(transform.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == {"numpy"}
