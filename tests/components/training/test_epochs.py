import dataclasses
import errno
import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import Arriving
from components.errors import DataError, ModelError
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training import epochs
from components.training.checkpoint import Checkpoint, newest
from components.training.model import build
from components.training.train import train

DEFAULT = tf.distribute.get_strategy()
MODEL = ModelOptions(name="cnn", options={"filters": [8, 8], "dropout": 0.3})
LINEAR = ModelOptions(name="linear")
HERE = pathlib.Path(__file__).parent


def run(folder, options, batches, model=MODEL, trace=None):
    folder.mkdir(exist_ok=True)
    builder = functools.partial(build, model, batches.spec, seed=3)
    return train(options, builder, model, batches, folder, strategy=DEFAULT, seed=3, trace=trace or Trace())


def weights_of(made):
    return keras.saving.load_model(made.file).get_weights()


def assert_equal_bits(one, other):
    for ours, theirs in zip(weights_of(one), weights_of(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


# --- the end that a signal asks for ----------------------------------------------------------------------------------


@pytest.fixture
def heard():
    """Signals as a program in the foreground has them; in the background SIGINT is ignored."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Inside an epoch; after its last update, before its validation.
@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 1.4), (signal.SIGTERM, 2.0)])
def test_a_signal_saves_the_very_update_and_the_rest_ends_in_the_same_bits(number, at, pictures, tmp_path, heard):
    options = TrainOptions(epochs=3, batch_size=32, optimizer={"ema": 0.9})
    seen = []

    def ask(done, total, note):
        seen.append(done)
        if done >= at:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", options, pictures, trace=Trace(on_progress=ask))
    saved = newest(tmp_path / "cut", pytest.fail)
    assert saved.updates == round(seen[-1] * 6)
    assert signal.getsignal(number) is signal.default_int_handler
    told = []
    cut = run(tmp_path / "cut", options, pictures, trace=Trace(on_progress=lambda done, *_: told.append(done)))
    assert told[0] > seen[-1]
    assert_equal_bits(cut, run(tmp_path / "whole", options, pictures))


def test_a_second_signal_acts_at_once(pictures, tmp_path, heard):
    def ask(done, total, note):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, TrainOptions(epochs=3, batch_size=32), pictures, trace=Trace(on_progress=ask))
    assert newest(tmp_path, pytest.fail) is None


def test_a_signal_that_was_ignored_stays_ignored(pictures, tmp_path, heard):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trace = Trace(on_progress=lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert run(tmp_path, TrainOptions(epochs=1, batch_size=32), pictures, trace=trace).facts["epochs"] == 1


# Two batches are there, four are to come; or all are, but not what validation reads.
@pytest.mark.parametrize(("there", "saved"), [(2, 2), (6, 6)])
def test_a_signal_is_heard_while_the_training_waits_for_data(there, saved, pictures, tmp_path, heard):
    options = TrainOptions(epochs=2, batch_size=32)
    waiting = dataclasses.replace(pictures, arriving=Arriving(batches=lambda size: there, complete=lambda: False))
    seen = []

    def ask(done, total, note):
        seen.append(done)
        if round(done * 6) == saved:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", options, waiting, trace=Trace(on_progress=ask))
    assert time.monotonic() - begun < 60  # it would wait for ever
    assert newest(tmp_path / "cut", pytest.fail).updates == saved
    assert_equal_bits(run(tmp_path / "cut", options, pictures), run(tmp_path / "whole", options, pictures))


def test_waiting_for_data_that_are_being_written_counts_as_waiting(pictures, tmp_path):
    begun = []

    def there(size):
        begun.append(time.monotonic())
        return 3 if time.monotonic() - begun[0] < 2.0 else 6

    late = dataclasses.replace(pictures, arriving=Arriving(batches=there, complete=lambda: True))
    facts = run(tmp_path, TrainOptions(epochs=1, batch_size=32), late).facts
    assert 0.2 < facts["speed"]["waiting_share"] < 1
    assert facts["seconds"] > 1.5


def test_what_ends_the_writing_ends_the_training(pictures, tmp_path):
    def there(size):
        raise DataError("the source has gone")

    late = dataclasses.replace(pictures, arriving=Arriving(batches=there, complete=lambda: False))
    with pytest.raises(DataError, match="the source has gone"):
        run(tmp_path, TrainOptions(epochs=1, batch_size=32), late)


def test_no_checkpoint_is_taken_up_that_counted_other_rows(pictures, tmp_path, heard):
    options = TrainOptions(epochs=2, batch_size=32)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "cut", options, pictures, trace=Trace(on_progress=lambda *_: os.kill(os.getpid(), signal.SIGINT))
        )
    sound = dataclasses.replace(pictures, rows=dict(pictures.rows) | {"train": pictures.rows["train"] - 1})
    said = []
    again = run(tmp_path / "cut", options, sound, trace=Trace(on_warning=said.append))
    assert said == [
        "Rows that were counted turned out malformed, so the epoch has another order: the training starts again."
    ]
    assert_equal_bits(again, run(tmp_path / "whole", options, sound))


@pytest.mark.slow  # starts twenty processes
def test_a_training_killed_twenty_times_ends_in_the_same_bits(pictures, tmp_path):
    options = TrainOptions(
        epochs=40, batch_size=4, early_stopping={"patience": 40}, checkpoint_every="0.05s", optimizer={"ema": 0.99}
    )
    cut = tmp_path / "cut"
    cut.mkdir()
    environment = os.environ | {"PYTHONPATH": f"{HERE.parents[2]}{os.pathsep}{HERE}"}
    command = [sys.executable, "-m", "killed", cut, "1000", MODEL.model_dump_json(), options.model_dump_json()]
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(20):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = [path.name for path in cut.iterdir()]
        while [path.name for path in cut.iterdir()] == before and process.poll() is None:  # until it works
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "finished before it was killed: make the training longer"
        reached.append(max((path.name for path in cut.iterdir() if path.name.startswith("check")), default=""))
    assert len(set(reached)) > 10
    assert_equal_bits(run(cut, options, pictures), run(tmp_path / "whole", options, pictures))


# --- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_bad_row_is_named_and_the_state_before_it_is_kept(pictures, make_batches, tmp_path):
    x, y = next(iter(pictures.ordered("validation", 50)))
    bad = x.numpy().copy()
    batches = make_batches(pictures.spec, train=(bad, y.numpy()), validation=(x.numpy(), y.numpy()))
    options = TrainOptions(epochs=3, batch_size=5, checkpoint_every="0.001s")

    def spoil(done, total, note):
        if done >= 1:
            bad[7] = np.nan

    with pytest.raises(ModelError) as caught:
        run(tmp_path, options, batches, LINEAR, trace=Trace(on_progress=spoil))
    order = np.random.default_rng([3, 1]).permutation(50).tolist()
    step = order.index(7) // 5
    rows = order[step * 5 : step * 5 + 5]
    told = ", ".join(map(str, rows))
    message = str(caught.value)
    assert f"in epoch 2, at step {step + 1} of 10 (rows {told} of the training split, all in " in message
    assert [int(line) for line in (tmp_path / "diverged.txt").read_text().split()] == rows
    kept = newest(tmp_path, pytest.fail)
    assert message.endswith(f"The state before is kept in {tmp_path / f'checkpoint-{kept.updates:09d}'}.")
    assert 10 <= kept.updates <= 10 + step
    assert all(np.isfinite(array).all() for array in kept.arrays["model"])


def test_a_full_disk_ends_the_training_and_leaves_the_last_good_checkpoint(pictures, tmp_path, monkeypatch):
    options = TrainOptions(epochs=4, batch_size=32)
    save, count = np.savez, []

    def full(file, **arrays):
        count.append(1)
        if len(count) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, **arrays)

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "cut", options, pictures)
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [
        "checkpoint-000000006",
        "checkpoint-000000012",
    ]
    assert_equal_bits(run(tmp_path / "cut", options, pictures), run(tmp_path / "whole", options, pictures))


# --- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_in_many_files_is_read_as_it_was_written(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"model": [rng.normal(size=(10, n)) for n in range(1, 30)], "optimizer": [np.array(7, np.int64)]}
    written = Checkpoint(12, {name: iter(values) for name, values in arrays.items()}, {"best": 0.5})
    path = written.save(tmp_path, shard_bytes=4000)
    assert path.name == "checkpoint-000000012"
    sizes = [file.stat().st_size for file in sorted(path.glob("*.npz"))]
    assert len(sizes) > 5
    assert max(sizes) < 4000 + 10 * 29 * 8 + 30 * 500  # what fits, one array more, and the zip's own
    found = newest(tmp_path, pytest.fail)
    assert (found.updates, found.facts) == (12, {"best": 0.5})
    for name, values in arrays.items():
        for ours, theirs in zip(found.arrays[name], values, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_three_checkpoints_are_kept_and_one_of_the_same_update_is_replaced(tmp_path):
    for updates in (1, 2, 3, 4, 4):
        Checkpoint(updates, {"model": [np.zeros(1)]}, {}).save(tmp_path)
    assert sorted(path.name[-1] for path in tmp_path.iterdir()) == ["2", "3", "4"]


@pytest.mark.parametrize("name", ["facts.json", "001.npz"])
def test_a_checkpoint_without_one_of_its_files_is_passed_over(name, tmp_path):
    for updates in (1, 2):
        Checkpoint(updates, {"model": [np.full(3, updates)]}, {}).save(tmp_path)
    (tmp_path / "checkpoint-000000002" / name).unlink()
    said = []
    assert newest(tmp_path, said.append).updates == 1
    assert "checkpoint-000000002 is damaged" in said[0]
    assert not (tmp_path / "checkpoint-000000002").exists()


# --- averages of the weights ---------------------------------------------------------------------------------------


def test_the_moving_average_is_what_is_judged_and_saved(pictures, tmp_path, monkeypatch):
    made = {}
    for name, ema in (("plain", None), ("averaged", 0.8)):
        options = TrainOptions(epochs=1, batch_size=32, optimizer={"name": "sgd", "learning_rate": 0.1, "ema": ema})
        states = []
        assign = epochs.assign

        def remember(variables, values, states=states, assign=assign):
            states.append(values)
            assign(variables, values)

        monkeypatch.setattr(epochs, "assign", remember)
        made[name] = run(tmp_path / name, options, pictures, LINEAR), states
    # By hand: the path of plain SGD, update by update.
    model = build(LINEAR, pictures.spec, seed=3)
    optimizer = keras.optimizers.SGD(0.1)
    average = None
    for x, y in pictures.training(32, 3, 0).take(6):
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(y, model(x), from_logits=True)
            loss = tf.reduce_mean(loss)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        now = [each.numpy() for each in model.trainable_variables]
        average = now if average is None else [0.8 * a + 0.2 * w for a, w in zip(average, now, strict=True)]
    averaged = weights_of(made["averaged"][0])
    for ours, theirs in zip(averaged, average, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    x, y = next(iter(pictures.ordered("validation", 50)))
    loaded = keras.saving.load_model(made["averaged"][0].file)
    loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, loaded(x), from_logits=True))
    told = json.loads((tmp_path / "averaged" / "history.json").read_text())["val_loss"]
    assert told == [pytest.approx(float(loss), rel=1e-5)]
    assert not np.allclose(averaged[0], weights_of(made["plain"][0])[0], atol=1e-3)


# --- checkpoints of short epochs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "often", "saved"), [(0.01, "5m", 6), (2.0, "5m", 2), (2.0, "0.00001s", 6)])
def test_a_slow_checkpoint_is_not_written_after_each_short_epoch(
    pictures, tmp_path, monkeypatch, seconds, often, saved
):
    """Of six epochs of a fraction of a second: the first, whose cost nobody knew, and the last are always written."""
    clock, kept = [0.0], []

    def tick():
        clock[0] += 1e-4
        return clock[0]

    monkeypatch.setattr(epochs.time, "monotonic", tick)
    monkeypatch.setattr(epochs.time, "perf_counter", tick)

    def save(self, folder):
        clock[0] += seconds
        kept.append(self.facts["epoch"])

    monkeypatch.setattr(Checkpoint, "save", save)

    options = TrainOptions(epochs=6, batch_size=192, checkpoint_every=often)
    run(tmp_path, options, pictures, LINEAR)
    assert len(kept) == saved
    assert (kept[0], kept[-1]) == (1, 6)
