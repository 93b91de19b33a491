"""Auto: carries a search for recipes out, trial by trial, within its budget.

    config --search()--> config with the recipes that were tried

What to try is decided by `pipeline.search`; here are time and the store. A trial costs what its steps took when they were
made, in this run or an earlier one, so the same command with everything in the store walks the same way and does nothing,
and one with a larger budget goes on where this one ended.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable

from components.artifacts import Measured, PreparedData
from components.delivery.select import REFERENCE, drops
from components.errors import BudgetError
from components.fields import in_seconds
from pipeline.config import Config
from pipeline.plan import Plan, Step, make_plan
from pipeline.search import Proposal, Trial, propose, trial_of
from pipeline.walk import PER_RECIPE, Walk

# Seconds of an epoch of fine-tuning over one of the base training, before any was seen: wrappers cost, and a twin trains
# faster than the Keras 3 model (benchmarks/train_overhead.py, docs/results.md).
_SLOWER = {"channels": 0.8, "lowrank": 1.0, "prune": 1.0, "cluster": 1.5, "qat": 2.0}
_EXPORT = 10.0  # of integers, before any was seen: two conversions and the calibration
_TRAINING_RUNS = 4.0  # what an example costs in training, over the latency of its file


def search(config: Config, walk: Walk) -> Config:
    """Tries recipes until the budget is spent or nothing better is in sight.

    Args:
      config: With `compress.recipes: auto`.
      walk: Nothing walked yet; knows the artifacts of every trial afterwards, and why each was tried.

    Returns:
      The configuration with the recipes that were tried, float32 first, for the stages that follow.
    """
    base = make_plan(config, until="measure")
    walk.go(base)
    clock = _Clock(config, walk, base)
    tried: list[str] = []
    while True:
        proposals = propose(_trials(config, walk, tried), config.select, clock.expected)
        fitting = next((each for each in proposals if clock.fits(each.recipe)), None)
        if fitting is None or clock.cut(proposals[0].recipe):
            if proposals:
                tried.append(proposals[0].recipe)
                _skip(config, walk, tried, proposals[0], clock)
            return _with(config, tried)
        tried.append(fitting.recipe)
        walk.trials[fitting.recipe] = fitting.why
        plan = make_plan(_with(config, tried), until="measure")
        left = datetime.timedelta(seconds=round(clock.left))
        walk.screen.trial(fitting.recipe, fitting.why, f"{left} of {config.compress.budget} left")
        walk.pulse = clock.alarm(plan)
        walk.go(plan)
        walk.pulse = lambda: None
        clock.add(plan)
        if fitting.recipe in walk.failures and clock.rang:
            walk.skipped.append(fitting.recipe)
            return _with(config, tried)


def _with(config: Config, recipes: list[str]) -> Config:
    compress = config.compress.model_copy(update={"recipes": [REFERENCE, *recipes]})
    return config.model_copy(update={"compress": compress})


def _skip(config: Config, walk: Walk, tried: list[str], proposal: Proposal, clock: _Clock) -> None:
    """The next trial does not fit: it is recorded as one that was not made."""
    walk.trials[proposal.recipe] = proposal.why
    plan = make_plan(_with(config, tried), until="measure")
    first = next(step for step in plan.steps if step.name not in walk.done and not step.lazy)
    walk.lose(first, clock.up)
    walk.go(plan)
    walk.skipped.append(proposal.recipe)


def _trials(config: Config, walk: Walk, tried: list[str]) -> list[Trial]:
    names = [each for each in (REFERENCE, *tried) if f"measure {each}" in walk.done]
    variants = {
        each["recipe"]: each for each in drops([Measured(walk.done[f"measure {name}"]).variant for name in names])
    }
    none = {"status": "failed"}
    return [
        trial_of(variants.get(name, {**none, "recipe": name}), config.select, skipped=name in walk.skipped)
        for name in tried
    ]


class _Clock:
    """What trials took, what they are expected to take, and what is left of the budget. Seconds throughout."""

    def __init__(self, config: Config, walk: Walk, base: Plan) -> None:
        self.config, self.walk, self.store = config, walk, base.store
        self.budget = in_seconds(config.compress.budget)
        self.base = {step.name for step in base.steps}
        self.spent = 0.0
        self.counted: set[str] = set()
        self.rang = False
        self._took = {step.name: self.store.seconds(step.key) for step in base.steps}
        self._epochs: dict[str, list[float]] = {}  # step kind -> seconds an epoch
        self._exports: list[float] = []
        self._steps: dict[str, list[Step]] = {}  # recipe -> its steps
        self._epoch = self._base_epoch()

    @property
    def left(self) -> float:
        return self.budget - self.spent

    @property
    def up(self) -> BudgetError:
        """Said of a trial that does not fit, begun or not: a rerun must say the same."""
        return BudgetError(
            f"the budget of {self.config.compress.budget} does not hold it; raise --budget, and the search goes on from here."
        )

    def alarm(self, plan: Plan) -> Callable[[], None]:
        """A pulse that ends the trial when the budget is spent; what an earlier attempt took counts."""
        before = sum(self.store.spent(step.key) for step in plan.steps if step.name not in self.base | self.counted)
        end = time.monotonic() + self.left - before

        def pulse() -> None:
            if time.monotonic() > end:
                self.rang = True
                raise self.up

        return pulse

    def add(self, plan: Plan) -> None:
        """Counts what the steps of a trial took, cut ones too."""
        for step in plan.steps:
            if step.name in self.base | self.counted:
                continue
            if step.name in self.walk.done:
                self.counted.add(step.name)
                seconds = self.store.seconds(step.key)
                self.spent += seconds
                self._learn(step, seconds)
            elif step.name in self.walk.lost:
                self.counted.add(step.name)
                self.spent += self.store.spent(step.key)

    def _learn(self, step: Step, seconds: float) -> None:
        assert step.recipe is not None, "trials are made of steps of recipes"
        if step.stage.name == "compress":
            kind = step.recipe.steps[-1].name
            self._epochs.setdefault(kind, []).append(seconds / getattr(self.config.compress, kind).epochs)
        elif step.stage.name == "export":
            self._exports.append(seconds)

    def expected(self, recipe: str) -> float:
        """What a recipe would take, steps of earlier trials left out.

        Learnt from this search's trials alone: what else is in the store must not change the order in which it goes.
        """
        return sum(map(self._expected, self._open(recipe)))

    def fits(self, recipe: str) -> bool:
        """Whether a recipe is expected to end within what is left."""
        return self.expected(recipe) <= self.left

    def cut(self, recipe: str) -> bool:
        """Whether an earlier run began it and ran out of this very budget, though it was expected to fit."""
        begun = sum(self.store.spent(step.key) for step in self._open(recipe))
        return begun > 0 and begun + 1 > self.left

    def _open(self, recipe: str) -> list[Step]:
        """The steps of a recipe that no trial has made yet."""
        if recipe not in self._steps:
            plan = make_plan(_with(self.config, [recipe]), until="measure")
            self._steps[recipe] = [step for step in plan.steps if step.stage.name in PER_RECIPE and not step.lazy]
        return [step for step in self._steps[recipe] if step.name not in self.base | self.counted]

    def _expected(self, step: Step) -> float:
        if step.stage.name == "measure":
            return self._took[f"measure {REFERENCE}"]
        if step.stage.name == "export":
            return max(self._exports, default=_EXPORT)
        assert step.recipe is not None, "every step of a recipe has it"
        kind = step.recipe.steps[-1].name
        seen = self._epochs.get(kind)
        epoch = sum(seen) / len(seen) if seen else _SLOWER[kind] * self._epoch
        return epoch * float(getattr(self.config.compress, kind).epochs)

    def _base_epoch(self) -> float:
        """Seconds of an epoch of the base training; of a model that was not trained, guessed from its latency."""
        epochs = self.config.train.epochs
        if epochs:
            return self._took["train"] / epochs
        rows = PreparedData(self.walk.done["preprocess"]).rows("train")
        latency = Measured(self.walk.done[f"measure {REFERENCE}"]).variant["latency_ms"]["p50"]
        return float(rows * latency / 1000 * _TRAINING_RUNS)
