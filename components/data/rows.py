"""Reading: one split descriptor becomes columns of sound records, and a list of the malformed ones."""

from __future__ import annotations

import base64
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from components.data import arrays, csvfile, pictures
from components.data.csvfile import Bad
from components.data.hashing import Part, bytes_hash, row_hashes
from components.data.schema import Schema
from components.data.source import Descriptor
from components.data.transform import Cells, Coded, label_text, parse_cells
from components.options import CsvSource, ImagesSource, Source, SplitOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """The sound records of one descriptor, and the malformed ones.

    Attributes:
      columns: name -> cells as `Transform.apply` takes them, (rows, ...).
      label: Classification: text; regression: float64.
      hashes: uint64 (rows,), stable; see `components.data.hashing`.
      bad: The malformed records.
      locate: row -> (position as the user would look it up, first characters).
      record: row -> the raw record as `golden.json` holds it.
      file: Path that positions refer to.
    """

    columns: dict[str, Cells]
    label: Cells
    hashes: np.ndarray
    bad: list[Bad]
    locate: Callable[[int], tuple[str, str]]
    record: Callable[[int], dict[str, Any]]
    file: str

    def __len__(self) -> int:
        return len(self.hashes)

    def take(self, rows: np.ndarray) -> dict[str, Cells]:
        """The columns of some rows (int64 indices)."""
        return {name: take(cells, rows) for name, cells in self.columns.items()}


def take(cells: Cells, rows: np.ndarray) -> Cells:
    """Some rows of a column."""
    if isinstance(cells, Coded):
        return Coded(cells.codes[rows], cells.values)
    return cells[rows] if isinstance(cells, np.ndarray) else [cells[row] for row in rows]


def read(descriptor: Descriptor, source: Source, schema: Schema, splits: SplitOptions, *, pixels: bool = True) -> Rows:
    """Reads one descriptor; what is malformed goes to `Rows.bad`.

    Args:
      descriptor: From `descriptors(source, ...)`.
      schema: Which columns, read as what.
      splits: Whose `group` and `salt` the hashes depend on.
      pixels: False leaves picture files undecoded: "pixels" is empty, and no picture is found malformed.
    """
    if isinstance(source, CsvSource):
        return _read_csv(descriptor, source, schema, splits)
    if isinstance(source, ImagesSource):
        return _read_images(descriptor, splits, pixels)
    return _read_arrays(descriptor, schema, splits)


def release() -> None:
    """Lets go of what is kept between reads: decoded arrays, an open compressed file."""
    arrays.release()
    csvfile.close()


def _read_csv(descriptor: Descriptor, source: CsvSource, schema: Schema, splits: SplitOptions) -> Rows:
    assert descriptor.cut is not None, "a table is cut into byte ranges"
    path = pathlib.Path(descriptor.path)
    table = csvfile.read_table(path, descriptor.cut, descriptor.columns, source.delimiter)
    reasons: dict[int, str] = {}
    columns: dict[str, Cells] = {}
    for column in schema.columns:
        cells = table.columns[column.name]
        if column.kind == "number":
            columns[column.name], bad = csvfile.numbers(cells, schema.missing)
            reasons |= {int(row): _not_a_number(column.name, cells[int(row)].as_py()) for row in np.flatnonzero(bad)}
        else:
            columns[column.name] = csvfile.coded_cells(cells)
    label, unlabelled = _csv_label(csvfile.coded_cells(table.columns[schema.label]), schema)
    reasons |= unlabelled
    hashed = [splits.group] if splits.group else descriptor.columns
    hashes = row_hashes((csvfile.part(name, table.columns[name]) for name in hashed), splits.salt)
    kept = np.delete(np.arange(len(hashes)), list(reasons))

    def locate(row: int) -> tuple[str, str]:
        return f"line {table.lines[kept[row]]}", table.text(kept[row])

    def record(row: int) -> dict[str, Any]:
        return {column.name: table.columns[column.name][int(kept[row])].as_py().decode() for column in schema.columns}

    more = [Bad(descriptor.path, f"line {table.lines[row]}", reasons[row], table.text(row)) for row in sorted(reasons)]
    rows = Rows(
        columns=columns,
        label=label,
        hashes=hashes,
        bad=table.bad + more,
        locate=locate,
        record=record,
        file=descriptor.path,
    )
    if not reasons:
        return rows
    return dataclasses.replace(rows, columns=rows.take(kept), label=take(label, kept), hashes=hashes[kept])


def _not_a_number(name: str, cell: bytes) -> str:
    return f"column '{name}': a number is needed, got '{csvfile.shown(cell)[:40]}'"


def _csv_label(label: Coded, schema: Schema) -> tuple[Cells, dict[int, str]]:
    """(labels as the task reads them, reasons why some rows have none)."""
    texts = [label_text(value, schema.label_strip) for value in label.values]
    values, bad = parse_cells(texts, schema.missing)
    absent = np.array([text in schema.missing for text in texts], bool)
    if schema.task == "regression":
        reasons = {
            int(row): _not_a_number(schema.label, texts[label.codes[row]].encode())
            for row in np.flatnonzero((bad | absent)[label.codes])
        }
        return values[label.codes], reasons
    where = np.flatnonzero(absent[label.codes])
    return Coded(label.codes, texts), {int(row): f"column '{schema.label}': the label is missing" for row in where}


def _read_images(descriptor: Descriptor, splits: SplitOptions, pixels: bool) -> Rows:
    found: list[np.ndarray] = []
    kept: list[str] = []
    hashes: list[int] = []
    bad: list[Bad] = []
    for name in descriptor.files:
        path = pathlib.Path(descriptor.path) / name
        with csvfile.readable(path):
            content = path.read_bytes()
        try:
            if pixels:
                found.append(pictures.decode(content))
        except ValueError as error:
            bad.append(Bad(descriptor.path, name, str(error), ""))
            continue
        kept.append(name)
        hashes.append(bytes_hash(content, splits.salt))
    names = sorted({name.split("/")[0] for name in kept})
    codes = np.array([names.index(name.split("/")[0]) for name in kept], np.int32)
    return Rows(
        columns={"pixels": found},
        label=Coded(codes, names),
        hashes=np.array(hashes, np.uint64),
        bad=bad,
        locate=lambda row: (kept[row], ""),
        record=lambda row: picture_record(found[row]),
        file=descriptor.path,
    )


def picture_record(pixels: np.ndarray) -> dict[str, Any]:
    """uint8 (h, w, c) as a golden record."""
    return {"pixels": base64.b64encode(pixels.tobytes()).decode(), "shape": list(pixels.shape)}


def _read_arrays(descriptor: Descriptor, schema: Schema, splits: SplitOptions) -> Rows:
    assert descriptor.arrays is not None, "arrays are cut into row ranges"
    start, stop = descriptor.rows
    x, y = (whole[start:stop] for whole in arrays.load(descriptor.arrays))
    label, unlabelled = _array_label(y, schema)
    unsound = unlabelled | (~np.isfinite(x).all(axis=1) if schema.kind == "values" else np.zeros(len(x), bool))
    bad = [
        Bad(
            descriptor.path, f"row {start + row}", "every value and the label must be finite numbers", str(x[row])[:200]
        )
        for row in np.flatnonzero(unsound)
    ]
    kept = np.flatnonzero(~unsound)
    stored = np.ascontiguousarray(x[kept])
    width = stored.nbytes // max(len(stored), 1)
    starts = np.arange(len(stored), dtype=np.int64) * width
    hashes = row_hashes([Part("x", stored.reshape(-1).view(np.uint8), starts, starts + width)], splits.salt)
    name = "values" if schema.kind == "values" else "pixels"
    values = stored.astype(np.float32) if schema.kind == "values" else stored

    def record(row: int) -> dict[str, Any]:
        return {"values": values[row].tolist()} if schema.kind == "values" else picture_record(values[row])

    return Rows(
        columns={name: values},
        label=take(label, kept),
        hashes=hashes,
        bad=bad,
        locate=lambda row: (f"row {start + kept[row]}", ""),
        record=record,
        file=descriptor.path,
    )


def _array_label(y: np.ndarray, schema: Schema) -> tuple[Cells, np.ndarray]:
    """(labels as the task reads them, bool (rows,): True where there is none)."""
    if schema.task == "regression":
        values = y.astype(np.float64)
        return values, ~np.isfinite(values)
    absent = ~np.isfinite(y) if y.dtype.kind == "f" else np.zeros(len(y), bool)
    distinct, codes = np.unique(y, return_inverse=True)
    names = [f"{value:g}" if isinstance(value, float) else str(value) for value in distinct.tolist()]
    return Coded(codes.astype(np.int32), names), absent
