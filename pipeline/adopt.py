"""Adopt: a trained model takes the place of a configuration's model and training, so that its journey starts at compression.

MODEL.keras, a configuration's values or just data --adopt()--> the values of `trimline compress`
"""

from __future__ import annotations

import os
import pathlib
import re
from typing import Any

from components.errors import ConfigError
from components.options import BASE_ONLY
from pipeline.rules import Origin, Spot

# Of a training section these still say something about a model that is trained: how fine-tuning feeds it.
_KEPT = ("batch_size", "augmentation")


def adopt(data: dict[str, Any], origin: Origin, model: str | os.PathLike[str]) -> None:
    """Puts the trained model into `data`, under the model's own name, and takes the training out.

    Args:
      data: Values of a configuration, changed in place.
      origin: Changed with them, so that errors name the model.
      model: A `.keras` file, relative to the current folder.
    """
    file = pathlib.Path(model)
    spot = Spot(0, str(file), pathlib.Path.cwd())
    before, training = data.get("model"), data.get("train")
    outputs = before["outputs"] if isinstance(before, dict) and "outputs" in before else "auto"
    kept = {key: training[key] for key in _KEPT if key in training} if isinstance(training, dict) else {}
    new: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")[:64] or "model",
        "model": {"file": str(file), "outputs": outputs},
        "train": {**kept, "epochs": 0},
    }
    strategy = data.get("strategy")
    if isinstance(strategy, dict) and strategy.get("name") in BASE_ONLY:
        new["strategy"] = {}
    data.update(new)
    for key in ("name", "model"):
        for stale in [path for path in origin.spots if path[:1] == (key,)]:
            del origin.spots[stale]
        origin.spots[(key,)] = spot


def data_alone(path: pathlib.Path) -> dict[str, Any] | None:
    """The configuration of data that need no words: pictures in class folders, or an `.npz` file; None for other files.

    Raises:
      ConfigError: A table, whose label must be named.
    """
    if path.is_dir():
        return {"source": {"kind": "images", "train": str(path.absolute())}}
    if path.suffix == ".npz":
        return {"source": {"kind": "arrays", "train": str(path.absolute())}}
    if path.name.endswith((".csv", ".csv.gz")):
        raise ConfigError(
            f"--data {path}: a table needs a configuration that names its label; write one with 'trimline init adult my.yaml'."
        )
    return None
