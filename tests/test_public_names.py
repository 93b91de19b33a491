"""The public names, listed once: a change here is a change that users must be told of in CHANGELOG.md."""

import importlib
import inspect
import pathlib

import pytest

import pipeline

PIPELINE = ["Config", "Plan", "Results", "load_config", "make_plan", "run"]
VERBS = {
    "components.data.preprocess": "preprocess",
    "components.data.dataset": "make_batches",
    "components.training.model": "build",
    "components.training.train": "train",
    "components.compression.twin": "to_twin",
    "components.compression.compress": "compress",
    "components.delivery.export": "export",
    "components.delivery.proof": "read_proof",
    "components.delivery.errors_by_layer": "errors_by_layer",
    "components.delivery.measure": "measure",
    "components.delivery.select": "select",
    "components.delivery.bundle": "bundle",
    "components.delivery.report": "report",
}
ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_package_offers_these_names_and_no_others():
    assert sorted(pipeline.__all__) == PIPELINE
    assert sorted(dir(pipeline)) == PIPELINE
    for name in PIPELINE:
        assert getattr(pipeline, name).__name__ == name


def test_a_name_that_is_not_there_is_answered_with_those_that_are():
    with pytest.raises(AttributeError, match=r"no attribute 'rum'; it has Config, Plan, Results"):
        _ = pipeline.rum


@pytest.mark.parametrize(("module", "verb"), VERBS.items(), ids=VERBS.values())
def test_every_stage_verb_is_typed_and_explained(module, verb):
    function = getattr(importlib.import_module(module), verb)
    signature = inspect.signature(function)
    bare = [name for name, value in signature.parameters.items() if value.annotation is inspect.Parameter.empty]
    assert bare == []
    assert signature.return_annotation is not inspect.Signature.empty
    assert function.__doc__
    assert len(function.__doc__.splitlines()) > 3


@pytest.mark.parametrize("package", ["components", "pipeline", "tpu"])
def test_the_packages_say_that_they_are_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_the_guide_to_the_python_api_names_every_one():
    text = (ROOT / "docs" / "python-api.md").read_text()
    assert [name for name in [*PIPELINE, *VERBS, *VERBS.values()] if f"`{name}" not in text] == []
