"""Distillation: a student learns from the answers of a teacher as well as from the labels.

Hinton et al. 2015, arXiv 1503.02531. Plain TensorFlow, since students train in Keras 3 and, compressed, in tf_keras.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from components.artifacts import Task
from components.errors import ContractError
from components.options import Distillation

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types

_SMALLEST = 1e-7  # probabilities below it are taken for it, as Keras does


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained model that answers.

    Attributes:
      answer: Inputs of one batch -> (batch, outputs); called inside the training step, under its strategy.
      outputs: 'logits' or 'probabilities'.
    """

    answer: Callable[[Tensor], Tensor]
    outputs: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
    """How a student listens to its teachers.

    Attributes:
      teachers: One or more; the probabilities (regression: values) of several are averaged.
      weight: Share of the teachers in the loss, in (0, 1].
      temperature: Divides the logits of both sides, above 0: the higher, the more the unlikely classes say.
      task: Of the student.
      outputs: What the student returns, 'logits' or 'probabilities'.
    """

    teachers: tuple[Teacher, ...]
    weight: float
    temperature: float
    task: Task
    outputs: str

    def answers(self, inputs: Tensor) -> Tensor:
        """The teachers' mean answer, float32 (batch, outputs), without gradient: probabilities at the temperature, or values."""
        said = [self._at_temperature(teacher.answer(inputs), teacher.outputs) for teacher in self.teachers]
        if self.task == "classification":
            said = [tf.nn.softmax(logits) for logits in said]
        return tf.stop_gradient(tf.add_n(said) / len(said))

    def distance(self, answers: Tensor, given: Tensor) -> Tensor:
        """How far the student is from its teachers, float32 (batch,).

        T^2 KL(teachers || student), both at temperature T: the square keeps the gradient, which falls with 1 / T^2,
        comparable to that of the labels. Regression: the squared error.

        Args:
          answers: What `answers` gave for a batch.
          given: What the student returned for it, (batch, outputs).
        """
        student = self._at_temperature(given, self.outputs)
        if self.task == "regression":
            return tf.reduce_sum(tf.square(student - answers), axis=-1)
        apart = tf.math.xlogy(answers, answers) - answers * tf.nn.log_softmax(student)
        return self.temperature**2 * tf.reduce_sum(apart, axis=-1)

    def mixed(self, hard: Tensor, distance: Tensor) -> Tensor:
        """(1 - weight) hard + weight distance, of two losses of one shape."""
        return (1 - self.weight) * hard + self.weight * tf.cast(distance, hard.dtype)

    def _at_temperature(self, values: Tensor, outputs: str) -> Tensor:
        """Logits over the temperature, up to a constant in each row; values of a regression as they are."""
        values = tf.cast(values, tf.float32)
        if self.task == "regression":
            return values
        return (tf.math.log(tf.maximum(values, _SMALLEST)) if outputs == "probabilities" else values) / self.temperature


def make_lesson(
    options: Distillation | None, teachers: Callable[[], tuple[Teacher, ...]], task: Task, outputs: str
) -> Lesson | None:
    """The lesson that `options` ask for, None without them.

    Args:
      options: Weight and temperature.
      teachers: Loads them; called only where there are options, under the scope of the student's strategy.
      task: Of the student.
      outputs: Of the student.

    Raises:
      ContractError: Nobody was handed over to teach.
    """
    if options is None:
        return None
    found = teachers()
    if not found:
        raise ContractError(
            "distill: one teacher at least was promised, got none; pass `teachers`, for instance load_teachers."
        )
    return Lesson(teachers=found, weight=options.weight, temperature=options.temperature, task=task, outputs=outputs)
