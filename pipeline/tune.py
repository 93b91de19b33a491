"""Tune: a search for the values of a configuration with which its base training is best on validation rows.

    configuration with a `tune` section --tune()--> Tuned, tuned.yaml

KerasTuner proposes, the journey's own stages train: each trial is a step in the store, so a repeated search trains nothing
twice, and the run of `tuned.yaml` finds its training done. The test split is not read.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from components.artifacts import TrainedModel, write_json
from components.errors import ConfigError, DataError, TrimlineError
from components.options import TuneOptions, TuneRange
from components.tracing import Trace
from pipeline.config import Config, dump, load_config
from pipeline.plan import make_plan
from pipeline.runner import run_folder
from pipeline.screen import Screen
from pipeline.walk import Walk

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One set of values.

    Attributes:
      number: 1 is the first.
      values: Key of the configuration -> value.
      score: On validation rows; None where it failed.
      reason: Why it failed, '' where it did not.
    """

    number: int
    values: Values
    score: float | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A finished search.

    Attributes:
      trials: As they were tried.
      metric: 'accuracy' (higher is better) or 'rmse' (lower is better).
      file: The best configuration, complete.
    """

    trials: list[Trial]
    metric: str
    file: pathlib.Path

    @property
    def best(self) -> Trial:
        """The best trial that did not fail; of equal ones the first."""
        sign = -1 if self.metric == "accuracy" else 1
        return min(
            (each for each in self.trials if each.score is not None), key=lambda each: sign * (each.score or 0.0)
        )


def tune(make: Callable[[list[str]], Config], trials: int | None, screen: Screen) -> Tuned:
    """Carries out the search that the configuration's `tune` section describes.

    Args:
      make: Overrides, 'a.b=c' as after `--set` -> the configuration with them.
      trials: In the place of `tune.trials`; None leaves it.
      screen: Where progress is shown.

    Raises:
      ConfigError: No `tune` section, a key that is none, or KerasTuner is not installed.
      DataError: No validation rows to judge by.
      TrimlineError: Every trial failed; the first one's reason.
    """
    config = make([])
    options = config.tune
    if options is None:
        raise ConfigError(
            "tune: the configuration must say what to search, got no section tune; for instance "
            "tune: {space: {train.optimizer.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}}}."
        )
    for key, choice in options.space.items():
        make(
            [override(key, choice.low if isinstance(choice, TuneRange) else choice[0])]
        )  # faults show before any training
    folder = run_folder(config)
    count = trials or options.trials
    search = _Search(make, folder, screen, count)
    _propose(options, count, config.seed, search)
    finished = [each for each in search.done if each.score is not None]
    if not finished:
        raise TrimlineError(
            f"tune: none of the {len(search.done)} trials could be trained; the first: {search.done[0].reason}"
        )
    found = Tuned(search.done, search.metric, folder / "tuned.yaml")
    best = make([override(key, value) for key, value in found.best.values.items()])
    found.file.write_text(dump(best.model_copy(update={"tune": None})), encoding="utf-8")
    write_json(
        folder / "tune.json", {"metric": found.metric, "trials": [dataclasses.asdict(each) for each in found.trials]}
    )
    return found


def override(key: str, value: Any) -> str:
    """As after `--set`.

    >>> override("train.optimizer.learning_rate", 0.01)
    'train.optimizer.learning_rate=0.01'
    """
    return f"{key}={json.dumps(value)}"


class _Search:
    """Trains what is proposed and remembers how good it was."""

    def __init__(self, make: Callable[[list[str]], Config], folder: pathlib.Path, screen: Screen, count: int) -> None:
        self._make, self._folder, self._screen, self._count = make, folder, screen, count
        self.done: list[Trial] = []
        self.metric = ""

    def score(self, values: Mapping[str, Any]) -> float:
        """Accuracy, or rmse, of the training with `values` on validation rows.

        Raises:
          DataError: There are none.
          TrimlineError: The training failed; remembered.
        """
        number = len(self.done) + 1
        told = ", ".join(
            f"{key.rpartition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{key.rpartition('.')[2]} {value}"
            for key, value in values.items()
        )
        self._screen.trial(f"{number}/{self._count}", told, f"best so far {self._best()}")
        try:
            score = self._train(values)
        except TrimlineError as error:
            if self.failed_with(error):
                self.done.append(Trial(number, dict(values), None, str(error)))
                self._screen.failed(f"trial {number}", str(error))
            raise
        self.done.append(Trial(number, dict(values), score))
        with Trace(self._folder / "tensorboard" / "tune" / f"{number:03d}") as trace:
            trace.hparams(dict(values), {f"validation/{self.metric}": score})
        return score

    @staticmethod
    def failed_with(error: Exception) -> bool:
        """Whether it lies in the values, so that others may do better."""
        return isinstance(error, TrimlineError) and not isinstance(error, DataError)

    def _train(self, values: Mapping[str, Any]) -> float:
        config = self._make([override(key, value) for key, value in values.items()])
        walk = Walk(folder=self._folder, screen=self._screen)
        walk.go(make_plan(config, until="train"))
        facts = TrainedModel(walk.done["train"]).facts["validation"]
        if not facts:
            raise DataError(
                "tune: trials are judged by the validation split, which has 0 rows; raise preprocess.splits.validation."
            )
        self.metric = "accuracy" if "accuracy" in facts else "rmse"
        return float(facts[self.metric])

    def _best(self) -> str:
        scores = [each.score for each in self.done if each.score is not None]
        if not scores:
            return "none"
        return f"{self.metric} {max(scores) if self.metric == 'accuracy' else min(scores):.4f}"


def _propose(options: TuneOptions, count: int, seed: int, search: _Search) -> None:
    """Lets KerasTuner propose `count` sets of values, each in the light of those before."""
    try:
        import keras_tuner
    except ImportError as error:
        raise ConfigError(
            f"trimline tune: keras-tuner was expected, got '{error}'; install it: pip install 'trimline[tuner]'."
        ) from error
    space = keras_tuner.HyperParameters()
    for key, choice in options.space.items():
        _declare(space, key, choice)
    oracles = {
        "bayesian": keras_tuner.oracles.BayesianOptimizationOracle,
        "random": keras_tuner.oracles.RandomSearchOracle,
    }
    oracle = oracles[options.algorithm](
        # Accuracy and rmse alike become a number that is better when it is lower.
        objective=keras_tuner.Objective("score", "min"),
        max_trials=count,
        hyperparameters=space,
        seed=seed + 1,  # it takes 0 for none
        allow_new_entries=False,
        max_consecutive_failed_trials=count + 1,
    )

    class Tuner(keras_tuner.Tuner):  # keras_tuner is an extra: its class is known here only
        def run_trial(self, trial: Any, *_: Any, **__: Any) -> dict[str, float]:
            values = {key: trial.hyperparameters.get(key) for key in options.space}
            try:
                score = search.score(values)
            except Exception as error:
                if search.failed_with(error):
                    raise keras_tuner.errors.FailedTrialError(str(error)) from error
                raise keras_tuner.errors.FatalRuntimeError(
                    str(error)
                ) from error  # others it would take for a bad trial
            return {"score": -score if search.metric == "accuracy" else score}

    # What KerasTuner keeps is thrown away: the store keeps what is dear, and proposals follow from the seed and the scores.
    with tempfile.TemporaryDirectory() as folder:
        try:
            Tuner(oracle=oracle, directory=folder, project_name="tune", overwrite=True).search(verbose=0)
        except keras_tuner.errors.FatalRuntimeError as error:
            raise error.__cause__ or error from None


def _declare(space: Any, key: str, choice: TuneRange | list[Any]) -> None:
    if isinstance(choice, list):
        space.Choice(key, choice)
        return
    sampling = "log" if choice.log else "linear"
    if all(isinstance(each, int) for each in (choice.low, choice.high)):
        space.Int(key, choice.low, choice.high, sampling=sampling)
    else:
        space.Float(key, float(choice.low), float(choice.high), sampling=sampling)


def of_file(source: str, overrides: list[str]) -> Callable[[list[str]], Config]:
    """What `tune` asks for, of a YAML file or a template and the overrides that hold for every trial."""
    return lambda more: load_config(source, [*overrides, *more])
