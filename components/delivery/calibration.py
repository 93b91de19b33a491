"""Calibration: which rows fix the ranges of an integer file, and how well these ranges hold.

    labels --order()--> rows in an order whose every beginning is stratified
    float file + rows --settle()--> as many of them as the ranges need
    integer file + held-out rows --coverage()--> by tensor: what its range covers, and what it clips

A range that saw too little clips what it did not see, silently; so the range of every tensor is watched while rows are
added, and rows that took no part say afterwards what is clipped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from components.artifacts import DataSpec
from components.delivery.activations import Activations
from components.errors import ConfigError, ContractError
from components.options import ExportOptions

CALIBRATION_LIMIT = 512  # ranges of the models in docs/results.md no longer move beyond some 200 examples
FIRST = 64
SETTLED = 0.05
"""Ranges have settled when, as rows doubled, none grew by more than this share of its width."""
CLIPPED = 0.01
"""More than this share of held-out values outside a tensor's range is worth a warning."""
STRATA = 10  # of a regression's labels
Ranges = dict[str, tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Rows:
    """What ranges are found and judged with.

    Attributes:
      inputs: The calibration split, float32 (n, *shape).
      order: Positions in it, see `order`.
      held_out: float32 (m, *shape) that take no part; None where there are none.
    """

    inputs: np.ndarray
    order: np.ndarray
    held_out: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The rows that were taken.

    Attributes:
      rows: Their positions in the split, ascending.
      ranges: Smallest and largest value of each tensor over them, by its name in the float file.
      steps: {"rows": how many were seen, "growth": largest growth of a range since the step before, None at first}.
      settled: Whether the rows doubled at last and the growth was within `SETTLED`.
    """

    rows: np.ndarray
    ranges: Ranges
    steps: tuple[dict[str, Any], ...]
    settled: bool


def check_rows(inputs: np.ndarray | None, spec: DataSpec, options: ExportOptions, format: str) -> np.ndarray:
    """The calibration split as it is, if ranges can be had from it.

    Raises:
      ConfigError: `options.calibration_examples` is above what it holds.
      ContractError: It is absent or empty, of another shape or dtype, or holds NaN or infinity.
    """
    held = 0 if inputs is None else len(inputs)
    if inputs is None or held == 0:
        raise ContractError(
            f"export: {format} needs examples that fix its ranges, got 0; raise preprocess.splits.calibration above 0 or leave {format} out of compress.recipes."
        )
    if inputs.shape[1:] != spec.input_shape or inputs.dtype != np.float32:
        raise ContractError(
            f"export: calibration examples are float32 of shape {spec.input_shape}, got {inputs.dtype} {inputs.shape[1:]}; pass them as the model is fed."
        )
    if not np.isfinite(inputs).all():
        row = int(np.argmin(np.isfinite(inputs.reshape(held, -1)).all(axis=1)))
        raise ContractError(f"export: calibration example {row} holds NaN or infinity; repair the calibration split.")
    if (options.calibration_examples or 0) > held:
        raise ConfigError(
            f"export.calibration_examples={options.calibration_examples}: the calibration split holds {held}; lower it or raise preprocess.splits.calibration."
        )
    return inputs


def order(rows: int, labels: np.ndarray | None, spec: DataSpec, seed: int) -> np.ndarray:
    """Positions of all rows, shuffled, so that each beginning holds every stratum in its share.

    Args:
      rows: How many there are.
      labels: int32 (rows,) classes, each a stratum; or float32 (rows,) or (rows, 1) values, by tenths of their quantiles.
        None: one stratum.
      spec: Says which of the two.
      seed: Shuffles within each stratum.

    Returns:
      int64 (rows,). The first of each stratum come before all others, so the first `n` rows hold `n` strata.

    >>> spec = DataSpec(task="classification", input_name="x", input_shape=(1,), labels=("a", "b"))
    >>> labels = np.array([0, 0, 0, 0, 1, 1])
    >>> labels[order(6, labels, spec, seed=0)]
    array([0, 1, 0, 0, 1, 0])
    """
    strata = np.zeros(rows, np.int64) if labels is None else _strata(labels.reshape(-1), spec)
    place = np.empty(rows)
    random = np.random.default_rng(seed)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        place[random.permutation(members)] = np.arange(len(members)) / len(members)
    return np.lexsort((strata, place))


def _strata(labels: np.ndarray, spec: DataSpec) -> np.ndarray:
    if spec.task == "classification":
        return labels.astype(np.int64)
    inner = np.quantile(labels, np.arange(1, STRATA) / STRATA)
    return np.searchsorted(inner, labels, side="right")


def settle(float_file: Activations, rows: Rows, examples: int | None) -> Calibration:
    """Takes rows in the given order, twice as many each time, until no range grows any more.

    Args:
      float_file: The model in float32.
      rows: To take from.
      examples: Takes just so many; None lets the ranges decide, up to `CALIBRATION_LIMIT`.
    """
    ranges: Ranges = {}
    steps: list[dict[str, Any]] = []
    seen = 0
    for wanted in [examples] if examples else _sizes(min(len(rows.order), CALIBRATION_LIMIT)):
        before, ranges = ranges, observe(float_file, rows.inputs[rows.order[seen:wanted]], ranges)
        seen = wanted
        steps.append({"rows": seen, "growth": _growth(before, ranges) if before else None})
        if before and steps[-1]["growth"] <= SETTLED:
            break
    doubled = len(steps) > 1 and steps[-1]["rows"] >= 2 * steps[-2]["rows"]  # the last few rows of a split prove little
    settled = doubled and steps[-1]["growth"] <= SETTLED
    return Calibration(rows=np.sort(rows.order[:seen]), ranges=ranges, steps=tuple(steps), settled=settled)


def _sizes(limit: int) -> list[int]:
    """64, 128, 256, ... and the limit last."""
    sizes = []
    size = FIRST
    while size < limit:
        sizes.append(size)
        size *= 2
    return [*sizes, limit]


def observe(file: Activations, inputs: Iterable[np.ndarray], ranges: Ranges) -> Ranges:
    """`ranges`, widened to what the file's tensors hold for `inputs`; zero lies in each, since integers must hold it."""
    found = dict(ranges)
    for example in inputs:
        for tensor, values in zip(file.tensors, file.run(example), strict=True):
            low, high = found.get(tensor.name, (0.0, 0.0))
            found[tensor.name] = (min(low, float(values.min())), max(high, float(values.max())))
    return found


def _growth(before: Ranges, after: Ranges) -> float:
    """Largest growth of one end of a range, as a share of its width."""
    grown = [
        max(before[name][0] - low, high - before[name][1]) / (high - low)
        for name, (low, high) in after.items()
        if high > low
    ]
    return max(grown, default=0.0)


def coverage(file: Activations, float_file: Activations, calibration: Calibration, rows: Rows) -> list[dict[str, Any]]:
    """How the ranges of an integer file hold, tensor by tensor.

    Args:
      file: The finished file.
      float_file: The same model in float32.
      calibration: What its ranges come from.
      rows: Those that `calibration` took are counted as 'calibration', up to `CALIBRATION_LIMIT` of those held out as
        'validation'.

    Returns:
      In the order of the operators: {"tensor", "layer", "low", "high": the range that the file can hold, "covered": width of
      what calibration saw as a share of the width of the range, "clipped": {split: share of the float values that lie more
      than half a code outside the range}}.
    """
    places = {each.name: place for place, each in enumerate(float_file.tensors)}
    found = {name: each for name, each in file.by_name(places).items() if each.range is not None}
    ranges = {name: each.range for name, each in found.items() if each.range is not None}
    splits = {"calibration": rows.inputs[calibration.rows]}
    if rows.held_out is not None and len(rows.held_out):
        splits["validation"] = rows.held_out[:CALIBRATION_LIMIT]
    clipped = {
        split: _clipped(
            float_file, examples, {places[name]: _widened(ranges[name], found[name].scale) for name in found}
        )
        for split, examples in splits.items()
    }
    report = []
    for name in sorted(found, key=places.__getitem__):
        (low, high), seen = ranges[name], calibration.ranges[name]
        report.append(
            {
                "tensor": name,
                "layer": float_file.tensors[places[name]].layer,
                "low": low,
                "high": high,
                "covered": (min(seen[1], high) - max(seen[0], low)) / (high - low),
                "clipped": {split: shares[places[name]] for split, shares in clipped.items()},
            }
        )
    return report


def _widened(limits: tuple[float, float], scale: float) -> tuple[float, float]:
    """Values up to half a code outside still round to the last code without an error of their own."""
    return limits[0] - scale / 2, limits[1] + scale / 2


def _clipped(file: Activations, rows: np.ndarray, limits: dict[int, tuple[float, float]]) -> dict[int, float]:
    """By place in `file.tensors`: share of values outside the limits."""
    outside = dict.fromkeys(limits, 0)
    total = dict.fromkeys(limits, 0)
    for example in rows:
        values = file.run(example)
        for place, (low, high) in limits.items():
            outside[place] += int(np.count_nonzero((values[place] < low) | (values[place] > high)))
            total[place] += values[place].size
    return {place: outside[place] / total[place] if total[place] else 0.0 for place in limits}


def worst_clipped(report: Sequence[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """The tensor that clips the largest share of `split`, where that is above `CLIPPED`."""
    worst = max(report, key=lambda each: each["clipped"].get(split, 0.0), default=None)
    return worst if worst is not None and worst["clipped"].get(split, 0.0) > CLIPPED else None


def calibration_table(found: dict[str, Any]) -> str:
    """`calibration.json` of a calibrated file, as Markdown."""
    splits = list(found["tensors"][0]["clipped"])
    header = ["layer", "low", "high", "covered", *(f"clipped, {split}" for split in splits)]
    lines = [header, ["---"] * len(header)]
    for each in found["tensors"]:
        numbers = [each["low"], each["high"], each["covered"], *each["clipped"].values()]
        lines.append([each["layer"], *(f"{number:.4g}" for number in numbers)])
    settled = "the ranges had settled" if found["settled"] else "the ranges had not settled"
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{found['rows']} rows; {settled}.\n\n{table}"
