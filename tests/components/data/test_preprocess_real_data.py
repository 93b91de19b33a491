"""Preprocessing of real data sets."""

import numpy as np
import pytest

from components.artifacts import SPLITS
from components.options import (
    CsvSource,
    IdxSource,
    PreprocessOptions,
)
from tests.components.data.test_preprocess import prepare, split_rows

# --- real data ---


ADULT = (
    "age,workclass,fnlwgt,education,education_num,marital,occupation,relationship,race,sex,gain,loss,hours,country,y"
)


def test_adult_is_read_whole_with_both_files(tmp_path, shared_data):
    folder = shared_data / "adult"
    source = CsvSource(
        kind="csv", train=[str(folder / "adult.data")], test=[str(folder / "adult.test")], label="y",
        columns=ADULT.split(","), comment="|", label_strip=".",
    )  # fmt: skip
    data = prepare(source, tmp_path)
    assert data.manifest["records"] == {"read": 48_842, "kept": 48_842, "quarantined": 0}
    assert (data.rows("test"), data.spec.labels) == (16_281, ("<=50K", ">50K"))
    assert data.manifest["class_counts"]["test"] == {"<=50K": 12_435, ">50K": 3_846}
    missing = {each["name"]: each["missing"] for each in data.manifest["features"]}
    assert missing["occupation"] > 1400
    assert missing["age"] == 0


@pytest.mark.parametrize("variant", ["big_tipper_label", "simple"])
def test_chicago_taxi_keeps_rows_with_many_empty_cells(tmp_path, shared_data, variant):
    label = "big_tipper" if variant == "big_tipper_label" else "tips"
    source = CsvSource(kind="csv", train=[str(shared_data / "chicago_taxi" / variant / "data.csv")], label=label)
    data = prepare(source, tmp_path)
    records = data.manifest["records"]
    assert (data.spec.task, records["read"]) == ("classification" if label == "big_tipper" else "regression", 15_002)
    assert records["quarantined"] <= 0.001 * records["read"]


def test_fashion_mnist_is_read_from_its_original_files(tmp_path, shared_data):
    folder = shared_data / "fashion_mnist"
    names = {
        f"{split}_{what}s": str(folder / f"{file}-{what}s-idx{rank}-ubyte.gz")
        for split, file in (("train", "train"), ("test", "t10k"))
        for what, rank in (("image", 3), ("label", 1))
    }
    data = prepare(IdxSource(kind="idx", **names), tmp_path)
    assert data.manifest["records"]["kept"] == 70_000
    assert set(data.manifest["class_counts"]["test"].values()) == {1000}
    assert data.rows("validation") == pytest.approx(6000, abs=250)


@pytest.mark.slow
def test_kdd_cup_has_no_row_in_two_splits_though_most_are_duplicates(tmp_path, shared_data):
    source = CsvSource(
        kind="csv", train=[str(shared_data / "kddcup99" / "kddcup.data_10_percent.gz")], label="c41",
        columns=[f"c{place}" for place in range(42)],
    )  # fmt: skip
    data = prepare(source, tmp_path, PreprocessOptions(max_bad_fraction=0.05))
    assert data.manifest["records"]["read"] == 494_021
    seen: dict[bytes, str] = {}
    for split in SPLITS:
        rows = split_rows(data, split)
        for row in np.unique(np.hstack([rows["numbers"].view(np.int32), rows["ids"], rows["label"][:, None]]), axis=0):
            assert seen.setdefault(row.tobytes(), split) == split
