"""The recipe grammar: what parses, what it is written back as, and what is refused in which words."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.errors import ConfigError
from components.options import CompressOptions
from components.recipe import FORMATS, STRENGTHS, TRAINING_STEPS, parse_recipe

STRENGTH = {"channels": 0.5, "lowrank": 0.9, "prune": 0.7, "cluster": 16}
FORM = "a number, a number and blocks (0.9:1x4, 0.9:1x16), or zeros:group up to 16 (2:4)"
LOADS = "XNNPACK loads sparse int8 kernels of dense layers in blocks of 1x16 only"


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("float32", "float32"),
        ("qat", "qat"),
        ("qat+int8", "qat"),
        ("prune", "prune@0.7"),
        ("prune+float32", "prune@0.7"),
        ("lowrank+prune+qat", "lowrank@0.9+prune@0.7+qat"),
        ("prune@0.85 + cluster + int8", "prune@0.85+cluster@16+int8"),
        ("prune@2:4", "prune@2:4"),
        ("prune@02:4+qat", "prune@2:4+qat"),
        ("prune@0.90:1x16+int8 + sparse", "prune@0.9:1x16+int8+sparse"),
        ("prune@0.9:1x16+qat+sparse", "prune@0.9:1x16+qat+sparse"),
        ("prune@0.9:1x4+sparse", "prune@0.9:1x4+float32+sparse"),
        ("prune@0.9+float16+sparse", "prune@0.9+float16+sparse"),
        ("prune+sparse", "prune@0.7+float32+sparse"),
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
        ("prune@1.0:1x4", "prune takes a sparsity above 0 and below 1, got 1; write for instance 'prune@0.8'."),
        ("prune@4:4", f"the strength after '@' must be {FORM}, got '4:4'; write 'prune@0.7'."),
        ("prune@0:4", f"the strength after '@' must be {FORM}, got '0:4'; write 'prune@0.7'."),
        ("prune@8:17", f"the strength after '@' must be {FORM}, got '8:17'; write 'prune@0.7'."),
        ("prune@0.9:2x2", f"the strength after '@' must be {FORM}, got '0.9:2x2'; write 'prune@0.7'."),
        ("cluster@2:4", "the strength after '@' must be a number, got '2:4'; write 'cluster@16'."),
        ("sparse", "unknown step 'sparse'; use one of"),
        ("prune+sparse+int8", "unknown step 'sparse'; use one of"),
        ("cluster+int8+sparse", "sparse storage leaves zeros out, so prune must come before it, got none; write"),
        (
            "prune@0.9+int8+sparse",
            f"sparse storage of int8 does not work after 'prune@0.9': {LOADS}; drop '+sparse', or",
        ),
        ("prune@0.9:1x4+qat+sparse", f"sparse storage of int8 does not work after 'prune@0.9:1x4': {LOADS}; drop"),
        ("prune@2:4+int8+sparse", f"sparse storage of int8 does not work after 'prune@2:4': {LOADS}; drop"),
        (
            "prune@0.9:1x16+dynamic+sparse",
            "sparse storage of dynamic does not work after 'prune@0.9:1x16': XNNPACK takes the stored weights for the whole",
        ),
        (
            "prune@0.9:1x4+float16+sparse",
            "sparse storage of float16 does not work after 'prune@0.9:1x4': TFLite makes NaN of float16 blocks; drop",
        ),
        (
            "prune@0.9:1x16+int16x8+sparse",
            "sparse storage of int16x8 does not work after 'prune@0.9:1x16': it has not been",
        ),
        ("cluster@many", "the strength after '@' must be a number, got 'many'; write 'cluster@16'."),
        (
            "lowrank@1",
            "lowrank takes a share of the kernel's energy above 0 and below 1, got 1; write for instance 'lowrank@0.9'.",
        ),
        ("prune+lowrank", "'lowrank' cannot follow 'prune'; the order is"),
        ("channels@1", "channels takes a share of the multiply-adds above 0 and below 1, got 1; write for instance"),
        (
            "prune+channels",
            "'channels' cannot follow 'prune'; the order is channels, lowrank, prune, cluster, qat, each once.",
        ),
        ("qat@8", "qat takes no strength, got '@8'; write 'qat'."),
        ("cluster+prune", "'prune' cannot follow 'cluster'; the order is"),
        ("int8+qat", "'int8' says how the file is written, so nothing may follow it; got 'qat'."),
        ("qat+float16", "a qat model is written as int8, got 'float16'; drop '+float16' or 'qat'."),
        ("qat+int4_weights", "a qat model is written as int8, got 'int4_weights'; drop '+int4_weights' or 'qat'."),
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


@given(
    st.one_of(
        st.tuples(st.integers(1, 99), st.sampled_from(["", ":1x4", ":1x16"])).map(
            lambda given: (given[0] / 100, f"{given[0] / 100:g}{given[1]}", given[1][1:] or None)
        ),
        st.tuples(st.integers(1, 15), st.integers(2, 16))
        .filter(lambda given: given[0] < given[1])
        .map(lambda given: (given[0] / given[1], f"{given[0]}:{given[1]}", f"{given[0]}:{given[1]}")),
    ),
    st.sampled_from(["", "+float32", "+float16", "+dynamic", "+int8", "+qat", "+cluster@16+qat"]),
    st.booleans(),
)
def test_a_pattern_is_read_and_written_back_and_so_is_sparse_storage(pruned, after, sparse):
    strength, written, pattern = pruned
    text = f"prune@{written}{after}" + "+sparse" * sparse
    format = "int8" if "qat" in after else after.strip("+") or "float32"
    works = {"float16": ":1x" not in written, "dynamic": False, "int8": pattern == "1x16"}.get(format, True)
    if sparse and not works:
        with pytest.raises(ConfigError, match=f"sparse storage of {format} does not work after"):
            parse_recipe(text, {})
        return
    recipe = parse_recipe(text, {})
    assert recipe.sparse == sparse
    assert (recipe.steps[0].strength, recipe.steps[0].pattern) == (strength, pattern)
    assert str(recipe.steps[0]) == f"prune@{written}"
    assert parse_recipe(str(recipe), {}) == recipe


def test_patterns_of_equal_strength_are_different_steps():
    first, second = (parse_recipe(text, {}).steps for text in ("prune@0.5", "prune@2:4"))
    assert first != second
    assert first[0].strength == second[0].strength
