"""Trainable: what a model must be for the training that is asked for; asked by `plan` before, and by `train` at its start."""

from __future__ import annotations

import contextlib

import keras

from components.errors import ModelError
from components.options import TrainOptions
from components.training.privacy import check_private
from components.training.rematerialize import rematerialized
from components.training.transfer import transferred


def check_trainable(model: keras.Model, options: TrainOptions) -> None:
    """Looks whether `model` can be trained as `options` say, and leaves it as it was.

    Raises:
      ConfigError: `transfer.frozen` names no layer, or leaves none to train.
      ModelError: Nothing can be trained; a layer mixes examples under `privacy`; no layer can be computed again.
    """
    if not options.epochs:
        return
    if not model.trainable_variables:
        raise ModelError(f"model '{model.name}' has no trainable weights; set layer.trainable = True on some layer.")
    with contextlib.ExitStack() as stack:
        if options.transfer is not None:
            stack.enter_context(transferred(model, options.transfer.model_copy(update={"lora": None})))
        if options.privacy is not None:
            check_private(model)
        if options.rematerialize:
            stack.enter_context(rematerialized(model))
