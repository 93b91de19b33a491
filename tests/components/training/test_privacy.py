import json
import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import DataSpec
from components.errors import ModelError
from components.options import ModelOptions, PrivacyOptions, TrainOptions
from components.tracing import Trace
from components.training.privacy import KEY, Privacy, noise_key, promise
from components.training.train import train

ROWS = 12
LINEAR = ModelOptions(name="linear")


def small():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((3,))
    x = keras.layers.LayerNormalization()(keras.layers.Dense(4, "tanh")(inputs))
    return keras.Model(inputs, keras.layers.Dense(2)(x))


@pytest.fixture
def rows(make_batches):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, 3)).astype("float32"), rng.integers(0, 2, ROWS).astype("int32")
    x[0] *= 50  # one that would move the model far
    spec = DataSpec(task="classification", input_name="x", input_shape=(3,), labels=("a", "b"))
    return make_batches(spec, train=(x, y)), x, y


def run(folder, batches, *, strategy=None, trace=None, build=small, **options):
    folder.mkdir(exist_ok=True)
    options = {"batch_size": ROWS, "epochs": 1, "optimizer": {"name": "sgd", "learning_rate": 1.0}, **options}
    strategy = strategy or tf.distribute.get_strategy()
    made = train(
        TrainOptions(**options), build, LINEAR, batches, folder, strategy=strategy, seed=0, trace=trace or Trace()
    )
    return keras.saving.load_model(made.file).get_weights(), made


@pytest.mark.parametrize("accumulate", [1, 3])
def test_each_example_moves_the_model_by_no_more_than_the_clip(rows, tmp_path, accumulate):
    batches, x, y = rows
    privacy = {"noise": 1e-9, "clip": 0.1}  # noise that float32 does not see
    moved, _ = run(tmp_path, batches, privacy=privacy, accumulate=accumulate)
    model, total = small(), 0
    norms = []
    for row in range(ROWS):  # by hand, one after the other
        with tf.GradientTape() as tape:
            loss = keras.losses.sparse_categorical_crossentropy(y[row], model(x[row : row + 1])[0], from_logits=True)
        gradients = [each.numpy() for each in tape.gradient(loss, model.trainable_variables)]
        norms.append(np.sqrt(sum(np.square(each).sum() for each in gradients)))
        total += np.concatenate([each.ravel() for each in gradients]) * min(1, 0.1 / norms[-1])
    assert max(norms) > 0.1
    before = np.concatenate([each.ravel() for each in model.get_weights()])
    after = np.concatenate([each.ravel() for each in moved])
    np.testing.assert_allclose(before - after, total / ROWS, atol=1e-6)
    assert np.linalg.norm(before - after) <= 0.1 + 1e-6


@pytest.mark.parametrize("replicas", [1, 2])
def test_the_noise_has_the_deviation_that_was_asked_for(rows, tmp_path, replicas, mirrored):
    strategy = mirrored if replicas == 2 else None
    wide = keras.Input((3,))

    def build():
        keras.utils.set_random_seed(1)
        return keras.Model(wide, keras.layers.Dense(2)(keras.layers.Dense(3000, use_bias=False)(wide)))

    batches, _, _ = rows
    moved, _ = run(tmp_path, batches, build=build, strategy=strategy, privacy={"noise": 40.0, "clip": 0.01})
    noise = build().get_weights()[0] - moved[0]  # the gradients themselves are at most 0.01 / 12 long
    assert np.std(noise) == pytest.approx(40.0 * 0.01 / ROWS, rel=0.05)
    assert abs(np.mean(noise)) < 4 * np.std(noise) / math.sqrt(noise.size)


def test_every_update_replica_and_kernel_has_noise_of_its_own():
    privacy = Privacy(PrivacyOptions(noise=1.0), 1, 1, (3, 4))
    zeros = [tf.zeros(1000), tf.zeros(1000)]
    drawn = {
        (update, replica, place): each.numpy()
        for update in (0, 1)
        for replica in (0, 1)
        for place, each in enumerate(privacy.noised(zeros, tf.constant(update), replica))
    }
    values = list(drawn.values())
    correlations = np.corrcoef(values) - np.eye(len(values))
    assert np.abs(correlations).max() < 0.15
    again = privacy.noised(zeros, tf.constant(1), 1)
    np.testing.assert_array_equal(again[1], drawn[1, 1, 1])
    other = Privacy(PrivacyOptions(noise=1.0), 1, 1, (3, 5)).noised(zeros, tf.constant(1), 1)
    assert not np.array_equal(other[1], drawn[1, 1, 1])


def test_a_training_that_was_stopped_draws_the_same_noise_and_leaves_no_key(rows, tmp_path):
    batches, _, _ = rows
    privacy = {"noise": 1.0, "clip": 0.1}

    def interrupt(done, total, note):
        if done >= 2:
            raise KeyboardInterrupt

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        (tmp_path / name / KEY).write_text("[11, 12]")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", batches, privacy=privacy, epochs=4, trace=Trace(on_progress=interrupt))
    cut, _ = run(tmp_path / "cut", batches, privacy=privacy, epochs=4)
    whole, _ = run(tmp_path / "whole", batches, privacy=privacy, epochs=4)
    for ours, theirs in zip(cut, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not (tmp_path / "cut" / KEY).exists()
    fresh, _ = run(tmp_path / "fresh", batches, privacy=privacy, epochs=4)  # the same seed, another secret
    assert not np.array_equal(fresh[0], whole[0])


def test_the_key_is_secret_and_stays_for_all_attempts(tmp_path):
    (tmp_path / "other").mkdir()
    assert noise_key(tmp_path) == noise_key(tmp_path) != noise_key(tmp_path / "other")


def test_epsilon_is_that_of_the_gaussian_mechanism_where_all_rows_take_part():
    """One update on all rows: epsilon of Renyi privacy, min over orders of a / (2 s^2) + conversion, by hand."""
    found = promise(PrivacyOptions(noise=2.0, delta=1e-5), rows=100, batch_size=100, updates=1)
    orders = np.arange(1.01, 200, 0.01)
    # Canonne et al. 2020, arXiv 2004.00010, proposition 12.
    by_hand = orders / 8 + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)
    assert found["epsilon"] == pytest.approx(by_hand.min(), rel=0.02)
    assert (found["delta"], found["updates"], found["rows"]) == (1e-5, 1, 100)


def test_more_noise_fewer_updates_and_smaller_batches_promise_more(rows, tmp_path):
    def epsilon(noise=1.0, rows=1000, batch_size=50, updates=100):
        return promise(PrivacyOptions(noise=noise), rows=rows, batch_size=batch_size, updates=updates)["epsilon"]

    assert epsilon(noise=2.0) < epsilon()
    assert epsilon(updates=10) < epsilon()
    assert epsilon(batch_size=10) < epsilon()
    batches, _, _ = rows
    told = []
    _, made = run(tmp_path, batches, privacy={"noise": 3.0}, epochs=2, trace=Trace(on_telling=told.append))
    facts = made.facts["privacy"]
    assert facts == promise(PrivacyOptions(noise=3.0), rows=ROWS, batch_size=ROWS, updates=2)
    assert facts["delta"] == pytest.approx(0.1 / ROWS)
    assert told[0] == f"privacy: epsilon {facts['epsilon']:.2f} at delta 0.0083 after all 2 updates"
    assert json.loads((tmp_path / "trained.json").read_text())["privacy"] == facts


def test_a_layer_that_mixes_examples_is_refused_by_name(rows, tmp_path):
    inputs = keras.Input((3,))
    normalization = keras.layers.BatchNormalization(name="norm")
    model = keras.Model(inputs, keras.layers.Dense(2)(normalization(inputs)))
    batches, _, _ = rows
    message = r"train\.privacy: layer 'norm' \(BatchNormalization\) mixes the examples of a batch"
    with pytest.raises(ModelError, match=message):
        run(tmp_path, batches, build=lambda: model, privacy={"noise": 1.0})
    normalization.trainable = False
    run(tmp_path, batches, build=lambda: model, privacy={"noise": 1.0})
