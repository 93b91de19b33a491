import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import PreparedData, Share, write_json
from components.data import dataset
from components.data.dataset import (
    batches,
    make_batches,
    read,
    rows_of_batch,
    steps_per_epoch,
    training_batches,
)
from components.data.transform import RANGES, Transform
from components.errors import ConfigError, ContractError
from components.options import Augmentation
from tests.components.data.stored import (
    PICTURE_TRANSFORM,
    PICTURES,
    STREAMED,
    TABLE,
    TABLE_TRANSFORM,
    Pairs,
    assert_same,
    cut,
    labels,
    picture_columns,
    prepared,
    table_columns,
    take,
)


@pytest.mark.parametrize("batch_size", [1, 5, 8, 16, 600, 1000])
def test_a_pass_gives_every_row_once_in_file_order_bit_equal_to_the_transform(
    pictures: PreparedData, batch_size: int
) -> None:
    given = picture_columns(600)
    made = batches(pictures, "train", batch_size=batch_size)
    found = list(made.as_numpy_iterator())
    assert len(found) == made.cardinality() == -(-600 // batch_size)
    assert all(len(x) == batch_size for x, _ in found[:-1])
    x, y = (np.concatenate(part) for part in zip(*found, strict=True))
    assert x.dtype == np.float32
    assert x.tobytes() == Transform(PICTURE_TRANSFORM).to_inputs(given).tobytes()
    assert y.dtype == np.int32
    assert y.tolist() == given["label"].tolist()


@pytest.mark.parametrize(("pixels", "ends"), RANGES.items())
def test_all_256_pixel_values_become_the_transforms_floats(
    tmp_path: pathlib.Path, pixels: str, ends: tuple[float, float]
) -> None:
    transform = PICTURE_TRANSFORM | {"inputs": {"kind": "image", "pixels": pixels}}
    columns = {"image": np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), "label": np.zeros(1, np.int32)}
    spec = dataclasses.replace(PICTURES, input_shape=(16, 16, 1))
    data = prepared(tmp_path / "d", spec, transform, {"test": [[columns]], "train": [[columns]]})
    x, _ = read(data, "test")
    assert x.tobytes() == Transform(transform).to_inputs(columns).tobytes()
    assert (x.min(), x.max()) == ends
    assert len(np.unique(x)) == 256
    assert next(batches(data, "test", batch_size=1).as_numpy_iterator())[0].tobytes() == x.tobytes()
    shifted = training_batches(data, batch_size=1, seed=0, augmentation=Augmentation(shift=0.9, noise=9.0))
    moved = np.concatenate([batch for batch, _ in take(shifted, 4)])
    assert (moved.min(), moved.max()) == ends


def test_a_table_is_its_numbers_and_then_each_id_one_hot(table: PreparedData) -> None:
    x, y = next(batches(table, "validation", batch_size=4).as_numpy_iterator())
    numbers = table_columns(21)["numbers"]
    assert x[1].tolist() == [*numbers[1].tolist(), 0, 1, 0, 0, 1]
    assert y.tolist() == [[0], [1], [2], [3]]
    assert (x.dtype, y.dtype) == (np.float32, np.float32)


def test_a_table_is_bit_equal_to_the_transform(table: PreparedData) -> None:
    x, _ = read(table, "validation")
    assert x.tobytes() == Transform(TABLE_TRANSFORM).to_inputs(table_columns(21)).tobytes()


@pytest.mark.parametrize("kept", ["numbers", "ids"])
def test_a_table_may_have_numbers_or_ids_only(tmp_path: pathlib.Path, kept: str) -> None:
    given = {name: value for name, value in table_columns(9).items() if name in (kept, "label")}
    depths = [3, 2] if kept == "ids" else []
    transform = {**TABLE_TRANSFORM, "inputs": {"kind": "features", "depths": depths}}
    spec = dataclasses.replace(TABLE, input_shape=(sum(depths) or 2,))
    data = prepared(tmp_path / "d", spec, transform, {"test": [[given]]})
    assert read(data, "test")[0].tobytes() == Transform(transform).to_inputs(given).tobytes()


@pytest.mark.parametrize(("limit", "rows"), [(None, 100), (0, 0), (1, 1), (8, 8), (43, 43), (500, 100)])
def test_read_gives_the_first_rows_as_a_pass_does(table: PreparedData, limit: int | None, rows: int) -> None:
    x, y = read(table, "train", limit)
    assert (x.shape, y.shape) == ((rows, 7), (rows, 1))
    whole = list(batches(table, "train", batch_size=100).as_numpy_iterator())[0]
    assert_same([(x, y)], [(whole[0][:rows], whole[1][:rows])])


def test_an_empty_split_gives_no_batch_and_arrays_of_no_rows(pictures: PreparedData) -> None:
    for split in ("calibration", "validation"):  # one empty file, no file
        assert list(batches(pictures, split, batch_size=4)) == []
        x, y = read(pictures, split)
        assert (x.shape, y.shape) == ((0, 4, 6, 1), (0,))


# --- training ----------------------------------------------------------------------------------------------------

WAYS = pytest.mark.parametrize("resident_bytes", [dataset.RESIDENT_BYTES, STREAMED], ids=["resident", "streamed"])


@WAYS
def test_shapes_are_static_and_the_data_never_end(pictures: PreparedData, resident_bytes: int) -> None:
    made = training_batches(pictures, batch_size=16, seed=1, resident_bytes=resident_bytes)
    assert [tuple(spec.shape) for spec in made.element_spec] == [(16, 4, 6, 1), (16,)]
    assert made.cardinality() == tf.data.INFINITE_CARDINALITY
    assert len(take(made, 3 * 37 + 1)) == 3 * 37 + 1


@WAYS
def test_an_epoch_holds_each_row_at_most_once_with_its_own_label(table: PreparedData, resident_bytes: int) -> None:
    steps = steps_per_epoch(table, 16)
    assert steps == 6
    found = take(training_batches(table, batch_size=16, seed=1, resident_bytes=resident_bytes), 2 * steps)
    for epoch in (found[:steps], found[steps:]):
        assert len(set(labels(epoch))) == 96
    inputs = Transform(TABLE_TRANSFORM).to_inputs(table_columns(100))
    for x, y in found:
        assert x.tobytes() == inputs[y[:, 0].astype(int)].tobytes()


@WAYS
def test_the_rows_of_a_batch_are_told_by_their_place_in_the_split(table: PreparedData, resident_bytes: int) -> None:
    x, y = read(table, "train")
    steps = steps_per_epoch(table, 16)
    made = take(training_batches(table, batch_size=16, seed=1, resident_bytes=resident_bytes), 2 * steps)
    for epoch, step in ((0, 0), (1, 0), (1, steps - 1)):
        rows = rows_of_batch(table, batch_size=16, seed=1, epoch=epoch, step=step, resident_bytes=resident_bytes)
        inputs, labels = made[epoch * steps + step]
        np.testing.assert_array_equal(inputs, x[rows])
        np.testing.assert_array_equal(labels, y[rows])
    two = [
        take(training_batches(table, batch_size=16, seed=1, resident_bytes=resident_bytes, share=Share(index, 2)), 3)[2]
        for index in (0, 1)
    ]
    rows = rows_of_batch(table, batch_size=16, seed=1, epoch=0, step=2, workers=2, resident_bytes=resident_bytes)
    np.testing.assert_array_equal(np.concatenate([inputs for inputs, _ in two]), x[rows])


@WAYS
def test_every_epoch_has_another_order_and_leaves_other_rows_out(table: PreparedData, resident_bytes: int) -> None:
    found = take(training_batches(table, batch_size=16, seed=1, resident_bytes=resident_bytes), 4 * 6)
    epochs = [labels(found[start : start + 6]) for start in range(0, 24, 6)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len({frozenset(epoch) for epoch in epochs}) > 1


@WAYS
def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    pictures: PreparedData, resident_bytes: int
) -> None:
    options = Augmentation(flip=True, shift=0.2, rotation=20, zoom=0.1, noise=0.05)

    def made(seed: int) -> Pairs:
        return take(
            training_batches(pictures, batch_size=32, seed=seed, augmentation=options, resident_bytes=resident_bytes),
            40,
        )

    first = made(3)
    tf.random.set_seed(99)  # what the rest of the program does with TensorFlow's own seed plays no part
    assert_same(made(3), first)
    assert labels(made(4)) != labels(first)
    assert [x.tobytes() for x, _ in first[:18]] != [x.tobytes() for x, _ in first[18:36]]


@WAYS
@pytest.mark.parametrize("first_epoch", [1, 3])
def test_starting_at_an_epoch_gives_what_an_undisturbed_run_saw(
    pictures: PreparedData, resident_bytes: int, first_epoch: int
) -> None:
    options = Augmentation(flip=True, rotation=20, noise=0.05)

    def made(epoch: int, count: int) -> Pairs:
        return take(
            training_batches(
                pictures,
                batch_size=64,
                seed=7,
                first_epoch=epoch,
                augmentation=options,
                resident_bytes=resident_bytes,
            ),
            count,
        )

    assert_same(made(first_epoch, 12), made(0, 9 * first_epoch + 12)[9 * first_epoch :])


def test_rows_held_in_memory_are_shuffled_evenly(tmp_path: pathlib.Path) -> None:
    data = prepared(tmp_path / "d", TABLE, TABLE_TRANSFORM, {"train": cut(table_columns(20), 2)})
    found = take(training_batches(data, batch_size=20, seed=0), 2000)
    counts = np.stack([np.bincount(y[:, 0].astype(int)[:1], minlength=20) for _, y in found]).sum(0)
    # Each row leads 100 of 2,000 epochs, give or take five standard deviations of 9.7.
    assert counts.min() > 51
    assert counts.max() < 149
    assert len({y.tobytes() for _, y in found}) == 2000


def test_a_stream_mixes_rows_of_all_files_and_blocks(tmp_path: pathlib.Path) -> None:
    data = prepared(tmp_path / "d", TABLE, TABLE_TRANSFORM, {"train": cut(table_columns(1024), 4)})
    first = labels(take(training_batches(data, batch_size=64, seed=0, resident_bytes=STREAMED), 1))
    assert {int(label) // 256 for label in first} == {0, 1, 2, 3}
    assert len({int(label) // 8 for label in first}) > 32


def test_a_stream_with_small_buffers_still_gives_each_row_once(
    table: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "SHUFFLE_BYTES", 300)  # one block, and super-batches of 15 rows
    made = training_batches(table, batch_size=5, seed=0, resident_bytes=STREAMED)
    assert sorted(labels(take(made, 20))) == list(range(100))


def test_the_remainder_of_blocks_and_super_batches_is_not_lost(tmp_path: pathlib.Path) -> None:
    data = prepared(tmp_path / "d", TABLE, TABLE_TRANSFORM, {"train": cut(table_columns(29), 2, block=7)})
    made = training_batches(data, batch_size=29, seed=0, resident_bytes=STREAMED)
    assert sorted(labels(take(made, 1))) == list(range(29))


def test_augmentation_is_of_the_training_split_only(pictures: PreparedData) -> None:
    made = make_batches(pictures, augmentation=Augmentation(noise=0.05))
    plain = Transform(PICTURE_TRANSFORM).to_inputs(picture_columns(19))
    x, _ = next(made.ordered("test", 19).as_numpy_iterator())
    assert x.tobytes() == plain.tobytes()
    noisy, _ = next(made.training(16, 0, 0).as_numpy_iterator())
    assert len(np.unique(noisy)) > 300  # 8 bit pixels have at most 256 values


@WAYS
def test_every_batch_and_epoch_is_augmented_in_its_own_way(tmp_path: pathlib.Path, resident_bytes: int) -> None:
    same = {"image": np.full((8, 4, 6, 1), 128, np.uint8), "label": np.zeros(8, np.int32)}
    data = prepared(tmp_path / "d", PICTURES, PICTURE_TRANSFORM, {"train": [[same]]})
    options = Augmentation(noise=0.1)
    made = training_batches(data, batch_size=2, seed=0, augmentation=options, resident_bytes=resident_bytes)
    assert len({x.tobytes() for x, _ in take(made, 3 * 4)}) == 12


def test_batches_know_their_spec_and_rows_and_train_a_model(pictures: PreparedData) -> None:
    import keras

    made = make_batches(pictures, augmentation=Augmentation())
    assert made.spec == PICTURES
    assert made.rows == {"train": 600, "validation": 0, "calibration": 0, "test": 19}
    assert made.steps_per_epoch(64) == steps_per_epoch(pictures, 64) == 9
    model = keras.Sequential([keras.Input((4, 6, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(made.training(64, 0, 0), epochs=2, steps_per_epoch=9, shuffle=False, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    assert history.history["loss"][1] < history.history["loss"][0]


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_batch_larger_than_the_split_names_the_largest_that_fits(table: PreparedData) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size=101 exceeds the 100 rows .*: use 100 or less"):
        training_batches(table, batch_size=101, seed=0)


def test_pictures_only_changes_are_refused_for_tables(table: PreparedData) -> None:
    with pytest.raises(ConfigError, match=r"train\.augmentation\.flip=True is for pictures, .* 7 features: remove it"):
        make_batches(table, augmentation=Augmentation(flip=True))


ENTRANCES: dict[str, Callable[[PreparedData], Any]] = {
    "make_batches": lambda data: make_batches(data, augmentation=Augmentation()),
    "training_batches": lambda data: training_batches(data, batch_size=4, seed=0),
    "streamed": lambda data: training_batches(data, batch_size=4, seed=0, resident_bytes=STREAMED),
    "batches": lambda data: batches(data, "train", batch_size=4),
    "read": lambda data: read(data, "train"),
}
ENTRANCE = pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES.keys())


@ENTRANCE
def test_an_absent_file_is_named(table: PreparedData, enter: Callable[[PreparedData], Any]) -> None:
    table.files("train")[1].unlink()
    with pytest.raises(ContractError, match=r"train-00001.tfrecord: the manifest promises \d+ bytes, got no such file"):
        enter(table)


@ENTRANCE
def test_a_file_cut_short_is_named_with_both_sizes(table: PreparedData, enter: Callable[[PreparedData], Any]) -> None:
    path = table.files("train")[2]
    size = path.stat().st_size
    os.truncate(path, size - 9)
    with pytest.raises(
        ContractError, match=f"train-00002.tfrecord: the manifest promises {size} bytes, got {size - 9}"
    ):
        enter(table)


@pytest.mark.parametrize("way", ["training_batches", "read"])
def test_a_flipped_bit_is_found_before_the_first_row_is_used(table: PreparedData, way: str) -> None:
    path = table.files("train")[0]
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(ContractError, match=r"train-00000.tfrecord: record \d+ at byte \d+: the checksum"):
        ENTRANCES[way](table)


def test_a_flipped_bit_in_a_stream_stops_it(table: PreparedData) -> None:
    path = table.files("train")[0]
    damaged = bytearray(path.read_bytes())
    damaged[300] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(tf.errors.DataLossError, match="corrupted record"):
        take(training_batches(table, batch_size=16, seed=0, resident_bytes=STREAMED), 6)
    with pytest.raises(tf.errors.DataLossError, match="corrupted record"):
        list(batches(table, "train", batch_size=16))


@ENTRANCE
def test_a_transform_of_other_data_is_refused(table: PreparedData, enter: Callable[[PreparedData], Any]) -> None:
    write_json(table.folder / "transform.json", PICTURE_TRANSFORM)
    with pytest.raises(ContractError, match=r"one-hot widths \(\) must make inputs of shape \(7,\); run preprocess"):
        enter(table)


def test_a_file_with_fewer_rows_than_promised_is_refused(table: PreparedData) -> None:
    manifest = dict(table.manifest)
    manifest["splits"]["train"]["rows"] = 150
    write_json(table.folder / "manifest.json", manifest)
    with pytest.raises(ContractError, match="promises 150 train rows, got 100; run preprocess again"):
        read(PreparedData(table.folder), "train")
