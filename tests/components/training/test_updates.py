"""Updates that the training stage makes, against their textbook formulas in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import DataSpec
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.train import train

ROWS, WIDTH, CLASSES = 20, 4, 3
UPDATES = 3


def drawn():
    rng = np.random.default_rng(5)
    return rng.normal(size=(ROWS, WIDTH)), rng.integers(0, CLASSES, ROWS), rng.normal(size=(ROWS, 1))


def trained(folder, make_batches, task, optimizer, build, **options):
    """Weights after UPDATES updates on one batch, the whole data."""
    x, classes, values = drawn()
    classification = task == "classification"
    spec = DataSpec(
        task=task, input_name="x", input_shape=(WIDTH,), labels=tuple("abc") if classification else ()
    )  # fmt: skip
    y = classes.astype("int32") if classification else values.astype("float32")
    batches = make_batches(spec, train=(x.astype("float32"), y))
    made = train(
        TrainOptions(epochs=UPDATES, batch_size=ROWS, optimizer=optimizer, **options),
        build,
        ModelOptions(name="linear"),
        batches,
        folder,
        strategy=tf.distribute.get_strategy(),
        seed=0,
        trace=Trace(),
    )
    return [each.astype(float) for each in keras.saving.load_model(made.file).get_weights()]


def linear(outputs):
    keras.utils.set_random_seed(2)
    inputs = keras.Input((WIDTH,))
    return keras.Model(inputs, keras.layers.Dense(outputs, name="logits")(inputs))


def softmax(logits):
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def cross_entropy_gradients(kernel, bias, smoothing=0.0):
    """Of mean(-sum(target * log softmax(x W + b))) by W and b."""
    x, classes, _ = drawn()
    target = np.eye(CLASSES)[classes] * (1 - smoothing) + smoothing / CLASSES
    error = (softmax(x @ kernel + bias) - target) / ROWS
    return [x.T @ error, error.sum(0)]


def squared_error_gradients(kernel, bias):
    """Of mean((x W + b - y)^2) by W and b."""
    x, _, values = drawn()
    error = 2 * (x @ kernel + bias - values) / ROWS
    return [x.T @ error, error.sum(0)]


def sgd(rate, momentum=0.0, decay=0.0):
    """v = momentum v - rate g; w = w + v, after the kernel alone shrank by rate * decay."""
    speed = [0.0, 0.0]

    def update(weights, gradients, number):
        shrunk = [weights[0] * (1 - rate * decay), weights[1]]
        for place, gradient in enumerate(gradients):
            speed[place] = momentum * speed[place] - rate * gradient
        return [weight + each for weight, each in zip(shrunk, speed, strict=True)]

    return update


def adam(rate, decay=0.0):
    """Kingma and Ba 2015, arXiv 1412.6980, in the order of computation that ends their section 2, where the small constant
    is the paper's epsilon hat; the decay as in Loshchilov and Hutter 2019, arXiv 1711.05101.
    """
    first, second = [0.0, 0.0], [0.0, 0.0]

    def update(weights, gradients, number):
        made = []
        for place, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
            first[place] = 0.9 * first[place] + 0.1 * gradient
            second[place] = 0.999 * second[place] + 0.001 * gradient**2
            length = rate * np.sqrt(1 - 0.999**number) / (1 - 0.9**number)
            pull = rate * decay * weight if place == 0 else 0.0
            made.append(weight - length * first[place] / (np.sqrt(second[place]) + 1e-7) - pull)
        return made

    return update


def by_formula(outputs, gradients, update):
    weights = [each.astype(float) for each in linear(outputs).get_weights()]
    for number in range(1, UPDATES + 1):
        weights = update(weights, gradients(*weights), number)
    return weights


@pytest.mark.parametrize(
    ("optimizer", "update"),
    [
        ({"name": "sgd", "learning_rate": 0.3}, lambda: sgd(0.3)),
        ({"name": "sgd", "learning_rate": 0.3, "momentum": 0.9}, lambda: sgd(0.3, 0.9)),
        ({"name": "sgd", "learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.1}, lambda: sgd(0.3, 0.9, 0.1)),
        ({"name": "adam", "learning_rate": 0.05}, lambda: adam(0.05)),
        ({"name": "adamw", "learning_rate": 0.05, "weight_decay": 0.2}, lambda: adam(0.05, 0.2)),
    ],
    ids=["sgd", "momentum", "decay", "adam", "adamw"],
)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_updates_follow_the_textbook(task, optimizer, update, make_batches, tmp_path):
    outputs, gradients = (
        (CLASSES, cross_entropy_gradients) if task == "classification" else (1, squared_error_gradients)
    )
    ours = trained(tmp_path, make_batches, task, optimizer, lambda: linear(outputs))
    before = linear(outputs).get_weights()
    for mine, theirs, start in zip(ours, by_formula(outputs, gradients, update()), before, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)
        assert np.abs(mine - start).min() > 1e-4  # every weight has moved by far more than the tolerance


def test_smoothed_labels_give_the_gradient_of_the_mixed_target(make_batches, tmp_path):
    rates = {"name": "sgd", "learning_rate": 0.3}
    ours = trained(tmp_path, make_batches, "classification", rates, lambda: linear(CLASSES), label_smoothing=0.2)
    expected = by_formula(CLASSES, lambda *weights: cross_entropy_gradients(*weights, smoothing=0.2), sgd(0.3))
    for mine, theirs in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def network(dtype="float32"):
    """Smooth, so that differences converge; batch normalization, so that rows depend on each other."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((WIDTH,), dtype=dtype)
    x = keras.layers.Dense(5, "tanh", dtype=dtype, kernel_regularizer=keras.regularizers.L2(0.05))(inputs)
    x = keras.layers.BatchNormalization(dtype=dtype)(x)
    x = keras.layers.Reshape((5, 1), dtype=dtype)(x)
    x = keras.layers.Conv1D(2, 3, activation="softplus", dtype=dtype)(x)
    x = keras.layers.Flatten(dtype=dtype)(x)
    return keras.Model(inputs, keras.layers.Dense(CLASSES, dtype=dtype)(x))


def test_gradients_are_the_differences_of_the_loss(make_batches, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "UPDATES", 1)
    rates = {"name": "sgd", "learning_rate": 1.0}  # one update moves each weight by its gradient
    start = [each.astype(float) for each in network().get_weights()]
    moved = trained(tmp_path, make_batches, "classification", rates, network)
    exact = network("float64")
    x, classes, _ = drawn()

    def loss(weights):
        exact.set_weights(weights)
        logits = exact(x.astype("float32").astype(float), training=True).numpy()
        return -np.log(softmax(logits)[np.arange(ROWS), classes]).mean() + 0.05 * np.square(weights[0]).sum()

    names = [variable.name for variable in exact.variables]
    for place, name in enumerate(names):
        if name.startswith("moving"):
            continue
        found = np.empty_like(start[place])
        for index in np.ndindex(found.shape):
            sides = []
            for step in (1e-5, -1e-5):
                weights = [each.copy() for each in start]
                weights[place][index] += step
                sides.append(loss(weights))
            found[index] = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(start[place] - moved[place], found, rtol=1e-3, atol=2e-6, err_msg=name)
