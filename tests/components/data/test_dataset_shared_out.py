"""Batches under a strategy, and of several processes."""

import collections
import contextlib
import itertools

import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import PreparedData, Share
from components.data.dataset import (
    batches,
    make_batches,
    training_batches,
)
from components.errors import ConfigError, ContractError
from components.options import Augmentation
from tests.components.data.stored import (
    STREAMED,
    assert_same,
    labels,
    take,
)


@pytest.mark.parametrize("split_batch", [16, 17])
def test_two_replicas_share_each_batch_out_and_lose_no_row(
    table: PreparedData, two_devices: list[str], split_batch: int
) -> None:
    strategy = tf.distribute.MirroredStrategy(two_devices)
    made = make_batches(table, augmentation=Augmentation())
    shared = iter(strategy.experimental_distribute_dataset(made.training(16, 0, 0)))
    alone = take(made.training(16, 0, 0), 6)
    for _, y in alone:
        parts = strategy.experimental_local_results(next(shared)[1])
        assert [len(part) for part in parts] == [8, 8]
        assert np.concatenate([part.numpy() for part in parts]).tolist() == y.tolist()
    ordered = strategy.experimental_distribute_dataset(made.ordered("train", split_batch))
    seen = collections.Counter(
        float(value)
        for _, y in ordered
        for part in strategy.experimental_local_results(y)
        for value in part.numpy().reshape(-1)
    )
    assert seen == dict.fromkeys(map(float, range(100)), 1)


# --- several processes -------------------------------------------------------------------------------------------


def shares(count: int) -> list[Share]:
    return [Share(index, count) for index in range(count)]


def test_in_memory_the_shares_of_three_processes_are_the_batches_of_one(pictures: PreparedData) -> None:
    whole = take(training_batches(pictures, batch_size=24, seed=5), 30)
    parts = [take(training_batches(pictures, batch_size=24, seed=5, share=share), 30) for share in shares(3)]
    joined = [tuple(np.concatenate(part) for part in zip(*step, strict=True)) for step in zip(*parts, strict=True)]
    assert {len(y) for part in parts for _, y in part} == {8}
    assert_same(joined, whole)


def test_streaming_no_row_goes_to_two_processes_and_each_meets_other_rows_in_the_next_epoch(
    table: PreparedData,
) -> None:
    made = [training_batches(table, batch_size=32, seed=5, resident_bytes=STREAMED, share=share) for share in shares(2)]
    epochs = [[labels(take(each.skip(3 * epoch), 3)) for each in made] for epoch in (0, 1, 2)]
    for parts in epochs:
        assert [len(part) for part in parts] == [48, 48]
        assert len({*parts[0], *parts[1]}) == 96
    assert len({tuple(sorted(parts[0])) for parts in epochs}) > 1
    later = training_batches(table, batch_size=32, seed=5, first_epoch=2, resident_bytes=STREAMED, share=Share(1, 2))
    assert labels(take(later, 3)) == epochs[2][1]


def test_streaming_a_process_reads_no_block_of_another(table: PreparedData) -> None:
    """With a file damaged, only those fail whose run of rows goes through it."""
    path = table.files("train")[1]  # rows 40 to 71
    broken = bytearray(path.read_bytes())
    broken[-20:] = bytes(20)
    path.write_bytes(broken)
    fine = 0
    for seed in range(2):
        for share in shares(5):
            made = training_batches(table, batch_size=20, seed=seed, resident_bytes=STREAMED, share=share)
            with contextlib.suppress(tf.errors.DataLossError):
                fine += len(take(made, 5)) == 5
    assert 2 <= fine < 10


def test_each_process_draws_its_own_changes(pictures: PreparedData) -> None:
    noise = Augmentation(noise=0.1)
    found = []
    for share in shares(3):
        (x, _), (clean, _) = (
            take(training_batches(pictures, batch_size=24, seed=5, augmentation=how, share=share), 1)[0]
            for how in (noise, Augmentation())
        )
        found.append(x - clean)
    assert all(np.abs(part).max() > 0.05 for part in found)
    for a, b in itertools.combinations(found, 2):
        assert np.abs(a - b).mean() > 0.02


def test_in_a_pass_every_process_gets_as_many_batches_and_every_row_goes_to_one(table: PreparedData) -> None:
    parts = [list(batches(table, "validation", batch_size=10, share=share).as_numpy_iterator()) for share in shares(4)]
    assert [[len(y) for _, y in part] for part in parts] == [[2, 2, 0], [3, 3, 0], [2, 2, 0], [3, 3, 1]]
    assert [labels([part[step] for part in parts]) for step in range(3)] == [
        list(map(float, range(first, last))) for first, last in ((0, 10), (10, 20), (20, 21))
    ]


def test_a_batch_that_does_not_divide_by_the_processes_names_one_that_does(table: PreparedData) -> None:
    message = r"train\.batch_size=20 must divide by the 3 workers \(remainder 2\): use 21\."
    with pytest.raises(ConfigError, match=message):
        training_batches(table, batch_size=20, seed=0, share=Share(0, 3))


def test_a_file_whose_blocks_are_not_full_cannot_be_shared_out(table: PreparedData) -> None:
    table.manifest["splits"]["train"]["files"][0]["blocks"] += 1
    with pytest.raises(
        ContractError, match=r"40 rows must lie in 5 blocks of 8 to be shared out, got 6; run preprocess"
    ):
        training_batches(table, batch_size=20, seed=0, resident_bytes=STREAMED, share=Share(0, 2))
