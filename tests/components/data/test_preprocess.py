import collections
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from components.artifacts import SPLITS, sha256
from components.data import passes
from components.data.blocks import read_blocks
from components.data.preprocess import preprocess
from components.data.transform import Transform, raw_columns
from components.errors import ConfigError, DataError
from components.options import (
    ArraysSource,
    ColumnOptions,
    CsvSource,
    DigitsSource,
    FeatureSelection,
    ImagesSource,
    LineSource,
    PreprocessOptions,
    SplitOptions,
)
from components.tracing import Trace


def prepare(source, folder, options=None, task=None, **more):
    folder.mkdir(exist_ok=True)
    return preprocess(source, options or PreprocessOptions(), folder, task=task, seed=0, trace=Trace(**more))


def split_rows(data, split):
    """Columns of a whole split, from its blocks."""
    blocks = [block for path in data.files(split) for block in read_blocks(path)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def write_csv(path, rows=3000, seed=0, order=None):
    draw = np.random.default_rng(seed)
    x, word = draw.normal(50, 9, rows), draw.integers(0, 4, rows)
    lines = [
        f'{x[row]:.3f},"w{word[row]}, it is",{row % 7},{"yes" if x[row] > 50 else "no"}'
        for row in (range(rows) if order is None else order)
    ]
    path.write_text("x,word,day,y\n" + "\n".join(lines) + "\n")
    return CsvSource(kind="csv", train=[str(path)], label="y")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_digits_become_blocks_that_the_manifest_describes(tmp_path):
    data = prepare(DigitsSource(), tmp_path)
    manifest = data.manifest
    assert (data.spec.input_shape, data.spec.task, len(data.spec.labels)) == ((8, 8, 1), "classification", 10)
    assert manifest["records"] == {"read": 1797, "kept": 1797, "quarantined": 0}
    assert sum(data.rows(split) for split in SPLITS) == 1797
    shares = {split: data.rows(split) / 1797 for split in SPLITS}
    assert shares == pytest.approx({"train": 0.65, "validation": 0.1, "calibration": 0.05, "test": 0.2}, abs=0.03)
    for split in SPLITS:
        rows = split_rows(data, split)
        assert rows["image"].shape == (data.rows(split), 8, 8, 1)
        assert {name: str(values.dtype) for name, values in rows.items()} == {"image": "uint8", "label": "int32"}
        counted = np.bincount(rows["label"], minlength=10).tolist()
        assert counted == list(manifest["class_counts"][split].values())
        for file in manifest["splits"][split]["files"]:
            assert sha256(tmp_path / file["name"]) == file["sha256"]


def test_in_a_notebook_beam_needs_none_of_its_interactive_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("apache_beam.utils.interactive_utils.is_in_ipython", lambda: True)
    assert sum(prepare(DigitsSource(), tmp_path).rows(split) for split in SPLITS) == 1797


def test_only_what_is_promised_is_left_in_the_folder(tmp_path):
    data = prepare(DigitsSource(), tmp_path)
    named = {file["name"] for split in SPLITS for file in data.manifest["splits"][split]["files"]}
    faces = {"manifest.json", "transform.json", "schema.json", "statistics.json", "golden.json", "quarantine.jsonl"}
    assert set(os.listdir(tmp_path)) == named | faces


def test_a_table_is_standardised_by_its_training_split(tmp_path):
    data = prepare(write_csv(tmp_path / "a.csv"), tmp_path / "out")
    rows = split_rows(data, "train")
    assert data.manifest["columns"] == {
        "numbers": {"dtype": "float32", "shape": [2]},
        "ids": {"dtype": "int32", "shape": [1]},
        "label": {"dtype": "int32", "shape": []},
    }
    assert np.allclose(rows["numbers"].mean(axis=0), 0, atol=1e-6)
    assert np.allclose(rows["numbers"].std(axis=0), 1, atol=1e-6)
    assert set(rows["ids"][:, 0].tolist()) == {2, 3, 4, 5}
    assert data.spec.input_shape == (2 + 2 + 4,)


def test_the_same_row_lands_in_the_same_split_whatever_order_and_cut(tmp_path):
    order = np.random.default_rng(5).permutation(3000)
    one = prepare(write_csv(tmp_path / "a.csv"), tmp_path / "one")
    other = prepare(write_csv(tmp_path / "b.csv", order=order), tmp_path / "other", PreprocessOptions(split_bytes=4096))
    assert len(other.files("train")) > 10
    for split in SPLITS:
        assert one.rows(split) == other.rows(split)
        days = [
            np.sort(split_rows(data, split)["ids"][:, 0] * 2 + split_rows(data, split)["label"])
            for data in (one, other)
        ]
        assert np.array_equal(*days)


def test_duplicates_and_groups_never_straddle_two_splits(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user,x,y\n" + "".join(f"u{row % 50},{row},{row % 2}\n" for row in range(2000)))
    source = CsvSource(kind="csv", train=[str(path)], label="y")
    whole = {"x": ColumnOptions(rule="none")}
    data = prepare(source, tmp_path / "out", PreprocessOptions(splits=SplitOptions(group="user"), columns=whole))
    homes = collections.defaultdict(set)
    for split in SPLITS:
        for value in split_rows(data, split)["numbers"][:, 0]:
            homes[int(value) % 50].add(split)
    assert len(homes) == 50
    assert {len(splits) for splits in homes.values()} == {1}


def test_given_test_files_are_the_test_split(tmp_path):
    source = write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "b.csv", rows=200, seed=1)
    data = prepare(source.model_copy(update={"test": [str(tmp_path / "b.csv")]}), tmp_path / "out")
    assert data.rows("test") == 200
    assert data.rows("validation") == pytest.approx(300, abs=60)
    assert sum(data.rows(split) for split in SPLITS) == 3200


def test_two_worker_processes_give_the_same_bytes_as_one_process(tmp_path):
    source = write_csv(tmp_path / "a.csv")
    options = PreprocessOptions(split_bytes=20_000)
    one = prepare(source, tmp_path / "one", options)
    many = prepare(source, tmp_path / "many", options.model_copy(update={"runner": "multi_processing"}))
    assert len(one.files("train")) > 2
    assert contents(one.folder) == contents(many.folder)


def test_malformed_rows_go_to_the_quarantine_and_every_record_is_accounted_for(tmp_path):
    source = write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open("a") as file:
        file.write('1.0,"never closed,3,yes\n1.0,w1\nfast,w1,3,yes\n2.0,w1,3,\n')
    said = []
    data = prepare(source, tmp_path / "out", on_warning=said.append)
    lines = [json.loads(line) for line in (data.folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["position"], line["reason"]) for line in lines] == [
        ("line 3002", "a quote opens a field and does not close it before a delimiter or the line's end"),
        ("line 3003", "2 cells where 4 are needed"),
        ("line 3004", "column 'x': a number is needed, got 'fast'"),
        ("line 3005", "column 'y': the label is missing"),
    ]
    assert lines[2]["text"] == "fast,w1,3,yes"
    assert data.manifest["records"] == {"read": 3004, "kept": 3000, "quarantined": 4}
    assert said == ["4 of 3004 records are malformed and were left out; see quarantine.jsonl."]


def test_too_many_malformed_rows_stop_the_run_with_the_first_three_shown(tmp_path):
    source = write_csv(tmp_path / "a.csv", rows=100)
    with (tmp_path / "a.csv").open("a") as file:
        file.write("1,2\n" * 4)
    message = (
        r"preprocess.max_bad_fraction=0.01: 4 of 104 records are malformed, a share of 0.0385. First: .*a.csv line 102: "
        r"2 cells where 4 are needed; .* line 103: .*; .* line 104: [^;]*\. Mend the data"
    )
    with pytest.raises(DataError, match=message):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_label_that_training_never_saw_is_malformed(tmp_path):
    source = write_csv(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("x,word,day,y\n" + "1,w1,2,yes\n" * 99 + "1,w1,2,perhaps\n")
    data = prepare(source.model_copy(update={"test": [str(tmp_path / "b.csv")]}), tmp_path / "out")
    (line,) = map(json.loads, (data.folder / "quarantine.jsonl").read_text().splitlines())
    assert (line["position"], line["reason"]) == ("line 101", "its label does not occur in the training split")
    assert data.rows("test") == 99


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"preprocess.splits.calibration: the split must hold rows, got none of 12"):
        prepare(
            LineSource(kind="line", rows=12), tmp_path, PreprocessOptions(splits=SplitOptions(calibration=0.0001)),
        )  # fmt: skip


def test_a_split_of_share_zero_may_be_empty(tmp_path):
    data = prepare(DigitsSource(), tmp_path, PreprocessOptions(splits=SplitOptions(calibration=0)))
    assert (data.rows("calibration"), data.files("calibration")) == (0, [])


def test_buckets_hold_equal_shares_and_missing_cells_have_their_own(tmp_path):
    source = write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open("a") as file:
        file.write("?,w1,3,yes\n")
    options = PreprocessOptions(columns={"x": ColumnOptions(rule="bucketise", buckets=4)})
    data = prepare(source, tmp_path / "out", options)
    ids = split_rows(data, "train")["ids"][:, 0]
    counts = np.bincount(ids[ids > 0])[1:]
    assert len(counts) == 4
    assert counts / counts.sum() == pytest.approx([0.25] * 4, abs=0.02)


def test_selection_is_reported_and_narrows_the_input(tmp_path):
    data = prepare(write_csv(tmp_path / "a.csv"), tmp_path / "out", PreprocessOptions(select=FeatureSelection(keep=1)))
    features = {each["name"]: each for each in data.manifest["features"]}
    assert [name for name, each in features.items() if each["kept"]] == ["x"]
    assert features["x"]["score"] > 0.5 > features["day"]["score"]
    assert data.spec.input_shape == (1,)
    assert Transform.from_json(data.transform).names == ["x"]


def test_golden_records_pass_through_the_transform_to_the_features_in_the_blocks(tmp_path):
    sources = {"digits": DigitsSource(), "csv": write_csv(tmp_path / "a.csv"), "line": LineSource(kind="line")}
    for name, source in sources.items():
        data = prepare(source, tmp_path / name)
        golden = json.loads((data.folder / "golden.json").read_text())
        made = Transform.from_json(data.transform)
        features = made.apply(raw_columns([record["raw"] for record in golden]))
        assert len(golden) == 16
        for row, record in enumerate(golden):
            held = split_rows(data, record["split"])
            for column, values in features.items():
                assert values[row].tobytes() == held[column][record["index"]].tobytes()
            label = (
                data.spec.labels[held["label"][record["index"]]] if data.spec.labels else held["label"][record["index"]]
            )
            assert record["label"] == label
            if "numbers" in features:
                assert np.float32(record["features"]["numbers"]).tolist() == features["numbers"][row].tolist()


def test_golden_records_come_from_calibration_first_and_then_from_validation(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    data = preprocess(DigitsSource(), PreprocessOptions(), folder, task=None, seed=0, golden=100, trace=Trace())
    golden = json.loads((data.folder / "golden.json").read_text())
    assert collections.Counter(record["split"] for record in golden) == {
        "calibration": data.rows("calibration"),
        "validation": 100 - data.rows("calibration"),
    }


def test_pictures_of_any_size_become_one_size(tmp_path):
    draw = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "root" / name).mkdir(parents=True)
        for row in range(40):
            pixels = draw.integers(0, 256, (9 + row % 5, 12, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "root" / name / f"{row}.png")
    (tmp_path / "root" / "dog" / "broken.png").write_bytes(b"no picture")
    source = ImagesSource(kind="images", train=str(tmp_path / "root"))
    options = PreprocessOptions(image_size=(6, 7), image_channels=1, max_bad_fraction=0.05, split_bytes=4096)
    data = prepare(source, tmp_path / "out", options)
    assert (data.spec.input_shape, data.spec.labels) == ((6, 7, 1), ("cat", "dog"))
    assert data.manifest["records"] == {"read": 81, "kept": 80, "quarantined": 1}
    assert "dog/broken.png" in (data.folder / "quarantine.jsonl").read_text()
    assert split_rows(data, "train")["image"].shape[1:] == (6, 7, 1)
    with pytest.raises(DataError, match=r"1 of 81 records are malformed"):
        prepare(source, tmp_path / "out", options.model_copy(update={"max_bad_fraction": 0.01}))


def test_rows_of_numbers_with_a_number_to_predict(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.normal(3, 2, (500, 4))
    np.savez(tmp_path / "a.npz", x=x, y=x.sum(axis=1))
    data = prepare(ArraysSource(kind="arrays", train=str(tmp_path / "a.npz")), tmp_path / "out")
    rows = split_rows(data, "train")
    assert (data.spec.task, data.spec.input_shape, data.spec.labels) == ("regression", (4,), ())
    assert np.allclose(rows["numbers"].mean(axis=0), 0, atol=1e-6)
    assert rows["label"].dtype == np.float32
    assert data.manifest["class_counts"] == {}


def test_the_line_keeps_its_unit(tmp_path):
    rows = split_rows(prepare(LineSource(kind="line"), tmp_path), "train")
    slope, height = np.polyfit(rows["numbers"][:, 0], rows["label"], 1)
    assert (slope, height) == (pytest.approx(2, abs=0.15), pytest.approx(1.5, abs=0.1))


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "train-00077.tfrecord").write_bytes(b"old")
    (tmp_path / ".test-00001.tfrecord.1234.tmp").write_bytes(b"torn")
    (tmp_path / passes.WORK).mkdir()
    (tmp_path / passes.WORK / "bad-00000.jsonl").write_text("stale\n")
    data = prepare(DigitsSource(), tmp_path)
    assert not (tmp_path / "train-00077.tfrecord").exists()
    assert not list(tmp_path.glob(".*"))
    assert (data.folder / "quarantine.jsonl").read_text() == ""


def test_progress_reaches_the_end_and_never_passes_it(tmp_path):
    seen = []
    prepare(write_csv(tmp_path / "a.csv"), tmp_path / "out", on_progress=lambda *each: seen.append(each))
    assert (3000, 6000, "statistics") in seen
    assert seen[-1] == (6000, 6000, "blocks")
    assert all(done <= total for done, total, _ in seen)


def test_a_wrong_path_is_found_before_any_work(tmp_path):
    with pytest.raises(ConfigError, match=r"source.train: a file is needed, got '/nowhere.csv'"):
        prepare(CsvSource(kind="csv", train=["/nowhere.csv"], label="y"), tmp_path)


def test_a_count_that_does_not_add_up_stops_the_run(tmp_path, monkeypatch):
    honest = passes.second

    def loses_a_row(job, descriptor):
        rows = honest(job, descriptor)
        rows[descriptor.index]["files"]["train"]["rows"] -= 1
        return rows

    monkeypatch.setattr(passes, "second", loses_a_row)
    with pytest.raises(DataError, match="digits: 1797 records were counted, 1796 were read"):
        prepare(DigitsSource(), tmp_path)


def test_counts_quarantine_and_features_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    source = write_csv(tmp_path / "a.csv")
    with (tmp_path / "a.csv").open("a") as file:
        file.write("only one cell\n")
    (tmp_path / "out").mkdir()
    with Trace(tmp_path / "board") as trace:
        preprocess(source, PreprocessOptions(), tmp_path / "out", task=None, seed=0, trace=trace)
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {"records/quarantined", "rows/train", "quarantine", "features/x", "features/word"} <= tags


QUIET = """
import logging, pathlib, sys
from components.data.preprocess import preprocess
from components.options import DigitsSource, PreprocessOptions
from components.tracing import Trace
preprocess(DigitsSource(), PreprocessOptions(), pathlib.Path(sys.argv[1]), task=None, seed=0, trace=Trace())
print(logging.root.handlers, logging.root.manager.disable, "tensorflow" in sys.modules)
"""


def test_it_prints_nothing_leaves_logging_alone_and_does_not_load_tensorflow(tmp_path):
    done = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path)], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("[] 0 False", "")


def test_a_file_that_is_damaged_behind_its_header_is_named(tmp_path):
    packed = gzip.compress(("x,y\n" + "1,0\n" * 100_000).encode())
    (tmp_path / "a.csv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match=r"a.csv.gz: a readable file is needed, got: Compressed file ended before"):
        prepare(CsvSource(kind="csv", train=[str(tmp_path / "a.csv.gz")], label="y"), tmp_path / "out")


def test_what_a_worker_cannot_read_stops_the_run_in_our_words(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((50_000, 2)), y=np.arange(50_000.0))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[:500_000] + b"\1" + content[500_001:])  # breaks its checksum
    with pytest.raises(DataError, match=r"a.npz: a readable file is needed, got: Bad CRC-32"):
        prepare(ArraysSource(kind="arrays", train=str(tmp_path / "a.npz")), tmp_path / "out")


KILLED = """
import pathlib, sys
from components.data.preprocess import preprocess
from components.options import CsvSource, PreprocessOptions
from components.tracing import Trace
source = CsvSource(kind="csv", train=[sys.argv[1]], label="y")
preprocess(source, PreprocessOptions(split_bytes=4096), pathlib.Path(sys.argv[2]), task=None, seed=0, trace=Trace())
"""


def test_a_killed_run_leaves_no_face_and_the_next_one_gives_the_same_bytes(tmp_path):
    source = write_csv(tmp_path / "a.csv", rows=6_000)
    torn, whole = tmp_path / "torn", tmp_path / "whole"
    torn.mkdir()
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "a.csv"), str(torn)])
    while child.poll() is None and not list(torn.glob("train-*.tfrecord")):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (torn / "manifest.json").exists()
    options = PreprocessOptions(split_bytes=4096)
    prepare(source, torn, options)
    prepare(source, whole, options)
    assert contents(torn) == contents(whole)
