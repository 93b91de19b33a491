"""Find rate: the loss of a short training whose learning rate rises shows which rates a model takes.

    TrainOptions, model, Batches --find_rate()--> Found --draw()--> a picture

The range test of Smith 2017, arXiv 1506.01186. Nothing that a run uses is changed.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from components.artifacts import Batches
from components.errors import ModelError
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.loop import Loop, Totals, make_loss
from components.training.model import outputs_of
from components.training.optimizer import make_optimizer
from components.training.prepared import prepared
from components.training.replicas import check_batch
from components.training.split import Split, beside_their_weights, whole_somewhere

LOWEST, HIGHEST = 1e-6, 10.0
UPDATES = 200
_MEMORY = 0.9  # of the moving average of the losses: one batch's is noise
_EXPLODED = 4.0  # times the lowest loss: whatever comes after says nothing
_MARGIN = 10.0


@dataclasses.dataclass(frozen=True)
class Found:
    """What the test saw, an entry for each update.

    Attributes:
      rates: Learning rates, rising.
      losses: Of the update's batch, before it.
      smoothed: Moving average of the losses, corrected for its start.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]

    @property
    def at_lowest(self) -> float:
        """The rate at which the smoothed loss was lowest; further up it rises again."""
        return self.rates[min(range(len(self.smoothed)), key=self.smoothed.__getitem__)]

    @property
    def suggested(self) -> float:
        """A tenth of `at_lowest`: well inside the rates that lower the loss."""
        return self.at_lowest / _MARGIN


class _Ramp(keras.optimizers.schedules.LearningRateSchedule):
    """LOWEST * (HIGHEST / LOWEST) ** (update / (updates - 1))."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def __call__(self, step: Any) -> Any:
        """The rate of update `step`, 0 is the first."""
        return LOWEST * tf.pow(HIGHEST / LOWEST, tf.cast(step, tf.float32) / max(1, self.updates - 1))

    def get_config(self) -> dict[str, Any]:
        """The arguments."""
        return {"updates": self.updates}


def find_rate(
    options: TrainOptions,
    build_model: Callable[[], keras.Model],
    model_options: ModelOptions,
    batches: Batches,
    *,
    strategy: tf.distribute.Strategy,
    seed: int,
    trace: Trace,
    updates: int = UPDATES,
    split: Split | None = None,
) -> Found:
    """Trains a fresh model for up to `updates` updates while the rate rises from LOWEST to HIGHEST; ends when the loss explodes.

    Args:
      options: Optimizer, batch size, smoothing, parts, and what is frozen, corrected or computed again as in the training's
        first epoch; schedule, precision, privacy and teachers play no part.
      build_model: Returns a built model; called under the strategy's scope.
      model_options: Says whether a classifier returns logits or probabilities.
      batches: The split train is read.
      strategy: See `pipeline.strategy`.
      seed: Fixes the order of the examples.
      trace: Hears progress; scalars by update.
      updates: Two at least.
      split: Places the layers on several devices.

    Raises:
      ConfigError: The batch does not divide by the replicas.
      ModelError: The loss is not finite from the first update on.
    """
    check_batch(options.batch_size, strategy.num_replicas_in_sync, "mirrored", accumulate=options.accumulate)
    with strategy.scope(), whole_somewhere(split):
        model = build_model()
    task = batches.spec.task
    loss = make_loss(task, outputs_of(model, model_options), options.label_smoothing)
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average = 0.0
    with prepared(model, options, split) as ready:
        with strategy.scope():
            flat = options.optimizer.model_copy(update={"schedule": "constant", "warmup_epochs": 0.0})
            optimizer = make_optimizer(flat, updates, 1, rate=_Ramp(updates))
            if ready.home is not None:
                beside_their_weights(optimizer)
            optimizer.build(ready.variables)
        loop = Loop(model, optimizer, loss, task, strategy, accumulate=options.accumulate, home=ready.home)
        iterator = loop.iterator(batches.training(options.batch_size, seed, 0))
        for number in range(updates):
            rate = float(optimizer.learning_rate)
            found = Totals(task, loop.advance(iterator, 1, Totals.START)).loss
            if not math.isfinite(found) or (smoothed and found > _EXPLODED * min(smoothed)):
                break
            average = _MEMORY * average + (1 - _MEMORY) * found
            rates.append(rate)
            losses.append(found)
            smoothed.append(average / (1 - _MEMORY ** (number + 1)))
            trace.progress(number + 1, updates, f"rate {rate:.2e} loss {smoothed[-1]:.3f}")
            for name, value in {"learning_rate": rate, "loss/train": found, "loss/smoothed": smoothed[-1]}.items():
                trace.scalar(name, value, number + 1)
    if not rates:
        raise ModelError(
            f"find-rate: the loss of model '{model.name}' is not finite at the first update, before any rate could matter; look for "
            "extreme values in the data."
        )
    return Found(rates, losses, smoothed)


def draw(found: Found, path: pathlib.Path, chosen: float) -> None:
    """Writes the picture, a PNG: the loss by the rate, with `chosen` (the rate of the configuration) and the suggestion."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(found.rates, found.losses, color="#a9d5d1", linewidth=1, label="loss of each batch")
    axes.plot(found.rates, found.smoothed, color="#0b766f", linewidth=2, label="moving average")
    axes.axvline(found.suggested, color="#1d2330", linewidth=1, label=f"suggested {found.suggested:.1e}")
    axes.axvline(chosen, color="#1d2330", linewidth=1, linestyle=":", label=f"as configured {chosen:.1e}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
    axes.set_ylim(top=1.1 * max(found.smoothed))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
