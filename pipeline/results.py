"""`results.json`: every variant, measured; the one that was picked, and why. Format: docs/results-format.md."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Collection, Mapping
from typing import Any

from components.artifacts import PreparedData, read_json, write_json
from components.errors import ConstraintError
from components.machine import processor
from components.tracing import Trace

FILE = "results.json"
SCHEMA = 1
PACKAGES = (
    "tensorflow",
    "keras",
    "tf-keras",
    "tensorflow-model-optimization",
    "ai-edge-litert",
    "apache-beam",
    "numpy",
)


@dataclasses.dataclass(frozen=True)
class Results:
    """A finished run, as it lies in `workspace/<run>`.

    Attributes:
      folder: The run's folder.
    """

    folder: pathlib.Path

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """The content of results.json."""
        return read_json(self.folder / FILE)

    @property
    def variants(self) -> list[dict[str, Any]]:
        """Every variant in the order of the configuration, float32 first."""
        return self.data["variants"]

    @property
    def selected(self) -> dict[str, Any] | None:
        """The variant that was picked; None where none met the constraints."""
        return next((each for each in self.variants if each["recipe"] == self.data["selected"]), None)

    @property
    def report(self) -> pathlib.Path:
        """The page to look at."""
        return self.folder / "report.html"

    @property
    def bundle(self) -> pathlib.Path | None:
        """The folder that ships; None where nothing was picked."""
        return self.folder / "bundle" if self.selected else None

    @property
    def tensorboard(self) -> pathlib.Path:
        """The log folder for `tensorboard --logdir`."""
        return self.folder / "tensorboard"


def write_results(
    folder: pathlib.Path,
    *,
    name: str,
    select_options: Any,
    data: PreparedData,
    training: Mapping[str, Any],
    measured: Mapping[str, dict[str, Any]],
    files: Mapping[str, str],
    failures: Mapping[str, str],
    skipped: Collection[str],
    trials: Mapping[str, str],
    seconds: Mapping[str, float],
    trace: Trace,
) -> None:
    """Joins the measured variants, picks one, and writes results.json into `folder`.

    Args:
      folder: Target.
      name: The run.
      select_options: A `SelectOptions`.
      data: For the task and the number of examples.
      training: What the base training left in `trained.json`.
      measured: Recipe -> its measurements, in the user's order.
      files: Recipe -> its `.tflite`, relative to the workspace.
      failures: Recipe -> why it was not.
      skipped: Those of them whose time was up.
      trials: Recipe -> why a search tried it; empty where the user named the recipes.
      seconds: Step -> how long it worked.
      trace: For the selection's TensorBoard run.
    """
    from components.delivery.select import remarks, select

    variants = _variants(measured, files, failures, skipped, trials)
    for line in (said := remarks(variants)):
        trace.warn(line)
    try:
        picked = select(variants, select_options)
        selected, because = picked.recipe, picked.because
    except ConstraintError as error:
        selected, because = None, str(error)
    spec = data.spec
    value = {
        "schema": SCHEMA,
        "run": name,
        "task": spec.task,
        "metric": "accuracy" if spec.task == "classification" else "rmse",
        "examples": {split: data.rows(split) for split in data.manifest["splits"]},
        "environment": environment(),
        "training": dict(training),
        "seconds": {step: round(value, 2) for step, value in seconds.items()},
        "variants": variants,
        "constraints": select_options.model_dump(),
        "selected": selected,
        "selected_because": because,
        "remarks": said,
    }
    trace.text("selected", f"**{selected}** {because}" if selected else because)
    for variant in variants:
        if variant["status"] == "ok":
            trace.scalar(f"chosen/{variant['recipe']}", float(variant["recipe"] == selected))
    write_json(folder / FILE, value)


def _variants(
    measured: Mapping[str, dict[str, Any]],
    files: Mapping[str, str],
    failures: Mapping[str, str],
    skipped: Collection[str],
    trials: Mapping[str, str],
) -> list[dict[str, Any]]:
    """The entries of results.json: those measured, with their drops, then those that could not be."""
    from components.delivery.select import drops, failed

    entries = [{**variant, "file": files[recipe]} for recipe, variant in measured.items()]
    absent = [
        failed(recipe, reason, "skipped" if recipe in skipped else "failed") for recipe, reason in failures.items()
    ]
    return [
        {**variant, **({"tried_because": trials[variant["recipe"]]} if variant["recipe"] in trials else {})}
        for variant in drops(entries) + absent
    ]


def environment() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
