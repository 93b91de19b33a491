"""Prepared data as preprocess leaves them, small, of rows that can be told apart."""

import itertools
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from components.artifacts import DataSpec, PreparedData, write_json
from components.data.blocks import Layout, encode, write_blocks

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


def take(made: tf.data.Dataset, count: int) -> Pairs:
    return list(itertools.islice(made.as_numpy_iterator(), count))


def assert_same(found: Pairs, expected: Pairs) -> None:
    assert len(found) == len(expected)
    for (x, y), (other_x, other_y) in zip(found, expected, strict=True):
        assert x.tobytes() == other_x.tobytes()
        assert y.tobytes() == other_y.tobytes()


def labels(pairs: Pairs) -> list[float]:
    return np.concatenate([y.reshape(-1) for _, y in pairs]).tolist()
