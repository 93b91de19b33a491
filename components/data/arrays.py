"""Arrays as sources: scikit-learn's digits, `.npz` files, idx files as MNIST ships them, a line made on the spot."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import pathlib
import struct
import zipfile
from typing import Any

import numpy as np

from components.data import texts
from components.data.csvfile import is_gzip, readable
from components.data.texts import TextRule
from components.errors import ConfigError, DataError
from components.options import ArraysSource, DigitsSource, IdxSource, LineSource, TextSource

DIGITS_ROWS = 1797
DIGITS_SHAPE = (8, 8, 1)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


@dataclasses.dataclass(frozen=True)
class ArrayFiles:
    """Where `x` and `y` lie.

    Attributes:
      kind: As the source has it.
      x: File of the examples; '' for what is made or embedded.
      y: File of the labels; may be the same.
      line: (rows, noise) of a line.
      text: How texts below the folder `x` become rows.
    """

    kind: str
    x: str = ""
    y: str = ""
    line: tuple[int, float] = (0, 0.0)
    text: TextRule | None = None


def files_of(source: ArraysSource | DigitsSource | IdxSource | LineSource | TextSource) -> dict[str, ArrayFiles]:
    """'train' and, where given, 'test'."""
    if isinstance(source, DigitsSource):
        return {"train": ArrayFiles("digits")}
    if isinstance(source, LineSource):
        return {"train": ArrayFiles("line", line=(source.rows, source.noise))}
    if isinstance(source, TextSource):
        rule, folders = texts.rule_of(source), {"train": source.train, "test": source.test}
        return {split: ArrayFiles("text", x=path, text=rule) for split, path in folders.items() if path is not None}
    if isinstance(source, ArraysSource):
        given = {"train": (source.train, source.train), "test": (source.test, source.test)}
    else:
        given = {
            "train": (source.train_images, source.train_labels),
            "test": (source.test_images, source.test_labels),
        }
        if (source.test_images is None) != (source.test_labels is None):
            raise ConfigError(
                "source.test_images, source.test_labels: both or neither must be given, got one; add the other."
            )
    return {split: ArrayFiles(source.kind, x, y) for split, (x, y) in given.items() if x is not None and y is not None}


def look(files: ArrayFiles) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape with rows first, dtype) of the examples, from the header alone.

    Raises:
      DataError: The file is not what its kind promises, or labels and examples differ in number.
    """
    if files.kind == "digits":
        return (DIGITS_ROWS, *DIGITS_SHAPE), np.dtype(np.uint8)
    if files.kind == "line":
        return (files.line[0], 1), np.dtype(np.float32)
    if files.text is not None:
        return load(files)[0].shape, np.dtype(np.int32)
    header = _idx_header if files.kind == "idx" else _npz_header
    shape, dtype = header(files.x, "x")
    labels, _ = header(files.y, "y")
    if labels != shape[:1]:
        raise DataError(
            f"{files.y}: labels must have shape ({shape[0]},), one for each of the examples in {files.x}, got {labels}."
        )
    picture = len(shape) in (3, 4) and dtype == np.uint8
    if not (picture or len(shape) in (1, 2)) or 0 in shape:
        raise DataError(
            f"{files.x}: x must be uint8 pictures (rows, height, width[, 1 or 3]) or numbers (rows[, width]), got {dtype} {shape}."
        )
    return shape if len(shape) in (2, 4) else (*shape, 1), dtype


def load(files: ArrayFiles) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) whole, decoded once per process: x (rows, height, width, channels) uint8 or (rows, width) as stored."""
    stamps = tuple(pathlib.Path(path).stat().st_mtime_ns for path in (files.x, files.y) if path)
    return _load(files, stamps)


@functools.lru_cache(maxsize=2)
def _load(files: ArrayFiles, _stamps: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    if files.kind == "digits":
        return _digits()
    if files.kind == "line":
        return _line(*files.line)
    if files.text is not None:
        return texts.load(files.x, files.text)
    if files.kind == "idx":
        x, y = _idx(files.x), _idx(files.y)
    else:
        x, y = _npz(files.x, "x"), _npz(files.y, "y")
    return x if x.ndim in (2, 4) else x[..., None], y


def release() -> None:
    """Lets go of decoded arrays."""
    _load.cache_clear()


def _digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits  # half a second to import; nothing else here needs it

    digits = load_digits()
    pixels = digits.images.astype(np.int64) * 255 // 16  # stored as 0 to 16
    return pixels.astype(np.uint8)[..., None], digits.target.astype(np.int64)


def _line(rows: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """y = 2x + 1 + noise * U[0, 1), x from U[0, 1); always the same, so that the cache holds."""
    draw = np.random.Generator(np.random.PCG64(2))
    x = draw.random((rows, 1), np.float32)
    return x, 2 * x[:, 0].astype(np.float64) + 1 + noise * draw.random(rows)


def labels(files: ArrayFiles) -> np.ndarray:
    """The labels alone."""
    if files.kind == "digits":
        return np.arange(10)
    if files.kind == "line":
        return _line(*files.line)[1]
    if files.text is not None:
        return load(files)[1]
    if files.kind == "idx":
        return _idx(files.y)
    return _npz(files.y, "y")


def _open(path: str) -> Any:
    return gzip.open(path) if is_gzip(pathlib.Path(path)) else pathlib.Path(path).open("rb")


def _idx_header(path: str, _name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    with readable(path), _open(path) as file:
        return _read_idx_header(path, file)


def _read_idx_header(path: str, file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _IDX_TYPES:
        raise DataError(f"{path}: an idx file begins with 0, 0, a type and a rank, got {head!r}; check the path.")
    rest = file.read(4 * head[3])
    if len(rest) < 4 * head[3]:
        raise DataError(
            f"{path}: an idx header of rank {head[3]} has {4 + 4 * head[3]} bytes, got {4 + len(rest)}; the file is cut short."
        )
    return struct.unpack(f">{head[3]}I", rest), np.dtype(_IDX_TYPES[head[2]])


def _idx(path: str) -> np.ndarray:
    with readable(path), _open(path) as file:
        shape, dtype = _read_idx_header(path, file)
        content = file.read()
    if len(content) != int(np.prod(shape)) * dtype.itemsize:
        raise DataError(
            f"{path}: {shape} of {dtype} take {int(np.prod(shape)) * dtype.itemsize} bytes, got {len(content)}; get the file again."
        )
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _npz(path: str, name: str) -> np.ndarray:
    with readable(path), np.load(path) as stored:
        return stored[name]


def _npz_header(path: str, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path}: a .npz file with arrays x and y is needed, got something else; write it with numpy.savez."
        )
    with readable(path), zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            held = ", ".join(member.removesuffix(".npy") for member in archive.namelist())
            raise DataError(f"{path}: arrays x and y are needed, got {held or 'none'}; name them so.")
        with archive.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    if dtype.kind not in ("biufU" if name == "y" else "biuf"):
        raise DataError(f"{path}: array {name} must hold numbers{' or text' if name == 'y' else ''}, got {dtype}.")
    return shape, dtype
