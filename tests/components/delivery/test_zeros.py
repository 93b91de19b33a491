import re
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from components.delivery.zeros import Zeros, densify, find_zeros, storage


def level(size=0, segments=None, indices=None):
    """One level of a walk as the schema's parser gives it: dense of `size` places, or compressed."""
    vectors = [None if each is None else types.SimpleNamespace(values=np.array(each)) for each in (segments, indices)]
    return types.SimpleNamespace(
        format=int(segments is not None), denseSize=size, arraySegments=vectors[0], arrayIndices=vectors[1]
    )


def walk(order, blocked, *levels):
    return types.SimpleNamespace(traversalOrder=np.array(order), blockMap=blocked, dimMetadata=list(levels))


def encode(dense, side):
    """`dense` with its last axis compressed in blocks of `side`, every other axis dense: what the converter writes.

    (sparsity parameters, stored values); written down place by place, to be compared with the vectorised reader.
    """
    segments, indices, stored = [0], [], []
    for row in dense.reshape(-1, dense.shape[-1]):
        for block, start in enumerate(range(0, len(row), side)):
            if row[start : start + side].any():
                indices.append(block)
                stored += row[start : start + side].tolist()
        segments.append(len(indices))
    above = [level(each) for each in dense.shape[:-1]]
    inside = [level(side)] if side > 1 else []
    order = range(len(dense.shape) + len(inside))
    blocked = np.array([len(dense.shape) - 1]) if side > 1 else None
    return walk(order, blocked, *above, level(0, segments, indices), *inside), np.array(stored, dense.dtype)


def test_the_worked_example_holds():
    parameters = walk([0, 1, 2], [1], level(2), level(0, [0, 1, 2], [1, 0]), level(2))
    dense = densify(np.array([1, 2, 3, 4], np.int8), parameters, (2, 4))
    assert dense.tolist() == [[0, 0, 1, 2], [3, 4, 0, 0]]
    assert dense.dtype == np.int8
    assert storage(parameters) == "sparse 1x2"


@settings(max_examples=100, deadline=None)
@given(
    dense=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)).flatmap(
        lambda sides: arrays.arrays(np.int8, (*sides[:2], 4 * sides[2]), elements=st.sampled_from([0, 0, 0, 1, -7]))
    ),
    side=st.sampled_from([1, 2, 4]),
    flat=st.booleans(),
)
def test_what_was_stored_sparse_is_read_back_whole(dense, side, flat):
    dense = dense.reshape(-1, dense.shape[-1]) if flat else dense
    parameters, stored = encode(dense, side)
    assert np.array_equal(densify(stored, parameters, dense.shape), dense)
    assert storage(parameters) == ("sparse" if side == 1 else f"sparse 1x{side}")


def test_axes_may_be_walked_in_any_order():
    parameters = walk([1, 0], None, level(3), level(0, [0, 1, 1, 3], [1, 0, 1]))
    assert densify(np.array([5, 6, 7]), parameters, (2, 3)).tolist() == [[0, 0, 6], [5, 0, 7]]


@pytest.mark.parametrize(
    "parameters",
    [
        walk([0, 2], None, level(2), level(0, [0, 1, 2], [1, 0])),  # an axis that the kernel does not have
        walk([0, 1], None, level(2), level(0, [0, 1], [1])),  # a segment too few
        walk([0, 1], None, level(2), level(0, [0, 2, 1], [1, 0])),  # backwards
        walk([0, 1], None, level(2), level(0, [0, 1, 2], [1, 4])),  # beyond the row
        walk([0, 1], None, level(2), level(0, [0, 1, 1], [1])),  # one place for two weights
        walk([0, 1], None, level(1 << 40), level(0, [0, 1, 2], [1, 0])),  # more rows than memory
    ],
)
def test_damaged_parameters_are_refused(parameters):
    with pytest.raises((ValueError, IndexError)):
        densify(np.array([1, 2]), parameters, (2, 4))


def test_one_stored_weight_does_not_fill_many_places():
    parameters = walk([0, 1], None, level(2), level(0, [0, 1, 2], [1, 0]))
    with pytest.raises(ValueError, match="2 places for 1 stored weights"):
        densify(np.array([1]), parameters, (2, 4))


def test_a_shape_beyond_memory_is_refused_before_it_is_made():
    parameters = walk([0, 1], None, level(2), level(0, [0, 1, 2], [1, 0]))
    with pytest.raises(ValueError, match=r"a kernel of shape \(2, 1073741824\) cannot be walked"):
        densify(np.array([1, 2]), parameters, (2, 1 << 30))


def masked(pattern, shape, seed=0):
    """True where a kernel of `shape` pruned to `pattern` is zero."""
    random = np.random.default_rng(seed)
    if ":" in pattern:
        zeros, group = map(int, pattern.split(":"))
        order = random.random((np.prod(shape) // group, group)).argsort(axis=1)
        return (order < zeros).reshape(shape)
    side = int(pattern[2:])
    return np.repeat(random.random((*shape[:-1], shape[-1] // side)) < 0.8, side, axis=-1)


@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:4", "5:8", "12:16", "1x4", "1x16"])
def test_a_pattern_is_found_and_survives_single_zeros(pattern):
    zero = masked(pattern, (24, 64))
    found = find_zeros(zero, "FULLY_CONNECTED")
    assert found.pattern == pattern
    assert found.lack(pattern, float(zero.mean()), 1e-9) is None
    more = zero | (np.random.default_rng(1).random(zero.shape) < 0.02)
    assert find_zeros(more, "FULLY_CONNECTED").lack(pattern, float(zero.mean()), 1e-9) is None


def test_zeros_anywhere_have_no_pattern():
    zero = np.random.default_rng(0).random((64, 64)) < 0.8
    assert find_zeros(zero, "FULLY_CONNECTED").pattern == ""
    assert find_zeros(np.zeros((4, 16), bool), "FULLY_CONNECTED") == Zeros()


def test_blocks_are_of_dense_kernels_and_groups_also_of_convolutions():
    assert find_zeros(masked("1x16", (8, 3, 3, 32)), "CONV_2D").blocks == {}
    assert find_zeros(masked("2:4", (8, 3, 3, 32)), "CONV_2D").pattern == "2:4"
    assert find_zeros(masked("2:4", (1, 3, 3, 32)), "DEPTHWISE_CONV_2D") == Zeros()


def test_groups_that_do_not_fill_the_inputs_are_not_counted():
    found = find_zeros(np.tile([True, True, False, False], (3, 9)), "FULLY_CONNECTED")  # 36 inputs
    assert found.groups == {"3": 1, "4": 2, "6": 2, "9": 4, "12": 6}
    assert found.blocks == {}


def test_a_pattern_that_is_broken_once_is_told_in_numbers():
    zero = masked("2:4", (8, 16))
    zero[3, 4:8] = [False, True, False, False]
    words = "2 zeros in each 4 inputs were promised, the file holds a group with 1"
    assert find_zeros(zero, "CONV_2D").lack("2:4", 0.5, 1e-9) == words
    zero = masked("1x4", (8, 16))
    held = float(zero.mean())
    zero[np.nonzero(zero)[0][0], np.nonzero(zero)[1][0]] = False
    said = find_zeros(zero, "FULLY_CONNECTED").lack("1x4", held, 1e-9)
    assert re.fullmatch(
        rf"sparsity {held:.4f} in blocks of 1x4 was promised, the file holds {held - 4 / 128:.4f}", said
    )
