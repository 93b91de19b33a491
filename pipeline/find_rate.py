"""Find rate: which learning rates the model of a configuration takes; beside the journey, nothing of which it changes."""

from __future__ import annotations

import functools
import pathlib
from typing import TYPE_CHECKING

from components.artifacts import PreparedData, write_json
from components.tracing import Trace
from pipeline.config import Config
from pipeline.plan import make_plan
from pipeline.runner import run_folder
from pipeline.screen import Screen
from pipeline.walk import Walk

if TYPE_CHECKING:
    from components.training.find_rate import Found

PICTURE = "find_rate.png"


def find_rate(config: Config, screen: Screen) -> tuple[Found, pathlib.Path]:
    """Prepares the data if need be and makes the test.

    Returns:
      What was found, and the picture, in the run's folder; `find_rate.json` beside it has the numbers.

    Raises:
      TrimlineError: See the stages preprocess and train.
    """
    from components.data.dataset import make_batches
    from components.training.find_rate import draw, find_rate
    from components.training.model import build
    from pipeline.strategy import make_split, make_strategy

    folder, walk = run_folder(config), Walk(folder=run_folder(config), screen=screen)
    walk.go(make_plan(config, until="preprocess"))
    data = PreparedData(walk.done["preprocess"])
    with (
        screen.step("find-rate", 1),
        Trace(folder / "tensorboard" / "find-rate", screen.progress, screen.warn) as trace,
    ):
        found = find_rate(
            config.train,
            functools.partial(build, config.model, data.spec, seed=config.seed),
            config.model,
            make_batches(data, augmentation=config.train.augmentation),
            strategy=make_strategy(config.strategy),
            seed=config.seed,
            trace=trace,
            split=make_split(config.strategy),
        )
    write_json(
        folder / "find_rate.json",
        {"rates": found.rates, "losses": found.losses, "smoothed": found.smoothed, "suggested": found.suggested},
    )
    draw(found, folder / PICTURE, config.train.optimizer.learning_rate)
    return found, folder / PICTURE
