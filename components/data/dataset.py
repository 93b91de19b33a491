"""Dataset: blocks on disk become batches for training, for one ordered pass, or arrays.

    PreparedData --make_batches()--> Batches          float32 inputs of static shape, labels
    PreparedData --read()--> (inputs, labels)         NumPy, in file order

Rows stay as compact as they are stored (a picture: uint8) until their batch is made; nothing is ever done row by row.
Everything random is a function of (seed, epoch, step), so a run that starts at epoch e sees what an undisturbed run saw.
A training split of up to RESIDENT_BYTES is held in memory and shuffled completely. A larger one streams, and so does the
first epoch of a training that overlaps with preprocessing (`first_batches`): files are
shuffled and interleaved, then blocks within a buffer, then rows within super-batches of up to SUPER_ROWS.

Of several processes each gets its `Share` of every batch, and no row twice in an epoch. In memory the order is that of one
process, cut; streaming, each takes a run of rows of the epoch's shuffled files and reads no other block: `shards`.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from components.artifacts import SPLITS, Arriving, Batches, PreparedData, Share
from components.data.augment import augment, check_augmentation
from components.data.blocks import Layout, read_blocks
from components.data.inputs import Columns, Inputs, parse
from components.data.opened import OpenedData, records
from components.data.shards import Shards
from components.data.transform import RANGES
from components.errors import ConfigError, ContractError
from components.options import Augmentation

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types
# As stored: 80 bytes a row make 6 million rows, 784 make 680,000.
RESIDENT_BYTES = 512 << 20
# A shuffle buffer of blocks, and again a super-batch of rows, may take this much.
SHUFFLE_BYTES = 128 << 20
SUPER_ROWS = 16_384
_FILES_AT_ONCE = 16
_BLOCKS_AT_ONCE = 256
_SUPER_BATCHES = 16  # at least, in a first epoch that waits for its rows


def make_batches(
    data: PreparedData,
    *,
    augmentation: Augmentation,
    share: Share = Share(),  # noqa: B008, frozen
    overlap: bool = False,
) -> Batches:
    """What a training stage needs of `data`, with nothing read yet.

    Args:
      data: Prepared; its files are looked at, not read.
      augmentation: Of the training split only.
      share: Of the process; batches hold its rows only.
      overlap: The first epoch reads files in the order in which they were written, or are written just now, where `data`
        is `OpenedData`; see `first_batches`. What needs all of them waits.

    Raises:
      ConfigError: See `check_augmentation`.
      ContractError: A file of the manifest is absent or has another size, or manifest and transform do not agree.
    """
    check_augmentation(augmentation, data.spec)
    for split in () if isinstance(data, OpenedData) else SPLITS:
        _check_files(data, split)
    Inputs.of(data)

    def whole() -> PreparedData:
        return data.whole() if isinstance(data, OpenedData) else data

    def there(batch_size: int) -> int:
        assert isinstance(data, OpenedData), "asked for while data are arriving only"
        if data.ended():
            return steps_per_epoch(data, batch_size)
        at_once = _super_rows(data, Inputs.of(data).layout, batch_size)
        rows = data.rows_there()
        return (rows if rows == data.rows("train") else rows // at_once * at_once) // batch_size

    def training(batch_size: int, seed: int, first_epoch: int) -> tf.data.Dataset:
        if overlap and first_epoch == 0:
            return first_batches(data, batch_size=batch_size, seed=seed, augmentation=augmentation)
        return training_batches(
            whole(), batch_size=batch_size, seed=seed, first_epoch=first_epoch, augmentation=augmentation, share=share
        )

    def rows_of(batch_size: int, seed: int, epoch: int, step: int) -> np.ndarray:
        if overlap and epoch == 0:
            _, columns = next(iter(_first_rows(whole(), batch_size, seed).skip(step)))
            return np.asarray(columns[_ROW]).astype(np.int64)
        return rows_of_batch(whole(), batch_size=batch_size, seed=seed, epoch=epoch, step=step, workers=share.count)

    return Batches(
        spec=data.spec,
        training=training,
        ordered=lambda split, batch_size: batches(whole(), split, batch_size=batch_size, share=share),
        rows={split: data.rows(split) for split in SPLITS},
        rows_of=rows_of,
        share=share,
        first_apart=overlap,
        arriving=Arriving(batches=there, complete=data.ended) if isinstance(data, OpenedData) else None,
    )


def steps_per_epoch(data: PreparedData, batch_size: int) -> int:
    """Whole batches in one epoch; the remainder is dropped so that shapes stay static."""
    return data.rows("train") // batch_size


def _steps(data: PreparedData, batch_size: int) -> int:
    """Of an epoch; at least one."""
    steps = steps_per_epoch(data, batch_size)
    if not steps:
        raise ConfigError(
            f"train.batch_size={batch_size} exceeds the {data.rows('train')} rows of the training split, and a batch must be whole: use {data.rows('train')} or less."
        )
    return steps


def training_batches(
    data: PreparedData,
    *,
    batch_size: int,
    seed: int,
    first_epoch: int = 0,
    augmentation: Augmentation = Augmentation(),  # noqa: B008, frozen
    resident_bytes: int = RESIDENT_BYTES,
    share: Share = Share(),  # noqa: B008, frozen
) -> tf.data.Dataset:
    """Shuffled, augmented batches of the training split, without end.

    Args:
      data: Prepared.
      batch_size: Rows of each batch.
      seed: With the epoch it fixes order and augmentation, bit by bit.
      first_epoch: 0 is the first. Epoch e is the same whether the data set started at it or earlier.
      augmentation: See `augment`.
      resident_bytes: A split of at most this many stored bytes is held in memory, which is also faster. The order
        differs between the two ways, so that it must not change within a run.
      share: Of the process: it gets `share.part(batch_size)` of the rows of each batch.

    Returns:
      (float32 (batch_size, *input_shape), int32 (batch_size,) or float32 (batch_size, 1)), `steps_per_epoch` an epoch.

    Raises:
      ConfigError: The split has fewer rows than a batch, the batch does not divide by the processes, or `augmentation`
        does not suit the data.
      ContractError: Held in memory: a file is damaged. Streaming finds damage later, as `tf.errors.DataLossError`.
    """
    check_augmentation(augmentation, data.spec)
    _check_files(data, "train")
    _steps(data, batch_size)
    if batch_size % share.count:
        raise ConfigError(
            f"train.batch_size={batch_size} must divide by the {share.count} workers (remainder {batch_size % share.count}): use {batch_size - batch_size % share.count + share.count}."
        )
    inputs = Inputs.of(data)
    make = _resident_batches if _is_small(data, inputs.layout, resident_bytes) else _streamed_batches
    made, columns_of = make(data, inputs.layout, batch_size, tf.constant(seed, tf.int64), first_epoch, share)

    def finish(key: Tensor, step: Tensor, chosen: Any) -> tuple[Tensor, Tensor]:
        x, y = inputs.expand(columns_of(chosen))
        key = _key(key, _FIRST_WORKER - share.index) if share.index else key  # each worker draws its own changes
        return augment(x, _key(key, _FIRST_STEP + step), augmentation, RANGES.get(inputs.pixels, (0.0, 1.0))), y

    # One map for all that a batch needs: each further one costs a small batch as much as its work.
    made = made.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    made = made.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return _with_options(made)


def first_batches(
    data: PreparedData,
    *,
    batch_size: int,
    seed: int,
    augmentation: Augmentation = Augmentation(),  # noqa: B008, frozen
) -> tf.data.Dataset:
    """The first epoch over files in the order in which they are written; waits for those that are not there yet.

    Files follow one another by a hash of the seed; rows are shuffled within super-batches of up to a sixteenth of all rows.
    Batches as those of `training_batches`, and as many, then the data set ends. The same whether `data` are whole or not.

    Raises:
      ConfigError: The split has fewer rows than a batch.
    """
    steps = _steps(data, batch_size)
    inputs, key = Inputs.of(data), tf.constant([seed, 0], tf.int64)

    def finish(step: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        x, y = inputs.expand(columns)
        return augment(x, _key(key, _FIRST_STEP + step), augmentation, RANGES.get(inputs.pixels, (0.0, 1.0))), y

    made = _first_rows(data, batch_size, seed).take(steps)
    made = made.map(finish, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return _with_options(made.apply(tf.data.experimental.assert_cardinality(steps)))


def _first_rows(data: PreparedData, batch_size: int, seed: int) -> tf.data.Dataset:
    """(step, columns) of each batch of the first epoch."""
    layout, key = Inputs.of(data).layout, tf.constant([seed, 0], tf.int64)
    signature = (tf.TensorSpec((), tf.string), tf.TensorSpec((), tf.int64))
    made = tf.data.Dataset.from_generator(lambda: records(data, seed), output_signature=signature)
    made = made.map(functools.partial(_numbered, layout), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    made = (
        made.rebatch(_super_rows(data, layout, batch_size))
        .enumerate()
        .map(functools.partial(_permuted, _key(key, _ROWS)))
    )
    made = made.rebatch(batch_size, drop_remainder=True).enumerate()
    return made.map(lambda step, columns: (tf.cast(step, tf.int32), columns))


def _super_rows(data: PreparedData, layout: Layout, batch_size: int) -> int:
    """Rows among which the first epoch shuffles, and for which it waits."""
    most = min(SUPER_ROWS, SHUFFLE_BYTES // layout.row_bytes, data.rows("train") // _SUPER_BATCHES)
    return max(batch_size, most)


def rows_of_batch(
    data: PreparedData,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    step: int,
    workers: int = 1,
    resident_bytes: int = RESIDENT_BYTES,
) -> np.ndarray:
    """Which rows of the training split, in file order, 0 is the first, make batch `step` of `epoch`: int64 (batch_size,).

    Walks through the epoch up to the batch, without computing inputs, once for each of the `workers`.
    """
    layout = Inputs.of(data).layout
    make = _resident_batches if _is_small(data, layout, resident_bytes) else _streamed_batches
    parts = []
    for index in range(workers):
        made, _ = make(data, layout, batch_size, tf.constant(seed, tf.int64), epoch, Share(index, workers))
        _, _, chosen = next(iter(made.skip(step)))
        parts.append(chosen[_ROW] if isinstance(chosen, dict) else chosen)
    return np.concatenate(parts).astype(np.int64)


def _is_small(data: PreparedData, layout: Layout, resident_bytes: int) -> bool:
    return bool(data.rows("train") * layout.row_bytes <= resident_bytes)


def batches(data: PreparedData, split: str, *, batch_size: int, share: Share = Share()) -> tf.data.Dataset:  # noqa: B008, frozen
    """One pass over `split` in file order; the last batch may be smaller, an empty split gives none.

    Every process gets as many batches as the others, each its share of the rows; of the last one that may be none.

    Returns:
      (float32 (batch, *input_shape), int32 (batch,) or float32 (batch, 1)).

    Raises:
      ContractError: A file is absent or has another size. Damage is found later, as `tf.errors.DataLossError`.
    """
    _check_files(data, split)
    inputs = Inputs.of(data)
    files = tf.constant([str(path) for path in data.files(split)], tf.string)
    made = tf.data.TFRecordDataset(files).map(
        functools.partial(parse, inputs.layout), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    made = made.rebatch(batch_size)
    if share.count > 1:
        made = made.map(functools.partial(_part, share))
    made = made.map(inputs.expand, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    count = math.ceil(data.rows(split) / batch_size)
    return _with_options(made.apply(tf.data.experimental.assert_cardinality(count)))


def _part(share: Share, columns: Columns) -> Columns:
    rows = tf.shape(columns["label"])[0]
    first, last = rows * share.index // share.count, rows * (share.index + 1) // share.count
    return {name: value[first:last] for name, value in columns.items()}


def read(data: PreparedData, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The first `limit` rows of `split` (all where None), in file order.

    Returns:
      (float32 (rows, *input_shape), int32 (rows,) or float32 (rows, 1)).

    Raises:
      ContractError: A file is absent or damaged.
    """
    _check_files(data, split)
    inputs = Inputs.of(data)
    rows = data.rows(split) if limit is None else min(limit, data.rows(split))
    with tf.device("CPU:0"):
        x, y = inputs.expand(_columns(data, split, inputs.layout, rows))
    return np.asarray(x), np.asarray(y)


def _with_options(dataset: tf.data.Dataset) -> tf.data.Dataset:
    options = tf.data.Options()
    options.deterministic = True
    # Every process reads all files: a strategy with several workers shares batches out, not files of unequal length.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)


# --- files -------------------------------------------------------------------------------------------------------


def _check_files(data: PreparedData, split: str) -> None:
    """Looks whether the manifest's files are there with their sizes: cheap, and catches a half-copied folder."""
    for file in data.manifest["splits"][split]["files"]:
        path = data.folder / file["name"]
        found = path.stat().st_size if path.is_file() else "no such file"
        if found != file["bytes"]:
            raise ContractError(
                f"{path}: the manifest promises {file['bytes']} bytes, got {found}; run preprocess again with --force preprocess."
            )


def _columns(data: PreparedData, split: str, layout: Layout, rows: int) -> dict[str, np.ndarray]:
    """The first `rows` rows as they are stored."""
    made = {column.name: np.empty((rows, *column.shape), column.dtype) for column in layout.columns}
    done = 0
    for path, block in _blocks(data.files(split)):
        if done == rows:
            break
        if block.keys() != made.keys():
            raise ContractError(f"{path}: a block holds {sorted(block)}, the manifest promises {sorted(made)}.")
        taken = min(len(block["label"]), rows - done)
        for name, array in made.items():
            array[done : done + taken] = block[name][:taken]
        done += taken
    if done < rows:
        raise ContractError(
            f"{data.folder}: the manifest promises {rows} {split} rows, got {done}; run preprocess again with --force preprocess."
        )
    return made


def _blocks(paths: list[pathlib.Path]) -> Iterator[tuple[pathlib.Path, dict[str, np.ndarray]]]:
    return ((path, block) for path in paths for block in read_blocks(path))


# --- order -------------------------------------------------------------------------------------------------------
# Stateless throughout, so that neither the global seed of TensorFlow nor what ran before plays a part. The key of an
# epoch, (seed, epoch), is folded with the purpose: a batch's augmentation gets _FIRST_STEP + its number.

_ROWS, _FILES, _BUFFERS, _FIRST_STEP = range(4)
_ROW = "row number"
"""Column that a streamed batch carries beside those that are stored."""
_FIRST_WORKER = -1  # and downwards: steps go upwards


def _key(parent: Tensor, purpose: Tensor | int) -> Tensor:
    """int64 (2,), as `parent`; fold_in would fall back to int32 with an int32 purpose."""
    return tf.random.fold_in(parent, tf.cast(purpose, tf.int64))


def _shuffled(values: Tensor, key: Tensor) -> Tensor:
    return tf.random.experimental.stateless_shuffle(values, key)


def _resident_batches(
    data: PreparedData, layout: Layout, batch_size: int, seed: Tensor, first_epoch: int, share: Share
) -> tuple[tf.data.Dataset, Callable[[Tensor], Columns]]:
    """(epoch's key, step, row numbers) of each batch, drawn anew each epoch, and the function that gathers these from memory."""
    rows, steps = data.rows("train"), steps_per_epoch(data, batch_size)
    first, last = share.part(batch_size)
    with tf.device("CPU:0"):  # else a GPU would hold them, and tf.data would fetch them back row by row
        columns = {name: tf.constant(value) for name, value in _columns(data, "train", layout, rows).items()}

    def one_epoch(epoch: Tensor) -> tf.data.Dataset:
        key = tf.stack([seed, epoch])
        order = _shuffled(tf.range(rows), _key(key, _ROWS))
        chosen = tf.reshape(order[: steps * batch_size], (steps, batch_size))[:, first:last]
        return tf.data.Dataset.from_tensor_slices((tf.repeat(key[tf.newaxis], steps, 0), tf.range(steps), chosen))

    def gather(chosen: Tensor) -> Columns:
        return {name: tf.gather(value, chosen) for name, value in columns.items()}

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch), gather


def _streamed_batches(
    data: PreparedData, layout: Layout, batch_size: int, seed: Tensor, first_epoch: int, share: Share
) -> tuple[tf.data.Dataset, Callable[[Columns], Columns]]:
    """(epoch's key, step, columns) of each batch, from disk: files, then blocks, then rows are shuffled, each within its reach."""
    entries = data.manifest["splits"]["train"]["files"]
    files = tf.constant([str(path) for path in data.files("train")], tf.string)
    # Where each file begins among the rows of the split; all its blocks but the last are full.
    begins = tf.constant(np.cumsum([0, *(entry["rows"] for entry in entries)])[:-1], tf.int64)
    block_rows = data.manifest["block_rows"]
    block_bytes = max(1, block_rows * layout.row_bytes)
    buffer = min(_BLOCKS_AT_ONCE, max(1, SHUFFLE_BYTES // block_bytes))
    batch_size //= share.count
    super_rows = min(SUPER_ROWS, max(batch_size, SHUFFLE_BYTES // layout.row_bytes))
    shards = Shards.of(data, share, steps_per_epoch(data, batch_size * share.count) * batch_size)

    def blocks(file: Tensor, begin: Tensor) -> tf.data.Dataset:
        return tf.data.TFRecordDataset(file).enumerate().map(lambda number, one: (one, begin + number * block_rows))

    def one_epoch(epoch: Tensor) -> tf.data.Dataset:
        key = tf.stack([seed, epoch])
        order = _shuffled(tf.range(len(data.files("train"))), _key(key, _FILES))
        if shards is None:
            made = tf.data.Dataset.from_tensor_slices((tf.gather(files, order), tf.gather(begins, order)))
            made = made.interleave(blocks, cycle_length=_FILES_AT_ONCE)
        else:
            made = shards.blocks(order).interleave(shards.read, cycle_length=_FILES_AT_ONCE)
        made = made.batch(buffer).enumerate()
        made = made.map(lambda number, some: _blocks_shuffled(some, _key(_key(key, _BUFFERS), number))).unbatch()
        cut = functools.partial(_numbered, layout) if shards is None else functools.partial(_part_numbered, layout)
        made = made.map(cut, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        made = made.rebatch(super_rows).enumerate().map(functools.partial(_permuted, _key(key, _ROWS)))
        made = made.rebatch(batch_size, drop_remainder=True).enumerate()
        return made.map(lambda step, columns: (key, tf.cast(step, tf.int32), columns))

    return tf.data.Dataset.counter(first_epoch).flat_map(one_epoch), lambda columns: columns


def _blocks_shuffled(some: Any, key: Tensor) -> Any:
    """Records, or records with the rows that count in them, in another order."""
    order = _shuffled(tf.range(tf.shape(tf.nest.flatten(some)[0])[0]), key)
    return tf.nest.map_structure(lambda values: tf.gather(values, order), some)


def _numbered(layout: Layout, record: Tensor, begin: Tensor) -> Columns:
    """Columns of a block, and the numbers of its rows, of which `begin` is the first."""
    made = parse(layout, record)
    return {**made, _ROW: begin + tf.range(tf.shape(made["label"], tf.int64)[0])}


def _part_numbered(layout: Layout, record: Tensor, begin: Tensor, first: Tensor, last: Tensor) -> Columns:
    """The same of rows `first` to before `last` of the block."""
    return {name: value[first:last] for name, value in _numbered(layout, record, begin).items()}


def _permuted(key: Tensor, number: Tensor, columns: Columns) -> Columns:
    """The rows of super-batch `number` in another order, the same for all columns."""
    order = _shuffled(tf.range(tf.shape(columns["label"])[0]), _key(key, number))
    return {name: tf.gather(value, order) for name, value in columns.items()}
