"""The recipe grammar: what parses, what it is written back as, and what is refused in which words."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import ConfigError
from components.options import CompressOptions
from components.recipe import FORMATS, STRENGTHS, TRAINING_STEPS, parse_recipe

STRENGTH = {"channels": 0.5, "prune": 0.7, "cluster": 16}


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("float32", "float32"),
        ("qat", "qat"),
        ("qat+int8", "qat"),
        ("prune", "prune@0.7"),
        ("prune+float32", "prune@0.7"),
        ("prune@0.85 + cluster + int8", "prune@0.85+cluster@16+int8"),
        ("channels+prune@0.8+qat", "channels@0.5+prune@0.8+qat"),
    ],
)
def test_a_recipe_is_written_back_whole(text, whole):
    assert str(parse_recipe(text, STRENGTH)) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prune@0", "prune takes a sparsity above 0 and below 1, got 0; write for instance 'prune@0.8'."),
        ("cluster@2.5", "cluster takes a whole number from 2 to 256, got 2.5; write for instance 'cluster@16'."),
        ("cluster@many", "the strength after '@' must be a number, got 'many'; write 'cluster@16'."),
        ("channels@1", "channels takes a share of the multiply-adds above 0 and below 1, got 1; write for instance"),
        ("prune+channels", "'channels' cannot follow 'prune'; the order is channels, prune, cluster, qat, each once."),
        ("qat@8", "qat takes no strength, got '@8'; write 'qat'."),
        ("cluster+prune", "'prune' cannot follow 'cluster'; the order is"),
        ("int8+qat", "'int8' says how the file is written, so nothing may follow it; got 'qat'."),
        ("qat+float16", "a qat model is written as int8, got 'float16'; drop '+float16' or 'qat'."),
        ("prune+pickle", "unknown step 'pickle'; use one of"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_with_place_rule_value_and_next_step(text, words):
    with pytest.raises(ConfigError, match=re.escape(f"compress.recipes '{text}': {words}")):
        parse_recipe(text, STRENGTH)


def test_every_example_fits_and_every_step_has_options_and_a_default():
    options = CompressOptions()
    for name, takes in STRENGTHS.items():
        assert hasattr(options, name)
        if takes is not None:
            assert str(parse_recipe(takes.example, {})) == takes.example
            assert takes.fits(float(options.strengths[name]))


@given(st.lists(st.sampled_from(TRAINING_STEPS), unique=True), st.sampled_from(FORMATS))
def test_steps_in_order_parse_and_their_own_writing_parses_to_the_same(names, written):
    ordered = sorted(names, key=TRAINING_STEPS.index)
    text = "+".join([*ordered, "int8" if "qat" in ordered else written])
    recipe = parse_recipe(text, CompressOptions().strengths)
    assert [step.name for step in recipe.steps] == ordered
    assert parse_recipe(str(recipe), {}) == recipe
    assert [len(path) for path in recipe.prefixes()] == list(range(1, len(ordered) + 1))
