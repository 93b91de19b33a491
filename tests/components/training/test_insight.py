import dataclasses
import functools
import time

import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import read_json
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.insight import Profiler, in_words, insight, peak_memory
from components.training.model import build
from components.training.train import train

MODEL = ModelOptions(name="linear")


def run(folder, options, batches, trace=None):
    folder.mkdir(exist_ok=True)
    return train(
        options,
        functools.partial(build, MODEL, batches.spec, seed=3),
        MODEL,
        batches,
        folder,
        strategy=tf.distribute.get_strategy(),
        seed=3,
        trace=trace or Trace(),
    )


@pytest.mark.parametrize(
    ("share", "bound", "words"),
    [
        (0.01, "compute", "1 % of it waiting for data: compute-bound;"),
        (0.10, "both", "10 % of it waiting for data: some of each;"),
        (0.60, "input", "60 % of it waiting for data: input-bound (the device waits for data: lighter"),
    ],
)
def test_the_first_epoch_is_left_out_and_the_share_is_put_into_words(share, bound, words):
    history = {"examples_per_second": [10.0, 1000.0, 3000.0, 2000.0], "waiting_share": [0.9, share, share, share]}
    found = insight(history, 100, 3 << 20)
    assert found == {
        "examples_per_second": 2000.0,
        "update_ms": pytest.approx(50.0),
        "waiting_share": share,
        "bound": bound,
        "memory_bytes": 3 << 20,
    }
    assert words in in_words(found)
    assert in_words(found).startswith("speed: 2,000 examples/s, 50.0 ms an update, ")
    assert in_words(found).endswith("; at most 3 MiB of memory")


def test_a_training_whose_data_are_slow_is_told_to_be_input_bound(pictures, tmp_path):
    def slow(x, y):
        time.sleep(0.03)
        return x, y

    def training(*arguments):
        usual = pictures.training(*arguments)
        shapes = usual.element_spec
        made = usual.map(lambda x, y: tf.numpy_function(slow, (x, y), (x.dtype, y.dtype)))
        return made.map(lambda x, y: (tf.ensure_shape(x, shapes[0].shape), tf.ensure_shape(y, shapes[1].shape)))

    sleepy = dataclasses.replace(pictures, training=training)
    told = []
    made = run(tmp_path / "slow", TrainOptions(epochs=3, batch_size=32), sleepy, Trace(on_telling=told.append))
    speed = made.facts["speed"]
    assert speed["bound"] == "input"
    assert 0.5 < speed["waiting_share"] <= 1.0
    assert speed["update_ms"] > 10  # validation lets the input catch up
    assert "input-bound" in told[-1]
    assert len(read_json(made.folder / "history.json")["waiting_share"]) == 3


def test_memory_is_that_of_this_process_where_there_is_no_gpu():
    before = peak_memory()
    block = np.ones(peak_memory() // 8 + (40 << 17))  # more than all so far, in eight-byte numbers
    assert peak_memory() >= before + (30 << 20)
    assert block.nbytes > before


def test_only_the_chosen_updates_are_profiled(pictures, tmp_path):
    seen = []
    options = TrainOptions(epochs=3, batch_size=32, profile=(8, 9))
    trace = Trace(tmp_path / "events", on_progress=lambda done, *_: seen.append(round(done * 6)))
    run(tmp_path / "run", options, pictures, trace)
    assert len(list((tmp_path / "events").rglob("*.xplane.pb"))) == 1
    assert {7, 9} <= set(seen)  # calls end where the profile begins and ends


def test_a_profile_cuts_calls_at_its_ends_only():
    profiler = Profiler((8, 9), "somewhere")
    assert [profiler.most(done, 100) for done in (0, 6, 7, 8, 9, 50)] == [7, 1, 2, 1, 100, 100]
    assert Profiler(None, "somewhere").most(0, 100) == 100
