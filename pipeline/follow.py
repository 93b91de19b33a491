"""Follow: what a worker does that is not the chief. It carries out its part of each step that the chief announces."""

from __future__ import annotations

import logging
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from components.errors import ContractError, StoppedError, TrimlineError, WorkerError
from components.tracing import Trace
from pipeline.config import Config
from pipeline.plan import Plan, Step, make_plan
from pipeline.screen import Screen
from pipeline.stage import Call
from pipeline.team import Team

log = logging.getLogger("trimline")
_APPEARS_SECONDS = 30.0  # network file systems show a new folder to others after a while


def follow(team: Team, config: Config, screen: Screen) -> None:
    """Works until the chief says that the run is over.

    Args:
      team: Joined; this process is not the chief.
      config: The run's, as the chief has it.
      screen: Where progress is shown.

    Raises:
      StoppedError: The chief ended the run, because of an error or on request.
      WorkerError: The chief or another worker was lost.
      ContractError: An artifact that the chief has is not to be seen from here.
    """
    for order in team.orders():
        if "end" in order:
            if order["end"] is not None:
                raise StoppedError(f"the chief ended the run: {order['end']}")
            return
        changed = config.compress.model_copy(update={"recipes": order["recipes"]})
        plan = make_plan(config.model_copy(update={"compress": changed}))
        step = next(each for each in plan.steps if each.name == order["step"])
        with screen.step(step.name, 0):
            try:
                _take_part(team, plan, step, order, screen)
            except WorkerError:
                raise
            except TrimlineError as error:
                screen.failed(step.name, str(error))
                raise


def _take_part(team: Team, plan: Plan, step: Step, order: Mapping[str, Any], screen: Screen) -> None:
    takes = {name: _seen(plan, name) for name in step.takes}
    with team.followed(order) as folder:
        log.info("%s starts in %s, for %s", step.name, folder, order["folder"])
        with Trace(None, screen.progress, screen.warn) as trace:
            step.stage.run(
                Call(
                    name=step.name,
                    config=step.config,
                    folder=folder,
                    takes=takes,
                    demand=lambda name: _seen(plan, name),
                    recipe=step.recipe,
                    failures={},
                    skipped=(),
                    trials={},
                    seconds={},
                    trace=trace,
                    share=team.place.share,
                )
            )


def _seen(plan: Plan, name: str) -> pathlib.Path:
    """The chief's artifact of an earlier step."""
    step = next(each for each in plan.steps if each.name == name)
    until = time.monotonic() + _APPEARS_SECONDS
    while not plan.cached(step):
        if time.monotonic() > until:
            raise ContractError(
                f"{plan.store.folder(step.key)}: every worker must see what the chief made, and this one does not; put the workspace on a "
                "disk that they share, and give all the same configuration and version of trimline."
            )
        time.sleep(0.5)
    return plan.store.folder(step.key)
