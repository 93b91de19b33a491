"""Runs a configuration: plan, walk, and what is published in the run's folder."""

from __future__ import annotations

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping

from components.errors import ConfigError, WorkerError
from components.options import AUTO
from pipeline import preflight
from pipeline.auto import search
from pipeline.config import Config, load_config, searching
from pipeline.follow import follow
from pipeline.plan import Plan, check_stages, make_plan
from pipeline.quiet import quiet as silence
from pipeline.results import FILE, Results
from pipeline.screen import Screen
from pipeline.store import publish, retract
from pipeline.team import TOGETHER, Place, Team, place
from pipeline.walk import Walk, scope

PAGES = ("report.html", "report.png")
LOG = "run.log"
BEFORE_RECIPES = ("preprocess", "train")
"""Stages that no recipe has a part in."""


def run(
    config: Config | str | os.PathLike[str],
    *,
    until: str | None = None,
    force: Iterable[str] = (),
    screen: Screen | None = None,
    quiet: bool = True,
    budget: str | None = None,
) -> Results:
    """Carries a configuration out, from raw data to a bundle.

    Args:
      config: A checked configuration, a YAML file's path, or a template's name.
      until: Last stage to walk; None goes all the way. Results are published only by a run that goes all the way.
      force: Stages whose work is done again although it is in the store, with all that depends on them.
      screen: Where progress is shown; None shows nothing.
      quiet: True sends what libraries print meanwhile to the run's log, by the process's file descriptors 1 and 2.
      budget: Time in which to search for recipes in the place of those that `config` lists, as 90s, 30m or 2h.

    Returns:
      The finished run. `selected` is None where no variant met the constraints. Under multi_worker this returns in every
      process; what there is to read, the chief has written.

    Raises:
      TrimlineError: One of its branches, with a message for the user. All finished work stays in the store. WorkerError:
        start this process again.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    if budget is not None:
        config = load_config(config.model_dump(mode="json"), searching(budget))
    check_stages(force, "--force")
    plan, folder = make_plan(config, until=until), run_folder(config)
    preflight.refuse(plan)
    screen, where = screen or Screen.silent(), place(config.strategy)
    walk = Walk(folder=folder, screen=screen, force=tuple(force))
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(silence(folder / log_name(where)))
        walk.team = _join(plan, force, where, screen)
        if not where.chief:
            if walk.team is not None:
                follow(walk.team, config, screen)
            return Results(folder)
        stack.enter_context(_leading(walk.team))
        if config.compress.recipes == AUTO and until not in BEFORE_RECIPES:
            plan = make_plan(search(config, walk), until=until)
        walk.go(plan)
    if "report" in walk.done:
        _publish(plan, walk.done, folder)
    return Results(folder)


def _join(plan: Plan, force: Iterable[str], where: Place, screen: Screen) -> Team | None:
    """The team, where there is something to train together: what is in the store already asks for nobody.

    Joined before anything else is done, because TensorFlow can be given its cluster only as it starts.
    """
    if plan.config.strategy.name != "multi_worker":
        return None
    forced = {step.name for step in plan.after(force)}
    if all(plan.cached(step) and step.name not in forced for step in plan.steps if step.stage.name in TOGETHER):
        return None
    screen.line(f"  waiting  for the other {len(where.addresses) - 1} workers; this is number {where.index}")
    return Team.join(where, plan.config.strategy)


@contextlib.contextmanager
def _leading(team: Team | None) -> Iterator[None]:
    """Sends the other workers home, whatever way the chief's run ends."""
    try:
        yield
    except WorkerError:
        raise
    except BaseException as error:
        if team is not None:
            team.dismiss(error)
        raise
    if team is not None:
        team.dismiss(None)


def log_name(where: Place) -> str:
    """File in the run's folder for what the libraries say; each worker has its own."""
    return LOG if where.chief else f"worker-{where.index}.log"


def _publish(plan: Plan, done: Mapping[str, pathlib.Path], folder: pathlib.Path) -> None:
    """Puts what the run leaves into its folder, and takes away what an earlier run left that is true no more."""
    publish(done["select"] / FILE, folder / FILE)
    for page in PAGES:
        if (done["report"] / page).exists():
            publish(done["report"] / page, folder / page)
    results = Results(folder)
    if results.bundle is None:
        retract(folder / "bundle")
    else:
        publish(done["bundle"], results.bundle)
    current = {scope(step) for step in plan.steps}
    for link in results.tensorboard.iterdir():
        if link.is_symlink() and link.name not in current:
            link.unlink()


def run_folder(config: Config) -> pathlib.Path:
    """The run's own folder in the workspace, made where it was not.

    Raises:
      ConfigError: The workspace cannot be written.
    """
    folder = pathlib.Path(config.workspace) / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"workspace: a folder that can be written was expected, got '{error.strerror}' for {error.filename or folder}; "
            "choose another with --set workspace=FOLDER."
        ) from error
    return folder
