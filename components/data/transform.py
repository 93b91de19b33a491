"""Raw cells or pixels to model inputs: the ONE definition, used by Beam and by the deployed bundle.

    raw columns --apply()--> stored features --to_inputs()--> float32 model input

The bundle ships this very file, so it needs numpy and the standard library only, and raises ValueError where the rest
of trimline raises its own errors. Every result is bit-identical whatever the batch size: numbers are computed in
float64 element by element, pictures in integers.

The JSON form, `Transform.to_json()`:

    {"schema": 1, "kind": "table",  "inputs": {"kind": "features", "depths": [one-hot width of each id column]},
     "missing": [cell, ...], "label": LABEL, "columns": [
       {"name", "kind": "number", "rule": "standardise", "mean": m, "std": s},
       {"name", "kind": "number", "rule": "none", "mean": m},
       {"name", "kind": "number", "rule": "bucketise", "boundaries": [...]},
       {"name", "kind": "category", "vocabulary": [...]}]}
    {"schema": 1, "kind": "values", "inputs": {"kind": "features", "depths": []}, "label": LABEL,
     "mean": [...], "std": [...]}
    {"schema": 1, "kind": "image",  "inputs": {"kind": "image", "pixels": "zero_to_one" | "minus_one_to_one" | "zero_to_255"},
                                    "label": LABEL, "size": [height, width], "channels": 1 | 3}
    LABEL = {"kind": "classes", "names": [...], "strip": "."} | {"kind": "number"}
"""

from __future__ import annotations

import base64
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

MISSING_ID = 0
UNKNOWN_ID = 1
RESERVED_IDS = 2
_PIXEL_SCALE = np.float32(1 / 255)
RANGES = {"zero_to_one": (0.0, 1.0), "minus_one_to_one": (-1.0, 1.0), "zero_to_255": (0.0, 255.0)}
"""Black and white as a model gets them, by what `preprocess.pixels` may be."""
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_FLOAT32_LIMIT = float(np.finfo(np.float32).max)
_BLANKS = " \t\n\r\v\f"


@dataclasses.dataclass(frozen=True)
class Coded:
    """A column of text in which each distinct cell is kept once.

    Attributes:
      codes: int32 (rows,), index into `values`.
      values: The distinct cells; two may still be equal after stripping.
    """

    codes: np.ndarray
    values: Sequence[str]


Cells = np.ndarray | Coded | Sequence[Any]


def strip(cell: str) -> str:
    """A cell without the blanks around it (ASCII only, as CSV tools agree on no others)."""
    return cell.strip(_BLANKS)


def parse_cells(cells: Iterable[Any], missing: Iterable[str] = ()) -> tuple[np.ndarray, np.ndarray]:
    """Text to numbers, without ever raising.

    Args:
      cells: str or bytes (UTF-8); blanks around a cell do not count.
      missing: Cells that mean: no value.

    Returns:
      (float64 (rows,), NaN where missing or bad; bool (rows,), True where a cell is neither a finite number nor missing).

    >>> values, bad = parse_cells([" 39", "?", "4x"], missing=["?"])
    >>> values.tolist(), bad.tolist()
    ([39.0, nan, nan], [False, False, True])
    """
    absent = set(missing)
    parsed = [_parse(cell, absent) for cell in cells]
    values = np.array([np.nan if value is None else value for value in parsed], np.float64)
    bad = np.array([value is None for value in parsed], bool)
    return values, bad


def _parse(cell: Any, missing: set[str]) -> float | None:
    """The number, NaN where missing, None where bad."""
    try:
        text = strip(cell.decode() if isinstance(cell, bytes) else str(cell))
    except UnicodeDecodeError:
        return None
    if text in missing:
        return np.nan
    if not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if np.isfinite(value) else None


def coded(cells: Iterable[Any]) -> Coded:
    """A plain sequence of cells as `Coded`."""
    texts = [cell.decode() if isinstance(cell, bytes) else str(cell) for cell in cells]
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return Coded(np.array([places[text] for text in texts], np.int32), tuple(places))


def raw_columns(records: Sequence[Mapping[str, Any]]) -> dict[str, Cells]:
    """Golden records (`golden.json`, key "raw") as the columns that `Transform.apply` takes.

    A record is {column: cell}, or {"pixels": base64 of uint8 bytes, "shape": [height, width, channels]}, or
    {"values": [number, ...]}.
    """
    if records and {"pixels", "shape"} == set(records[0]):
        flat = [np.frombuffer(base64.b64decode(record["pixels"]), np.uint8) for record in records]
        return {"pixels": [pixels.reshape(record["shape"]) for pixels, record in zip(flat, records, strict=True)]}
    if records and set(records[0]) == {"values"} and isinstance(records[0]["values"], list):
        return {"values": np.array([record["values"] for record in records], np.float32)}
    names = list(records[0]) if records else []
    return {name: [_cell(record, name, row) for row, record in enumerate(records)] for name in names}


def _cell(record: Mapping[str, Any], name: str, row: int) -> str:
    if name not in record:
        raise ValueError(
            f"record {row} lacks column '{name}', which the first record has; give every record all columns."
        )
    return "" if record[name] is None else str(record[name])


class Transform:
    """Statistics and rules as a vectorised function; see the module for its JSON form."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        if facts.get("schema") != 1:
            raise ValueError(
                f"transform.schema must be 1, got {facts.get('schema')!r}; use the trimline that wrote it."
            )
        self._facts = dict(facts)
        self._missing = frozenset(facts.get("missing", ()))
        self.columns: list[dict[str, Any]] = list(facts.get("columns", ()))
        self._tables = {
            column["name"]: {text: RESERVED_IDS + rank for rank, text in enumerate(column["vocabulary"])}
            for column in self.columns
            if column["kind"] == "category"
        }
        label = facts["label"]
        self._classes = {name: index for index, name in enumerate(label.get("names", ()))}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Transform:
        """Reads what `to_json` gave."""
        return cls(facts)

    def to_json(self) -> dict[str, Any]:
        """The transform as JSON-able values."""
        return dict(self._facts)

    @property
    def kind(self) -> str:
        """'table', 'values' or 'image'."""
        return str(self._facts["kind"])

    @property
    def names(self) -> list[str]:
        """Raw columns that `apply` needs."""
        return {"image": ["pixels"], "values": ["values"]}.get(self.kind) or [c["name"] for c in self.columns]

    def apply(self, columns: Mapping[str, Cells]) -> dict[str, np.ndarray]:
        """Raw columns to the features that blocks store.

        Args:
          columns: Table: name -> cells (str or bytes; `Coded`; or float64 with NaN where missing, already parsed).
            Image: {"pixels": uint8 (rows, h, w, c), or a sequence of (h, w, c) of any sizes}.
            Values: {"values": (rows, width)}. Columns that the transform does not use are ignored.

        Returns:
          {"image": uint8 (rows, height, width, channels)}, or {"numbers": float32 (rows, n), "ids": int32 (rows, m)}
          without the one whose width is 0.

        Raises:
          ValueError: A column is absent, a cell is not a number, or a shape is wrong.
        """
        absent = [name for name in self.names if name not in columns]
        if absent:
            raise ValueError(f"the records lack column '{absent[0]}'; got {', '.join(columns) or 'no columns'}.")
        if self.kind == "image":
            return {"image": self._pictures(columns["pixels"])}
        if self.kind == "values":
            return {"numbers": self._values(columns["values"])}
        return self._table(columns)

    def to_inputs(self, features: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stored features to the model's input: float32 (rows, *input_shape); pictures in the range that `pixels` names.

        Features are the numbers, then the one-hot form of each id column, in order.
        """
        if self.kind == "image":
            return in_range(features["image"].astype(np.float32), self._facts["inputs"]["pixels"])
        parts = [features["numbers"].astype(np.float32)] if "numbers" in features else []
        for place, depth in enumerate(self._facts["inputs"]["depths"]):
            parts.append((features["ids"][:, place, None] == np.arange(depth, dtype=np.int32)).astype(np.float32))
        return np.concatenate(parts, axis=1)

    def labels(self, cells: Cells) -> np.ndarray:
        """Label cells to int32 class indices, -1 where unknown; or to float32, NaN where not a number."""
        if self._facts["label"]["kind"] == "number":
            return self._parsed(cells)[0].astype(np.float32)
        column = cells if isinstance(cells, Coded) else coded(cells)
        ids = [self._classes.get(label_text(value, self._facts["label"]["strip"]), -1) for value in column.values]
        return np.array(ids, np.int32).reshape(-1)[column.codes]

    def _table(self, columns: Mapping[str, Cells]) -> dict[str, np.ndarray]:
        numbers, ids = [], []
        for column in self.columns:
            cells = columns[column["name"]]
            if column["kind"] == "category":
                ids.append(self._ids(column["name"], cells))
            elif column["rule"] == "bucketise":
                ids.append(bucket_ids(self._numbers(column["name"], cells), np.array(column["boundaries"])))
            else:
                numbers.append(_standardised(self._numbers(column["name"], cells), column["mean"], column.get("std")))
        stacked = {"numbers": numbers, "ids": ids}
        return {name: np.stack(parts, axis=1) for name, parts in stacked.items() if parts}

    def _parsed(self, cells: Cells) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(cells, Coded):
            values, bad = parse_cells(cells.values, self._missing)
            return values[cells.codes], bad[cells.codes]
        if isinstance(cells, np.ndarray) and cells.dtype.kind in "fiu":
            return cells.astype(np.float64), np.zeros(len(cells), bool)
        return parse_cells(cells, self._missing)

    def _numbers(self, name: str, cells: Cells) -> np.ndarray:
        values, bad = self._parsed(cells)
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            shown = cells.values[cells.codes[row]] if isinstance(cells, Coded) else cells[row]
            raise ValueError(f"record {row}, column '{name}': a number or a missing cell is needed, got {shown!r}.")
        return values

    def _ids(self, name: str, cells: Cells) -> np.ndarray:
        column = cells if isinstance(cells, Coded) else coded(cells)
        table = self._tables[name]
        texts = [strip(value) for value in column.values]
        ids = [MISSING_ID if text in self._missing else table.get(text, UNKNOWN_ID) for text in texts]
        return np.array(ids, np.int32).reshape(-1)[column.codes]

    def _values(self, cells: Cells) -> np.ndarray:
        mean, std = np.array(self._facts["mean"], np.float64), np.array(self._facts["std"], np.float64)
        values = np.asarray(cells, np.float64)
        if values.ndim != 2 or values.shape[1] != len(mean):
            raise ValueError(f"'values' must have shape (rows, {len(mean)}), got {values.shape}.")
        return _float32((values - mean) / std)

    def _pictures(self, pictures: Cells) -> np.ndarray:
        assert not isinstance(pictures, Coded), "pixels are arrays"
        (height, width), channels = self._facts["size"], self._facts["channels"]
        made = [resize(to_channels(np.asarray(picture), channels), height, width) for picture in pictures]
        return np.stack(made) if made else np.zeros((0, height, width, channels), np.uint8)


def label_text(cell: str, ending: str = "") -> str:
    """A label cell as the name of its class: blanks and the characters of `ending` at its end removed."""
    return strip(strip(cell).rstrip(ending)) if ending else strip(cell)


def bucket_ids(values: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """float64 (rows,) to int32 ids: 0 where NaN, else 1 + the number of boundaries at or below the value.

    >>> bucket_ids(np.array([np.nan, 1.0, 2.0, 9.0]), np.array([2.0, 5.0])).tolist()
    [0, 1, 2, 3]
    """
    ids = 1 + np.searchsorted(boundaries, values, side="right")
    return np.where(np.isnan(values), MISSING_ID, ids).astype(np.int32)


def _standardised(values: np.ndarray, mean: float, std: float | None) -> np.ndarray:
    """Missing becomes the mean; `std` None leaves the unit alone."""
    filled = np.where(np.isnan(values), mean, values)
    return _float32(filled if std is None else (filled - mean) / std)


def _float32(values: np.ndarray) -> np.ndarray:
    return np.clip(values, -_FLOAT32_LIMIT, _FLOAT32_LIMIT).astype(np.float32)


def to_channels(picture: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (h, w) or (h, w, 1 | 3) to (h, w, channels); grey is luma (ITU-R BT.601) in integers, as Pillow has it."""
    if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or picture.shape[2:] not in ((), (1,), (3,)):
        raise ValueError(f"a picture must be uint8 (h, w) or (h, w, 1 or 3), got {picture.dtype} {picture.shape}.")
    picture = picture[:, :, None] if picture.ndim == 2 else picture
    if picture.shape[2] == channels:
        return picture
    if channels == 3:
        return np.repeat(picture, 3, axis=2)
    weighed = picture.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32)
    return ((weighed + 32768) >> 16).astype(np.uint8)[:, :, None]


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear resize (a triangle filter as wide as the reduction), columns first, then rows.

    In 22-bit fixed point with rounding between the two passes, as Pillow's BILINEAR does: the same result on every
    machine.

    Args:
      picture: uint8 (h, w, c).

    Returns:
      uint8 (height, width, c); `picture` itself where it has that size already.
    """
    if picture.shape[1] != width:
        picture = _resample(picture.transpose(1, 0, 2), width).transpose(1, 0, 2)
    return _resample(picture, height) if picture.shape[0] != height else picture


def in_range(pixels: Any, name: str) -> Any:
    """float32 values of 0 to 255 in the range of that name; NumPy arrays and tensors alike, bit by bit.

    At most one product is rounded, and doubling is exact, so no order of the steps gives other bits.
    """
    if name == "zero_to_255":
        return pixels
    unit = pixels * _PIXEL_SCALE
    return unit * np.float32(2) - np.float32(1) if name == "minus_one_to_one" else unit


def _resample(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w, c) to (size, w, c)."""
    places, weights = _taps(picture.shape[0], size)
    total = np.full((size, *picture.shape[1:]), 1 << 21, np.int32)
    for tap in range(places.shape[1]):
        total += picture[places[:, tap]].astype(np.int32) * weights[:, tap, None, None]
    return np.clip(total >> 22, 0, 255).astype(np.uint8)


def _taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows read, int32 weights in units of 2**-22), both (size_out, taps)."""
    scale = size_in / size_out
    reach = max(scale, 1.0)
    centers = (np.arange(size_out) + 0.5) * scale
    low = np.maximum((centers - reach + 0.5).astype(np.int64), 0)
    high = np.minimum((centers + reach + 0.5).astype(np.int64), size_in)
    places = low[:, None] + np.arange(int((high - low).max()))
    weights = np.maximum(0.0, 1.0 - np.abs((places - centers[:, None] + 0.5) / reach))
    weights = np.where(places < high[:, None], weights, 0.0)
    weights = weights / _summed(weights)
    return np.minimum(places, size_in - 1), np.floor(weights * (1 << 22) + 0.5).astype(np.int32)


def _summed(weights: np.ndarray) -> np.ndarray:
    """Row sums from left to right, (rows, 1): `np.sum` may add in another order on another machine."""
    total = np.zeros((len(weights), 1))
    for tap in range(weights.shape[1]):
        total += weights[:, tap, None]
    return total
