"""Report: a run as one page that a colleague can be sent, and as one picture.

    results.json, predictions, training history --report()--> report.html

The page is one file without scripts or links to elsewhere: charts are inline SVG, colours follow the reader's light or
dark setting, and everything that came from the user's data is escaped. No TensorFlow.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from components.artifacts import SPLITS
from components.delivery import charts
from components.delivery.charts import Palette, working
from components.delivery.measure import confusion
from components.delivery.rescue import in_words as rescue_in_words
from components.delivery.select import REFERENCE, deciding_drop

# A matrix of more classes is no longer read; the most frequent mistakes are.
CONFUSION_CLASSES = 20
MISTAKES = 12


def report(
    results: Mapping[str, Any],
    folder: pathlib.Path,
    *,
    labels: Sequence[str] = (),
    predictions: pathlib.Path | None = None,
    history: Mapping[str, Sequence[float]] | None = None,
) -> pathlib.Path:
    """Writes `report.html` into `folder`.

    Args:
      results: Content of `results.json`.
      folder: Exists; an earlier page is overwritten.
      labels: Class names in the order of the outputs; empty leaves the confusion matrix out.
      predictions: The chosen variant's `predictions.npz` as `measure` wrote it: `outputs` (n, classes), `labels` (n,).
      history: Of the base training: {"loss", "val_loss", "accuracy" or "rmse", ...: one value an epoch}.

    Returns:
      The page. Equal arguments give equal bytes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"seconds": in_time, "number": _number, "signed": _signed}
    environment.filters |= filters
    page = environment.get_template("report.html").render(
        results=results,
        chosen=_chosen(results),
        rows=table(results),
        charts=_charts(results, history or {}),
        matrix=_matrix(labels, predictions) if labels and predictions else None,
        stages=stages(results["seconds"]),
        untreated=untreated(results),
        tried=[each for each in results["variants"] if each.get("tried_because")],
        rescues=[(each["recipe"], rescue_in_words(each["rescue"]), each["rescue"]) for each in _rescued(results)],
        splits=[(split, results["examples"][split]) for split in SPLITS if split in results["examples"]],
        lost=[each for each in results["variants"] if each["status"] != "ok"],
    )
    path = folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def picture(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the run as one PNG: metric over compressed size, beside the sizes.

    Args:
      results: Content of `results.json` with at least one measured variant.
      path: Target, '.png'.
    """

    def draw(figure: Figure, palette: Palette) -> None:
        left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
        charts.bars(right, results, palette)
        charts.scatter(left, results, palette)

    charts.png(draw, (12.5, max(3.6, 0.34 * len(working(results)) + 1)), path)


def _chosen(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The variant that ships with its share of float32's bytes, None where none does."""
    found = next((each for each in results["variants"] if each["recipe"] == results["selected"]), None)
    if found is None:
        return None
    whole = _reference(results)
    share = None if whole is None else found["gzip_bytes"] / whole["gzip_bytes"]
    speed = None if whole is None else found["latency_ms"]["p50"] / whole["latency_ms"]["p50"]
    return {**found, "share": share, "time_share": speed, "deciding_drop": deciding_drop(found)}


def _reference(results: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((each for each in working(results) if each["recipe"] == REFERENCE), None)


def table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every variant as the page's table shows it; figures that were not measured are None."""
    whole = _reference(results)
    front = {each["recipe"] for each in charts.pareto(working(results), results["metric"])}
    rows = []
    for variant in results["variants"]:
        timing, proof = variant["latency_ms"] or {}, variant["proof"] or {}
        size = variant["gzip_bytes"]
        rows.append(
            {
                **{key: variant[key] for key in ("recipe", "status", "metric", "metric_drop", "bytes", "gzip_bytes")},
                **{key: variant.get(key) for key in ("validation_metric", "validation_drop")},
                "share": size / whole["gzip_bytes"] if whole and size else None,
                "p50": timing.get("p50"),
                "p90": timing.get("p90"),
                "sparsity": proof.get("sparsity"),
                "distinct": proof.get("distinct_per_channel_max", proof.get("distinct_weights_max")),
                "chosen": variant["recipe"] == results["selected"],
                "front": variant["recipe"] in front,
            }
        )
    return rows


def _charts(results: Mapping[str, Any], history: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    made: dict[str, Any] = {"scatter": None, "sizes": None, "training": []}
    variants = working(results)
    if variants:
        made["scatter"] = charts.svg(
            lambda figure, palette: charts.scatter(figure.subplots(), results, palette),
            (5.8, 4.1),
            f"Test {results['metric']} over gzip bytes of {len(variants)} variants; the table holds the same figures.",
        )
        made["sizes"] = charts.svg(
            lambda figure, palette: charts.bars(figure.subplots(), results, palette),
            (5.8, max(2.0, 0.33 * len(variants) + 0.4)),
            "Bytes of each variant, raw and after gzip; the table holds the same figures.",
        )
    for name in ("loss", results["metric"]):
        if values := history.get(name):
            made["training"].append(_curve(history, name, len(values)))
    return made


def _curve(history: Mapping[str, Sequence[float]], name: str, epochs: int) -> str:
    last = [
        f"{said} {history[key][-1]:.4g}"
        for key, said in ((name, "training"), (f"val_{name}", "validation"))
        if history.get(key)
    ]
    return charts.svg(
        lambda figure, palette: charts.curve(figure.subplots(), history, name, palette),
        (5.8, 2.9),
        f"{name} of the base model over {epochs} epochs; at the end: {', '.join(last)}.",
    )


def _matrix(labels: Sequence[str], predictions: pathlib.Path) -> dict[str, Any]:
    """The confusion matrix of the chosen file, or its most frequent mistakes where the classes are many."""
    with np.load(predictions) as arrays:
        counts = confusion(arrays["outputs"], arrays["labels"], len(labels))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    wrong = counts - np.diag(np.diag(counts))
    worst = np.argsort(-wrong, axis=None, kind="stable")[:MISTAKES]
    pairs = [tuple(map(int, np.unravel_index(place, wrong.shape))) for place in worst if wrong.flat[place]]
    mistakes = [
        {"true": labels[i], "answered": labels[j], "count": int(wrong[i, j]), "share": float(shares[i, j])}
        for i, j in pairs
    ]
    rows = [
        {"label": label, "cells": list(zip(counts[place].tolist(), shares[place].tolist(), strict=True))}
        for place, label in enumerate(labels)
    ]
    return {"labels": list(labels), "rows": rows if len(labels) <= CONFUSION_CLASSES else None, "mistakes": mistakes}


def stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Time by step in the order of the run, with its share of the longest."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return [{"step": step, "seconds": value, "share": value / longest} for step, value in seconds.items()]


def untreated(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers that compression left alone: each once, with the recipes that it concerns."""
    found: dict[tuple[str, str, str], list[str]] = collections.defaultdict(list)
    for variant in results["variants"]:
        for layer in variant.get("untreated") or ():
            found[layer["layer"], layer["class"], layer["reason"]].append(variant["recipe"])
    return [
        {"layer": layer, "class": kind, "reason": reason, "recipes": recipes}
        for (layer, kind, reason), recipes in found.items()
    ]


def _rescued(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [each for each in results["variants"] if each.get("rescue")]


def in_time(seconds: float) -> str:
    """Seconds as people say them.

    >>> [in_time(each) for each in (0.04, 7.25, 75, 5400)]
    ['0.04 s', '7.2 s', '1 min 15 s', '1 h 30 min']
    """
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def _number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _signed(value: float | None) -> str:
    """A drop: its sign is its meaning, and zero has none."""
    return "–" if value is None else "0.0000" if round(value, 4) == 0 else f"{value:+.4f}".replace("-", "−")
