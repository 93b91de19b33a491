import collections
import contextlib
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import DataSpec, PreparedData, Share, write_json
from components.data import dataset
from components.data.blocks import Layout, encode, write_blocks
from components.data.dataset import (
    batches,
    make_batches,
    parse,
    read,
    rows_of_batch,
    steps_per_epoch,
    training_batches,
)
from components.data.transform import RANGES, Transform
from components.errors import ConfigError, ContractError
from components.options import Augmentation

STREAMED = 0  # resident_bytes that force the way of large data
Pairs = list[tuple[np.ndarray, np.ndarray]]


def prepared(
    folder: pathlib.Path,
    spec: DataSpec,
    transform: dict[str, Any],
    splits: dict[str, list[list[dict[str, np.ndarray]]]],
) -> PreparedData:
    """Writes {split: files, each a list of blocks} as preprocess leaves them."""
    folder.mkdir(parents=True)
    first = next(block for files in splits.values() for file in files for block in file)
    manifest: dict[str, Any] = {"schema": 1, "spec": spec.to_json(), "block_rows": 8, "splits": {}}
    manifest["columns"] = Layout.of({k: (v.dtype.name, v.shape[1:]) for k, v in first.items()}).to_json()
    for split in ("train", "validation", "calibration", "test"):
        files = [
            write_blocks(folder / f"{split}-{number:05}.tfrecord", map(encode, file))
            for number, file in enumerate(splits.get(split, []))
        ]
        rows, blocks = (sum(file[key] for file in files) for key in ("rows", "blocks"))
        manifest["splits"][split] = {"rows": rows, "blocks": blocks, "files": files}
    write_json(folder / "transform.json", transform)
    write_json(folder / "manifest.json", manifest)
    return PreparedData(folder)


def cut(columns: dict[str, np.ndarray], files: int, block: int = 8) -> list[list[dict[str, np.ndarray]]]:
    """Columns as `files` files of blocks of at most `block` rows."""
    rows = len(columns["label"])
    blocks = [{k: v[start : start + block] for k, v in columns.items()} for start in range(0, rows, block)]
    return [list(part) for part in np.array_split(np.array(blocks, object), files)]


TABLE = DataSpec(task="regression", input_name="features", input_shape=(7,))
TABLE_TRANSFORM: dict[str, Any] = {
    "schema": 1,
    "kind": "table",
    "inputs": {"kind": "features", "depths": [3, 2]},
    "label": {"kind": "number"},
}
PICTURES = DataSpec(task="classification", input_name="image", input_shape=(4, 6, 1), labels=("a", "b", "c"))
PICTURE_TRANSFORM: dict[str, Any] = {
    "schema": 1,
    "kind": "image",
    "inputs": {"kind": "image", "pixels": "zero_to_one"},
    "label": {"kind": "classes", "names": ["a", "b", "c"], "strip": ""},
}


def table_columns(rows: int) -> dict[str, np.ndarray]:
    """Row r has the label r, and so can be told from every other."""
    random = np.random.default_rng(rows)
    return {
        "numbers": random.normal(size=(rows, 2)).astype("float32"),
        "ids": np.stack([np.arange(rows) % 3, np.arange(rows) % 2], axis=1).astype("int32"),
        "label": np.arange(rows, dtype="float32"),
    }


def picture_columns(rows: int) -> dict[str, np.ndarray]:
    """The first two pixels of row r hold r; pixels take all 256 values."""
    image = np.random.default_rng(rows).integers(0, 256, (rows, 4, 6, 1), dtype=np.uint8)
    image[:, 0, 0, 0], image[:, 0, 1, 0] = np.arange(rows) // 256, np.arange(rows) % 256
    return {"image": image, "label": np.arange(rows, dtype="int32") % 3}


@pytest.fixture
def table(tmp_path: pathlib.Path) -> PreparedData:
    return prepared(
        tmp_path / "table",
        TABLE,
        TABLE_TRANSFORM,
        {"train": cut(table_columns(100), 3), "validation": cut(table_columns(21), 2)},
    )


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> PreparedData:
    splits = {"train": cut(picture_columns(600), 3), "test": cut(picture_columns(19), 1), "calibration": [[]]}
    return prepared(tmp_path / "pictures", PICTURES, PICTURE_TRANSFORM, splits)


def take(made: tf.data.Dataset, count: int) -> Pairs:
    return list(itertools.islice(made.as_numpy_iterator(), count))


def assert_same(found: Pairs, expected: Pairs) -> None:
    assert len(found) == len(expected)
    for (x, y), (other_x, other_y) in zip(found, expected, strict=True):
        assert x.tobytes() == other_x.tobytes()
        assert y.tobytes() == other_y.tobytes()


def labels(pairs: Pairs) -> list[float]:
    return np.concatenate([y.reshape(-1) for _, y in pairs]).tolist()


# --- one pass, and arrays ----------------------------------------------------------------------------------------


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


# --- the TensorFlow reader of blocks -----------------------------------------------------------------------------


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


# --- under a strategy --------------------------------------------------------------------------------------------


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
    for seed in range(6):
        for share in shares(5):
            made = training_batches(table, batch_size=20, seed=seed, resident_bytes=STREAMED, share=share)
            with contextlib.suppress(tf.errors.DataLossError):
                fine += len(take(made, 5)) == 5
    assert 6 <= fine < 30


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
