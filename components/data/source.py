"""Sources: where raw records come from, cut into split descriptors that workers read on their own.

    Source --descriptors()--> Descriptor, ... --read()--> Rows

A descriptor is a byte range of a CSV file, a row range of arrays, or a slice of the list of pictures. It alone travels
through Beam; rows never do.
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from components.data import arrays, csvfile, pictures, texts
from components.data.arrays import ArrayFiles
from components.data.csvfile import Range
from components.data.schema import Peek
from components.data.transform import strip
from components.errors import ConfigError, DataError
from components.options import CsvSource, ImagesSource, Source, TextSource

PEEK_BYTES = 1 << 18
PEEK_ROWS = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Descriptor:
    """The element that travels through Beam.

    Attributes:
      index: Position among all descriptors of a run; names the files that it becomes.
      origin: 'train' or 'test': which of the source's files it belongs to.
      path: File of a table or of arrays; root folder of pictures.
      records: How many records an independent count found: ends of lines, array header, folder listing.
      columns: Names of a table's cells, in file order.
      cut: Byte range of a table.
      arrays: Files behind a row range.
      rows: [start, stop) of arrays.
      files: Paths of pictures, below `path`.
    """

    index: int
    origin: str
    path: str
    records: int
    columns: tuple[str, ...] = ()
    cut: Range | None = None
    arrays: ArrayFiles | None = None
    rows: tuple[int, int] = (0, 0)
    files: tuple[str, ...] = ()


# --- before any work ---------------------------------------------------------------------------------------------


def content_files(source: Source) -> list[pathlib.Path]:
    """Every file whose bytes matter, for fingerprints; none for what is embedded.

    Raises:
      ConfigError: One is not there.
    """
    _check_paths(source)
    if isinstance(source, CsvSource):
        return [pathlib.Path(path) for path in [*source.train, *(source.test or ())]]
    if isinstance(source, ImagesSource):
        roots = [pathlib.Path(path) for path in (source.train, source.test) if path]
        return sorted(root / name for root in roots for name in pictures.listing(root))
    if isinstance(source, TextSource):
        roots = [pathlib.Path(path) for path in (source.train, source.test) if path]
        return [path for root in roots for path in texts.listing(root, source.learn)]
    found = arrays.files_of(source).values()
    return [
        pathlib.Path(path) for path in dict.fromkeys(path for files in found for path in (files.x, files.y) if path)
    ]


def peek(source: Source) -> Peek:
    """Cheap facts, and the checks that need no full read.

    Raises:
      ConfigError: A file or a column is not there.
      DataError: A file is not what its kind promises.
    """
    _check_paths(source)
    if isinstance(source, CsvSource):
        return _peek_csv(source)
    if isinstance(source, ImagesSource):
        return _peek_images(source)
    files = arrays.files_of(source)
    shape, _ = arrays.look(files["train"])
    if "test" in files and (other := arrays.look(files["test"])[0])[1:] != shape[1:]:
        raise DataError(
            f"{files['test'].x}: examples must have shape {shape[1:]} as in {files['train'].x}, got {other[1:]}."
        )
    kind = "image" if len(shape) == 4 else "values"
    labels = arrays.labels(files["train"])
    labels = labels[np.isfinite(labels)] if labels.dtype.kind == "f" else labels
    return Peek(kind=kind, shape=shape[1:], labels=np.unique(labels).tolist(), rows=shape[0])


def _check_paths(source: Source) -> None:
    for key, value in source.model_dump(exclude={"kind", "label", "columns", "missing"}).items():
        if not key.startswith(("train", "test")) or value is None:
            continue
        for text in [value] if isinstance(value, str) else value:
            path = pathlib.Path(text)
            if isinstance(source, ImagesSource | TextSource) and not path.is_dir():
                what = "a folder" if getattr(source, "learn", "class") == "next" else "a folder with one folder a class"
                raise ConfigError(f"source.{key}: {what} is needed, got '{path}'; correct the path.")
            if not isinstance(source, ImagesSource | TextSource) and not path.is_file():
                raise ConfigError(
                    f"source.{key}: a file is needed, got '{path}', which is not there; correct the path."
                )


def _peek_images(source: ImagesSource) -> Peek:
    root = pathlib.Path(source.train)
    path = pictures.first(root)
    if path is None:
        raise DataError(f"{root}: one folder a class with pictures in it is needed, got none; check source.train.")
    names = pictures.classes(root)
    unknown = sorted(set(pictures.classes(pathlib.Path(source.test))) - set(names)) if source.test else []
    if unknown:
        raise DataError(f"{source.test}: its class folders must be among those of source.train, got '{unknown[0]}'.")
    try:
        shape = pictures.decode(path.read_bytes()).shape
    except ValueError as error:
        raise DataError(f"{path}: {error}; remove the file.") from error
    return Peek(kind="image", shape=shape, labels=names)


def _peek_csv(source: CsvSource) -> Peek:
    path = pathlib.Path(source.train[0])
    columns, start, line = csv_layout(path, source)
    for other in [*source.train[1:], *(source.test or ())]:
        _check_layout(pathlib.Path(other), source, columns)
    if source.label not in columns:
        raise ConfigError(
            f"source.label: a column of {path} is needed, got '{source.label}'; columns: {', '.join(columns[:20])}."
        )
    cut = next(csvfile.ranges(path, source.delimiter, PEEK_BYTES, start, line), None)
    if cut is None:
        raise DataError(f"{path}: at least one record is needed, got none.")
    table = csvfile.read_table(path, cut, columns, source.delimiter)
    if not len(table.lines):
        raise DataError(
            f"{path}: no sound record among the first {cut.records}; {table.bad[0].position}: {table.bad[0].reason}."
        )
    sample = {name: _texts(cells) for name, cells in table.columns.items()}
    rows = sum(_size(pathlib.Path(each)) for each in source.train) * cut.records // max(cut.stop - cut.start, 1)
    return Peek(kind="table", columns=columns, sample=sample, labels=_known(sample[source.label], source), rows=rows)


def _texts(cells: Any) -> list[str]:
    return [cell.decode() for cell in cells[:PEEK_ROWS].to_pylist()]


def _known(labels: Sequence[str], source: CsvSource) -> list[str]:
    missing = {strip(cell) for cell in source.missing}
    return [label for label in labels if strip(label) not in missing]


def _size(path: pathlib.Path) -> int:
    """Decompressed bytes; a gzip file says so in its last four (modulo 2**32)."""
    if not csvfile.is_gzip(path):
        return path.stat().st_size
    with path.open("rb") as file:
        file.seek(-4, 2)
        return int.from_bytes(file.read(4), "little")


# --- descriptors -------------------------------------------------------------------------------------------------


def descriptors(source: Source, split_bytes: int) -> list[Descriptor]:
    """Cuts the source into pieces of about `split_bytes`, in a fixed order; counts the records of each.

    Raises:
      ConfigError: A file is not there.
      DataError: A file is not what its kind promises.
    """
    _check_paths(source)
    if isinstance(source, CsvSource):
        found = _csv_descriptors(source, split_bytes)
    elif isinstance(source, ImagesSource):
        found = _image_descriptors(source, split_bytes)
    else:
        found = _array_descriptors(arrays.files_of(source), split_bytes)
    return [dataclasses.replace(each, index=index) for index, each in enumerate(found)]


def _csv_descriptors(source: CsvSource, split_bytes: int) -> Iterator[Descriptor]:
    for origin, paths in (("train", source.train), ("test", source.test or ())):
        for text in paths:
            path = pathlib.Path(text)
            columns, start, line = csv_layout(path, source)
            for cut in csvfile.ranges(path, source.delimiter, split_bytes, start, line):
                yield Descriptor(index=0, origin=origin, path=text, records=cut.records, columns=columns, cut=cut)


def _image_descriptors(source: ImagesSource, split_bytes: int) -> Iterator[Descriptor]:
    for origin, text in (("train", source.train), ("test", source.test)):
        if text is None:
            continue
        held: list[str] = []
        size = 0
        for name in pictures.listing(pathlib.Path(text)):
            held.append(name)
            size += (pathlib.Path(text) / name).stat().st_size
            if size >= split_bytes:
                yield Descriptor(index=0, origin=origin, path=text, records=len(held), files=tuple(held))
                held, size = [], 0
        if held:
            yield Descriptor(index=0, origin=origin, path=text, records=len(held), files=tuple(held))


def _array_descriptors(found: dict[str, ArrayFiles], split_bytes: int) -> Iterator[Descriptor]:
    for origin, files in found.items():
        shape, dtype = arrays.look(files)
        step = max(1, split_bytes // (int(np.prod(shape[1:])) * dtype.itemsize))
        for start in range(0, shape[0], step):
            rows = (start, min(start + step, shape[0]))
            yield Descriptor(
                index=0, origin=origin, path=files.x or files.kind, records=rows[1] - rows[0], arrays=files, rows=rows
            )


def csv_layout(path: pathlib.Path, source: CsvSource) -> tuple[tuple[str, ...], int, int]:
    """(column names, byte and physical line of the first record).

    Raises:
      DataError: No header, or a column name twice.
    """
    head = csvfile.read_range(path, 0, PEEK_BYTES)
    start, line = (3 if head.startswith(b"\xef\xbb\xbf") else 0), 1
    while source.comment and head[start:].startswith(source.comment.encode()):
        start, line = _next_line(head, start), line + 1
    if source.columns is not None:
        names, end = source.columns, start
    else:
        end = _next_line(head, start)
        text = head[start:end].decode("utf-8", "replace")
        names = [strip(name) for name in next(csv.reader([text.rstrip("\r\n")], delimiter=source.delimiter), [])]
        line += 1
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if not names or twice:
        shown = f"'{twice[0]}' twice" if twice else "none"
        raise DataError(f"{path}: each column needs a name of its own, got {shown}; set source.columns.")
    return tuple(names), end, line


def _next_line(head: bytes, start: int) -> int:
    end = head.find(b"\n", start)
    return len(head) if end < 0 else end + 1


def _check_layout(path: pathlib.Path, source: CsvSource, columns: tuple[str, ...]) -> None:
    names, _, _ = csv_layout(path, source)
    if names != columns:
        odd = next((name for name in names if name not in columns), None) or f"{len(names)} columns in another order"
        raise DataError(f"{path}: the columns must be those of {source.train[0]}, got {odd}; make the headers equal.")
