import functools

import pytest
import yaml

from components.errors import ConfigError, DataError, TrimlineError
from pipeline import tune as module
from pipeline.config import load_config
from pipeline.screen import Screen
from pipeline.tune import Trial, Tuned, tune

BASE = {
    "name": "tuned",
    "source": {"kind": "digits"},
    "model": {"name": "mlp", "options": {"units": [16]}},
    "train": {"epochs": 2, "batch_size": 64, "optimizer": {"learning_rate": 0.01}},
    "compress": {"recipes": ["float32"]},
    "tune": {
        "space": {
            "train.optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
            "train.optimizer.name": ["adam", "sgd"],
        },
        "trials": 4,
    },
}


def maker(folder, **changes):
    return functools.partial(load_config, {**BASE, "workspace": str(folder), **changes})


def test_a_search_takes_the_best_on_validation_rows_and_a_second_one_trains_nothing(tmp_path, monkeypatch):
    found = tune(maker(tmp_path), None, Screen.silent())
    assert [each.number for each in found.trials] == [1, 2, 3, 4]
    assert found.metric == "accuracy"
    assert found.best.score == max(each.score for each in found.trials)
    assert len({each.values["train.optimizer.learning_rate"] for each in found.trials}) == 4
    best = load_config(found.file)
    assert best.tune is None
    assert best.train.optimizer.learning_rate == found.best.values["train.optimizer.learning_rate"]
    assert best.train.optimizer.name == found.best.values["train.optimizer.name"]
    assert sorted(path.name for path in (tmp_path / "tuned/tensorboard/tune").iterdir()) == ["001", "002", "003", "004"]

    def nothing(*_, **__):
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr("components.training.train.train", nothing)
    assert tune(maker(tmp_path), None, Screen.silent()).trials == found.trials
    assert (
        yaml.safe_load(found.file.read_text())["train"]["optimizer"]["name"]
        == found.best.values["train.optimizer.name"]
    )


def test_random_proposals_stay_within_the_space(tmp_path, monkeypatch):
    space = {"model.options.units": [8, 24], "train.batch_size": {"low": 32, "high": 40}}
    seen = []

    def score(self, values):
        self.metric = "rmse"
        seen.append(dict(values))
        return float(values["train.batch_size"])

    monkeypatch.setattr(module._Search, "_train", score)
    space = {"model.options.dropout": [0.0, 0.5], "train.batch_size": {"low": 32, "high": 40}}
    made = maker(tmp_path, tune={"space": space, "algorithm": "random", "trials": 30})
    found = tune(made, 8, Screen.silent())
    assert len(seen) == 8
    assert all(32 <= each["train.batch_size"] <= 40 and isinstance(each["train.batch_size"], int) for each in seen)
    assert {each["model.options.dropout"] for each in seen} <= {0.0, 0.5}
    assert found.best.score == min(each["train.batch_size"] for each in seen)


def test_a_failed_trial_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def score(self, values):
        self.metric = "accuracy"
        if values["train.optimizer.name"] == "sgd":
            raise TrimlineError("train: it flew off.")
        return 0.5

    monkeypatch.setattr(module._Search, "_train", score)
    made = maker(tmp_path, tune={**BASE["tune"], "algorithm": "random"})
    found = tune(made, 6, Screen.silent())
    assert {each.reason for each in found.trials} == {"", "train: it flew off."}
    assert found.best.values["train.optimizer.name"] == "adam"
    monkeypatch.setattr(module._Search, "_train", lambda self, values: (_ for _ in ()).throw(TrimlineError("no.")))
    with pytest.raises(TrimlineError, match=r"tune: none of the \d trials could be trained; the first: no\."):
        tune(made, 2, Screen.silent())


def test_what_cannot_be_searched_is_refused_before_any_training(tmp_path):
    with pytest.raises(ConfigError, match=r"tune: the configuration must say what to search, got no section tune"):
        tune(maker(tmp_path, tune=None), None, Screen.silent())
    wrong = {"space": {"train.optimizer.learnig_rate": [0.1, 0.2]}}
    with pytest.raises(ConfigError, match=r"learnig_rate.*did you mean 'learning_rate'"):
        tune(maker(tmp_path, tune=wrong), None, Screen.silent())
    with pytest.raises(ConfigError, match=r"low must be below high, got 2 and 1"):
        maker(tmp_path, tune={"space": {"train.epochs": {"low": 2, "high": 1}}})([])
    with pytest.raises(ConfigError, match=r"low must be above 0 where log is true, got 0"):
        maker(tmp_path, tune={"space": {"train.epochs": {"low": 0, "high": 1, "log": True}}})([])
    assert not (tmp_path / "store").exists()


def test_without_validation_rows_there_is_nothing_to_judge_by(tmp_path):
    made = maker(tmp_path, preprocess={"splits": {"validation": 0, "test": 0.2, "calibration": 0.1}})
    with pytest.raises(DataError, match=r"tune: trials are judged by the validation split, which has 0 rows"):
        tune(made, None, Screen.silent())


def test_the_best_is_lowest_for_rmse_and_the_first_of_equals():
    trials = [Trial(1, {}, None, "no"), Trial(2, {}, 0.5), Trial(3, {}, 0.4), Trial(4, {}, 0.4)]
    assert Tuned(trials, "rmse", None).best.number == 3
    assert Tuned(trials, "accuracy", None).best.number == 2
