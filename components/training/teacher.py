"""Teacher: trained Keras 3 models whose answers a student learns from; see `components.distillation`.

.keras files, DataSpec --load_teachers()--> Teachers
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import keras

from components.artifacts import DataSpec
from components.distillation import Teacher
from components.errors import ContractError
from components.options import ModelOptions
from components.training.model import load, outputs_of


def load_teachers(
    files: Sequence[pathlib.Path], spec: DataSpec, options: ModelOptions, *, where: str, outputs: str | None = None
) -> tuple[Teacher, ...]:
    """Loads models and checks that they can teach.

    Args:
      files: What `keras.Model.save` wrote.
      spec: Of the student's data: a teacher takes the same inputs and returns as many outputs.
      options: Of the student; a builder's module is imported first, as it may register the teacher's layers.
      where: The option that names the files, for messages.
      outputs: 'logits' or 'probabilities'; None reads it off each teacher's last layer.

    Returns:
      One a file; their variables are placed by the strategy in whose scope this is called.

    Raises:
      ConfigError: A file is absent.
      ModelError: A file cannot be loaded.
      ContractError: Inputs or outputs are not those of the data.
    """
    return tuple(_teacher(file, spec, options, where, outputs) for file in files)


def _teacher(file: pathlib.Path, spec: DataSpec, options: ModelOptions, where: str, outputs: str | None) -> Teacher:
    model = load(file, options)
    model.trainable = False
    _check(model, spec, f"{where}: teacher {file.name}")
    read = outputs_of(model, options.model_copy(update={"outputs": "auto"}))
    return Teacher(answer=lambda inputs: model(inputs, training=False), outputs=outputs or read)


def _check(model: keras.Model, spec: DataSpec, where: str) -> None:
    shapes = [tuple(each.shape[1:]) for each in (*(model.inputs or ()), *(model.outputs or ()))]
    wanted = [tuple(spec.input_shape), (spec.outputs,)]
    if shapes != wanted:
        raise ContractError(
            f"{where} must take {wanted[0]} and return {wanted[1]} as the data have it, got {shapes}; "
            "name one that was trained on data of this shape."
        )
