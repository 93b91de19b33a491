"""The policy of `recipes: auto`, on landscapes that are made up."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.options import CompressOptions, SelectOptions
from components.recipe import RESCUE, parse_recipe
from pipeline.search import AXES, ENDS, OPENERS, Point, Trial, propose, steps_of, trial_of

LIMIT = 0.01
STRENGTHS = CompressOptions().strengths


def seconds(recipe):
    return 2.0 + 60 * recipe.count("@") + 60 * recipe.endswith("qat")


def loss(recipe, hurts=None):
    """Monotone: more of any step loses more; qat gives a third of it back."""
    hurts = hurts or {"channels": 0.001, "lowrank": 0.002, "prune": 0.0012, "cluster": 0.0008}
    steps = dict(step.split("@") for step in recipe.split("+") if "@" in step)
    lost = sum(hurts[axis] * (AXES[axis].index(float(value)) + 1) for axis, value in steps.items())
    return lost if recipe.endswith("qat") else 1.5 * lost + 0.001


def size(recipe):
    return {"dynamic": 80_000.0, "float16": 150_000.0}.get(recipe, 79_000.0)


def search(options, loss=loss, limit=60, fails=(), impossible=()):
    """Every trial until nothing is proposed, always the first proposal."""
    trials, proposals = [], []
    while len(trials) < limit and (found := propose(trials, options, seconds, impossible)):
        recipe = found[0].recipe
        proposals.append(found[0])
        if recipe in fails:
            trials.append(Trial(recipe, None, True, None))
            continue
        excess = max(0.0, loss(recipe) - LIMIT) / LIMIT
        goal = size(recipe) if "@" not in recipe else 79_000 * point(recipe).share
        trials.append(Trial(recipe, excess, excess > 0, goal))
    return trials, proposals


def point(recipe):
    *steps, end = recipe.split("+")
    found = Point(end=end)
    for step in steps:
        axis, _, value = step.partition("@")
        found = found.at(axis, AXES[axis].index(float(value)) + 1)
    return found


def test_formats_that_train_nothing_come_first():
    trials, proposals = search(SelectOptions(), limit=3)
    assert tuple(trial.recipe for trial in trials) == OPENERS
    assert {each.why for each in proposals} == {"it takes no training"}


def test_it_goes_stronger_where_that_held_and_half_way_back_where_it_did_not():
    """int8 loses 1.5 x 0.0013 a notch of pruning and 0.001 more, qat 0.0013 a notch; 0.01 is allowed."""
    hurts = {"channels": 1.0, "lowrank": 1.0, "prune": 0.0013, "cluster": 1.0}
    trials, proposals = search(SelectOptions(), lambda recipe: loss(recipe, hurts))
    pruned = [trial.recipe for trial in trials if trial.recipe.startswith("prune") and "cluster" not in trial.recipe]
    assert pruned == ["prune@0.7+int8", "prune@0.8+int8", "prune@0.8+qat", "prune@0.9+qat", "prune@0.85+qat"]
    best = min((trial for trial in trials if not trial.excess), key=lambda trial: trial.goal)
    assert best.recipe == "prune@0.85+qat"
    whys = {each.recipe: each.why for each in proposals}
    assert whys["prune@0.7+int8"] == "int8 held, so prune too"
    assert whys["prune@0.8+int8"] == "prune@0.7+int8 held, so stronger"


def test_what_lost_too_much_as_int8_is_tried_after_qat():
    hurts = {"channels": 1.0, "lowrank": 1.0, "prune": 0.002, "cluster": 1.0}
    trials, proposals = search(SelectOptions(), lambda recipe: loss(recipe, hurts))
    assert trials[3] == Trial(
        "prune@0.7+int8", pytest.approx(0.3), True, pytest.approx(79_000 * point("prune@0.7+int8").share)
    )
    whys = {each.recipe: each.why for each in proposals}
    assert whys["prune@0.7+qat"] == "prune@0.7+int8 loses too much, qat may give it back"


def test_a_rescue_is_proposed_only_where_int8_loses_too_much():
    lossy = [
        Trial("int8", 2.0, True, 79_000.0),
        Trial("dynamic", 0.0, False, 80_000.0),
        Trial("float16", 0.0, False, 1e5),
    ]
    first = propose(lossy, SelectOptions(), seconds)[0]
    assert (first.recipe, first.why) == (RESCUE, "int8 loses too much, and perhaps few of its layers are to blame")
    assert RESCUE not in [
        each.recipe for each in propose(lossy[1:] + [Trial("int8", 0.0, False, 1.0)], SelectOptions(), seconds)
    ]
    assert RESCUE not in [
        each.recipe for each in propose(lossy, SelectOptions(max_metric_drop=None, max_bytes=1), seconds)
    ]


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        (SelectOptions(size="raw"), {"channels", "lowrank"}),
        (SelectOptions(objective="latency"), {"channels", "lowrank"}),
        (SelectOptions(objective="metric"), set()),
    ],
)
def test_steps_that_do_not_serve_the_goal_are_left_out(options, axes):
    trials, _ = search(options)
    used = {step.partition("@")[0] for trial in trials for step in trial.recipe.split("+") if "@" in step}
    assert used == axes
    assert (options.objective == "metric") == ([trial.recipe for trial in trials] == [*OPENERS, "qat"])


def test_a_step_that_a_model_does_not_allow_ends_its_axis_and_no_other():
    prune = {f"prune@{value:g}+{end}" for value in AXES["prune"] for end in ENDS}
    trials, _ = search(SelectOptions(), fails=prune)
    failed = [trial.recipe for trial in trials if trial.goal is None]
    assert 0 < len(failed) < len(prune)
    assert any(trial.recipe.startswith("cluster") and trial.goal for trial in trials)


def steps_in(trials):
    return {step for trial in trials for step in trial.recipe.split("+")}


def test_a_step_that_is_known_to_be_impossible_is_never_tried_and_milder_ones_are():
    barred = ["channels@0.3", "channels@0.4", "channels@0.5", *(f"lowrank@{value:g}" for value in AXES["lowrank"])]
    tried = steps_in(search(SelectOptions(size="raw"), impossible=barred)[0])
    assert {step for step in tried if "@" in step} == {"channels@0.1", "channels@0.2"}
    assert "qat" in steps_in(search(SelectOptions(objective="metric"))[0])
    assert "qat" not in steps_in(search(SelectOptions(objective="metric"), impossible=["qat"])[0])


def test_the_steps_of_a_goal_are_legal_and_begin_with_the_mildest():
    steps = steps_of(SelectOptions())
    assert [str(parse_recipe(step, STRENGTHS)) for step in steps] == steps
    assert (steps[0], steps[-1], "prune@0.5" in steps) == ("channels@0.1", "qat", True)
    assert steps_of(SelectOptions(objective="metric")) == ["qat"]


def test_nothing_but_validation_figures_is_looked_at():
    variant = {
        "recipe": "int8", "status": "ok", "metric_name": "accuracy", "metric": 0.1, "metric_drop": 0.8,
        "validation_metric": 0.9, "validation_drop": 0.004, "bytes": 9, "gzip_bytes": 7, "latency_ms": {"p50": 0.5},
    }  # fmt: skip
    assert trial_of(variant, SelectOptions()) == Trial("int8", 0.0, False, 7.0)
    assert trial_of(variant, SelectOptions(objective="metric")).goal == -0.9
    assert trial_of(variant, SelectOptions(objective="latency", max_metric_drop=0.002)) == Trial(
        "int8", pytest.approx(1.0), True, 0.5
    )
    assert trial_of(variant, SelectOptions(size="raw", max_bytes=6)) == Trial("int8", pytest.approx(0.5), False, 9.0)
    rmse = {**variant, "metric_name": "rmse"}
    assert trial_of(rmse, SelectOptions(objective="metric")).goal == 0.9
    assert trial_of({"recipe": "qat", "status": "failed"}, SelectOptions()) == Trial("qat", None, True, None)
    assert trial_of({"recipe": "qat", "status": "failed"}, SelectOptions(), skipped=True).lossy is False


@settings(deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries({axis: st.floats(0, 0.02) for axis in AXES}),
    st.sampled_from(["size", "latency", "metric"]),
    st.sampled_from([None, 0.01]),
    st.floats(0, 0.02),
    st.sets(st.sampled_from(steps_of(SelectOptions()))),
)
def test_any_search_ends_repeats_itself_and_tries_legal_recipes_once(hurts, objective, limit, of_int8, barred):
    options = SelectOptions(objective=objective, max_metric_drop=limit)

    def lost(recipe):
        return loss(recipe, hurts) + of_int8 * recipe.endswith("int8")

    trials, _ = search(options, lost, limit=400, impossible=barred)
    names = [trial.recipe for trial in trials]
    assert len(names) < 400
    assert len(set(names)) == len(names)
    assert [str(parse_recipe(name, STRENGTHS)) for name in names] == names
    assert search(options, lost, limit=400, impossible=barred)[0] == trials
    assert not steps_in(trials) & barred
    lossy = [point(trial.recipe) for trial in trials if trial.lossy and trial.recipe.split("+")[-1] in ENDS]
    for number, one in enumerate(lossy):
        assert not any(later.holds(one) for later in lossy[number + 1 :]), "stronger than one that lost too much"


def test_the_worked_example_of_a_point_holds():
    assert Point((0, 0, 6, 3), "qat").recipe == "prune@0.8+cluster@16+qat"
    assert Point().recipe == "int8"
    assert point("channels@0.5+prune@0.7+int8").share < point("prune@0.7+int8").share < Point().share == 1.0
