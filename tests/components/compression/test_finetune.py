import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from components.artifacts import DataSpec
from components.compression.finetune import Setting, _taught, evaluate, finetune
from components.distillation import Lesson, Teacher
from components.errors import ConfigError, ModelError
from components.options import FineTune
from components.tracing import Trace

from .conftest import SPEC, batches_of, draw, small_batches

ROOT = pathlib.Path(__file__).resolve().parents[3]


def setting(folder: pathlib.Path, **changes) -> Setting:
    made = Setting(
        step="prune@0.5",
        options=FineTune(epochs=3, learning_rate=0.01),
        batches=small_batches(),
        batch_size=32,
        outputs="logits",
        seed=1,
        folder=folder,
        strategy=tf.distribute.get_strategy(),
        trace=Trace(),
    )
    return dataclasses.replace(made, **changes)


def network(outputs: str = "logits") -> tf_keras.Model:
    tf_keras.utils.set_random_seed(5)
    layers = tf_keras.layers
    image = layers.Input((8, 8, 1))
    x = layers.Dropout(0.3, rng_type="stateful")(layers.Dense(16, activation="relu")(layers.Flatten()(image)))
    return tf_keras.Model(image, layers.Dense(3, activation="softmax" if outputs == "probabilities" else None)(x))


@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
def test_a_classifier_learns_whatever_it_returns(tmp_path, outputs):
    got = finetune(network(outputs), setting(tmp_path, outputs=outputs, options=FineTune(epochs=8, learning_rate=0.01)))
    assert got["accuracy"] > 0.8
    assert got["loss"] < 0.7


def test_regression_reports_the_root_mean_squared_error(tmp_path):
    random = np.random.default_rng(0)
    x = random.random((128, 1)).astype(np.float32)
    spec = DataSpec(task="regression", input_name="features", input_shape=(1,))
    batches = batches_of(spec, train=(x, 2 * x + 1), validation=(x, 2 * x + 1))
    rows = tf_keras.layers.Input((1,))
    model = tf_keras.Model(rows, tf_keras.layers.Dense(1)(rows))
    got = finetune(model, setting(tmp_path, batches=batches, options=FineTune(epochs=40, learning_rate=0.1)))
    assert got["rmse"] == pytest.approx(np.sqrt(got["loss"]), rel=1e-4)
    assert got["rmse"] < 0.1


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        model = network()
        finetune(model, setting(tmp_path / name, seed=seed))
        made.append(model.get_weights())
    assert all(np.array_equal(a, b) for a, b in zip(made[0], made[1], strict=True))
    assert not all(np.array_equal(a, c) for a, c in zip(made[0], made[2], strict=True))


class _StopAt(tf_keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_an_interrupted_training_goes_on_to_the_same_weights_dropout_included(tmp_path):
    undisturbed = network()
    finetune(undisturbed, setting(tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        finetune(network(), setting(tmp_path / "b"), callbacks=[_StopAt()])
    resumed, epochs = network(), []
    finetune(resumed, setting(tmp_path / "b", trace=Trace(on_progress=lambda done, *_: epochs.append(done))))
    assert min(epochs) > 2, "epochs that were done have been done again"
    assert all(np.array_equal(a, b) for a, b in zip(undisturbed.get_weights(), resumed.get_weights(), strict=True))


# --- with a teacher ----------------------------------------------------------------------------------------------


def lesson(**changes) -> Lesson:
    """A teacher that knows the rule: the brightest of three rows."""

    def answer(pictures: tf.Tensor) -> tf.Tensor:
        return 3 * (tf.reduce_sum(pictures[:, 1:6:2, :, 0], -1) - 3.0)

    made = Lesson(
        teachers=(Teacher(answer=answer, outputs="logits"),),
        weight=0.8,
        temperature=2.0,
        task="classification",
        outputs="logits",
    )
    return dataclasses.replace(made, **changes)


def test_a_good_teacher_makes_up_for_few_and_partly_wrong_labels(tmp_path):
    x, y = draw(32, 0)
    y[::4] = (y[::4] + 1) % 3
    few = batches_of(SPEC, train=(x, y), validation=draw(300, 1))
    made = setting(tmp_path, batches=few, batch_size=16, options=FineTune(epochs=30, learning_rate=0.01))
    alone = finetune(network(), dataclasses.replace(made, folder=tmp_path / "alone"))
    taught = finetune(network(), dataclasses.replace(made, folder=tmp_path / "taught", lesson=lesson()))
    assert taught["accuracy"] > alone["accuracy"] + 0.05, (taught, alone)


def test_one_update_is_that_of_the_mixed_loss_with_penalties_whole(tmp_path):
    """SGD at rate 1: the weights move by the gradient, which TensorFlow takes of the formula written out."""
    x, y = (tf.constant(part) for part in draw(8, 0))
    image = tf_keras.layers.Input((8, 8, 1))
    dense = tf_keras.layers.Dense(3, kernel_regularizer=tf_keras.regularizers.L2(0.1))
    model = tf_keras.Model(image, dense(tf_keras.layers.Flatten()(image)))
    kernel, bias = (tf.constant(each) for each in model.get_weights())
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        logits = tf.reshape(x, (8, 64)) @ kernel + bias
        p, log_q = tf.nn.softmax(lesson().teachers[0].answer(x) / 2.0), tf.nn.log_softmax(logits / 2.0)
        labels = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        apart = 4.0 * tf.reduce_mean(tf.reduce_sum(p * (tf.math.log(p) - log_q), -1))
        penalty = 0.1 * tf.reduce_sum(kernel**2)
        loss = 0.2 * labels + 0.8 * apart + penalty
    taught = _taught(model, lesson())
    loss_of = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    taught.compile(tf_keras.optimizers.SGD(1.0), loss_of, ["accuracy"])
    told = taught.train_on_batch(x, y, return_dict=True)
    np.testing.assert_allclose(model.get_weights()[0], kernel - tape.gradient(loss, kernel), atol=1e-6)
    assert told["loss"] == pytest.approx(float(labels + penalty), rel=1e-5)


def test_a_taught_training_goes_on_to_the_same_weights(tmp_path):
    undisturbed, untaught = network(), network()
    finetune(undisturbed, setting(tmp_path / "a", lesson=lesson()))
    with pytest.raises(KeyboardInterrupt):
        finetune(network(), setting(tmp_path / "b", lesson=lesson()), callbacks=[_StopAt()])
    resumed = network()
    finetune(resumed, setting(tmp_path / "b", lesson=lesson()))
    assert all(np.array_equal(a, b) for a, b in zip(undisturbed.get_weights(), resumed.get_weights(), strict=True))
    finetune(untaught, setting(tmp_path / "c"))
    assert not np.array_equal(undisturbed.get_weights()[0], untaught.get_weights()[0])


def test_two_devices_learn_from_a_teacher_what_one_learns(mirrored, tmp_path):
    made = []
    for name, strategy in (("one", tf.distribute.get_strategy()), ("two", mirrored)):
        with strategy.scope():
            tf_keras.utils.set_random_seed(5)
            image = tf_keras.layers.Input((8, 8, 1))
            penalty = tf_keras.regularizers.L2(0.01)
            dense = tf_keras.layers.Dense(3, kernel_regularizer=penalty)
            model = tf_keras.Model(image, dense(tf_keras.layers.Flatten()(image)))
        options = FineTune(epochs=2, learning_rate=0.01)
        got = finetune(model, setting(tmp_path / name, strategy=strategy, options=options, lesson=lesson()))
        made.append([*model.get_weights(), np.float32(got["loss"])])
    for one, two in zip(*made, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4)


def test_regression_learns_from_a_teacher(tmp_path):
    """Labels are noise; the teacher is right, and all the weight is its own."""
    x = np.random.default_rng(0).random((128, 1)).astype(np.float32)
    spec = DataSpec(task="regression", input_name="features", input_shape=(1,))
    batches = batches_of(spec, train=(x, 0 * x), validation=(x, 2 * x + 1))
    teacher = Teacher(answer=lambda rows: 2 * rows + 1, outputs="logits")
    rows = tf_keras.layers.Input((1,))
    model = tf_keras.Model(rows, tf_keras.layers.Dense(1)(rows))
    right = lesson(teachers=(teacher,), weight=1.0, task="regression")
    options = FineTune(epochs=40, learning_rate=0.1)
    assert finetune(model, setting(tmp_path, batches=batches, options=options, lesson=right))["rmse"] < 0.1


def test_damaged_checkpoints_are_said_and_training_starts_over(tmp_path):
    undisturbed = network()
    finetune(undisturbed, setting(tmp_path))
    for path in (tmp_path / "checkpoints").glob("*.data*"):
        path.write_bytes(b"")
    heard, again = [], network()
    finetune(again, setting(tmp_path, trace=Trace(on_warning=heard.append)))
    assert len(heard) == 2
    assert heard[0].startswith("ckpt-3 is damaged")
    assert all(np.array_equal(a, b) for a, b in zip(undisturbed.get_weights(), again.get_weights(), strict=True))


def test_the_learning_rate_falls_to_zero_over_the_whole_step(tmp_path):
    rate = setting(tmp_path).learning_rate
    assert float(rate(0)) == pytest.approx(0.01)
    assert float(rate(3 * 6)) == pytest.approx(0, abs=1e-9)


def test_a_loss_that_is_not_finite_stops_with_the_option_to_change(tmp_path):
    options = FineTune(epochs=3, learning_rate=1e38)
    with pytest.raises(
        ModelError, match=r"prune@0\.5: the loss is (nan|inf) in epoch \d.*lower compress\.prune\.learning_rate"
    ):
        finetune(network(), setting(tmp_path, options=options))


def test_less_than_one_batch_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"compress\.batch_size=500: the training split holds 192 rows"):
        finetune(network(), setting(tmp_path, batch_size=500))


def test_without_validation_rows_nothing_is_reported(tmp_path):
    batches = dataclasses.replace(small_batches(), rows={"train": 192, "validation": 0})
    made = setting(tmp_path, batches=batches)
    assert finetune(network(), made) == {}
    assert evaluate(network(), made) == {}


def test_tensorboard_gets_losses_the_learning_rate_and_what_the_step_watches(tmp_path):
    with Trace(tmp_path / "log") as trace:
        finetune(network(), setting(tmp_path, trace=trace), watch=lambda: {"sparsity": {"dense": 0.25}})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "log"), {"tensors": 0}).Reload()
    assert set(events.Tags()["tensors"]) == {
        "train/loss",
        "train/accuracy",
        "train/learning_rate",
        "validation/loss",
        "validation/accuracy",
        "sparsity/dense",
    }
    assert [event.step for event in events.Tensors("validation/accuracy")] == [1, 2, 3]
    assert len(events.Tensors("sparsity/dense")) >= 3 * 4


def _run(folder: pathlib.Path, recipe: str, step: str, die_at: float) -> int:
    here = pathlib.Path(__file__).parent
    paths = os.pathsep.join(map(str, (ROOT, here)))
    command = [sys.executable, str(here / "killed.py"), str(folder), recipe, step, str(die_at)]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["prune+cluster+qat", "channels+lowrank"])
def test_a_killed_step_resumes_to_bit_equal_results_whichever_step_it_was(recipe, tmp_path):
    from .conftest import train_small

    train_small(tmp_path / "base")
    assert _run(tmp_path / "whole", recipe, "none", 0) == 0
    for step in recipe.split("+"):
        assert _run(tmp_path / "killed", recipe, step, 1.6) == -9
    assert _run(tmp_path / "killed", recipe, "none", 0) == 0
    for whole in sorted((tmp_path / "whole").iterdir()):
        other = tmp_path / "killed" / whole.name
        assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in whole.iterdir())
        assert (other / "compressed.json").read_text() == (whole / "compressed.json").read_text()
        with np.load(whole / "weights.npz") as ours, np.load(other / "weights.npz") as theirs:
            assert ours.files == theirs.files
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours.files)
