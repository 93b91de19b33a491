"""The plan: recipes share prefixes, and only what a change touches runs again."""

import pytest

from components.errors import ConfigError
from pipeline.config import from_dict
from pipeline.plan import make_plan, recipes

BASE = {
    "name": "t",
    "source": {"kind": "digits"},
    "model": {"name": "cnn"},
    "compress": {"recipes": ["int8", "prune@0.5+int8", "prune@0.5+qat", "prune@0.8+qat"]},
}


def config(tmp_path, **changes):
    value = {**BASE, "workspace": str(tmp_path)}
    for path, leaf in changes.items():
        node = value
        *sections, last = path.split("__")
        for section in sections:
            node[section] = dict(node.get(section, {}))
            node = node[section]
        node[last] = leaf
    return from_dict(value)


def keys(tmp_path, **changes):
    return {step.name: step.key for step in make_plan(config(tmp_path, **changes)).steps}


def test_the_steps_come_in_the_order_of_the_journey_and_prefixes_are_shared(tmp_path):
    names = [step.name for step in make_plan(config(tmp_path)).steps]
    assert names[:2] == ["preprocess", "train"]
    assert [name for name in names if name.startswith("compress")] == [
        "compress prune@0.5",
        "compress prune@0.8",
        "compress prune@0.5+qat",
        "compress prune@0.8+qat",
    ]
    assert names[-3:] == ["select", "bundle", "report"]


def test_every_step_takes_only_what_came_before(tmp_path):
    seen = set()
    for step in make_plan(config(tmp_path)).steps:
        assert set(step.takes) <= seen
        seen.add(step.name)


def test_float32_is_always_there_and_no_recipe_twice(tmp_path):
    asked = config(tmp_path, compress__recipes=["prune+qat", "prune@0.7+qat", "int8"])
    assert [str(recipe) for recipe in recipes(asked)] == ["float32", "prune@0.7+qat", "int8"]


def test_sparse_storage_is_measured_beside_the_same_recipe_without_it(tmp_path):
    asked = config(tmp_path, compress__recipes=["prune@0.9:1x16+qat+sparse", "prune@2:4+sparse", "prune@0.9:1x16+qat"])
    assert [str(recipe) for recipe in recipes(asked)] == [
        "float32",
        "prune@0.9:1x16+qat",
        "prune@0.9:1x16+qat+sparse",
        "prune@2:4",
        "prune@2:4+float32+sparse",
    ]
    names = [step.name for step in make_plan(asked).steps]
    assert names.count("compress prune@0.9:1x16+qat") == 1
    assert "export prune@2:4+float32+sparse" in names


@pytest.mark.parametrize(
    ("change", "untouched", "touched"),
    [
        ({"compress__qat": {"epochs": 9}}, ["train", "compress prune@0.5", "measure int8"], ["compress prune@0.5+qat"]),
        ({"compress__prune": {"epochs": 9}}, ["train", "export int8"], ["compress prune@0.8", "export prune@0.8+qat"]),
        ({"train__epochs": 9}, ["preprocess"], ["train", "compress prune@0.5", "report"]),
        ({"seed": 9}, [], ["preprocess", "train"]),
        ({"measure__runs": 9}, ["export int8"], ["measure int8", "select"]),
        ({"select__objective": "metric"}, ["measure int8"], ["select", "bundle", "report"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_change_touches_what_depends_on_it_and_nothing_else(tmp_path, change, untouched, touched):
    before, after = keys(tmp_path), keys(tmp_path, **change)
    assert [name for name in untouched if before[name] != after[name]] == []
    assert [name for name in touched if before[name] == after[name]] == []


def test_data_counts_by_content_and_not_by_path(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("x,y\n1,2\n")
    (tmp_path / "c.csv").write_text("x,y\n1,3\n")

    def key(name):
        source = {"kind": "csv", "train": [str(tmp_path / name)], "label": "y"}
        return keys(tmp_path, source=source)["preprocess"]

    assert key("a.csv") == key("b.csv") != key("c.csv")


def test_an_earlier_transform_counts_by_content_with_its_schema(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")

    def key(transform, schema):
        (tmp_path / "transform.json").write_text(transform)
        (tmp_path / "schema.json").write_text(schema)
        source = {"kind": "csv", "train": [str(tmp_path / "a.csv")], "label": "y"}
        return keys(tmp_path, source=source, preprocess={"transform": str(tmp_path / "transform.json")})["preprocess"]

    assert len({key("{}", "{}"), key("{}", "{}"), key("{ }", "{}"), key("{}", "{ }")}) == 3


def test_the_users_own_builder_counts(tmp_path):
    file = tmp_path / "mine.py"

    def key(text):
        file.write_text(text)
        return keys(tmp_path, model={"builder": f"{file}:build"})["train"]

    assert key("def build(): return 1") != key("def build(): return 22")


def test_a_teacher_counts_by_content_and_not_by_path(tmp_path):
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / f"{name}.keras").write_text(text)

    def key(section, name, **more):
        distill = {"teacher": [str(tmp_path / f"{name}.keras")], **more}
        made = keys(tmp_path, **{f"{section}__distill": distill})
        return made["train"], made["compress prune@0.5"]

    for section in ("train", "compress"):
        assert key(section, "a") == key(section, "b")
        assert key(section, "a")[1] != key(section, "c")[1]
        assert key(section, "a")[1] != key(section, "a", weight=0.3)[1]
        assert key(section, "a")[1] != keys(tmp_path)["compress prune@0.5"]
    assert key("compress", "a")[0] == key("compress", "c")[0], "the base training has nothing to do with it"
    own = keys(tmp_path, compress__distill={"teacher": "base"})
    assert own["compress prune@0.5"] not in (key("compress", "a")[1], keys(tmp_path)["compress prune@0.5"])


def test_a_teacher_of_the_same_run_is_trained_first_and_is_the_step_of_a_run_of_its_own(tmp_path):
    large = {"name": "resnet8"}
    plan = make_plan(config(tmp_path, train__distill={"teacher_model": large}))
    assert [step.name for step in plan.steps][:3] == ["preprocess", "train teacher", "train"]
    teacher, student = plan.steps[1:3]
    assert teacher.takes == ("preprocess",)
    assert student.takes == ("preprocess", "train teacher")
    assert (teacher.config.model.name, teacher.config.train.distill) == ("resnet8", None)
    assert student.config.model.name == "cnn"
    assert teacher.key == keys(tmp_path, model=large)["train"]
    assert student.key != keys(tmp_path)["train"]
    wider = keys(tmp_path, train__distill={"teacher_model": {**large, "options": {"width": 8}}})
    assert wider["train"] != student.key
    file = tmp_path / "mine.py"

    def with_builder(text):
        file.write_text(text)
        return keys(tmp_path, train__distill={"teacher_model": {"builder": f"{file}:build"}})

    before, after = with_builder("def build(): return 1"), with_builder("def build(): return 22")
    assert [before[name] != after[name] for name in ("train teacher", "train")] == [True, True]


def test_until_ends_the_plan_after_that_stage(tmp_path):
    assert make_plan(config(tmp_path), until="train").steps[-1].name == "train"


def test_an_unknown_stage_is_refused_with_the_list(tmp_path):
    with pytest.raises(ConfigError, match=r"--until tain: not a stage; use one of preprocess, train, compress"):
        make_plan(config(tmp_path), until="tain")


def test_a_missing_file_is_refused_before_any_work(tmp_path):
    source = {"kind": "csv", "train": [str(tmp_path / "no.csv")], "label": "y"}
    with pytest.raises(ConfigError, match=r"no\.csv"):
        make_plan(config(tmp_path, source=source))


def test_a_builder_in_a_module_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no_such_package_at_all"):
        make_plan(config(tmp_path, model={"builder": "no_such_package_at_all.models:build"}))


def test_forcing_a_stage_reaches_all_that_depends_on_it(tmp_path):
    names = {step.name for step in make_plan(config(tmp_path)).after(["measure"])}
    assert names == {
        "measure float32", "measure int8", "measure prune@0.5+int8", "measure prune@0.5+qat", "measure prune@0.8+qat",
        "select", "bundle", "report",
    }  # fmt: skip


def test_a_rescue_may_ask_for_qat_and_waits_for_float32(tmp_path):
    steps = {step.name: step for step in make_plan(config(tmp_path, compress__recipes=["prune+rescue"])).steps}
    export = steps["export prune@0.7+rescue"]
    assert export.takes == ("preprocess", "compress prune@0.7", "measure float32")
    assert export.asks == ("compress prune@0.7+qat",)
    assert [name for name, step in steps.items() if step.lazy] == ["compress prune@0.7+qat"]
    assert steps["bundle"].asks == ("compress prune@0.7+qat",)
    both = make_plan(config(tmp_path, compress__recipes=["prune+rescue", "prune+qat"])).steps
    assert not any(step.lazy for step in both)
    alone = config(tmp_path, compress__recipes=["rescue"], export={"rescue": {"qat": False}})
    assert not any(step.lazy or step.asks for step in make_plan(alone).steps)


def test_the_limit_of_a_rescue_redoes_the_rescue_and_no_other_file(tmp_path):
    recipes = ["int8", "rescue"]
    loose, tight = (
        keys(tmp_path, compress__recipes=recipes, select={"max_metric_drop": drop}) for drop in (0.02, 0.01)
    )
    changed = {name for name in loose if loose[name] != tight[name]}
    assert changed == {"export rescue", "measure rescue", "select", "bundle", "report"}
