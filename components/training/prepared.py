"""Prepared: a model as an update computes it; the one place where that is said, for training, range tests and lowering."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from components.options import TrainOptions
from components.training.fused import fused_normalization
from components.training.rematerialize import rematerialized
from components.training.split import Split, placed
from components.training.transfer import Stages, transferred

_NAMED = 5  # layers, in one line


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What was done to a model.

    Attributes:
      stages: What trains when; None where all of it does always.
      variables: All that are trained in some epoch.
      fused: Batch normalizations on the fused kernel.
      home: Device of what belongs to no layer, the loss above all; None leaves it to TensorFlow.
      told: For the user, a line each.
    """

    stages: Stages | None
    variables: list[Any]
    fused: int
    home: str | None
    told: tuple[str, ...]


@contextlib.contextmanager
def prepared(model: keras.Model, options: TrainOptions, split: Split | None = None) -> Iterator[Prepared]:
    """Inside the block layers of `model` are frozen, corrected, fused, computed again and placed as `options` and `split` say.

    After it the model has its own layers, on their own devices, with what was learned.

    Raises:
      ConfigError: A pattern names no layer, or nothing is left to train; the model is none that can be split.
      ModelError: No layer can be computed again.
    """
    told = []
    with contextlib.ExitStack() as stack:
        stages = stack.enter_context(transferred(model, options.transfer)) if options.transfer else None
        fused = stack.enter_context(fused_normalization(model))
        if options.rematerialize:
            again = stack.enter_context(rematerialized(model))
            named = ", ".join(again[:_NAMED]) + (", ..." if len(again) > _NAMED else "")
            told.append(f"rematerialized: {len(again)} layers, {named}")
        home = None
        if split is not None:
            there = stack.enter_context(placed(model, split, options))
            told.append(f"split: {there}")
            home = there.home
        yield Prepared(
            stages, model.trainable_variables if stages is None else stages.variables, fused, home, tuple(told)
        )
