"""The walk: cached or called, one failed recipe among good ones, force and until. The stages' own work is left out here;
tests/test_journey.py walks with the real ones."""

import contextlib
import dataclasses
import io
import json

import pytest
import rich.console

from components.artifacts import write_json
from components.errors import ContractError, ModelError, StoppedError, WorkerError
from pipeline import follow as following
from pipeline import plan as plan_module
from pipeline import runner
from pipeline.config import from_dict
from pipeline.follow import follow
from pipeline.runner import run, scope
from pipeline.screen import Screen
from pipeline.stage import Call
from pipeline.stages import STAGES
from pipeline.store import EVENTS
from pipeline.team import Place

CALLS: list[str] = []
FAULTS: dict[str, Exception] = {}
DEMANDS: dict[str, str] = {}


def work(call: Call) -> None:
    """Stands in for every stage: notes that it was called and leaves what the runner publishes."""
    name = call.name
    CALLS.append(name)
    if name in FAULTS:
        raise FAULTS[name]
    if name != "report":  # which writes no events
        (call.folder / EVENTS).mkdir()
    if name in DEMANDS:
        write_json(call.folder / "got.json", call.demand(DEMANDS[name]).name)
    if name == "select":
        write_json(call.folder / "results.json", {"selected": None, "variants": [], "failures": call.failures})
    if name == "report":
        (call.folder / "report.html").write_text("<p>")


@pytest.fixture
def config(tmp_path, monkeypatch):
    CALLS.clear()
    FAULTS.clear()
    DEMANDS.clear()
    monkeypatch.setattr(plan_module, "STAGES", {n: dataclasses.replace(s, run=work) for n, s in STAGES.items()})
    return from_dict(
        {
            "name": "t",
            "workspace": str(tmp_path),
            "source": {"kind": "digits"},
            "model": {"name": "cnn"},
            "compress": {"recipes": ["int8", "prune@0.5+int8"]},
        }
    )


ALL = 2 + 1 + 3 + 3 + 3  # preprocess train, compress, export, measure, select bundle report


def test_every_step_is_called_once_and_a_rerun_calls_nothing(config):
    run(config)
    assert len(CALLS) == ALL
    CALLS.clear()
    run(config)
    assert CALLS == []


def test_until_stops_and_the_next_run_goes_on_from_there(config):
    run(config, until="train")
    assert CALLS == ["preprocess", "train"]
    run(config)
    assert len(CALLS) == ALL


def test_force_does_the_stage_again_with_all_that_depends_on_it(config):
    run(config)
    CALLS.clear()
    run(config, force=["measure"])
    assert [name for name in CALLS if name.startswith("measure")] == [
        "measure float32", "measure int8", "measure prune@0.5+int8",
    ]  # fmt: skip
    assert "train" not in CALLS
    assert "select" in CALLS


def test_a_failed_recipe_is_recorded_with_its_reason_and_the_others_go_on(config):
    FAULTS["export int8"] = ModelError("layer 'conv' cannot be written; use float32.")
    results = run(config)
    assert results.data["failures"] == {"int8": "layer 'conv' cannot be written; use float32."}
    assert "measure int8" not in CALLS
    assert "measure prune@0.5+int8" in CALLS


def test_a_failed_prefix_fails_every_recipe_behind_it(config):
    FAULTS["compress prune@0.5"] = ModelError("nothing to prune.")
    results = run(config)
    assert results.data["failures"] == {"prune@0.5+int8": "nothing to prune."}


def test_an_unforeseen_fault_of_one_recipe_names_its_type_and_does_not_stop_the_run(config):
    FAULTS["measure int8"] = RuntimeError("kernel missing\nmore")
    results = run(config)
    (reason,) = results.data["failures"].values()
    assert reason == "measure int8: RuntimeError: kernel missing; the run's log has the traceback."


def test_what_failed_is_tried_again_next_time_and_the_selection_is_another(config):
    FAULTS["export int8"] = ModelError("once.")
    run(config)
    FAULTS.clear()
    CALLS.clear()
    results = run(config)
    assert CALLS == ["export int8", "measure int8", "select", "bundle", "report"]
    assert results.data["failures"] == {}


def test_a_fault_of_the_base_training_ends_the_run(config):
    FAULTS["train"] = ModelError("loss is not a number.")
    with pytest.raises(ModelError, match="loss is not a number"):
        run(config)


def test_the_screen_tells_cached_from_done_and_names_what_failed(config):
    FAULTS["export int8"] = ModelError("why.")
    stream = io.StringIO()
    run(config, until="export", screen=Screen(rich.console.Console(file=stream, width=120)))
    run(config, until="export", screen=Screen(rich.console.Console(file=stream, width=120)))
    text = stream.getvalue()
    assert "done     train" in text
    assert "cached   train" in text
    assert text.count("FAILED   export int8: why.") == 2


def test_what_an_earlier_run_left_goes_when_it_is_true_no_more(config, tmp_path):
    (tmp_path / "t" / "bundle").mkdir(parents=True)
    run(config)
    assert not (tmp_path / "t" / "bundle").exists(), "nothing was selected"
    other = config.model_copy(update={"compress": config.compress.model_copy(update={"recipes": ["float16"]})})
    run(other)
    names = {link.name for link in (tmp_path / "t" / "tensorboard").iterdir()}
    assert "5-measure-float16" in names
    assert "5-measure-int8" not in names


def test_what_a_library_prints_goes_to_the_log(config, tmp_path, capfd, monkeypatch):
    import os

    def noisy(call):
        os.write(2, b"noise from C\n")
        work(call)

    stages = {n: dataclasses.replace(s, run=noisy) for n, s in STAGES.items()}
    monkeypatch.setattr(plan_module, "STAGES", stages)
    run(config)
    assert "noise" not in capfd.readouterr().err
    assert "noise from C" in (tmp_path / "t" / "run.log").read_text()


def rescuing(config, *recipes):
    return config.model_copy(update={"compress": config.compress.model_copy(update={"recipes": list(recipes)})})


def test_a_step_that_nobody_asks_for_is_not_made(config):
    run(rescuing(config, "rescue"))
    assert [name for name in CALLS if name.startswith(("compress", "export", "measure"))] == [
        "export float32",
        "measure float32",
        "export rescue",
        "measure rescue",
    ]


def test_a_step_that_is_asked_for_is_made_once_and_is_the_one_of_its_own_recipe(config):
    DEMANDS["export rescue"] = "compress qat"
    stream = io.StringIO()
    run(rescuing(config, "rescue"), screen=Screen(rich.console.Console(file=stream, width=120)))
    assert CALLS.count("compress qat") == 1
    assert "done     compress qat" in stream.getvalue()
    CALLS.clear()
    run(rescuing(config, "rescue", "qat"))
    assert "compress qat" not in CALLS
    assert "export qat" in CALLS


def test_what_is_asked_for_in_vain_gives_its_reason_and_is_tried_once(config):
    DEMANDS["export rescue"] = "compress qat"
    FAULTS["compress qat"] = ModelError("nothing to quantize.")
    results = run(rescuing(config, "rescue", "qat"))
    assert results.data["failures"] == dict.fromkeys(["qat", "rescue"], "nothing to quantize.")
    assert CALLS.count("compress qat") == 1


def test_tensorboard_names_sort_as_the_journey_goes_and_lead_to_the_artifact(config, tmp_path):
    run(config)
    plan = plan_module.make_plan(config)
    names = [scope(step) for step in plan.steps]
    assert names == sorted(names, key=lambda name: name.split("-")[0])
    link = tmp_path / "t" / "tensorboard" / "2-train"
    assert link.is_symlink()
    assert not (tmp_path / "t" / "tensorboard" / "8-report").is_symlink(), "it would lead to nothing"
    assert link.resolve(strict=False) == plan.store.folder(plan.steps[1].key) / "tensorboard"


# --- several processes -----------------------------------------------------------------------------------------------


class StandIn:
    """A team whose other members always do as the chief does."""

    def __init__(self, fault=None, *, broken=False):
        self.place = Place(0, ("a:1", "b:1"))
        self.led_steps, self.dismissed = [], []
        self.fault, self.breaks, self.broken = fault, broken, False

    @contextlib.contextmanager
    def led(self, step, folder, recipes):
        self.led_steps.append((step, folder.name.endswith(".partial"), recipes))
        if self.fault and step.startswith("compress"):
            self.broken = self.breaks
            raise self.fault
        yield

    def dismiss(self, error):
        self.dismissed.append(error)


@pytest.fixture
def team_of(config, monkeypatch):
    def made(**how):
        team = StandIn(**how)
        monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": ["a:1", "b:1"]}, "task": TASK}))
        monkeypatch.setattr(runner.Team, "join", lambda where, options: team)
        strategy = config.strategy.model_copy(update={"name": "multi_worker", "workers": 2})
        return team, config.model_copy(update={"strategy": strategy})

    return made


TASK = {"type": "worker", "index": 0}


def test_the_chief_leads_the_steps_that_train_and_does_the_rest_alone(team_of):
    team, config = team_of()
    run(config)
    recipes = ["int8", "prune@0.5+int8"]
    assert team.led_steps == [("train", True, recipes), ("compress prune@0.5", True, recipes)]
    assert len(CALLS) == ALL
    assert team.dismissed == [None]


def test_what_is_trained_already_asks_for_no_team_unless_it_is_forced(team_of):
    team, config = team_of()
    run(config)
    run(config)
    assert len(team.dismissed) == 1
    run(config, force=["compress"])
    assert len(team.dismissed) == 2
    assert [name for name, *_ in team.led_steps] == ["train", "compress prune@0.5", "compress prune@0.5"]


def test_a_fault_that_all_share_fails_the_recipe_and_one_that_only_the_chief_has_ends_the_run(team_of):
    fault = ModelError("nothing to prune.")
    team, config = team_of(fault=fault)
    assert run(config).data["failures"] == {"prune@0.5+int8": "nothing to prune."}
    team, config = team_of(fault=fault, broken=True)
    with pytest.raises(ModelError, match=r"nothing to prune\."):
        run(config)
    assert team.dismissed == [fault]


def test_a_lost_worker_ends_the_run_and_nobody_is_left_to_dismiss(team_of):
    team, config = team_of(fault=WorkerError("worker 1 was lost."))
    with pytest.raises(WorkerError, match=r"worker 1 was lost\."):
        run(config)
    assert team.dismissed == []


class Led:
    """A team as a worker sees it: says what the chief would."""

    def __init__(self, *orders, folder):
        self.place, self.folder, self.said = Place(1, ("a:1", "b:1")), folder, orders
        self.taken = []

    def orders(self):
        yield from self.said

    @contextlib.contextmanager
    def followed(self, order):
        self.taken.append(order["step"])
        yield self.folder / order["step"]


def order(step, recipes=("prune@0.5+int8",)):
    return {"step": step, "folder": "f", "recipes": list(recipes)}


def test_a_worker_takes_part_in_what_is_announced_and_writes_nothing_into_the_store(config, tmp_path):
    run(config)
    CALLS.clear()
    before = sorted(tmp_path.rglob("*"))
    scratch = tmp_path.parent / f"{tmp_path.name}-scratch"
    for name in ("train", "compress prune@0.5"):
        (scratch / name).mkdir(parents=True)
    team = Led(order("train"), order("compress prune@0.5"), {"end": None}, folder=scratch)
    follow(team, config, Screen.silent())
    assert CALLS == team.taken == ["train", "compress prune@0.5"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_worker_ends_as_the_chief_says(config, tmp_path):
    follow(Led({"end": None}, folder=tmp_path), config, Screen.silent())
    with pytest.raises(StoppedError, match=r"the chief ended the run: no such file\."):
        follow(Led({"end": "no such file."}, folder=tmp_path), config, Screen.silent())


def test_a_worker_that_does_not_see_the_workspace_says_so(config, tmp_path, monkeypatch):
    monkeypatch.setattr(following, "_APPEARS_SECONDS", 0.0)
    with pytest.raises(ContractError, match=r"every worker must see what the chief made, and this one does not; put"):
        follow(Led(order("train"), folder=tmp_path), config, Screen.silent())
