"""Walks the plan: an artifact from the store, or the stage's work; one TensorBoard run and one progress line per step."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import pathlib
import tempfile
from collections.abc import Iterable, Mapping

from components.errors import ConfigError, TrimlineError
from components.tracing import Trace
from pipeline import preflight
from pipeline.config import Config, load_config
from pipeline.plan import Plan, Step, check_stages, make_plan
from pipeline.quiet import quiet as silence
from pipeline.results import FILE, Results
from pipeline.screen import Screen
from pipeline.stage import Call
from pipeline.stages import JOURNEY
from pipeline.store import EVENTS, publish, retract

log = logging.getLogger("trimline")

# A recipe that fails here becomes a failed variant, and the others go on; anywhere else the run cannot go on.
_PER_RECIPE = ("compress", "export", "measure")
PAGES = ("report.html", "report.png")
LOG = "run.log"


def run(
    config: Config | str | os.PathLike[str],
    *,
    until: str | None = None,
    force: Iterable[str] = (),
    screen: Screen | None = None,
    quiet: bool = True,
) -> Results:
    """Carries a configuration out, from raw data to a bundle.

    Args:
      config: A checked configuration, a YAML file's path, or a template's name.
      until: Last stage to walk; None goes all the way. Results are published only by a run that goes all the way.
      force: Stages whose work is done again although it is in the store, with all that depends on them.
      screen: Where progress is shown; None shows nothing.
      quiet: True sends what libraries print meanwhile to the run's log, by the process's file descriptors 1 and 2.

    Returns:
      The finished run. `selected` is None where no variant met the constraints.

    Raises:
      TrimlineError: One of its branches, with a message for the user. All finished work stays in the store.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    check_stages(force, "--force")
    plan, folder = make_plan(config, until=until), run_folder(config)
    preflight.refuse(plan)
    for step in list(plan.after(force)):
        plan.store.remove(step.key)
    with silence(folder / LOG) if quiet else contextlib.nullcontext():
        done = _walk(plan, folder, screen or Screen.silent())
    if "report" in done:
        _publish(plan, done, folder)
    return Results(folder)


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


def _walk(plan: Plan, folder: pathlib.Path, screen: Screen) -> dict[str, pathlib.Path]:
    """Every step in order; returns the artifact folders by step name."""
    done: dict[str, pathlib.Path] = {}
    lost: dict[str, str] = {}  # step name -> why it has no artifact
    failures: dict[str, str] = {}  # recipe -> the same, for results.json
    steps = [step for step in plan.steps if not step.lazy]
    screen.start(len(steps))
    for number, step in enumerate(steps):
        broken = next((lost[each] for each in step.takes if each in lost), None)
        if broken is not None and step.stage.name in _PER_RECIPE:
            lost[step.name] = broken
        else:
            try:
                done[step.name] = _carry_out(plan, step, done, lost, failures, folder, number, screen)
                continue
            except Exception as error:  # kept: in the log with its traceback, and in results.json
                if step.stage.name not in _PER_RECIPE:
                    raise
                lost[step.name] = _reason(step, error)
                screen.failed(step.name, lost[step.name])
        if step.recipe is not None and step.stage.name == "measure":
            failures[str(step.recipe)] = lost[step.name]
    return done


def _reason(step: Step, error: Exception) -> str:
    if isinstance(error, TrimlineError):
        return str(error)
    log.exception("%s failed", step.name, exc_info=error)
    first = str(error).strip().splitlines()
    return (
        f"{step.name}: {type(error).__name__}: {first[0] if first else 'no message'}; the run's log has the traceback."
    )


def _carry_out(
    plan: Plan,
    step: Step,
    done: dict[str, pathlib.Path],
    lost: dict[str, str],
    failures: dict[str, str],
    run_folder: pathlib.Path,
    number: int,
    screen: Screen,
) -> pathlib.Path:
    def demand(name: str) -> pathlib.Path:
        """Not put into `done`: the time that it takes is part of this step's."""
        if name in lost:
            raise TrimlineError(lost[name])
        asked = next(each for each in plan.steps if each.name == name)
        return done.get(name) or _carry_out(plan, asked, done, lost, failures, run_folder, number, screen)

    key, store = plan.key(step, failures), plan.store
    place = run_folder / "tensorboard" / scope(step)
    if store.completed(key):
        screen.cached(step.name)
    else:

        def work(partial: pathlib.Path) -> None:
            _link(place, partial / EVENTS)
            log.info("%s starts in %s", step.name, partial)
            trace = Trace(partial / EVENTS, screen.progress, screen.warn)
            seconds = {each.name: store.seconds(plan.key(each, failures)) for each in plan.steps if each.name in done}
            with trace:
                taken = {name: done[name] for name in step.takes if name in done}
                step.stage.run(
                    Call(step.name, step.config, partial, taken, demand, step.recipe, dict(failures), seconds, trace)
                )
            gc.collect()

        with screen.step(step.name, number):
            store.build(key, work, resumes=step.stage.resumes, waiting=lambda: screen.waiting(step.name))
    _link(place, store.folder(key) / EVENTS)
    return store.folder(key)


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
