import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.data import statistics
from components.data.fit import fit
from components.data.rows import Rows
from components.data.schema import Column, Schema
from components.data.statistics import count_texts, merge, merged_moments, moments, observe, vocabulary
from components.data.transform import Coded, coded
from components.errors import DataError
from components.options import FeatureSelection

SCHEMA = Schema(
    kind="table",
    task="classification",
    columns=(
        Column(name="n", kind="number", rule="standardise", buckets=4, vocabulary=9),
        Column(name="b", kind="number", rule="bucketise", buckets=4, vocabulary=9),
        Column(name="t", kind="category", rule="standardise", buckets=4, vocabulary=2),
    ),
    label="y",
    missing=("", "?"),
)


def made(index, values, texts=None, labels=None, assigned=None, schema=SCHEMA):
    """Statistics of one descriptor."""
    count = len(values)
    rows = Rows(
        columns={"n": values, "b": values * 2, "t": coded(texts or ["x"] * count)},
        label=coded(labels or ["yes", "no"] * (count // 2) + ["no"] * (count % 2)),
        hashes=np.arange(count, dtype=np.uint64),
        bad=[],
        locate=lambda row: (str(row), ""),
        record=lambda row: {},
        file="f",
    )
    order = np.random.default_rng(index).integers(0, 2**63, count).astype(np.uint64)
    return observe(index, rows, np.array(assigned or ["train"] * count), schema, order)


def test_moments_are_those_of_numpy_and_missing_cells_do_not_count():
    values = np.array([[1.0, 5.0], [np.nan, 6.0], [4.0, 7.0]])
    found = moments(values)
    assert found.mean.tolist() == [2.5, 6.0]
    assert np.allclose(found.std, [np.nanstd(values[:, 0]), np.std(values[:, 1])])
    assert (found.missing.tolist(), found.low.tolist(), found.high.tolist()) == ([1, 0], [1, 5], [4, 7])


def test_a_constant_column_has_std_one():
    assert moments(np.full((3, 1), 7.0)).std.tolist() == [1.0]


def test_parts_merge_without_losing_digits_where_the_mean_is_large():
    values = np.random.default_rng(0).normal(1e9, 1, (3000, 1))
    whole = moments(values)
    parts = [moments(part) for part in np.array_split(values, 7)]
    joined = parts[0]
    for part in parts[1:]:
        joined = merged_moments(joined, part)
    assert joined.std[0] == pytest.approx(np.std(values), rel=1e-9)
    assert joined.mean[0] == pytest.approx(whole.mean[0], rel=1e-15)


@given(st.permutations(range(5)), st.integers(1, 4))
def test_any_order_and_grouping_of_merges_gives_the_same_bits(order, cut):
    draw = np.random.default_rng(3)
    parts = [made(index, draw.normal(size=40), [f"w{word}" for word in draw.integers(0, 5, 40)]) for index in range(5)]
    straight = merge(parts)
    shuffled = [parts[index] for index in order]
    grouped = merge([merge(shuffled[:cut]), pickle.loads(pickle.dumps(merge(shuffled[cut:])))])
    assert fit(SCHEMA, grouped, None, 0, print) == fit(SCHEMA, straight, None, 0, print)
    assert np.array_equal(grouped.sample.order, straight.sample.order)


def test_only_training_rows_count():
    found = made(0, np.array([1.0, 2.0, 90.0, 91.0]), ["a", "a", "b", "b"], assigned=["train"] * 2 + ["test"] * 2)
    assert found.moments("n").high.tolist() == [2.0]
    assert found.categories["t"] == {"a": 2}
    assert dict(found.counts) == {"train": 2, "test": 2}


def test_quantiles_cut_into_equal_shares():
    stats = merge(made(index, np.arange(index, 10_000, 4, dtype=np.float64)) for index in range(4))
    assert np.allclose(stats.quantiles("b", 4), [5000, 10_000, 15_000], rtol=0.01)


def test_buckets_of_repeated_values_are_fewer():
    stats = made(0, np.array([0.0] * 90 + [5.0] * 10))
    assert stats.quantiles("b", 10) in ([0.0], [0.0, 10.0])


def test_the_vocabulary_holds_the_most_frequent_ties_by_text_and_no_missing_cell():
    assert vocabulary({"?": 9, "b": 2, "a": 2, "c": 5, "d": 1}, 3, ["?"]) == ["c", "a", "b"]


def test_texts_are_counted_without_blanks():
    assert count_texts(Coded(np.array([0, 1, 1, 2]), ["a", " a", "b"])) == {"a": 3, "b": 1}


def test_a_column_with_too_many_texts_is_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(statistics, "MOST_DISTINCT", 15)
    parts = [made(index, np.arange(10.0), [f"{index}-{row}" for row in range(10)]) for index in range(2)]
    said = []
    _, features = fit(SCHEMA, merge(parts), None, 0, said.append)
    assert [each["name"] for each in features if not each["kept"]] == ["t"]
    assert "preprocess.columns.t: a category may have at most a million different cells" in said[0]


def test_one_label_only_is_refused():
    with pytest.raises(DataError, match=r"at least two labels .* got \['yes'\]"):
        statistics.check(made(0, np.arange(2.0), labels=["yes", "yes"]), SCHEMA)


def test_an_empty_training_split_is_refused():
    with pytest.raises(DataError, match="the training split must hold rows, got none of 2"):
        statistics.check(made(0, np.arange(2.0), assigned=["test", "test"]), SCHEMA)


@pytest.mark.parametrize("method", ["mutual_information", "variance"])
def test_selection_keeps_the_column_that_tells_most(method):
    draw = np.random.default_rng(0)
    label = draw.integers(0, 2, 400)
    texts = [f"w{each}" if method == "mutual_information" else "same" for each in label]
    stats = made(0, draw.normal(size=400), texts, [str(each) for each in label])
    facts, features = fit(SCHEMA, stats, FeatureSelection(method=method, keep=1), 0, print)
    scores = {each["name"]: each["score"] for each in features}
    best = max(sorted(scores), key=scores.__getitem__)
    assert [column["name"] for column in facts["columns"]] == [best]
    assert best == ("t" if method == "mutual_information" else "b")
    assert scores["t"] == (pytest.approx(np.log(2), abs=0.02) if method == "mutual_information" else 0)
    assert [each["width"] for each in features if not each["kept"]] == [0, 0]


def test_the_sample_is_the_same_however_the_pass_was_cut():
    texts = [f"r{row}" for row in range(60)]
    parts = [made(index, np.arange(60.0), texts) for index in range(3)]
    one = merge([merge(parts[:2]), parts[2]]).sample
    other = merge([parts[0], merge(parts[1:])]).sample
    assert one.columns["t"].tolist() == other.columns["t"].tolist()
    assert (np.diff(one.order.astype(np.float64)) >= 0).all()
