"""The command line: `trimline run CONFIG` and its companions. Parses, calls, prints; decides nothing."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from components.errors import ConstraintError, StoppedError, TrimlineError, WorkerError

if TYPE_CHECKING:
    from pipeline.config import Config

app = typer.Typer(
    name="trimline",
    help="From raw data to the smallest, fastest TFLite model that still meets your accuracy, in one command.\n\n"
    "Start with:  trimline run digits     then:  trimline init adult my.yaml  and edit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
ConfigPath = Annotated[str, typer.Argument(help="A YAML file, or the name of a template (see 'trimline init --list').")]
Sets = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. --set train.epochs=5; may repeat.")
]
Until = Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")]
Force = Annotated[
    list[str], typer.Option(metavar="STAGE", help="Do this stage again, and all that depends on it; may repeat.")
]
Budget = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Search for recipes for this long (90s, 30m, 2h) instead of those listed: compress.recipes=auto and compress.budget.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts instead of a table.")]
INTERRUPTED = 130


@app.command()
def run(
    config: ConfigPath,
    overrides: Sets = [],  # noqa: B006 - typer copies it
    budget: Budget = None,
    until: Until = None,
    force: Force = [],  # noqa: B006 - typer copies it
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap", help="Train the first epoch while the data are still being prepared: train.overlap=true."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Walk the journey: preprocess, train, compress, export, measure, select, bundle, report.

    What is in the workspace already is not done again. Ctrl-C loses nothing: the same command goes on where it stopped.
    """
    from pipeline.config import load_config, searching

    with _errors():
        more = ["train.overlap=true"] if overlap else []
        _walk(load_config(config, [*overrides, *searching(budget), *more]), until, force, as_json)


@app.command()
def launch(
    config: ConfigPath,
    workers: Annotated[int, typer.Option(min=1, help="Processes that train together.")],
    overrides: Sets = [],  # noqa: B006 - typer copies it
    until: Until = None,
    force: Force = [],  # noqa: B006 - typer copies it
    restarts: Annotated[int, typer.Option(min=0, help="How often each worker that died is started again.")] = 3,
) -> None:
    """Run on several processes of this machine that train together: multi_worker without writing TF_CONFIG.

    The chief has the screen; what the others say is in worker-N.out of the run's folder. A worker that dies is started
    again and the run goes on from the last checkpoint. Ctrl-C stops them all and loses nothing.
    """
    from pipeline.config import load_config
    from pipeline.launch import launch as start
    from pipeline.runner import run_folder

    with _errors():
        team = [*overrides, "strategy.name=multi_worker", f"strategy.workers={workers}"]
        folder = run_folder(load_config(config, team))
        arguments = [config, *(f"--set={each}" for each in team), *([f"--until={until}"] if until else [])]
        code = start(arguments, [f"--force={each}" for each in force], folder, workers=workers, restarts=restarts)
        if code:
            raise SystemExit(code)


@app.command()
def compress(
    model: Annotated[pathlib.Path, typer.Argument(metavar="MODEL", help="A trained Keras 3 model, MODEL.keras.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA",
            help="What it was trained on: a folder of class folders with pictures, an .npz file with x and y, or a "
            "configuration, of which all but model and training counts.",
        ),
    ],
    overrides: Sets = [],  # noqa: B006 - typer copies it
    budget: Budget = None,
    until: Until = None,
    force: Force = [],  # noqa: B006 - typer copies it
    as_json: AsJson = False,
) -> None:
    """Start from a trained model: everything that run does, without the training.

    Pictures reach the model in [0, 1]; for one trained on other ranges say --set preprocess.pixels=zero_to_255 or
    minus_one_to_one. Numbers of an .npz file are standardised unless --set preprocess.columns.x.rule=none.
    """
    from pipeline.config import load_config, searching

    with _errors():
        _walk(load_config(data, [*overrides, *searching(budget)], model=model), until, force, as_json)


def _walk(config: Config, until: str | None, force: list[str], as_json: bool) -> None:
    """Carries `config` out and shows what came of it."""
    from pipeline import tables
    from pipeline.results import Results
    from pipeline.runner import log_name, run, run_folder
    from pipeline.team import place

    where = place(config.strategy)
    try:
        with _screen(run_folder(config) / log_name(where), show=not as_json) as screen:
            results: Results = run(config, until=until, force=force, screen=screen, quiet=False)
    except StoppedError:
        raise
    except WorkerError as error:
        from pipeline.launch import start_again

        start_again(error)
    if not where.chief:
        print(f"Worker {where.index} of {len(where.addresses)} has done its part; the results are the chief's.")
        return
    if until is not None and until != "report":
        return
    if as_json:
        print(json.dumps(results.data, indent=1, sort_keys=True))
    else:
        tables.show_results(results)
    if results.selected is None:
        raise ConstraintError(results.data["selected_because"])


@app.command("find-rate")
def find_rate(config: ConfigPath, overrides: Sets = []) -> None:  # noqa: B006 - typer copies it
    """Try rising learning rates on a fresh model and suggest one, with a picture. Changes nothing of a run."""
    from pipeline import find_rate as beside
    from pipeline.config import load_config
    from pipeline.runner import LOG, run_folder

    with _errors():
        loaded = load_config(config, overrides)
        with _screen(run_folder(loaded) / LOG, show=True) as screen:
            found, picture = beside.find_rate(loaded, screen)
        print(
            f"Loss is lowest at a rate of {found.at_lowest:.2g}; suggested: --set train.optimizer.learning_rate={found.suggested:.2g}"
        )
        print(f"Configured:   {loaded.train.optimizer.learning_rate:.2g}")
        print(f"Picture:      {picture}")


@app.command()
def tune(
    config: ConfigPath,
    trials: Annotated[int | None, typer.Option(min=1, help="How many; by default tune.trials.")] = None,
    overrides: Sets = [],  # noqa: B006 - typer copies it
) -> None:
    """Search for the values under `tune` with which the base training is best on validation rows; writes tuned.yaml.

    Every trial is kept: Ctrl-C loses nothing, and the same command goes on where it stopped.
    """
    from pipeline import tables
    from pipeline import tune as search
    from pipeline.config import load_config
    from pipeline.runner import LOG, run_folder

    with _errors():
        loaded = load_config(config, overrides)
        with _screen(run_folder(loaded) / LOG, show=True) as screen:
            found = search.tune(search.of_file(config, overrides), trials, screen)
        tables.show_tuned(found)


tpu_app = typer.Typer(
    help="What can be said about a training on TPUs without one.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(tpu_app, name="tpu")


@tpu_app.command("check")
def tpu_check(
    config: ConfigPath,
    target: Annotated[
        str, typer.Option(metavar="KIND:TOPOLOGY", help="Slice: v5e:2x2, v6e:2x2, v4:2x2x1, ...")
    ] = "v5e:2x2",
    lint_only: Annotated[bool, typer.Option("--lint-only", help="Do not compile; needs no libtpu.")] = False,
    python: Annotated[
        str | None,
        typer.Option(help="An interpreter that has the extra tpu-check (jax, jaxlib, libtpu); by default this one."),
    ] = None,
    limit: Annotated[float, typer.Option(metavar="SECONDS", help="Time for the compiler.")] = 600.0,
    overrides: Sets = [],  # noqa: B006 - typer copies it
) -> None:
    """Look for what a TPU would refuse in the update that CONFIG trains with, then compile it with the real XLA:TPU compiler."""
    from components.errors import ModelError
    from pipeline.config import load_config
    from pipeline.runner import run_folder
    from pipeline.tpu_check import UNPROVEN
    from pipeline.tpu_check import tpu_check as check

    with _errors():
        loaded = load_config(config, overrides)
        with _screen(run_folder(loaded) / "tpu.log", show=False):
            findings, verdict = check(
                loaded, target, compile=not lint_only, python=python or sys.executable, limit=limit
            )
        for finding in findings:
            print(finding)
        print(f"lint: {len(findings)} findings in the update for a device of {target}")
        if verdict is not None:
            print(verdict)
            print(UNPROVEN)
        if (verdict is not None and verdict.refusal) or any(each.level == "error" for each in findings):
            raise ModelError(f"tpu check: a device of {target} would not take the update; see above.")


@app.command()
def plan(config: ConfigPath, overrides: Sets = [], as_json: AsJson = False) -> None:  # noqa: B006 - typer copies it
    """Show what would run, what is in the store already, and what looks wrong. Trains nothing."""
    from pipeline import preflight, tables
    from pipeline.auto import outlook
    from pipeline.config import load_config
    from pipeline.plan import make_plan
    from pipeline.runner import run_folder

    with _errors():
        loaded = load_config(config, overrides)
        with _screen(run_folder(loaded) / "plan.log", show=False):
            made = make_plan(loaded)
            findings = preflight.check(made)
            ahead = outlook(loaded)
        tables.show_plan(made, findings, ahead, as_json=as_json)


@app.command()
def init(
    template: Annotated[str | None, typer.Argument(help="Name of a template.")] = None,
    path: Annotated[pathlib.Path | None, typer.Argument(help="File to write; default TEMPLATE.yaml.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the templates.")] = False,
) -> None:
    """Write a commented configuration to start from."""
    from components.errors import ConfigError
    from pipeline.config import template_text, templates

    with _errors():
        if show or template is None:
            for name in templates():
                print(f"{name:15} {template_text(name).splitlines()[0].lstrip('# ')}")
            return
        text = template_text(template)
        target = path or pathlib.Path(f"{template}.yaml")
        if target.exists():
            raise ConfigError(f"{target}: init writes new files only, and this one exists; name another or remove it.")
        target.write_text(text, encoding="utf-8")
        print(f"Wrote {target}. Next: trimline plan {target}")


@app.command()
def inspect(file: Annotated[pathlib.Path, typer.Argument(help="A .tflite file.")], as_json: AsJson = False) -> None:
    """Read a .tflite file and tell what is in it: sparsity, distinct weights, dtypes, operators, Flex."""
    from pipeline import tables

    with _errors():
        _must_exist(file)
        from components.delivery.proof import read_proof

        tables.show_proof(read_proof(file), as_json=as_json)


@app.command()
def verify(folder: Annotated[pathlib.Path, typer.Argument(help="A bundle folder.")], as_json: AsJson = False) -> None:
    """Check a bundle: checksums, and the golden samples through its transform and its file.

    Runs the bundle's own transform.py, so check only bundles that you trust.
    """
    from pipeline import tables

    with _errors():
        _must_exist(folder)
        from components.delivery.bundle import verify as verify_bundle

        with _no_noise():
            verified = verify_bundle(folder)
        tables.show_verification(verified, as_json=as_json)


@app.command()
def predict(
    folder: Annotated[pathlib.Path, typer.Argument(help="A bundle folder.")],
    source: Annotated[pathlib.Path, typer.Argument(metavar="INPUT", help=".csv, .npy, .json or an image file.")],
    as_json: AsJson = False,
) -> None:
    """Answer raw records with a bundle, exactly as its own predict.py does.

    Runs the bundle's own transform.py, so use only bundles that you trust.
    """
    from pipeline import tables

    with _errors():
        _must_exist(folder)
        _must_exist(source)
        from components.delivery.bundle import predict as predict_bundle

        with _no_noise():
            answers = predict_bundle(folder, source)
        tables.show_predictions(answers, as_json=as_json)


@app.command()
def tensorboard(
    folder: Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="A run's folder, e.g. workspace/digits.")],
    port: Annotated[int, typer.Option(help="0 takes any free one.")] = 6006,
) -> None:
    """Open TensorBoard on every stage of a run."""
    with _errors():
        _must_exist(folder / "tensorboard")
        _serve_tensorboard(folder, port)


@app.command()
def schema(
    target: Annotated[pathlib.Path | None, typer.Option("--out", help="File to write; default: the screen.")] = None,
) -> None:
    """Print the configuration's JSON Schema, for completion and checks in an editor."""
    from pipeline.config import json_schema

    text = json.dumps(json_schema(), indent=1)
    if target is None:
        print(text)
    else:
        target.write_text(text + "\n", encoding="utf-8")
        print(f"Wrote {target}. In a YAML file's first line: # yaml-language-server: $schema={target}")


def _serve_tensorboard(folder: pathlib.Path, port: int) -> None:
    """Serves until Ctrl-C; what TensorFlow says while it loads goes to a log."""
    from components.errors import ConfigError
    from pipeline.quiet import quiet

    with quiet(folder / "tensorboard.log") as screen:
        from tensorboard import program

        server = program.TensorBoard()
        # Its fast loader neither follows links nor stays silent.
        server.configure(argv=["", "--logdir", str(folder / "tensorboard"), "--port", str(port), "--load_fast=false"])
        try:
            address = server.launch()
        except program.TensorBoardServerException as error:
            raise ConfigError(f"--port {port}: a free port was expected, got '{error.msg}'; try --port 0.") from error
        print(f"TensorBoard: {address}    Ctrl-C ends it.", file=screen, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                signal.pause()


def _must_exist(path: pathlib.Path) -> None:
    from components.errors import ConfigError

    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder; check the path.")


@contextlib.contextmanager
def _no_noise() -> Iterator[None]:
    """What the runtime says of itself on the C side is of no use to a user."""
    from pipeline.quiet import quiet

    with quiet(pathlib.Path(os.devnull)):
        yield


@contextlib.contextmanager
def _screen(log_file: pathlib.Path, *, show: bool) -> Iterator[Any]:
    """A `Screen` on the terminal while the libraries talk to `log_file`."""
    import rich.console

    from pipeline.quiet import quiet
    from pipeline.screen import Screen

    terminal = sys.stdout.isatty()
    with quiet(log_file) as stream:
        console = rich.console.Console(file=stream, force_terminal=terminal) if show else None
        try:
            yield Screen(console)
        except (TrimlineError, KeyboardInterrupt):
            raise
        except Exception:
            logging.getLogger("trimline").exception("unexpected")
            raise


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """Every error becomes one line on standard error and an exit code of its own."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except TrimlineError as error:
        _leave(f"trimline: {error}", error.exit_code)
    except KeyboardInterrupt:
        _leave("trimline: stopped. What was finished is kept; the same command goes on from here.", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader of our output has left: nothing to complain about
        raise SystemExit(1) from None
    except Exception as error:
        if os.environ.get("TRIMLINE_DEBUG"):
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        _leave(
            f"trimline: this should not have happened: {type(error).__name__}: {first}. The traceback is in the run's "
            "log; set TRIMLINE_DEBUG=1 to see it here.",
            1,
        )


def _terminated(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(code)
