import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import DataSpec
from components.distillation import Lesson, Teacher
from components.errors import ConfigError, ContractError
from components.options import ModelOptions, OptimizerOptions, TrainDistillation, TrainOptions
from components.tracing import Trace
from components.training.loop import Loop, Totals, make_loss
from components.training.model import build
from components.training.teacher import load_teachers
from components.training.train import train

SPEC = DataSpec(task="classification", input_name="features", input_shape=(6,), labels=("a", "b", "c"))
MLP = ModelOptions(name="mlp", options={"units": [16]})
DISTILL = TrainDistillation(teacher=["teacher.keras"], weight=0.8, temperature=2.0)


def network(outputs: int = 3, width: int = 6, activation: str | None = None) -> keras.Model:
    keras.utils.set_random_seed(1)
    rows = keras.Input((width,))
    return keras.Model(rows, keras.layers.Dense(outputs, activation=activation)(rows))


def saved(folder, model: keras.Model, name: str = "teacher.keras"):
    folder.mkdir(exist_ok=True)
    model.save(folder / name)
    return folder / name


def load(*files, spec=SPEC):
    return load_teachers(files, spec, MLP, where="train.distill.teacher")


# --- who may teach -----------------------------------------------------------------------------------------------


def test_a_teacher_answers_as_the_saved_model_does_and_is_known_by_its_last_layer(tmp_path):
    soft, plain = network(activation="softmax"), network()
    teachers = load(saved(tmp_path, soft, "soft.keras"), saved(tmp_path, plain, "plain.keras"))
    assert [teacher.outputs for teacher in teachers] == ["probabilities", "logits"]
    x = np.random.default_rng(0).random((4, 6), np.float32)
    for teacher, model in zip(teachers, (soft, plain), strict=True):
        np.testing.assert_array_equal(teacher.answer(x), model(x))


def test_what_the_student_says_of_its_outputs_is_not_taken_for_the_teachers(tmp_path):
    options = MLP.model_copy(update={"outputs": "probabilities"})
    file = saved(tmp_path, network())
    assert load_teachers([file], SPEC, options, where="w")[0].outputs == "logits"
    assert load_teachers([file], SPEC, options, where="w", outputs="probabilities")[0].outputs == "probabilities"


@pytest.mark.parametrize(("model", "got"), [((4, 6), r"\[\(6,\), \(4,\)\]"), ((3, 5), r"\[\(5,\), \(3,\)\]")])
def test_a_teacher_of_other_data_is_refused_before_training(tmp_path, model, got):
    with pytest.raises(
        ContractError,
        match=rf"train\.distill\.teacher: teacher teacher\.keras must take \(6,\) and return \(3,\) as the data have it, got {got}; name one",
    ):
        load(saved(tmp_path, network(*model)))


def test_a_teacher_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.keras must be an existing \.keras file"):
        load(tmp_path / "gone.keras")


# --- what it does ------------------------------------------------------------------------------------------------


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Six numbers; the class is the largest of the first three."""
    x = np.random.default_rng(seed).normal(size=(count, 6)).astype(np.float32)
    return x, np.argmax(x[:, :3], -1).astype(np.int32)


def wise(folder):
    """A teacher that knows the rule."""
    model = network()
    model.set_weights([np.eye(6, 3, dtype=np.float32) * 4, np.zeros(3, np.float32)])
    return saved(folder, model)


def run(folder, batches, distill, file, *, strategy=None, trace=None, seed=3, epochs=4, **more):
    folder.mkdir(exist_ok=True)
    options = TrainOptions(epochs=epochs, batch_size=16, distill=distill, **more)
    strategy = strategy or tf.distribute.get_strategy()
    builder = functools.partial(build, MLP, SPEC, seed=seed)
    teachers = functools.partial(load_teachers, [file], SPEC, MLP, where="train.distill.teacher")
    return train(
        options, builder, MLP, batches, folder, strategy=strategy, seed=seed, trace=trace or Trace(), teachers=teachers
    )


def weights_of(made):
    return keras.saving.load_model(made.file).get_weights()


@pytest.fixture
def few(make_batches):
    """32 labelled rows, every fourth label wrong."""
    x, y = draw(32, 0)
    y[::4] = (y[::4] + 1) % 3
    return make_batches(SPEC, train=(x, y), validation=draw(400, 1))


@pytest.mark.slow  # three trainings; test_finetune.py has the fast one
def test_a_good_teacher_makes_up_for_few_and_partly_wrong_labels(few, tmp_path):
    file, rates = wise(tmp_path / "teacher"), OptimizerOptions(learning_rate=0.02)
    scores = {
        (taught, seed): run(
            tmp_path / f"{taught}-{seed}", few, DISTILL if taught else None, file, seed=seed, epochs=40, optimizer=rates
        ).facts["validation"]["accuracy"]
        for taught in (True, False)
        for seed in (1, 2)
    }
    for seed in (1, 2):
        assert scores[True, seed] > scores[False, seed] + 0.05, scores


def test_one_update_is_that_of_the_mixed_loss_and_the_sums_are_those_of_the_labels():
    """SGD at rate 1: the weights move by the gradient, which TensorFlow takes of the formula written out."""
    x, y = (tf.constant(part) for part in draw(8, 0))
    teacher, model = network(), network(activation=None)
    teacher.set_weights([each + 0.5 for each in teacher.get_weights()])
    kernel, bias = (tf.constant(each) for each in model.get_weights())
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        logits = x @ kernel + bias
        p, log_q = tf.nn.softmax(teacher(x) / 3.0), tf.nn.log_softmax(logits / 3.0)
        labels = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        apart = 9.0 * tf.reduce_mean(tf.reduce_sum(p * (tf.math.log(p) - log_q), -1))
        loss = 0.75 * labels + 0.25 * apart
    expected = kernel - tape.gradient(loss, kernel)
    lesson = Lesson(
        teachers=(Teacher(answer=teacher, outputs="logits"),),
        weight=0.25,
        temperature=3.0,
        task="classification",
        outputs="logits",
    )
    optimizer = keras.optimizers.SGD(1.0)
    optimizer.build(model.trainable_variables)
    loop = Loop(
        model, optimizer, make_loss("classification", "logits"), "classification", tf.distribute.get_strategy(), lesson
    )
    sums = loop.advance(loop.iterator(tf.data.Dataset.from_tensors((x, y))), 1, Totals.START)
    np.testing.assert_allclose(model.get_weights()[0], expected, atol=1e-6)
    assert sums[0] / sums[2] == pytest.approx(float(labels), rel=1e-5)


def test_a_taught_training_that_was_stopped_ends_in_the_same_bits(few, tmp_path):
    file = wise(tmp_path / "teacher")

    def interrupt(done, total, note):
        if done > 2.4:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole", few, DISTILL, file)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", few, DISTILL, file, trace=Trace(on_progress=interrupt))
    cut = run(tmp_path / "cut", few, DISTILL, file)
    assert all(np.array_equal(a, b) for a, b in zip(weights_of(whole), weights_of(cut), strict=True))
    untaught = run(tmp_path / "untaught", few, None, file)
    assert not np.array_equal(weights_of(whole)[0], weights_of(untaught)[0])


def test_two_mirrored_devices_learn_from_a_teacher_what_one_learns(few, tmp_path, mirrored):
    file, rates = wise(tmp_path / "teacher"), OptimizerOptions(name="sgd", learning_rate=0.1)
    one = run(tmp_path / "one", few, DISTILL, file, optimizer=rates)
    two = run(tmp_path / "two", few, DISTILL, file, optimizer=rates, strategy=mirrored)
    for a, b in zip(weights_of(one), weights_of(two), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
