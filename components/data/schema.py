"""Schema: what each raw column is, inferred from a first look, overridden by the options, written to `schema.json`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from components.artifacts import DataSpec, Task
from components.data.transform import RESERVED_IDS, label_text, parse_cells, strip
from components.errors import ConfigError, DataError
from components.options import ColumnOptions, PreprocessOptions, Source, TextSource

MOST_CLASSES_GUESSED = 20  # whole-number labels with more distinct values than this are taken for a quantity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peek:
    """Cheap facts about a source, found without reading all of it.

    Attributes:
      kind: 'table', 'values' (rows of numbers) or 'image'.
      columns: Names in file order, label included; tables only.
      sample: name -> first cells as text; tables only.
      shape: One example as stored: (height, width, channels) of the first picture, or (width,); () for tables.
      labels: First labels, or all of them where that is cheap: text or numbers.
      rows: Rows for training and what is drawn from it, roughly.
    """

    kind: str
    columns: tuple[str, ...] = ()
    sample: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] = ()
    labels: Sequence[str | float] = ()
    rows: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """One column of a table that becomes features; see `ColumnOptions`."""

    name: str
    kind: str
    rule: str
    buckets: int
    vocabulary: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
    """How raw records are read.

    Attributes:
      kind: As in `Peek`.
      task: Decides how labels are read.
      columns: Features of a table, in file order.
      label: Label column of a table.
      label_strip: Characters removed from the end of a label.
      missing: Cells that mean: no value; without blanks around them.
      shape: (height, width, channels) of stored pictures, or (width,) of values.
      rule: 'standardise' or 'none'; values only.
      pixels: The range in which a model gets pictures; images only.
      tokens: What the numbers of texts stand for; values of a text source only.
    """

    kind: str
    task: Task
    columns: tuple[Column, ...] = ()
    label: str = ""
    label_strip: str = ""
    missing: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    rule: str = "standardise"
    pixels: str = "zero_to_one"
    tokens: str = ""

    def to_json(self) -> dict[str, Any]:
        """The schema as JSON-able values."""
        return {"schema": 1, **dataclasses.asdict(self)}


def infer(seen: Peek, source: Source, options: PreprocessOptions, task: Task | None) -> Schema:
    """Decides what each column is.

    A column is a number where every cell of the first look that is not missing is one, else a category. The group
    column and the label are no features. Task None: classification where labels are text, or whole numbers of at
    most 20 different values; else regression.

    Raises:
      ConfigError: The options name a column that is not there, or ask for what this kind of source cannot do.
      DataError: No column is left to learn from.
    """
    _check_names(seen, source, options)
    missing = tuple(strip(cell) for cell in getattr(source, "missing", ()))
    ending = getattr(source, "label_strip", "")
    # Token numbers as labels look like values to predict.
    found = task or ("classification" if source.kind == "text" else guess_task(seen.labels, ending))
    if seen.kind == "image":
        return Schema(kind="image", task=found, shape=_picture_shape(seen.shape, options), pixels=options.pixels)
    if seen.kind == "values":
        usual = ColumnOptions(
            rule="none" if source.kind in ("line", "text") else "standardise"
        )  # a line is read off its weights
        rule = options.columns.get("x", usual).rule
        tokens = f"{source.tokens} of {source.vocabulary}" if isinstance(source, TextSource) else ""
        return Schema(kind="values", task=found, shape=seen.shape, rule=rule, tokens=tokens)
    label = getattr(source, "label", "")
    left_out = {label, options.splits.group}
    columns = [_column(name, seen.sample[name], missing, options) for name in seen.columns if name not in left_out]
    kept = tuple(column for column in columns if column.kind != "ignore")
    if not kept:
        raise DataError(
            f"preprocess.columns: at least one column beside the label '{label}' must be a feature, got none."
        )
    return Schema(kind="table", task=found, columns=kept, label=label, label_strip=ending, missing=missing)


def guess_task(labels: Sequence[str | float], ending: str = "") -> Task:
    """Classification or regression, from some labels.

    >>> guess_task(["<=50K", ">50K"]), guess_task([0.25, 1.5]), guess_task([3, 1, 2])
    ('classification', 'regression', 'classification')
    """
    values, bad = parse_cells([label_text(str(label), ending) for label in labels])
    if bad.any():
        return "classification"
    whole = bool(np.all(values == np.floor(values)))
    return "classification" if whole and len(np.unique(values)) <= MOST_CLASSES_GUESSED else "regression"


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct labels in the order of the logits: by number where all are numbers, else by text."""
    distinct = sorted(set(labels))
    values, bad = parse_cells(distinct)
    if bad.any():
        return tuple(distinct)
    return tuple(distinct[place] for place in np.argsort(values, kind="stable"))


def rough_spec(seen: Peek, schema: Schema) -> DataSpec:
    """What the data will look like, before it is read: exact for pictures and values, estimated for tables
    (vocabularies and buckets are taken from the first look)."""
    labels = [label_text(str(label), schema.label_strip) for label in seen.labels]
    names = class_names(labels) if schema.task == "classification" else ()
    if schema.kind == "image":
        return DataSpec(task=schema.task, input_name="image", input_shape=schema.shape, labels=names)
    width = schema.shape[0] if schema.kind == "values" else sum(_width(column, seen) for column in schema.columns)
    return DataSpec(task=schema.task, input_name="features", input_shape=(width,), labels=names)


def _width(column: Column, seen: Peek) -> int:
    if column.kind == "category":
        return RESERVED_IDS + min(column.vocabulary, len(set(seen.sample[column.name])))
    return 1 + column.buckets if column.rule == "bucketise" else 1


def _column(name: str, cells: Sequence[str], missing: Sequence[str], options: PreprocessOptions) -> Column:
    chosen = options.columns.get(name, ColumnOptions())
    kind = chosen.kind if chosen.kind != "auto" else _kind(cells, missing)
    return Column(name=name, kind=kind, rule=chosen.rule, buckets=chosen.buckets, vocabulary=chosen.vocabulary)


def _kind(cells: Sequence[str], missing: Sequence[str]) -> str:
    values, bad = parse_cells(cells, missing)
    # A column that is empty so far is read as a category, which no later cell can break.
    return "category" if bad.any() or np.isnan(values).all() else "number"


def _picture_shape(shape: tuple[int, ...], options: PreprocessOptions) -> tuple[int, ...]:
    height, width = options.image_size or shape[:2]
    return (height, width, options.image_channels or shape[2])


def _check_names(seen: Peek, source: Source, options: PreprocessOptions) -> None:
    known = list(seen.columns) if seen.kind == "table" else ["x"] if seen.kind == "values" else []
    for name in options.columns:
        if name == getattr(source, "label", None):
            raise ConfigError(f"preprocess.columns.{name}: the label is no feature; remove the entry.")
        _check_name("preprocess.columns", name, known)
    if options.splits.group is not None:
        _check_name("preprocess.splits.group", options.splits.group, list(seen.columns))
    if seen.kind == "values" and options.columns.get("x", ColumnOptions()).rule == "bucketise":
        raise ConfigError("preprocess.columns.x.rule: arrays take standardise or none, got 'bucketise'; choose one.")
    if options.pixels != "zero_to_one" and seen.kind != "image":
        raise ConfigError(
            f"preprocess.pixels: only pictures have pixels, got {options.pixels} for a source of kind {source.kind}; remove it."
        )
    if options.select is not None and seen.kind != "table":
        raise ConfigError(
            f"preprocess.select: only the columns of a csv source are selected, got {source.kind}; remove it."
        )


def _check_name(where: str, name: str, known: Sequence[str]) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known[:10]) or 'none for this source'}."
    raise ConfigError(f"{where}: a column of the source is needed, got '{name}'; {hint}")
