"""Walks a plan: an artifact from the store, or the stage's work; one TensorBoard run and one progress line per step."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import pathlib
from collections.abc import Callable
from typing import Any

from components.artifacts import Share
from components.errors import BudgetError, ModelError, TrimlineError, WorkerError
from components.tracing import Trace
from pipeline.ahead import Ahead
from pipeline.plan import Plan, Step
from pipeline.screen import Screen
from pipeline.stage import Call
from pipeline.stages import JOURNEY
from pipeline.store import EVENTS
from pipeline.team import TOGETHER, Team

log = logging.getLogger("trimline")

# A recipe that fails here becomes a failed variant, and the others go on; anywhere else the run cannot go on.
PER_RECIPE = ("compress", "export", "measure")


@dataclasses.dataclass(kw_only=True)
class Walk:
    """How far a run has come. Several plans may be walked one after the other; what is done stays done.

    Attributes:
      folder: The run's own.
      screen: Where progress is shown.
      force: Stages whose work is done again although it is in the store, with all that depends on them.
      pulse: Called often by steps that train; what it raises ends the step.
      team: The processes that train together, of which this is the chief; None: this one alone.
      done: Step name -> its artifact.
      lost: Step name -> why it has none.
      failures: Recipe -> why it was not measured.
      skipped: Those of them whose time was up.
      ahead: The preprocessing, while the first training goes on beside it.
      trials: Recipe -> why a search tried it; empty where the user named the recipes.
    """

    folder: pathlib.Path
    screen: Screen
    force: tuple[str, ...] = ()
    pulse: Callable[[], None] = lambda: None
    team: Team | None = None
    done: dict[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)
    trials: dict[str, str] = dataclasses.field(default_factory=dict)
    ahead: Ahead | None = None

    def go(self, plan: Plan) -> None:
        """Every step of `plan` that was not walked yet, in order."""
        self.forget(plan)
        walked = self.done.keys() | self.lost.keys()
        steps = [step for step in plan.steps if not step.lazy and step.name not in walked]
        self.screen.start(len(self.done) + len(self.lost) + len(steps))
        for step in steps:
            if self._goes_ahead(plan, step, steps):
                self._start_ahead(plan, step)
                continue
            broken = next((self.lost[each] for each in step.takes if each in self.lost), None)
            if broken is not None and step.stage.name in PER_RECIPE:
                self.lost[step.name] = broken
            else:
                try:
                    self.done[step.name] = self._carry_out(plan, step) if self.ahead is None else self._meet(plan, step)
                    continue
                except Exception as error:  # kept: in the log with its traceback, and in results.json
                    stops = isinstance(error, WorkerError) or (self.team is not None and self.team.broken)
                    if stops or step.stage.name not in PER_RECIPE:
                        raise
                    self.lose(step, error)
                    # What lies in the model is the same next time, and a search must come by it without training again.
                    if self.trials and isinstance(error, ModelError) and plan.store.partial(step.key).exists():
                        plan.store.fail(step.key, str(error))
            if step.recipe is not None and step.stage.name == "measure":
                self.failures[str(step.recipe)] = self.lost[step.name]

    def _goes_ahead(self, plan: Plan, step: Step, steps: list[Step]) -> bool:
        """Whether the next step may begin while this one is carried out."""
        if step.stage.name != "preprocess" or not plan.config.train.overlap or plan.cached(step):
            return False
        after = steps[steps.index(step) + 1 :]
        return bool(after) and after[0].stage.name == "train" and not plan.cached(after[0])

    def _start_ahead(self, plan: Plan, step: Step) -> None:
        folder, partial = plan.store.folder(step.key), plan.store.partial(step.key)
        beside = dataclasses.replace(self, screen=self.screen.beside())
        self.ahead = beside.ahead = Ahead(
            lambda pulse: beside._preprocess(plan, step, pulse), folder, partial, plan.config.seed
        )
        if not self.ahead.start():
            self.ahead = None
        self.done[step.name] = folder

    def _preprocess(self, plan: Plan, step: Step, pulse: Callable[[], None]) -> None:
        self.pulse = pulse
        self._carry_out(plan, step)

    def _meet(self, plan: Plan, step: Step) -> pathlib.Path:
        """The training beside the preprocessing, which is over then; again where rows that it counted on were malformed."""
        assert self.ahead is not None
        ahead, made = self.ahead, None
        try:
            made = self._carry_out(plan, step)
        except Exception as error:
            if not ahead.over:
                self.screen.warn(f"{_reason(step, error)} Preprocessing goes on, so that the next run finds it done.")
            data = ahead.finish()  # what it raises is what the training suffered from
            if data.rows("train") == ahead.data.rows("train"):
                raise
        except BaseException:
            ahead.cancel()
            raise
        finally:
            self.ahead = None
        if made is None:
            self.screen.warn("Records turned out malformed that the first epoch counted on: the training starts again.")
            plan.store.remove(step.key)
            made = self._carry_out(plan, step)
        return made

    def forget(self, plan: Plan) -> None:
        """Takes the steps of `plan` that are forced and were not walked yet out of the store."""
        walked = self.done.keys() | self.lost.keys()
        for step in list(plan.after(self.force)):
            if step.name not in walked:
                plan.store.remove(step.key)

    def lose(self, step: Step, error: Exception) -> None:
        """Records why a step has no artifact."""
        self.lost[step.name] = _reason(step, error)
        if isinstance(error, BudgetError):
            self.screen.skipped(step.name, self.lost[step.name])
        else:
            self.screen.failed(step.name, self.lost[step.name])

    @property
    def said(self) -> dict[str, Any]:
        """What a selection depends on beside the artifacts that it reads."""
        facts = {"failures": self.failures, "skipped": self.skipped, "trials": self.trials}
        return {name: value for name, value in facts.items() if value}

    def _carry_out(self, plan: Plan, step: Step) -> pathlib.Path:
        def demand(name: str) -> pathlib.Path:
            """Not put into `done`: the time that it takes is part of this step's."""
            if name in self.lost:
                raise TrimlineError(self.lost[name])
            asked = next(each for each in plan.steps if each.name == name)
            return self.done.get(name) or self._carry_out(plan, asked)

        key, store = plan.key(step, self.said), plan.store
        place = self.folder / "tensorboard" / scope(step)
        if store.completed(key):
            self.screen.cached(step.name)
        elif self.trials and (reason := store.failure(key)) is not None:
            raise ModelError(reason)
        else:

            def work(partial: pathlib.Path) -> None:
                _link(place, partial / EVENTS)
                log.info("%s starts in %s", step.name, partial)
                screen = self.screen
                with Trace(partial / EVENTS, screen.progress, screen.warn, self.pulse, screen.tell) as trace:
                    call = self._call(plan, step, partial, demand, trace)
                    with self._together(plan, step, partial):
                        step.stage.run(call)
                gc.collect()

            with self.screen.step(step.name, len(self.done) + len(self.lost)):
                store.build(key, work, resumes=step.stage.resumes, waiting=lambda: self.screen.waiting(step.name))
        events = store.folder(key) / EVENTS
        if events.exists():
            _link(place, events)
        else:  # the step wrote none: a link to nothing stops tools that copy a run
            place.unlink(missing_ok=True)
        return store.folder(key)

    def _together(self, plan: Plan, step: Step, folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
        if self.team is None or step.stage.name not in TOGETHER:
            return contextlib.nullcontext()
        recipes = plan.config.compress.recipes
        assert isinstance(recipes, list), "a team takes no search"
        return self.team.led(step.name, folder, recipes)

    def _call(
        self, plan: Plan, step: Step, folder: pathlib.Path, demand: Callable[[str], pathlib.Path], trace: Trace
    ) -> Call:
        return Call(
            name=step.name,
            config=step.config,
            folder=folder,
            takes={name: self.done[name] for name in step.takes if name in self.done},
            demand=demand,
            recipe=step.recipe,
            failures=dict(self.failures),
            skipped=tuple(self.skipped),
            trials=dict(self.trials),
            seconds={
                each.name: plan.store.seconds(plan.key(each, self.said))
                for each in plan.steps
                if each.name in self.done and (self.ahead is None or each.stage.name != "preprocess")
            },
            trace=trace,
            share=Share() if self.team is None else self.team.place.share,
            ahead=self.ahead,
        )


def _reason(step: Step, error: Exception) -> str:
    if isinstance(error, TrimlineError):
        return str(error)
    log.exception("%s failed", step.name, exc_info=error)
    first = str(error).strip().splitlines()
    return (
        f"{step.name}: {type(error).__name__}: {first[0] if first else 'no message'}; the run's log has the traceback."
    )


def scope(step: Step) -> str:
    """The step's TensorBoard run: names sort as the journey goes.

    '1-preprocess', '2-train', '3-compress-prune@0.7', ...
    """
    number = [stage.name for stage in JOURNEY].index(step.stage.name) + 1
    return f"{number}-{step.name.replace(' ', '-')}"


def _link(place: pathlib.Path, events: pathlib.Path) -> None:
    """Lets the run's TensorBoard folder show the artifact's events, live and afterwards; relative, so it may move."""
    place.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(events, place.parent)
    if place.is_symlink() and os.readlink(place) == target:
        return
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    temporary.replace(place)
