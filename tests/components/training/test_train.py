import functools
import json
import os
import pathlib
import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from components.artifacts import DataSpec
from components.errors import ConfigError, DataError, ModelError
from components.options import ModelOptions, OptimizerOptions, TrainOptions
from components.tracing import Trace
from components.training.loop import make_loss
from components.training.model import build
from components.training.optimizer import Schedule, make_optimizer
from components.training.replicas import check_batch, rescaled
from components.training.train import train

DEFAULT = tf.distribute.get_strategy()
CNN = ModelOptions(name="cnn", options={"filters": [8, 8]})
MLP = ModelOptions(name="mlp", options={"units": [16]})


def run(folder, options, batches, model=CNN, *, strategy=DEFAULT, trace=None, seed=3):
    folder.mkdir(exist_ok=True)
    builder = functools.partial(build, model, batches.spec, seed=seed)
    trace = trace or Trace()
    return train(options, builder, model, batches, folder, strategy=strategy, seed=seed, trace=trace)


def weights_of(trained):
    return keras.saving.load_model(trained.file).get_weights()


def history_of(trained):
    return json.loads((trained.folder / "history.json").read_text())


@pytest.fixture
def line(make_batches):
    """y = 2x + 1 + noise, uniform on [0, 1)."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (4000, 1)).astype(np.float32)
    y = (2 * x + 1 + rng.uniform(0, 1, x.shape)).astype(np.float32)
    spec = DataSpec(task="regression", input_name="features", input_shape=(1,))
    return make_batches(spec, train=(x[:3600], y[:3600]), validation=(x[3600:], y[3600:]))


# --- what training reaches -----------------------------------------------------------------------------------------


def test_sgd_on_a_noisy_line_finds_its_slope_and_the_noise_mean(line, tmp_path):
    rates = OptimizerOptions(name="sgd", learning_rate=0.1, schedule="cosine")
    made = run(tmp_path, TrainOptions(epochs=8, batch_size=30, optimizer=rates), line, ModelOptions(name="linear"))
    (slope,), (offset,) = weights_of(made)
    assert slope[0] == pytest.approx(2.0, abs=0.02)
    assert offset == pytest.approx(1.5, abs=0.02)
    assert made.facts["validation"]["rmse"] == pytest.approx((1 / 12) ** 0.5, rel=0.05)  # the noise's own
    assert made.facts["validation"]["loss"] == pytest.approx(made.facts["validation"]["rmse"] ** 2)


def test_a_small_cnn_learns_and_its_facts_are_those_of_the_saved_model(pictures, tmp_path):
    options = TrainOptions(epochs=10, batch_size=16, optimizer={"name": "adam", "learning_rate": 0.01})
    made = run(tmp_path, options, pictures)
    x, y = next(iter(pictures.ordered("validation", 50)))
    logits = keras.saving.load_model(made.file)(x).numpy()
    assert made.facts["validation"]["accuracy"] == pytest.approx(np.mean(logits.argmax(1) == y.numpy()))
    assert made.facts["validation"]["accuracy"] > 0.9
    assert made.facts["parameters"] == 739
    assert (made.facts["outputs"], made.facts["epochs"], made.facts["best_epoch"]) == ("logits", 10, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"model.keras", "history.json", "trained.json"}


def test_the_loop_makes_the_updates_that_model_fit_makes(pictures, tmp_path):
    made = run(tmp_path, TrainOptions(epochs=2, batch_size=32), pictures, MLP)
    model = build(MLP, pictures.spec, seed=3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], jit_compile=False)
    fitted = model.fit(pictures.training(32, 3, 0), epochs=2, steps_per_epoch=6, shuffle=False, verbose=0).history
    for ours, theirs in zip(weights_of(made), model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(history_of(made)["loss"], fitted["loss"], rtol=1e-5)
    np.testing.assert_allclose(history_of(made)["accuracy"], fitted["accuracy"], rtol=1e-5)


def test_a_model_that_ends_in_softmax_trains_on_its_probabilities(pictures, tmp_path):
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(inputs))
    keras.Model(inputs, x).save(tmp_path / "softmax.keras")
    model = ModelOptions(file=str(tmp_path / "softmax.keras"))
    options = TrainOptions(epochs=3, batch_size=16, optimizer={"learning_rate": 0.01})
    made = run(tmp_path / "run", options, pictures, model)
    assert made.facts["outputs"] == "probabilities"
    assert made.facts["validation"]["accuracy"] > 0.9


# --- seeds, kills and resumes --------------------------------------------------------------------------------------


def test_a_killed_training_started_again_ends_in_the_same_bits(pictures, tmp_path):
    model = ModelOptions(name="cnn", options={"filters": [8, 8], "dropout": 0.3})
    rates = {"name": "adamw", "learning_rate": 0.01, "weight_decay": 1e-3, "schedule": "cosine", "warmup_epochs": 1}
    rates["ema"] = 0.9
    options = TrainOptions(
        epochs=5, batch_size=32, optimizer=rates, early_stopping={"patience": 4}, checkpoint_every="0.001s"
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    cut.mkdir()
    here = pathlib.Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[2]}{os.pathsep}{here}"}
    command = [sys.executable, "-m", "killed", cut, "3.4", model.model_dump_json(), options.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = sorted(path.name for path in cut.iterdir())
    assert len(kept) == 3
    assert kept[1:] == ["checkpoint-000000018", "checkpoint-000000019"]  # of 6 updates an epoch
    newest = cut / kept[2]
    shard = newest / "001.npz"
    shard.write_bytes(shard.read_bytes()[:-200])
    (cut / ".checkpoint-000000024.123").mkdir()
    said = []
    undisturbed = run(whole, options, pictures, model)
    resumed = run(cut, options, pictures, model, trace=Trace(on_warning=said.append))
    assert said == [f"{newest.name} is damaged (File is not a zip file); training resumes from the one before it."]
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(undisturbed), weights_of(resumed), strict=True))
    for name in ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate"):
        assert history_of(undisturbed)[name] == history_of(resumed)[name]
    assert {path.name for path in cut.iterdir()} == {"model.keras", "history.json", "trained.json"}


def test_a_resume_starts_at_the_epoch_after_the_checkpoint(pictures, tmp_path):
    def interrupt(done, total, note):
        if done > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, TrainOptions(epochs=3, batch_size=32), pictures, MLP, trace=Trace(on_progress=interrupt))
    told = []
    run(
        tmp_path,
        TrainOptions(epochs=3, batch_size=32),
        pictures,
        MLP,
        trace=Trace(on_progress=lambda *a: told.append(a)),
    )
    assert 2 < told[0][0] < 3


def test_the_seed_fixes_every_bit_and_another_seed_changes_them(pictures, tmp_path):
    options = TrainOptions(epochs=2, batch_size=32)
    first, again, other = (run(tmp_path / f"{n}", options, pictures, seed=seed) for n, seed in enumerate((1, 1, 2)))
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(first), weights_of(again), strict=True))
    assert not np.array_equal(weights_of(first)[0], weights_of(other)[0])


# --- strategies ------------------------------------------------------------------------------------------------------


def test_two_mirrored_devices_give_the_weights_that_one_gives(pictures, tmp_path, mirrored):
    rates = OptimizerOptions(name="sgd", learning_rate=0.1, momentum=0.9, weight_decay=1e-3)
    options = TrainOptions(epochs=3, batch_size=32, optimizer=rates)
    assert mirrored.num_replicas_in_sync == 2
    one = run(tmp_path / "one", options, pictures, MLP)
    two = run(tmp_path / "two", options, pictures, MLP, strategy=mirrored)
    for a, b in zip(weights_of(one), weights_of(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert one.facts["validation"]["loss"] == pytest.approx(two.facts["validation"]["loss"], rel=1e-4)
    np.testing.assert_allclose(history_of(one)["loss"], history_of(two)["loss"], rtol=1e-4)


@pytest.mark.parametrize("replicas", [1, 2])
def test_xla_makes_the_same_updates_on_any_number_of_devices(pictures, tmp_path, mirrored, replicas):
    strategy = mirrored if replicas == 2 else DEFAULT
    made = []
    for xla in (False, True):
        options = TrainOptions(epochs=1, batch_size=32, xla=xla, accumulate=2, optimizer=OptimizerOptions(name="sgd"))
        made.append(run(tmp_path / f"{xla}", options, pictures, strategy=strategy))
    for a, b in zip(weights_of(made[0]), weights_of(made[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert made[0].facts["train"] == pytest.approx(made[1].facts["train"], rel=1e-4)


@pytest.mark.slow  # TensorFlow builds the graph for two replicas, twice
def test_normalization_and_dropout_train_on_two_devices_and_resume(pictures, tmp_path, mirrored):
    model = ModelOptions(name="cnn", options={"filters": [8, 8], "dropout": 0.1})
    options = TrainOptions(epochs=6, batch_size=32, optimizer={"learning_rate": 0.01})
    whole = run(tmp_path / "whole", options, pictures, model, strategy=mirrored)
    assert whole.facts["validation"]["accuracy"] > 0.6

    def interrupt(done, total, note):
        if done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", options, pictures, model, strategy=mirrored, trace=Trace(on_progress=interrupt))
    cut = run(tmp_path / "cut", options, pictures, model, strategy=mirrored)
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(whole), weights_of(cut), strict=True))


def test_a_batch_that_does_not_divide_names_the_sizes_that_do(pictures, tmp_path, mirrored):
    message = (
        r"train\.batch_size=25 must divide by the 2 replicas of strategy 'mirrored' \(remainder 1\): use 24 or 26\."
    )
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, TrainOptions(batch_size=25), pictures, strategy=mirrored)
    with pytest.raises(ConfigError, match=r"\(remainder 3\): use 8\.$"):
        check_batch(3, 8, "tpu")


def test_the_rule_of_rescaling_is_carried_out_and_told(pictures, tmp_path, mirrored):
    told = []
    options = TrainOptions(epochs=2, batch_size=16, optimizer={"name": "sgd", "learning_rate": 0.05})
    model = build(MLP, pictures.spec, seed=3)
    (tmp_path / "two").mkdir()
    two = train(
        options, lambda: build(MLP, pictures.spec, seed=3), MLP, pictures, tmp_path / "two", strategy=mirrored, seed=3,
        trace=Trace(on_telling=told.append), rescale=True,
    )  # fmt: skip
    assert told[0] == "2 replicas: batch 16 becomes 32, learning rate 0.05 becomes 0.1"
    by_hand = options.model_copy(
        update={"batch_size": 32, "optimizer": OptimizerOptions(name="sgd", learning_rate=0.1)}
    )
    one = run(tmp_path / "one", by_hand, pictures, MLP)
    for a, b in zip(weights_of(one), weights_of(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not np.allclose(weights_of(two)[0], model.get_weights()[0], atol=1e-3)


def test_rates_of_adam_grow_by_the_square_root_of_the_replicas():
    made = rescaled(TrainOptions(batch_size=64, optimizer={"name": "adam", "learning_rate": 0.001}), 4)
    assert (made.batch_size, made.optimizer.learning_rate) == (256, 0.002)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_gradients_of_parts_add_up_to_those_of_the_batch(pictures, tmp_path):
    rates = OptimizerOptions(name="sgd", learning_rate=0.1, momentum=0.9)
    made = {}
    for parts in (1, 4):
        options = TrainOptions(epochs=2, batch_size=32, optimizer=rates, accumulate=parts)
        model = ModelOptions(builder=f"{__file__}:regularized")
        made[parts] = run(tmp_path / f"{parts}", options, pictures, model)
    for a, b in zip(weights_of(made[1]), weights_of(made[4]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(history_of(made[1])["loss"], history_of(made[4])["loss"], rtol=1e-5)
    np.testing.assert_allclose(history_of(made[1])["accuracy"], history_of(made[4])["accuracy"])


def regularized(input_shape, outputs):
    """An embedding, whose gradient is sparse, and a penalty."""
    inputs = keras.Input(input_shape)
    x = keras.layers.Flatten()(inputs)
    x = keras.layers.Embedding(5, 3)(keras.ops.cast(x * 5, "int32"))
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, keras.layers.Dense(outputs, kernel_regularizer=keras.regularizers.L2(0.01))(x))


def test_a_batch_that_does_not_divide_into_parts_is_refused(pictures, tmp_path):
    message = r"train\.batch_size=30 must divide by train\.accumulate=4 \(remainder 2\): use 28 or 32\."
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, TrainOptions(batch_size=30, accumulate=4), pictures)


# --- what stops a training -------------------------------------------------------------------------------------------


def test_early_stopping_ends_after_patience_and_keeps_the_best_epochs_weights(pictures, tmp_path):
    options = TrainOptions(epochs=60, batch_size=16, early_stopping={"patience": 2}, optimizer={"learning_rate": 0.05})
    made = run(tmp_path, options, pictures, MLP)
    losses = history_of(made)["val_loss"]
    best = int(np.argmin(losses)) + 1
    assert made.facts["best_epoch"] == best
    assert made.facts["epochs"] == best + 2 < 60
    x, y = next(iter(pictures.ordered("validation", 50)))
    loss = make_loss("classification", "logits")(y, keras.saving.load_model(made.file)(x))
    assert float(tf.reduce_mean(loss)) == pytest.approx(losses[best - 1], rel=1e-5)
    assert made.facts["validation"]["loss"] == losses[best - 1]


def test_early_stopping_without_a_validation_split_is_refused(make_batches, pictures, tmp_path):
    x, y = next(iter(pictures.ordered("validation", 50)))
    blind = make_batches(pictures.spec, train=(x.numpy(), y.numpy()))
    with pytest.raises(DataError, match=r"train\.early_stopping .* 0 rows; raise preprocess\.splits\.validation"):
        run(tmp_path, TrainOptions(epochs=1, batch_size=10, early_stopping={}), blind)
    said = []
    made = run(tmp_path, TrainOptions(epochs=1, batch_size=10), blind, trace=Trace(on_warning=said.append))
    assert made.facts["validation"] == {}
    assert said == [
        "The validation split has 0 rows: training runs blind; raise preprocess.splits.validation to see it."
    ]


def test_a_batch_larger_than_the_split_is_refused(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"train\.batch_size=500 exceeds the 192 rows .* use 192 or less\."):
        run(tmp_path, TrainOptions(batch_size=500), pictures)


def test_a_loss_that_is_not_finite_stops_with_epoch_and_step(pictures, make_batches, tmp_path):
    x, y = next(iter(pictures.ordered("validation", 50)))
    bad = x.numpy().copy()
    bad[7] = np.nan
    batches = make_batches(pictures.spec, train=(bad, y.numpy()), validation=(x.numpy(), y.numpy()))
    order = np.random.default_rng([3, 0]).permutation(50).tolist()
    step = order.index(7) // 5 + 1
    assert step > 1
    message = rf"training loss is not finite in epoch 1, at step {step} of 10 .*; lower train\.optimizer\.learning_rate=0\.001 \(try 0\.0001\)"
    with pytest.raises(ModelError, match=message):
        run(tmp_path, TrainOptions(epochs=2, batch_size=5), batches, ModelOptions(name="linear"))


def test_a_training_that_runs_away_is_stopped(line, tmp_path):
    options = TrainOptions(epochs=60, batch_size=3600, optimizer={"name": "sgd", "learning_rate": 1e9})
    with pytest.raises(ModelError, match=r"not finite in epoch \d+.* lower train\.optimizer\.learning_rate=1e\+09"):
        run(tmp_path, options, line, ModelOptions(name="linear"))


def test_a_frozen_model_is_refused(pictures, tmp_path):
    model = build(MLP, pictures.spec, seed=1)
    model.trainable = False
    with pytest.raises(ModelError, match=r"model 'mlp' has no trainable weights; set layer\.trainable = True"):
        train(TrainOptions(), lambda: model, MLP, pictures, tmp_path, strategy=DEFAULT, seed=1, trace=Trace())


# --- a model that came trained -------------------------------------------------------------------------------------------


def test_no_epochs_take_the_model_as_it_is_and_judge_it(pictures, tmp_path):
    learned = run(tmp_path / "learned", TrainOptions(epochs=4, batch_size=20), pictures)
    given = ModelOptions(file=str(learned.file))
    taken = run(tmp_path / "taken", TrainOptions(epochs=0, batch_size=20), pictures, given)
    assert [each.tobytes() for each in weights_of(taken)] == [each.tobytes() for each in weights_of(learned)]
    assert taken.facts["validation"] == pytest.approx(learned.facts["validation"])
    assert (taken.facts["epochs"], taken.facts["best_epoch"], taken.facts["train"]) == (0, 0, {})
    assert history_of(taken) == {}
    assert taken.facts["seconds"] > 0.001  # a pass over the validation split, a function traced for it


def test_a_trained_model_that_is_fed_in_another_way_is_told(pictures, make_batches, tmp_path):
    options = TrainOptions(epochs=10, batch_size=16, optimizer={"name": "adam", "learning_rate": 0.01})
    learned = run(tmp_path / "learned", options, pictures)
    x, y = next(iter(pictures.ordered("validation", 60)))
    wrong = make_batches(pictures.spec, train=(x, y), validation=(x, (y + 1) % 3))  # labels in another order
    warned = []
    given = ModelOptions(file=str(learned.file))
    run(
        tmp_path / "t", TrainOptions(epochs=0, batch_size=20), wrong, given, trace=Trace(None, on_warning=warned.append)
    )
    assert len(warned) == 1
    assert "a guess among 3 classes 0.3333: it may be fed in another way" in warned[0]


def test_a_frozen_model_that_came_trained_is_taken(pictures, tmp_path):
    model = build(MLP, pictures.spec, seed=1)
    model.trainable = False
    options = TrainOptions(epochs=0)
    made = train(options, lambda: model, MLP, pictures, tmp_path, strategy=DEFAULT, seed=1, trace=Trace())
    assert made.facts["parameters"] == model.count_params()


# --- what it tells -----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_losses_metrics_rates_speed_and_the_graph(pictures, tmp_path):
    told = []
    with Trace(tmp_path / "log", on_progress=lambda *args: told.append(args)) as trace:
        made = run(tmp_path / "run", TrainOptions(epochs=3, batch_size=32), pictures, trace=trace)
    log = EventAccumulator(str(tmp_path / "log"), size_guidance={"tensors": 0}).Reload()
    wanted = {"loss/train", "loss/validation", "accuracy/train", "accuracy/validation", "learning_rate"}
    assert wanted | {"speed/epoch_seconds", "speed/examples_per_second"} <= set(log.Tags()["tensors"])
    assert log.Tags()["graph"]
    losses = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in log.Tensors("loss/train")]
    assert losses == [(n, pytest.approx(loss)) for n, loss in enumerate(history_of(made)["loss"], 1)]
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (3.0, 3)
    assert told[-1][2].startswith("epoch 3/3 loss ")


# --- losses and rates --------------------------------------------------------------------------------------------------


def test_losses_equal_their_formulas():
    y, logits = tf.constant([0, 2]), tf.constant([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    log_p = np.log(tf.nn.softmax(logits).numpy())
    plain = -log_p[[0, 1], [0, 2]]
    np.testing.assert_allclose(make_loss("classification", "logits")(y, logits), plain, rtol=1e-5)
    given = make_loss("classification", "probabilities")(y, tf.nn.softmax(logits))
    np.testing.assert_allclose(given, plain, rtol=1e-5)
    smoothed = 0.9 * plain + 0.1 * -log_p.mean(axis=1)
    np.testing.assert_allclose(make_loss("classification", "logits", 0.1)(y, logits), smoothed, rtol=1e-5)
    squared = make_loss("regression", "logits")(tf.constant([[1.0], [2.0]]), tf.constant([[3.0], [2.5]]))
    np.testing.assert_allclose(squared, [4.0, 0.25])


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"warmup_epochs": 1}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "decay": 0.1, "decay_epochs": 1}, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
        ({"schedule": "exponential", "decay": 0.25, "decay_epochs": 1}, [4 ** -(n / 4) for n in range(8)]),
        ({"schedule": "cosine"}, [(1 + np.cos(np.pi * n / 8)) / 2 for n in range(8)]),
        (
            {"schedule": "cosine", "warmup_epochs": 0.5},
            [0.5, 1] + [(1 + np.cos(np.pi * n / 6)) / 2 for n in range(6)],
        ),
    ],
)
def test_the_learning_rate_follows_its_schedule(options, rates):
    schedule = Schedule(OptimizerOptions(learning_rate=2.0, **options), steps_per_epoch=4, epochs=2)
    np.testing.assert_allclose([schedule(step) for step in range(8)], 2 * np.array(rates), atol=1e-6)
    np.testing.assert_allclose(schedule(tf.constant(100, tf.int64)), schedule(100))


def test_weight_decay_pulls_kernels_only():
    kernel = keras.Variable([2.0], name="kernel")
    bias = keras.Variable([2.0], name="bias")
    for name in ("sgd", "adamw"):
        kernel.assign([2.0])
        bias.assign([2.0])
        optimizer = make_optimizer(OptimizerOptions(name=name, learning_rate=0.1, weight_decay=0.5), 10, 1)
        optimizer.apply([tf.zeros(1), tf.zeros(1)], [kernel, bias])
        np.testing.assert_allclose([kernel.numpy()[0], bias.numpy()[0]], [2 - 0.1 * 0.5 * 2, 2.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam", "momentum": 0.9}, r"optimizer\.momentum=0\.9 belongs to sgd, got optimizer\.name=adam"),
        ({"name": "adam", "weight_decay": 0.1}, r"optimizer\.weight_decay=0\.1 belongs to adamw and sgd.* use adamw\."),
        ({"warmup_epochs": 5}, r"optimizer\.warmup_epochs=5 must be below epochs=5; lower it or train longer\."),
    ],
)
def test_optimizer_options_that_contradict_each_other_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimizerOptions(**options), 10, 5)
