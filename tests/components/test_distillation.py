"""The loss of distillation against its formula, in NumPy and in float64."""

import numpy as np
import pytest
import tensorflow as tf

from components.distillation import Lesson, Teacher, make_lesson
from components.errors import ContractError
from components.options import Distillation


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    return raised / raised.sum(-1, keepdims=True)


def lesson(*teachers: Teacher, task="classification", outputs="logits", weight=0.3, temperature=4.0) -> Lesson:
    return Lesson(teachers=teachers, weight=weight, temperature=temperature, task=task, outputs=outputs)


def says(values: np.ndarray, outputs: str = "logits") -> Teacher:
    return Teacher(answer=lambda _: tf.constant(values, tf.float32), outputs=outputs)


random = np.random.default_rng(0)
TEACHER, OTHER, STUDENT = (random.normal(size=(5, 4)) * 3 for _ in range(3))
INPUTS = np.zeros((5, 1))


def divergence(teacher: np.ndarray, student: np.ndarray, temperature: float) -> np.ndarray:
    """T^2 KL(teacher || student) of probabilities that are at the temperature already."""
    return temperature**2 * np.sum(teacher * (np.log(teacher) - np.log(student)), -1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("outputs", ["logits", "probabilities"])
@pytest.mark.parametrize("taught", ["logits", "probabilities"])
def test_the_distance_is_its_formula_whatever_the_two_return(outputs, taught, temperature):
    expected = divergence(softmax(TEACHER / temperature), softmax(STUDENT / temperature), temperature)
    teacher = says(TEACHER if taught == "logits" else softmax(TEACHER), taught)
    made = lesson(teacher, outputs=outputs, temperature=temperature)
    given = tf.constant(STUDENT if outputs == "logits" else softmax(STUDENT), tf.float32)
    np.testing.assert_allclose(made.distance(made.answers(INPUTS), given), expected, rtol=2e-5)


def test_several_teachers_are_averaged_as_probabilities_at_the_temperature():
    made = lesson(says(TEACHER), says(softmax(OTHER), "probabilities"))
    mean = (softmax(TEACHER / 4) + softmax(OTHER / 4)) / 2
    np.testing.assert_allclose(made.answers(INPUTS), mean, rtol=1e-5)


def test_regression_learns_the_squared_distance_to_the_mean_value():
    made = lesson(says(np.array([[1.0], [2.0]])), says(np.array([[3.0], [2.0]])), task="regression")
    answers = made.answers(INPUTS)
    np.testing.assert_allclose(answers, [[2.0], [2.0]])
    np.testing.assert_allclose(made.distance(answers, tf.constant([[0.5], [5.0]])), [2.25, 9.0])


def test_labels_and_teacher_share_the_loss_by_the_weight():
    np.testing.assert_allclose(lesson().mixed(tf.constant([10.0, 0.0]), tf.constant([0.0, 20.0])), [7.0, 6.0])


def test_a_probability_of_zero_costs_much_but_stays_finite():
    sure = np.array([[1.0, 0.0]])
    made = lesson(says(sure, "probabilities"), outputs="probabilities", temperature=1.0)
    distance = made.distance(made.answers(INPUTS), tf.constant(1 - sure, tf.float32))
    np.testing.assert_allclose(distance, [-np.log(1e-7)], rtol=1e-3)


def test_the_gradient_is_that_of_finite_differences_and_does_not_reach_the_teacher():
    """A tiny model with one weight matrix, against central differences of the formula in float64."""
    x = random.normal(size=(5, 3))
    weights, teaching = random.normal(size=(3, 4)), tf.Variable(TEACHER, dtype=tf.float32)
    made = lesson(Teacher(answer=lambda _: teaching * 1.0, outputs="logits"), temperature=2.0)
    variable = tf.Variable(weights, dtype=tf.float32)
    with tf.GradientTape() as tape:
        distance = made.distance(made.answers(INPUTS), tf.constant(x, tf.float32) @ variable)
        loss = tf.reduce_mean(made.mixed(tf.zeros(5), distance))
    gradient, none = tape.gradient(loss, [variable, teaching])
    assert none is None

    def value(w: np.ndarray) -> float:
        return 0.3 * divergence(softmax(TEACHER / 2), softmax(x @ w / 2), 2.0).mean()

    for place in np.ndindex(*weights.shape):
        step = np.zeros_like(weights)
        step[place] = 1e-5
        slope = (value(weights + step) - value(weights - step)) / 2e-5
        assert gradient.numpy()[place] == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_without_options_nobody_is_asked_and_with_them_somebody_must_be_there():
    def never() -> tuple[Teacher, ...]:
        raise AssertionError("loaded for nothing")

    assert make_lesson(None, never, "classification", "logits") is None
    made = make_lesson(Distillation(weight=0.25, temperature=3.0), lambda: (says(TEACHER),), "classification", "logits")
    assert made is not None
    assert (made.weight, made.temperature, len(made.teachers)) == (0.25, 3.0, 1)
    with pytest.raises(ContractError, match=r"^distill: one teacher at least was promised, got none; pass `teachers`"):
        make_lesson(Distillation(), tuple, "classification", "logits")
