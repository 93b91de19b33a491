"""The search carried out: its budget, what it records, and how it goes on. The stages' work is made up and so is the time."""

import dataclasses
import io

import pytest
import rich.console

from components.artifacts import write_json
from components.errors import ModelError
from pipeline import auto, store
from pipeline import plan as plan_module
from pipeline.config import from_dict
from pipeline.plan import make_plan
from pipeline.runner import run
from pipeline.screen import Screen
from pipeline.stages import STAGES
from pipeline.tables import show_plan

SECONDS = {"train": 40.0, "compress": 20.0, "export": 2.0, "measure": 1.0}


class World:
    """Stands in for every stage, and for the clock: a step takes what SECONDS says, in updates of one second."""

    def __init__(self):
        self.now, self.calls, self.faults = 0.0, [], {}

    def monotonic(self):
        return self.now

    def work(self, call):
        self.calls.append(call.name)
        for _ in range(int(SECONDS.get(call.name.split()[0], 0.0))):
            if call.name.startswith("compress"):
                call.trace.pulse()
            self.now += 1
        if call.name in self.faults:
            raise self.faults[call.name]
        if call.name.startswith("measure"):
            write_json(call.folder / "variant.json", self.variant(str(call.recipe)))
        if call.name == "select":
            facts = {
                "failures": call.failures,
                "skipped": list(call.skipped),
                "trials": call.trials,
                "tried": list(call.trials),
            }
            write_json(call.folder / "results.json", {"selected": None, "variants": [], **facts})
        if call.name == "report":
            (call.folder / "report.html").write_text("<p>")

    @staticmethod
    def variant(recipe):
        drop = 0.004 * recipe.count("@")
        return {
            "recipe": recipe, "status": "ok", "metric_name": "accuracy", "metric": 0.9, "validation_metric": 0.9 - drop,
            "bytes": 100, "gzip_bytes": 100 - 20 * recipe.count("@"), "latency_ms": {"p50": 0.1},
        }  # fmt: skip


@pytest.fixture
def world(monkeypatch):
    made = World()
    stages = {name: dataclasses.replace(stage, run=made.work) for name, stage in STAGES.items()}
    monkeypatch.setattr(plan_module, "STAGES", stages)
    for module in (auto, store):
        monkeypatch.setattr(module.time, "monotonic", made.monotonic)
    return made


def config(tmp_path, budget="120s", **more):
    return from_dict(
        {
            "name": "t",
            "workspace": str(tmp_path),
            "source": {"kind": "digits"},
            "model": {"name": "cnn"},
            "compress": {"recipes": "auto", "budget": budget},
            **more,
        }
    )


def search(world, config):
    world.calls.clear()
    stream = io.StringIO()
    results = run(config, screen=Screen(rich.console.Console(file=stream, width=200)))
    return results.data, stream.getvalue()


def test_the_search_tries_recipes_in_turn_and_says_why(world, tmp_path):
    data, screen = search(world, config(tmp_path, "120s"))
    names = data["tried"]
    assert names[:3] == ["int8", "dynamic", "float16"]
    assert data["trials"]["prune@0.7+int8"] == "int8 held, so prune too"
    assert f"trial    {names[3]}: {data['trials'][names[3]]} (0:01:51 of 120s left)" in screen
    assert [name for name in world.calls if name in ("select", "bundle", "report")] == ["select", "bundle", "report"]


@pytest.mark.parametrize("budget", [10, 60, 120, 300])
def test_the_budget_counts_the_trials_and_is_kept(world, tmp_path, budget):
    world.now = 0.0
    run(config(tmp_path, until := f"{budget}s"), until="train")
    before = world.now
    data, _ = search(world, config(tmp_path, until))
    spent = world.now - before - SECONDS["export"] - SECONDS["measure"]  # of float32, which is no trial
    assert spent <= 1.1 * budget
    assert len(data["skipped"]) == 1


def test_a_trial_that_takes_longer_than_expected_is_cut_and_recorded(world, tmp_path, monkeypatch):
    monkeypatch.setitem(SECONDS, "compress", 500.0)
    data, screen = search(world, config(tmp_path, "60s"))
    (cut,) = data["skipped"]
    reason = "the budget of 60s does not hold it; raise --budget, and the search goes on from here."
    assert data["failures"] == {cut: reason}
    assert f"skipped  compress {cut.rpartition('+')[0]}: {reason}" in screen
    again, _ = search(world, config(tmp_path, "60s"))
    assert again == data
    assert not [name for name in world.calls if name.startswith("compress")]


def test_a_rerun_does_nothing_and_a_larger_budget_goes_on(world, tmp_path):
    first, _ = search(world, config(tmp_path, "60s"))
    again, _ = search(world, config(tmp_path, "60s"))
    assert (again, world.calls) == (first, [])
    more, _ = search(world, config(tmp_path, "120s"))
    done = [name for name in first["tried"] if name not in first["skipped"]]
    assert more["tried"][: len(done)] == done
    assert len(more["trials"]) > len(first["trials"])
    assert not {f"export {name}" for name in done} & set(world.calls)


def test_a_failed_trial_is_recorded_and_the_search_goes_on(world, tmp_path):
    world.faults = {
        "compress prune@0.7": ModelError("nothing to prune."),
        "export dynamic": ModelError("no kernel."),
    }
    data, screen = search(world, config(tmp_path, "300s"))
    assert data["failures"]["prune@0.7+int8"] == "nothing to prune."
    assert data["failures"]["dynamic"] == "no kernel."
    assert "FAILED   compress prune@0.7: nothing to prune." in screen
    assert data["tried"].index("prune@0.7+int8") < len(data["trials"]) - 2
    assert "prune@0.7+int8" not in data["skipped"]


def test_until_a_stage_before_the_recipes_searches_nothing(world, tmp_path):
    run(config(tmp_path), until="train")
    assert world.calls == ["preprocess", "train"]


def test_until_measure_searches_and_selects_nothing(world, tmp_path):
    run(config(tmp_path, "20s"), until="measure")
    assert "measure int8" in world.calls
    assert "select" not in world.calls


def test_force_does_trials_again(world, tmp_path):
    search(world, config(tmp_path, "20s"))
    world.calls.clear()
    run(config(tmp_path, "20s"), force=["measure"])
    assert [name for name in world.calls if name.startswith("measure")] == [
        "measure float32", "measure int8", "measure dynamic", "measure float16",
    ]  # fmt: skip
    assert not [name for name in world.calls if name.startswith("export")]


def test_the_plan_of_a_search_holds_what_is_known_beforehand(tmp_path):
    names = [step.name for step in make_plan(config(tmp_path)).steps]
    assert names == ["preprocess", "train", "export float32", "measure float32", "select", "bundle", "report"]


def test_a_model_that_was_not_trained_gives_its_latency_for_a_guess(world, tmp_path, monkeypatch):
    monkeypatch.setattr(auto.PreparedData, "rows", lambda *_: 10_000)
    file = tmp_path / "m.keras"
    file.write_bytes(b"never read")
    data, _ = search(world, config(tmp_path, "100s", model={"file": str(file)}, train={"epochs": 0}))
    assert len(data["trials"]) > 3


def test_the_plan_says_that_recipes_are_searched_for(tmp_path, capsys):
    show_plan(make_plan(config(tmp_path, "2h")), [], as_json=False)
    assert (
        "Recipes are searched for behind the base training, for 2h (compress.budget), int8, dynamic, float16 first."
        in capsys.readouterr().out
    )
