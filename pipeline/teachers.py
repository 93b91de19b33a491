"""Who teaches: the files or the model that `distill` names, of the base training and of compressed variants."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from components.artifacts import TrainedModel
from components.options import CompressDistillation, TrainDistillation
from pipeline.stage import Call

if TYPE_CHECKING:
    from pipeline.config import Config

TEACHER = "train teacher"
"""Name of the step that trains `train.distill.teacher_model`."""


def teachers(call: Call, section: str) -> Callable[[], tuple[Any, ...]]:
    """Loads whoever teaches in `train` or `compress`; asked only where the section says distill."""
    from components.training.teacher import load_teachers

    distill, like = getattr(call.config, section).distill, call.config.model
    files = teacher_files(distill)
    outputs = None
    if distill is not None and not files:
        trained = TrainedModel(call.takes["train" if section == "compress" else TEACHER])
        files, outputs = [trained.file], trained.facts["outputs"]
        like = like if section == "compress" else distill.teacher_model
    where = f"{section}.distill.teacher"
    return functools.partial(load_teachers, files, call.data.spec, like, where=where, outputs=outputs)


def teacher_files(distill: TrainDistillation | CompressDistillation | None) -> list[pathlib.Path]:
    """The files that teach; none where it is a model of the run, or nobody."""
    named = distill.teacher if distill else None
    return [] if named is None or named == "base" else [pathlib.Path(name) for name in named]


def teacher_config(config: Config) -> Config | None:
    """The configuration under which the teacher of the base training is trained: there, it is the model.

    So it is the very step of a run of that model alone, and is found in the store where there was one.
    """
    distill = config.train.distill
    if distill is None or distill.teacher_model is None:
        return None
    train = config.train.model_copy(update={"distill": None})
    return config.model_copy(update={"model": distill.teacher_model, "train": train})


def distill_facts(distill: TrainDistillation | CompressDistillation | None) -> dict[str, Any] | None:
    """For a fingerprint: files count by their content, which the plan adds, not by their paths."""
    if distill is None:
        return None
    return {**distill.model_dump(), "teacher": len(teacher_files(distill)) or "own"}
