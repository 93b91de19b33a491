"""Fit: schema and statistics become the transform, with the features that were selected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from components.data.schema import Column, Schema, class_names
from components.data.statistics import Sample, Statistics, vocabulary
from components.data.transform import RESERVED_IDS
from components.errors import DataError
from components.options import FeatureSelection


def fit(
    schema: Schema, stats: Statistics, select: FeatureSelection | None, seed: int, warn: Callable[[str], None]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Turns what was learned into a transform.

    Args:
      select: Keeps the best columns; None keeps all.
      seed: Of the mutual information's estimator.
      warn: Told about columns that had to be left out.

    Returns:
      (the transform as JSON, what became of each raw feature: [{"name", "kind", "kept", "score", "width", ...}]).

    Raises:
      DataError: No column is left.
    """
    label = _label(schema, stats)
    if schema.kind == "image":
        facts = {
            "inputs": {"kind": "image", "pixels": schema.pixels},
            "size": list(schema.shape[:2]),
            "channels": schema.shape[2],
        }
        features = [_feature("image", "image", int(np.prod(schema.shape)))]
        return {"schema": 1, "kind": "image", "label": label, **facts}, features
    if schema.kind == "values":
        found = stats.moments("values")
        plain = schema.rule == "none"
        mean, std = (np.zeros_like(found.mean), np.ones_like(found.mean)) if plain else (found.mean, found.std)
        scaled = {"inputs": {"kind": "features", "depths": []}, "mean": mean.tolist(), "std": std.tolist()}
        return {"schema": 1, "kind": "values", "label": label, **scaled}, [_feature("values", "values", len(mean))]
    return _fit_table(schema, stats, select, seed, warn, label)


def _fit_table(
    schema: Schema,
    stats: Statistics,
    select: FeatureSelection | None,
    seed: int,
    warn: Callable[[str], None],
    label: dict[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    usable = [column for column in schema.columns if _usable(column, stats, warn)]
    scores = _scores(usable, schema, stats, select, seed)
    kept = _best(usable, scores, select)
    if not kept:
        raise DataError("preprocess.columns: at least one column must become a feature, got none; set the kind of one.")
    columns = [_fit_column(column, schema, stats) for column in usable if column.name in kept]
    ids = [column for column in columns if _is_id(column)]
    features = [
        _feature(column["name"], column["kind"], _depth(column) if _is_id(column) else 1, scores.get(column["name"]))
        | {"rule": column.get("rule"), "missing": missing(column["name"], schema, stats)}
        for column in [*(column for column in columns if not _is_id(column)), *ids]
    ]
    dropped = [column for column in schema.columns if column.name not in kept]
    features += [
        _feature(column.name, column.kind, 0, scores.get(column.name))
        | {"kept": False, "rule": column.rule, "missing": missing(column.name, schema, stats)}
        for column in dropped
    ]
    facts = {
        "schema": 1,
        "kind": "table",
        "label": label,
        "missing": list(schema.missing),
        "columns": columns,
        "inputs": {"kind": "features", "depths": [_depth(column) for column in ids]},
    }
    return facts, features


def _label(schema: Schema, stats: Statistics) -> dict[str, Any]:
    if schema.task == "regression":
        return {"kind": "number"}
    return {"kind": "classes", "names": list(class_names(list(stats.labels))), "strip": schema.label_strip}


def _feature(name: str, kind: str, width: int, score: float | None = None) -> dict[str, Any]:
    return {"name": name, "kind": kind, "kept": True, "score": score, "width": width}


def missing(name: str, schema: Schema, stats: Statistics) -> int:
    """Missing cells of a column of a table, training rows only."""
    counts = stats.categories.get(name)
    if counts is not None:
        return sum(counts[text] for text in schema.missing)
    return 0 if name in stats.categories else int(stats.moments(name).missing[0])


def _usable(column: Column, stats: Statistics, warn: Callable[[str], None]) -> bool:
    if column.kind != "category" or stats.categories[column.name] is not None:
        return True
    warn(
        f"preprocess.columns.{column.name}: a category may have at most a million different cells, this one has more"
        " and was left out; set its kind to number or ignore."
    )
    return False


def _fit_column(column: Column, schema: Schema, stats: Statistics) -> dict[str, Any]:
    if column.kind == "category":
        counts = stats.categories[column.name]
        assert counts is not None, "an unusable column was left out before"
        return {
            "name": column.name,
            "kind": "category",
            "vocabulary": vocabulary(counts, column.vocabulary, schema.missing),
        }
    facts: dict[str, Any] = {"name": column.name, "kind": "number", "rule": column.rule}
    if column.rule == "bucketise":
        return facts | {"boundaries": stats.quantiles(column.name, column.buckets)}
    found = stats.moments(column.name)
    facts["mean"] = float(found.mean[0])
    return facts | {"std": float(found.std[0])} if column.rule == "standardise" else facts


def _is_id(column: dict[str, Any]) -> bool:
    return column["kind"] == "category" or column["rule"] == "bucketise"


def _depth(column: dict[str, Any]) -> int:
    """One-hot width: missing, unknown and the vocabulary; or missing and the buckets."""
    if column["kind"] == "category":
        return RESERVED_IDS + len(column["vocabulary"])
    return 2 + len(column["boundaries"])


# --- selection ---------------------------------------------------------------------------------------------------


def _best(columns: list[Column], scores: dict[str, float], select: FeatureSelection | None) -> set[str]:
    names = [column.name for column in columns]
    if select is None:
        return set(names)
    return set(sorted(names, key=lambda name: (-scores[name], name))[: select.keep])


def _scores(
    columns: list[Column], schema: Schema, stats: Statistics, select: FeatureSelection | None, seed: int
) -> dict[str, float]:
    if select is None or not columns:
        return {}
    if select.method == "variance":
        return {column.name: _variance(column, stats) for column in columns}
    assert stats.sample is not None, "mutual information draws a sample"
    return _mutual_information(columns, schema, stats.sample, seed)


def _variance(column: Column, stats: Statistics) -> float:
    """Variance of the column scaled to [0, 1] by its range; for categories the chance that two rows differ (Gini).

    Raw variances of columns in different units cannot be compared.
    """
    if column.kind == "category":
        counts = np.array(list((stats.categories[column.name] or {}).values()), np.float64)
        return float(1 - ((counts / counts.sum()) ** 2).sum()) if counts.sum() else 0.0
    found = stats.moments(column.name)
    span = float(found.high[0] - found.low[0])
    return float(found.m2[0] / found.count[0]) / span**2 if found.count[0] and span else 0.0


def _mutual_information(columns: list[Column], schema: Schema, sample: Sample, seed: int) -> dict[str, float]:
    """Nats shared with the label, estimated on the sample (Kraskov et al. 2004; Ross 2014), as scikit-learn does."""
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression  # slow to import, rarely needed

    table = np.stack([_as_number(sample.columns[column.name]) for column in columns], axis=1)
    discrete = np.array([column.kind == "category" for column in columns])
    classification = schema.task == "classification"
    score = mutual_info_classif if classification else mutual_info_regression
    label = _as_number(sample.label) if classification else sample.label
    found = score(table, label, discrete_features=discrete, random_state=seed)
    return {column.name: float(value) for column, value in zip(columns, found, strict=True)}


def _as_number(cells: np.ndarray) -> np.ndarray:
    """Texts to codes; numbers with the mean where they are missing."""
    if cells.dtype == object:
        return np.unique(cells.astype(str), return_inverse=True)[1].astype(np.float64)
    known = cells[~np.isnan(cells)]
    return np.where(np.isnan(cells), known.mean() if len(known) else 0.0, cells)
