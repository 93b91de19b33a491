from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from components.data.blocks import Layout, encode
from components.data.dataset import (
    parse,
)
from tests.components.data.stored import picture_columns, table_columns


def both_ways(layout: Layout, record: bytes) -> list[dict[str, np.ndarray]]:
    """`parse` called eagerly, and inside tf.data."""
    eager = {name: value.numpy() for name, value in parse(layout, tf.constant(record)).items()}
    mapped = tf.data.Dataset.from_tensors(record).map(lambda each: parse(layout, each))
    return [eager, next(mapped.as_numpy_iterator())]


@pytest.mark.parametrize("rows", [1, 3, 4096])
@pytest.mark.parametrize("columns", [table_columns, picture_columns])
def test_tensorflow_parses_what_numpy_packed(columns: Callable[[int], dict[str, np.ndarray]], rows: int) -> None:
    given = columns(rows)
    layout = Layout.of({k: (v.dtype.name, v.shape[1:]) for k, v in given.items()})
    for found in both_ways(layout, encode(given)):
        assert found.keys() == given.keys()
        for name, value in given.items():
            assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
            assert found[name].tobytes() == value.tobytes()


def test_parsed_columns_have_static_shapes_but_for_the_rows() -> None:
    given = picture_columns(3)
    layout = Layout.of({k: (v.dtype.name, v.shape[1:]) for k, v in given.items()})
    made = tf.data.Dataset.from_tensors(encode(given)).map(lambda each: parse(layout, each))
    assert made.element_spec["image"].shape.as_list() == [None, 4, 6, 1]


@pytest.mark.parametrize("change", [lambda r: r[:-1], lambda r: b"X" + r[1:], lambda r: r[:17] + b"\2" + r[18:]])
def test_a_record_of_another_layout_stops_the_pipeline(change: Callable[[bytes], bytes]) -> None:
    given = picture_columns(3)
    layout = Layout.of({k: (v.dtype.name, v.shape[1:]) for k, v in given.items()})
    with pytest.raises(tf.errors.InvalidArgumentError, match="another layout than the manifest tells"):
        both_ways(layout, change(encode(given)))
