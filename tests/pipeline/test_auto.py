"""The search carried out: its budget, what it records, and how it goes on. The stages' work is made up and so is the time."""

import dataclasses
import io
import json

import pytest
import rich.console

from components.artifacts import write_json
from components.errors import ConfigError, ModelError
from components.options import SelectOptions
from pipeline import auto, fingerprint, store, walk
from pipeline import plan as plan_module
from pipeline.auto import outlook
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
        self.now, self.calls, self.faults, self.impossible, self.of_int8 = 0.0, [], {}, {}, 0.0

    def monotonic(self):
        return self.now

    def work(self, call):
        self.calls.append(call.name)
        for _ in range(int(SECONDS.get(call.name, SECONDS.get(call.name.split()[0], 0.0)))):
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

    def variant(self, recipe):
        drop = 0.004 * recipe.count("@") + self.of_int8 * recipe.endswith("int8")
        return {
            "recipe": recipe, "status": "ok", "metric_name": "accuracy", "metric": 0.9, "validation_metric": 0.9 - drop,
            "bytes": 100, "gzip_bytes": 100 - 20 * recipe.count("@"), "latency_ms": {"p50": 0.1},
        }  # fmt: skip


@pytest.fixture
def world(monkeypatch):
    made = World()
    stages = {name: dataclasses.replace(stage, run=made.work) for name, stage in STAGES.items()}
    monkeypatch.setattr(plan_module, "STAGES", stages)
    monkeypatch.setattr(fingerprint, "code_digest", lambda stage: stage.name)  # it would be read anew for every world
    monkeypatch.setattr(walk.gc, "collect", lambda: None)
    monkeypatch.setattr(auto.preflight, "impossible", lambda *_, ask: made.impossible)
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


@pytest.mark.parametrize("training", range(20, 44, 4))
def test_room_is_left_for_the_export_and_measurement_that_cannot_be_cut(world, tmp_path, monkeypatch, training):
    """27 of 60 seconds go to three exports and measurements; 33 are left, and the first training may last 24 of them."""
    monkeypatch.setitem(SECONDS, "export", 8.0)
    run(config(tmp_path, "60s"), until="train")
    monkeypatch.setitem(SECONDS, "compress", training)
    before = world.now
    data, _ = search(world, config(tmp_path, "60s"))
    assert world.now - before - SECONDS["export"] - SECONDS["measure"] <= 60
    (last,) = data["skipped"]
    assert (last == data["tried"][3]) == (training > 24)


def propose_only(monkeypatch, *recipes):
    """A policy that knows these recipes and no others."""

    def propose(trials, *_):
        tried = [trial.recipe for trial in trials]
        return [auto.Proposal(recipe, "why not") for recipe in recipes if recipe not in tried]

    monkeypatch.setattr(auto, "propose", propose)


def test_a_trial_cut_in_its_second_training_is_not_trained_by_a_rerun(world, tmp_path, monkeypatch):
    propose_only(monkeypatch, "prune@0.7+cluster@16+int8")
    run(config(tmp_path), until="train")
    monkeypatch.setitem(SECONDS, "compress", 45.0)
    sets = {"compress": {"recipes": "auto", "budget": "80s", "prune": {"epochs": 1}, "cluster": {"epochs": 1}}}
    data, _ = search(world, config(tmp_path, **sets))
    assert data["skipped"] == ["prune@0.7+cluster@16+int8"]
    assert [name for name in world.calls if name.startswith("compress")] == [
        "compress prune@0.7", "compress prune@0.7+cluster@16",
    ]  # fmt: skip
    assert search(world, config(tmp_path, **sets))[0] == data
    assert world.calls == []


def test_a_trial_that_goes_on_under_a_larger_budget_has_only_the_rest_of_it(world, tmp_path, monkeypatch):
    propose_only(monkeypatch, "prune@0.7+int8")
    run(config(tmp_path, "60s"), until="train")
    monkeypatch.setitem(SECONDS, "compress", 500.0)
    search(world, config(tmp_path, "60s"))
    before = world.now
    data, _ = search(world, config(tmp_path, "80s"))
    assert data["skipped"] == ["prune@0.7+int8"]
    assert world.calls[0] == "compress prune@0.7"
    assert 19 <= world.now - before <= 21


def test_a_rerun_knows_the_trial_that_was_cut_though_a_better_bet_did_not_fit(world, tmp_path, monkeypatch):
    propose_only(monkeypatch, "prune@0.7+qat", "cluster@16+int8")
    run(config(tmp_path), until="train")
    monkeypatch.setitem(SECONDS, "compress", 500.0)
    sets = {"compress": {"recipes": "auto", "budget": "40s", "qat": {"epochs": 99}, "cluster": {"epochs": 1}}}
    data, _ = search(world, config(tmp_path, **sets))
    assert data["skipped"] == ["cluster@16+int8"]
    assert search(world, config(tmp_path, **sets))[0] == data
    assert world.calls == []


def test_a_slow_rescue_does_not_make_other_exports_look_slow(world, tmp_path, monkeypatch):
    world.of_int8 = 0.02
    monkeypatch.setitem(SECONDS, "export rescue", 60.0)
    data, _ = search(world, config(tmp_path, "120s", export={"rescue": {"qat": False}}))
    assert data["tried"][3:5] == ["rescue", "qat"]
    assert "qat" not in data["skipped"], "70 of 120 seconds are spent, and 23 are enough"


def test_steps_that_the_model_does_not_allow_are_said_once_and_not_tried(world, tmp_path):
    steps = auto.steps_of(SelectOptions())
    world.impossible = {
        step: f"no {step}." for step in steps if step.startswith(("lowrank", "prune")) or step == "channels@0.8"
    }
    data, screen = search(world, config(tmp_path, "200s"))
    assert [line.strip() for line in screen.splitlines() if "not searched" in line] == [
        "note     not searched: no lowrank@0.98.", "note     not searched: no prune@0.5.",
    ]  # fmt: skip
    assert not [name for name in data["tried"] if "lowrank" in name or "prune" in name]
    assert data["failures"].keys() == set(data["skipped"])


def test_a_search_that_was_interrupted_goes_on_as_if_it_had_not_been(world, tmp_path):
    whole, _ = search(world, config(tmp_path / "whole", "120s"))
    world.faults = {"export prune@0.7+int8": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        search(world, config(tmp_path / "cut", "120s"))
    assert "compress prune@0.7" in world.calls
    world.faults = {}
    again, _ = search(world, config(tmp_path / "cut", "120s"))
    assert again == whole
    assert "compress prune@0.7" not in world.calls
    assert "export prune@0.7+int8" in world.calls


def test_a_run_takes_a_budget_in_the_place_of_recipes(world, tmp_path):
    listed = config(tmp_path, compress={"recipes": ["qat"]})
    data = run(listed, budget="20s").data
    assert data["tried"][:3] == ["int8", "dynamic", "float16"]
    with pytest.raises(
        ConfigError, match=r"compress\.budget: must be a positive number and s, m or h, got '20'; write"
    ):
        run(listed, budget="20")


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


def test_a_trial_that_the_model_does_not_bear_is_not_trained_by_a_rerun(world, tmp_path):
    world.faults = {"compress prune@0.7": ModelError("the loss is nan.")}
    made = config(tmp_path, "120s")
    data, _ = search(world, made)
    known = outlook(made).known
    again, screen = search(world, made)
    assert (again, world.calls) == (data, [])
    assert "FAILED   compress prune@0.7: the loss is nan." in screen
    assert [each.recipe for each in known] == [name for name in data["tried"] if name not in data["skipped"]]
    world.faults = {}
    world.calls.clear()
    run(made, force=["compress"])
    assert "measure prune@0.7+int8" in world.calls


def test_a_trial_that_failed_by_accident_is_tried_again_by_a_rerun(world, tmp_path):
    world.faults = {"compress prune@0.7": OSError("out of memory")}
    search(world, config(tmp_path, "120s"))
    world.faults = {}
    search(world, config(tmp_path, "120s"))
    assert "measure prune@0.7+int8" in world.calls


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


def test_training_that_is_forced_has_all_of_the_budget_again(world, tmp_path):
    data, _ = search(world, config(tmp_path, "60s"))
    world.calls.clear()
    again = run(config(tmp_path, "60s"), force=["compress"]).data
    assert [name for name in world.calls if name.startswith("compress")]
    assert (again["tried"], again["skipped"]) == (data["tried"], data["skipped"])


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
    made = config(tmp_path, "2h")
    show_plan(make_plan(made), [], outlook(made), as_json=False)
    assert (
        "Recipes are searched for behind the base training, for 2h (compress.budget), int8, dynamic, float16 first.\n"
        "Next: int8 (it takes no training).\n"
    ) in capsys.readouterr().out
    assert outlook(config(tmp_path, compress={"recipes": ["qat"]})) is None


def test_the_plan_knows_the_trials_in_the_store_and_the_one_that_comes_next(world, tmp_path, capsys):
    data, _ = search(world, config(tmp_path, "60s"))
    done = [name for name in data["tried"] if name not in data["skipped"]]
    world.calls.clear()
    same, more = outlook(config(tmp_path, "60s")), outlook(config(tmp_path, "120s"))
    assert [each.recipe for each in same.known] == done
    assert same.then is None
    assert 9 < same.seconds <= 60
    assert (more.known, world.calls) == (same.known, [])
    made = config(tmp_path, "120s")
    show_plan(make_plan(made), [], more, as_json=False)
    said = capsys.readouterr().out
    assert f"In the store are {len(done)} trials, which took {same.seconds:.0f} s: {', '.join(done)}.\n" in said
    assert f"Next: {more.then.recipe} ({more.then.why})." in said
    show_plan(make_plan(made), [], more, as_json=True)
    assert json.loads(capsys.readouterr().out)["search"]["then"]["recipe"] == more.then.recipe
    assert search(world, made)[0]["tried"][len(done)] == more.then.recipe
