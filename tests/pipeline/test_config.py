"""What is written is what is checked; whatever is wrong is one line with place, rule, value and next step."""

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jsonschema
import numpy as np
import pydantic
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from components.errors import ConfigError
from components.options import CsvSource, DigitsSource, LineSource, ModelOptions
from pipeline import config, reference, yaml_text
from pipeline.config import dump, from_dict, json_schema, load_config, template_text, templates
from tests.pipeline.conftest import BASE, DIGITS

# --- what is right -----------------------------------------------------------------------------------------------


def test_a_short_file_is_enough_and_everything_else_has_a_default(here):
    (here / "my.yaml").write_text(BASE)
    loaded = load_config("my.yaml")
    assert (loaded.seed, loaded.task, loaded.workspace) == (0, "auto", "workspace")
    assert loaded.train.batch_size == 64
    assert loaded.source == CsvSource(kind="csv", train=[str(here / "rows.csv")], label="y")


def test_a_relative_path_starts_at_the_folder_of_the_file_that_holds_it(here, monkeypatch):
    (here / "project").mkdir()
    (here / "project" / "my.yaml").write_text(
        "name: mine\nsource: {kind: csv, train: [../rows.csv], label: y}\nmodel: {builder: 'model.py:build'}\n"
    )
    (here / "project" / "model.py").touch()
    loaded = load_config(pathlib.Path("project/my.yaml"))
    assert loaded.source.train == [str(here / "project" / ".." / "rows.csv")]
    assert loaded.model.builder == f"{here}/project/model.py:build"
    overridden = load_config("project/my.yaml", ["source.train=[rows.csv]"])
    assert overridden.source.train == [str(here / "rows.csv")]
    assert loaded.workspace == "workspace"  # where the command is given, not where the file lies


def test_a_builder_by_its_import_path_and_an_absolute_path_stay_as_they_are(here):
    loaded = from_dict({**DIGITS, "model": {"builder": "package.module:build"}})
    assert loaded.model.builder == "package.module:build"
    assert load_config({**DIGITS, "workspace": "/w"}).workspace == "/w"


def test_a_path_takes_environment_variables_and_the_home_folder(here, monkeypatch):
    monkeypatch.setenv("ROWS", str(here))
    monkeypatch.setenv("HOME", str(here))
    (here / "my.yaml").write_text(BASE.replace("[rows.csv]", "['${ROWS}/rows.csv', ~/rows.csv]"))
    assert load_config("my.yaml").source.train == [str(here / "rows.csv")] * 2


def test_numbers_and_words_are_those_of_yaml_1_2(here):
    text = "a: 1e-3\nb: yes\nc: 010\nd: 0x10\ne: 1:30\nf: ~\ng: .5\nh: 'true'\nno: on\n1: 2\n"
    values, lines = yaml_text.read(text, "my.yaml")
    expected = {
        "a": 1e-3,
        "b": "yes",
        "c": 10,
        "d": 16,
        "e": "1:30",
        "f": None,
        "g": 0.5,
        "h": "true",
        "no": "on",
        "1": 2,
    }
    assert values == expected
    assert lines[("no",)] == 9


def test_an_override_sets_one_value_in_yaml(here):
    (here / "my.yaml").write_text(BASE + "train: {epochs: 7}\n")
    sets = ["train.optimizer.learning_rate=1e-2", "compress.recipes=[int8, prune@0.5+qat]", "model.options.units=[8]"]
    loaded = load_config("my.yaml", [*sets, "preprocess.columns.a.kind=number", "select.max_metric_drop="])
    assert loaded.train.optimizer.learning_rate == 0.01
    assert loaded.train.epochs == 7
    assert loaded.compress.recipes == ["int8", "prune@0.5+qat"]
    assert loaded.model.options == {"units": [8]}
    assert loaded.preprocess.columns["a"].kind == "number"
    assert loaded.select.max_metric_drop is None


def test_python_values_are_taken_as_they_come(here):
    loaded = from_dict(
        {
            "name": "mine",
            "source": DigitsSource(),
            "model": ModelOptions(name="mlp", options={"units": [8]}),
            "preprocess": {"image_size": (4, 5)},
            "train": {"epochs": np.int64(3), "optimizer": {"learning_rate": np.float32(0.5)}},
            "workspace": here / "work",
        }
    )
    assert loaded.preprocess.image_size == (4, 5)
    assert (loaded.train.epochs, loaded.train.optimizer.learning_rate) == (3, 0.5)
    assert loaded.workspace == str(here / "work")
    assert loaded.model.options == {"units": [8]}


def test_the_caller_s_values_are_left_alone(here):
    values = {**DIGITS, "source": {"kind": "csv", "train": ["rows.csv"], "label": "y"}}
    load_config(values, ["source.label=a", "name=other"])
    assert values["name"] == "mine"
    assert values["source"] == {"kind": "csv", "train": ["rows.csv"], "label": "y"}


def test_an_integer_option_of_a_model_stays_an_integer(here):
    options = from_dict({**DIGITS, "model": {"name": "mlp", "options": {"a": 1, "b": 1.0, "c": True, "d": "1"}}})
    assert {key: type(value) for key, value in options.model.options.items()} == {
        "a": int, "b": float, "c": bool, "d": str,
    }  # fmt: skip


@pytest.mark.parametrize("name", templates())
def test_a_template_is_legal_and_says_the_same_to_every_reader_of_yaml(name):
    text = template_text(name)
    assert text.startswith("# ")
    values, _ = yaml_text.read(text, name)
    jsonschema.validate(values, json_schema(), cls=jsonschema.Draft202012Validator)
    assert config.Config.model_validate(values).name == name
    assert yaml.safe_load(text) == values  # YAML 1.1, where 1e-3 is text and 010 is 8


def test_the_templates_are_those_that_were_promised():
    assert templates() == ["adult", "digits", "fashion_mnist", "images", "linear"]


def test_templates_without_data_of_their_own_load_as_they_are(here):
    assert load_config("digits").source == DigitsSource()
    assert load_config("linear").source == LineSource(kind="line", rows=1000, noise=1.0)


def test_a_template_names_the_variable_that_it_needs(here, monkeypatch):
    monkeypatch.delenv("TRIMLINE_DATA", raising=False)
    for name in ("fashion_mnist", "adult", "images"):
        with pytest.raises(
            ConfigError, match=rf"^template {name}:\d+: source\.train\S* must get the environment variable TRIM"
        ):
            load_config(name)


def test_the_schema_refuses_what_the_loader_refuses(here):
    validator = jsonschema.Draft202012Validator(json_schema())
    jsonschema.Draft202012Validator.check_schema(json_schema())
    validator.validate(DIGITS)
    for wrong in (
        {**DIGITS, "seeed": 1},
        {**DIGITS, "seed": "1"},
        {**DIGITS, "name": "a/b"},
        {**DIGITS, "source": {"kind": "cvs"}},
        {**DIGITS, "train": {"epochs": -1}},
        {**DIGITS, "preprocess": {"image_size": [1]}},
        {"name": "mine"},
    ):
        assert not validator.is_valid(wrong), wrong
        with pytest.raises(ConfigError):
            from_dict(wrong)


def test_every_option_says_in_the_schema_what_it_may_be():
    def walk(node: object) -> None:
        if isinstance(node, dict):
            if "properties" in node:
                assert node["additionalProperties"] is False, node["title"]
            for child in node.values():
                walk(child)

    walk(json_schema())
    assert json.loads(json.dumps(json_schema())) == json_schema()


def test_the_reference_in_docs_is_what_the_options_say():
    written = pathlib.Path(__file__).parents[2] / "docs" / "configuration.md"
    assert written.read_text(encoding="utf-8") == reference.reference(), "run: make docs"


# --- every input -------------------------------------------------------------------------------------------------

# A shared machine stalls for longer than Hypothesis expects of one example.
patiently = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["name", "source", "model", "train", "compress", "preprocess", "select", "kind", "epochs", "recipes"]
)
JUNK = st.dictionaries(FIELDS, PLAIN | st.dictionaries(FIELDS, PLAIN, max_size=3), max_size=5)


def fault(load: Callable[[], config.Config]) -> str:
    """What `load` says is wrong, as the terminal would show it; empty where it loads."""
    try:
        assert isinstance(load(), config.Config)
    except ConfigError as error:
        return str(error).encode().decode()
    return ""


@patiently
@given(JUNK)
def test_junk_values_give_a_configuration_error_and_nothing_else(values):
    assert len(fault(lambda: from_dict({**DIGITS, **values})).splitlines()) <= 1


@given(st.text(max_size=60) | st.binary(max_size=60))
@patiently
def test_junk_text_gives_a_configuration_error_and_nothing_else(tmp_path, junk):
    file = tmp_path / "junk.yaml"
    file.write_bytes(junk.encode("utf-8", "surrogatepass") if isinstance(junk, str) else junk)
    with pytest.raises(ConfigError) as refused:
        load_config(file)
    assert len(str(refused.value).splitlines()) == 1


@patiently
@given(st.text(max_size=40))
def test_a_junk_override_gives_a_configuration_error_or_a_configuration(override):
    assert len(fault(lambda: load_config(DIGITS, [override])).splitlines()) <= 1


FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | st.integers() | FINITE | st.text()


@patiently
@given(st.recursive(SCALAR, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
@example(["1e-3", "0o7", "010", "yes", "1:30", ".5", "null", "~", "", "<<", "=", "a\u2028b", "\x85"])  # read variously
def test_what_is_written_reads_back_the_same(value):
    back, _ = yaml_text.read(yaml_text.write(value), "written")
    assert repr(back) == repr(value)


@given(
    seed=st.integers(0, 2**31 - 1),
    options=st.dictionaries(st.text(), st.integers() | FINITE | st.text() | st.booleans() | st.lists(st.integers())),
    missing=st.lists(st.text()),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    size=st.none() | st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
)
@patiently
def test_a_dumped_configuration_loads_as_the_same_one(tmp_path, seed, options, missing, rate, size):
    (tmp_path / "rows.csv").touch()
    made = from_dict(
        {
            "name": "mine",
            "seed": seed,
            "source": {"kind": "csv", "train": [tmp_path / "rows.csv"], "label": "y", "missing": missing},
            "model": {"name": "mlp", "options": options},
            "preprocess": {"image_size": size},
            "train": {"optimizer": {"learning_rate": rate}},
        }
    )
    (tmp_path / "dumped.yaml").write_text(dump(made), encoding="utf-8")
    again = load_config(tmp_path / "dumped.yaml")
    assert again == made
    assert dump(again) == dump(made)


def test_loading_a_configuration_loads_no_heavy_library():
    code = "import sys, pipeline.config as c; c.load_config('digits'); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"tensorflow", "keras", "apache_beam", "numpy", "pyarrow"}.isdisjoint(done.stdout.split())


def test_a_configuration_cannot_be_changed(here):
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load_config("digits").seed = 1
