"""Runs whose first epoch reads what preprocessing writes just then, against runs that go step by step."""

import io
import random
import threading
import time

import keras
import numpy as np
import pytest
import rich.console
from PIL import Image

from components.artifacts import TrainedModel, read_json
from components.data.opened import OPENING
from components.errors import ConfigError, DataError
from pipeline.ahead import Ahead
from pipeline.config import from_dict
from pipeline.plan import make_plan
from pipeline.runner import run
from pipeline.screen import Screen


def configured(folder, source, **changed):
    return from_dict(
        {
            "name": "r",
            "workspace": str(folder),
            "source": source,
            "preprocess": {"split_bytes": 1024, "max_bad_fraction": 0.2},
            "model": {"name": "mlp", "options": {"units": [8]}},
            "train": {"epochs": 2, "batch_size": 32, "overlap": True},
            "compress": {"recipes": ["float32"]},
            **changed,
        }
    )


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    x, words = rng.normal(size=600), rng.integers(0, 3, 600)
    lines = [f"{x[i]:.6f},w{words[i]},{'ab'[int(x[i] > 0)]}\n" for i in range(600)]
    (tmp_path / "rows.csv").write_text("x,word,y\n" + "".join(lines))
    return {"kind": "csv", "train": [str(tmp_path / "rows.csv")], "label": "y"}


def pictures(folder):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for index in range(60):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{index}.png")
    (folder / "cat" / "broken.png").write_bytes(b"no picture at all")
    return {"kind": "images", "train": str(folder)}


def walked(config, until="train"):
    """(lines of the screen, the trained model's weights, its history)."""
    text = io.StringIO()
    run(config, until=until, screen=Screen(rich.console.Console(file=text, width=200)))
    plan = make_plan(config, until="train")
    made = TrainedModel(plan.store.folder(plan.steps[-1].key))
    history = read_json(made.folder / "history.json")
    told = {name: values for name, values in history.items() if "second" not in name and "wait" not in name}
    return text.getvalue().splitlines(), keras.saving.load_model(made.file).get_weights(), told


def test_both_go_on_at_once_and_what_is_learned_is_the_same(tmp_path, rows):
    at_once, apart = configured(tmp_path / "one", rows), configured(tmp_path / "two", rows)
    run(apart, until="preprocess")
    lines, ours, history = walked(at_once)
    order = [line.split()[:2] for line in lines if line.startswith(("  start", "  done"))]
    assert order[:2] == [["start", "preprocess"], ["start", "train"]]
    assert sorted(order[2:]) == [["done", "preprocess"], ["done", "train"]]
    assert order[-1] == ["done", "train"]
    lines, theirs, expected = walked(apart)
    assert "  cached   preprocess" in lines
    assert history == expected
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    # Preprocessed as ever, and found by runs that go step by step.
    assert make_plan(at_once).steps[0].key == make_plan(configured(tmp_path / "one", rows, train={})).steps[0].key
    assert not list((tmp_path / "one" / "store").rglob(OPENING))
    lines, _, _ = walked(at_once)
    assert [line.split()[0] for line in lines] == ["cached", "cached"]


def test_beam_draws_no_random_numbers_where_keras_draws_its_seeds(tmp_path, rows):
    from apache_beam.runners.worker import opcounters

    walked(configured(tmp_path / "one", rows), until="train")
    random.seed(0)
    before = random.getstate()
    opcounters.random.randint(1, 10)
    assert random.getstate() == before
    assert opcounters.random is not random


# Without validation rows nothing after the only epoch reads the data again.
@pytest.mark.parametrize("validation", [0.1, 0])
def test_rows_that_turn_out_malformed_start_the_training_again(validation, tmp_path):
    source = pictures(tmp_path / "pictures")
    more = {
        "preprocess": {"split_bytes": 1024, "max_bad_fraction": 0.2, "splits": {"validation": validation}},
        "model": {"name": "cnn", "options": {"filters": [4]}},
        "train": {"epochs": 1, "batch_size": 8, "overlap": True},
    }
    lines, ours, _ = walked(configured(tmp_path / "one", source, **more))
    assert any(
        "Records turned out malformed that the first epoch counted on: the training starts again." in line
        for line in lines
    )
    run(configured(tmp_path / "two", source, **more), until="preprocess")
    _, theirs, _ = walked(configured(tmp_path / "two", source, **more))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_class_that_only_validation_rows_have_does_not_end_the_training(tmp_path):
    """They count as sound until they are written, and would make one batch more."""
    rng = np.random.default_rng(0)
    lines = [f"{rng.normal():.6f},{'ab'[i % 2]}\n" for i in range(400)] + [f"{i}.5,rare{i}\n" for i in range(12)]
    (tmp_path / "rows.csv").write_text("x,y\n" + "".join(lines))
    source = {"kind": "csv", "train": [str(tmp_path / "rows.csv")], "label": "y"}
    more = {
        "preprocess": {"split_bytes": 1024, "max_bad_fraction": 0.2, "splits": {"validation": 0.3}},
        "train": {"epochs": 2, "batch_size": 1, "overlap": True},
    }
    lines, ours, history = walked(configured(tmp_path / "one", source, **more))
    assert any("records are malformed and were left out" in line for line in lines)
    assert not any("starts again" in line for line in lines)
    run(configured(tmp_path / "two", source, **more), until="preprocess")
    _, theirs, expected = walked(configured(tmp_path / "two", source, **more))
    assert history == expected
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_training_that_fails_says_so_at_once_and_its_data_are_prepared_all_the_same(tmp_path, rows, monkeypatch):
    from components.data import passes

    def slow(*given, written=passes.second):
        time.sleep(0.3)
        return written(*given)

    monkeypatch.setattr(passes, "second", slow)
    config = configured(tmp_path / "one", rows, train={"epochs": 1, "batch_size": 10_000, "overlap": True})
    text = io.StringIO()
    with pytest.raises(ConfigError, match=r"train\.batch_size=10000 exceeds"):
        run(config, until="train", screen=Screen(rich.console.Console(file=text, width=400)))
    lines = text.getvalue().splitlines()
    told = next(place for place, line in enumerate(lines) if "Preprocessing goes on" in line)
    assert "train.batch_size=10000 exceeds" in lines[told]
    assert next(place for place, line in enumerate(lines) if line.startswith("  done     preprocess")) > told
    assert make_plan(config, until="preprocess").cached(make_plan(config).steps[0])


def test_what_ends_the_preprocessing_is_what_the_run_says(tmp_path):
    config = configured(
        tmp_path / "one",
        pictures(tmp_path / "pictures"),
        preprocess={"max_bad_fraction": 0.0, "split_bytes": 1024},
        model={"name": "cnn", "options": {"filters": [4]}},
    )
    with pytest.raises(DataError, match=r"preprocess\.max_bad_fraction=0: 1 of 121 records are malformed"):
        run(config, until="train")
    plan = make_plan(config, until="train")
    assert not any(plan.cached(step) for step in plan.steps)


def test_nobody_wants_a_preprocessing_whose_run_was_stopped(tmp_path):
    (tmp_path / "partial").mkdir()
    begun, seen = threading.Event(), []

    def work(pulse):
        begun.set()  # first: `start` waits for the file alone
        (tmp_path / "partial" / OPENING).write_text('{"manifest": {"splits": {}}}')
        while True:
            pulse()
            seen.append(1)
            time.sleep(0.01)

    ahead = Ahead(work, tmp_path / "folder", tmp_path / "partial", 0)
    assert ahead.start()
    assert begun.is_set()
    assert not ahead.ended()
    ahead.cancel()
    count = len(seen)
    time.sleep(0.05)
    assert len(seen) == count


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"train": {"overlap": True, "privacy": {"noise": 1.0}}},
            "not for train.privacy, whose promise rests on batches",
        ),
        ({"strategy": {"name": "multi_worker", "workers": 2}}, "for one process, got strategy.name=multi_worker"),
        (
            {"train": {"overlap": True, "epochs": 0}, "model": {"builder": "a:b"}},
            "for a training, got train.epochs=0",
        ),
    ],
)
def test_what_needs_all_rows_from_the_start_does_not_overlap(tmp_path, rows, changed, reason):
    with pytest.raises(ConfigError, match=f"train.overlap is {reason}"):
        configured(tmp_path, rows, **changed)
