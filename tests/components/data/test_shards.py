import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import Share
from components.data.shards import Shards


def shards(index, wanted=7):
    """The example of the module: files of 5, 4 and 6 rows."""
    paths = tf.constant(["zero", "one", "two"])
    return Shards(paths, tf.constant([5, 4, 6], tf.int64), 2, index * wanted, wanted)


def test_each_process_takes_a_run_of_rows_through_the_files_in_their_order():
    found = [list(shards(index).blocks(tf.constant([2, 0, 1])).as_numpy_iterator()) for index in (0, 1)]
    # Each with the place of the file's first row in the split.
    assert found == [[(b"two", 9, 0, 6), (b"zero", 0, 0, 1)], [(b"zero", 0, 1, 5), (b"one", 5, 0, 3)]]


def test_a_run_skips_files_before_it_and_ends_within_the_last():
    assert list(shards(2, 5).blocks(tf.range(3)).as_numpy_iterator()) == [(b"two", 9, 1, 6)]


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (0, 5, [(b"ab", 100, 0, 2), (b"cd", 102, 0, 2), (b"e", 104, 0, 1)]),
        (1, 3, [(b"ab", 100, 1, 2), (b"cd", 102, 0, 1)]),
        (2, 3, [(b"cd", 102, 0, 1)]),
        (3, 5, [(b"cd", 102, 1, 2), (b"e", 104, 0, 1)]),
    ],
)
def test_only_blocks_with_rows_of_the_run_are_read_each_with_the_rows_that_count(tmp_path, first, last, expected):
    with tf.io.TFRecordWriter(str(tmp_path / "f")) as writer:
        for record in (b"ab", b"cd", b"e"):
            writer.write(record)
    path, begins = tf.constant(str(tmp_path / "f")), tf.constant(100, tf.int64)
    found = shards(0).read(path, begins, tf.constant(first, tf.int64), tf.constant(last, tf.int64))
    assert list(found.as_numpy_iterator()) == expected


def test_shares_of_a_number_of_rows_cover_each_row_once():
    for rows in (0, 1, 10, 64):
        parts = [Share(index, 3).part(rows) for index in range(3)]
        assert np.concatenate([np.arange(*part) for part in parts]).tolist() == list(range(rows))
    assert [Share(index, 3).part(10) for index in range(3)] == [(0, 3), (3, 6), (6, 10)]
