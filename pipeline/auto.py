"""Auto: carries a search for recipes out, trial by trial, within its budget.

    config --search()--> config with the recipes that were tried

What to try is decided by `pipeline.search`; here are time and the store. A trial costs what its steps took when they were
made, in this run or an earlier one, so the same command with everything in the store walks the same way and does nothing,
and one with a larger budget goes on where this one ended. Fine-tuning and the rungs of a rescue end when the budget does;
export and measurement cannot, so room is left for them.
"""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import time
from collections.abc import Callable, Mapping

from components.artifacts import Measured, PreparedData
from components.delivery.select import REFERENCE, drops
from components.errors import BudgetError
from components.fields import in_seconds
from components.options import AUTO
from components.recipe import RESCUE
from pipeline import preflight
from pipeline.config import Config
from pipeline.plan import Plan, Step, make_plan
from pipeline.screen import Screen
from pipeline.search import Proposal, Trial, propose, steps_of, trial_of
from pipeline.walk import PER_RECIPE, Walk

# Seconds of an epoch of fine-tuning over one of the base training, before any was seen: wrappers cost, and a twin trains
# faster than the Keras 3 model (benchmarks/train_overhead.py, docs/results.md).
_SLOWER = {"channels": 0.8, "lowrank": 1.0, "prune": 1.0, "cluster": 1.5, "qat": 2.0}
_EXPORT = 10.0  # of integers, before any was seen: two conversions and the calibration
_TRAINING_RUNS = 4.0  # what an example costs in training, over the latency of its file
_BETWEEN = 1.0  # what may pass between steps of a trial and is not counted


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
    impossible = preflight.impossible(base, steps_of(config.select), ask=True) or {}
    for reason in _never(impossible, steps_of(config.select)):
        walk.screen.warn(f"not searched: {reason}")
    hunt = _Hunt(config, walk, base, impossible)
    while (proposal := hunt.choose()) is not None and not hunt.over(proposal):
        hunt.carry_out(proposal)
        if hunt.clock.rang:
            return hunt.found
    if proposal is not None:
        hunt.skip(proposal)
    return hunt.found


@dataclasses.dataclass(frozen=True)
class Outlook:
    """What is known of a search before it runs.

    Attributes:
      known: Trials in the store, in the order in which it will come by them.
      seconds: What they took.
      then: The first that has to be made; None where the budget ends before, or nothing better is in sight.
    """

    known: tuple[Proposal, ...]
    seconds: float
    then: Proposal | None


def outlook(config: Config) -> Outlook | None:
    """Walks the search as far as the store goes and carries nothing out; None where the recipes are listed."""
    if config.compress.recipes != AUTO:
        return None
    base = make_plan(config, until="measure")
    steps = steps_of(config.select)
    trained = all(base.cached(step) for step in base.steps if not step.lazy)
    impossible = preflight.impossible(base, steps, ask=False) if trained else None
    if impossible is None:
        return Outlook((), 0.0, propose([], config.select, lambda _: 0.0)[0])
    done = {step.name: base.store.folder(step.key) for step in base.steps}
    hunt = _Hunt(config, Walk(folder=pathlib.Path(), screen=Screen.silent(), done=done), base, impossible)
    known: list[Proposal] = []
    while (proposal := hunt.choose()) is not None and not hunt.over(proposal):
        if not hunt.recall(proposal):
            return Outlook(tuple(known), hunt.clock.spent, proposal)
        known.append(proposal)
    return Outlook(tuple(known), hunt.clock.spent, None)


def _never(impossible: Mapping[str, str], steps: list[str]) -> list[str]:
    """The reason, once for each kind of step that is impossible at every strength."""
    kinds = {step.partition("@")[0]: step for step in reversed(steps)}
    possible = {step.partition("@")[0] for step in steps if step not in impossible}
    return [impossible[mildest] for kind, mildest in reversed(kinds.items()) if kind not in possible]


class _Hunt:
    """A search under way: the recipes tried so far, and what became of them."""

    def __init__(self, config: Config, walk: Walk, base: Plan, impossible: Mapping[str, str]) -> None:
        self.config, self.walk, self.impossible = config, walk, impossible
        self.clock = _Clock(config, walk, base)
        self.tried: list[str] = []

    @property
    def found(self) -> Config:
        """The configuration with the recipes that were tried."""
        return _with(self.config, self.tried)

    def choose(self) -> Proposal | None:
        """The best bet that fits; where none does the best of all, where there is none None."""
        proposals = propose(self._trials(), self.config.select, self.clock.expected, self.impossible)
        fitting = (each for each in proposals if self.clock.fits(each.recipe))
        return next(fitting, proposals[0] if proposals else None)

    def over(self, proposal: Proposal) -> bool:
        """Whether the search ends here: the trial does not fit, or an earlier run was cut in it by this very budget."""
        return not self.clock.fits(proposal.recipe) or self.clock.cut(proposal.recipe)

    def carry_out(self, proposal: Proposal) -> None:
        """A trial, within what is left."""
        plan, left = self._begin(proposal), datetime.timedelta(seconds=round(self.clock.left))
        self.walk.screen.trial(proposal.recipe, proposal.why, f"{left} of {self.config.compress.budget} left")
        self.walk.forget(plan)  # what is to be made again was not begun
        self.walk.pulse = self.clock.alarm(proposal.recipe)
        self.walk.go(plan)
        self.walk.pulse = lambda: None
        self.clock.add(plan)
        if self.clock.rang:
            self.walk.skipped.append(proposal.recipe)

    def skip(self, proposal: Proposal) -> None:
        """The trial is recorded as one that was not made."""
        plan = self._begin(proposal)
        first = next(step for step in plan.steps if step.name not in self.walk.done and not step.lazy)
        self.walk.lose(first, self.clock.up)
        self.walk.go(plan)
        self.walk.skipped.append(proposal.recipe)

    def recall(self, proposal: Proposal) -> bool:
        """Takes a trial from the store, a failed one too; False where it is not there, or not all of it."""
        plan, walk = self._begin(proposal), self.walk
        for step in (step for step in plan.steps if not step.lazy):
            broken = next((walk.lost[each] for each in step.takes if each in walk.lost), plan.store.failure(step.key))
            if plan.cached(step):
                walk.done[step.name] = plan.store.folder(step.key)
            elif broken is not None:
                walk.lost[step.name] = broken
            else:
                return False
        self.clock.add(plan)
        return True

    def _begin(self, proposal: Proposal) -> Plan:
        self.tried.append(proposal.recipe)
        self.walk.trials[proposal.recipe] = proposal.why
        return make_plan(self.found, until="measure")

    def _trials(self) -> list[Trial]:
        done = self.walk.done
        names = [each for each in (REFERENCE, *self.tried) if f"measure {each}" in done]
        variants = {
            each["recipe"]: each for each in drops([Measured(done[f"measure {name}"]).variant for name in names])
        }
        return [
            trial_of(
                variants.get(name, {"status": "failed", "recipe": name}),
                self.config.select,
                skipped=name in self.walk.skipped,
            )
            for name in self.tried
        ]


def _with(config: Config, recipes: list[str]) -> Config:
    compress = config.compress.model_copy(update={"recipes": [REFERENCE, *recipes]})
    return config.model_copy(update={"compress": compress})


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
        self._exports: dict[str, list[float]] = {}  # format -> seconds
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

    def alarm(self, recipe: str) -> Callable[[], None]:
        """A pulse that ends a trial when what is left is spent but for its room; what it took in earlier runs counts."""
        end = time.monotonic() + self.left - self._begun(recipe) - self._room

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
            self._exports.setdefault(step.recipe.format, []).append(seconds)

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
        attempts = any(
            self.store.spent(step.key) for step in self._open(recipe) if self.store.failure(step.key) is None
        )
        return attempts and self._begun(recipe) + self._room + _BETWEEN > self.left

    def _begun(self, recipe: str) -> float:
        """What the store holds of a trial that is not counted yet: finished steps and attempts."""
        return sum(
            self.store.seconds(step.key) if self.store.completed(step.key) else self.store.spent(step.key)
            for step in self._open(recipe)
        )

    @property
    def _room(self) -> float:
        """What comes behind the last moment at which a trial can be cut: an export, of a rescue the rung under way, and a measurement."""
        return self._export("int8") + self._measure

    def _open(self, recipe: str) -> list[Step]:
        """The steps of a recipe that no trial has made yet."""
        if recipe not in self._steps:
            plan = make_plan(_with(self.config, [recipe]), until="measure")
            self._steps[recipe] = [step for step in plan.steps if step.stage.name in PER_RECIPE and not step.lazy]
        return [step for step in self._steps[recipe] if step.name not in self.base | self.counted]

    def _expected(self, step: Step) -> float:
        assert step.recipe is not None, "every step of a recipe has it"
        if step.stage.name == "measure":
            return self._measure
        if step.stage.name == "export":
            return self._export(step.recipe.format)
        kind = step.recipe.steps[-1].name
        seen = self._epochs.get(kind)
        epoch = sum(seen) / len(seen) if seen else _SLOWER[kind] * self._epoch
        return epoch * float(getattr(self.config.compress, kind).epochs)

    def _export(self, format: str) -> float:
        if format in self._exports:
            return max(self._exports[format])
        plain = [seconds for each, seen in self._exports.items() if each != RESCUE for seconds in seen]
        rungs = 1 + 2 * self.config.export.rescue.most_layers.bit_length() if format == RESCUE else 1
        return rungs * max(plain, default=_EXPORT)

    @property
    def _measure(self) -> float:
        return self._took[f"measure {REFERENCE}"]

    def _base_epoch(self) -> float:
        """Seconds of an epoch of the base training; of a model that was not trained, guessed from its latency."""
        epochs = self.config.train.epochs
        if epochs:
            return self._took["train"] / epochs
        rows = PreparedData(self.walk.done["preprocess"]).rows("train")
        latency = Measured(self.walk.done[f"measure {REFERENCE}"]).variant["latency_ms"]["p50"]
        return float(rows * latency / 1000 * _TRAINING_RUNS)
