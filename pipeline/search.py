"""Search: which recipe `recipes: auto` tries next, from what was measured on validation rows so far.

    trials so far --propose()--> recipes worth trying, the best bet first

A recipe is a point on a grid: one axis a training step, its strengths in order, and how it is written at the end. The
search starts with the formats that train nothing. Then it moves from the best point, one axis at a time: to a strength in
the middle first, further where that meets the constraints, and by halves back where it does not. A point that is at least
as strong on every axis as one that lost too much is never tried. Of all moves, the one that promises most per second
goes first; steps that are trained already cost nothing, so recipes with a common beginning follow each other.

Pure: no clock, no files, no models. The same trials give the same proposals.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from components.delivery.select import constrained
from components.options import SelectOptions
from components.recipe import RESCUE

AXES: dict[str, tuple[float, ...]] = {
    "channels": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    "lowrank": (0.98, 0.95, 0.9, 0.85, 0.8),
    "prune": (0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95),
    "cluster": (64, 32, 16, 12, 8, 6, 4),
}
"""By training step its strengths, the mildest first, in the order of a recipe. Position 0 of a point means: without it."""
FIRST = {"channels": 3, "lowrank": 3, "prune": 4, "cluster": 3}
"""The position that is tried first: what most networks of docs/results.md bear."""
SHRINKS = {"gzip": tuple(AXES), "raw": ("channels", "lowrank"), "latency": ("channels", "lowrank"), "metric": ()}
"""By goal the axes that serve it. Zeros and shared values count only where the file is compressed."""
OPENERS = ("int8", "dynamic", "float16")
ENDS = ("int8", "qat")
"""How a file of integers comes about, the cheaper first; the second only where the first lost too much."""
_QAT = ENDS[1]
_WORTH_OF_QAT = 0.1
_WEIGHT_BITS = 6.6  # entropy of an int8 kernel after training, bits a weight (docs/results.md: gzip over parameters)


@dataclasses.dataclass(frozen=True)
class Point:
    """A recipe on the grid: a position for each of AXES, and one of ENDS."""

    positions: tuple[int, ...] = (0,) * len(AXES)
    end: str = ENDS[0]

    @property
    def recipe(self) -> str:
        """As `parse_recipe` reads it.

        >>> Point((0, 0, 6, 3), "qat").recipe
        'prune@0.8+cluster@16+qat'
        """
        steps = [
            f"{axis}@{strengths[position - 1]:g}"
            for (axis, strengths), position in zip(AXES.items(), self.positions, strict=True)
            if position
        ]
        return "+".join([*steps, self.end])

    def at(self, axis: str, position: int) -> Point:
        """The same with another position on one axis."""
        place = list(AXES).index(axis)
        return dataclasses.replace(self, positions=(*self.positions[:place], position, *self.positions[place + 1 :]))

    def holds(self, other: Point) -> bool:
        """Whether this is at least as strong on every axis as `other`, and not written in a better way."""
        stronger = all(mine >= its for mine, its in zip(self.positions, other.positions, strict=True))
        return stronger and ENDS.index(self.end) <= ENDS.index(other.end)

    @property
    def share(self) -> float:
        """Guess of the compressed size as a share of plain int8's; only its order matters."""
        channels, lowrank, prune, cluster = (
            strengths[position - 1] if position else None
            for strengths, position in zip(AXES.values(), self.positions, strict=True)
        )
        zeros = prune or 0.0
        bits = min(_WEIGHT_BITS, math.log2(cluster)) if cluster else _WEIGHT_BITS
        entropy = 0.0 if not zeros else -(zeros * math.log2(zeros) + (1 - zeros) * math.log2(1 - zeros))
        weight = min(_WEIGHT_BITS, entropy + (1 - zeros) * bits) / _WEIGHT_BITS
        return weight * (1 - 0.8 * (channels or 0.0)) * (lowrank or 1.0)


@dataclasses.dataclass(frozen=True)
class Trial:
    """What came of a recipe.

    Attributes:
      recipe: As it was proposed.
      excess: By how much it misses the constraints, 0 where it meets them all; None where it gave no file.
      lossy: Whether it loses more of the metric than is allowed, or gave no file: what is stronger will not do better.
      goal: What is to be small: bytes, milliseconds, or the metric turned that way; None where it gave no file.
      skipped: The time was up before it was measured.
    """

    recipe: str
    excess: float | None
    lossy: bool
    goal: float | None
    skipped: bool = False


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A recipe, and why it is tried, in words."""

    recipe: str
    why: str


def trial_of(variant: Mapping[str, Any], options: SelectOptions, *, skipped: bool = False) -> Trial:
    """Reads a variant of the results: validation figures, bytes, latency; never the test split's."""
    if variant["status"] != "ok":
        return Trial(variant["recipe"], None, not skipped, None, skipped)
    found = constrained(variant, options)
    over = {
        name: max(0.0, (math.inf if value is None else value) - limit) / (limit or 1.0)
        for name, (value, limit) in found.items()
    }
    value = variant["validation_metric"]
    goals = {
        "size": variant["gzip_bytes" if options.size == "gzip" else "bytes"],
        "latency": variant["latency_ms"]["p50"],
        "metric": value if variant["metric_name"] == "rmse" else -value,
    }
    return Trial(
        variant["recipe"], sum(over.values()), over.get("max_metric_drop", 0.0) > 0, float(goals[options.objective])
    )


def steps_of(options: SelectOptions) -> list[str]:
    """Every training step that a search with this goal may propose; the mildest of each kind first."""
    return [f"{axis}@{strength:g}" for axis in SHRINKS[_goal(options)] for strength in AXES[axis]] + [_QAT]


def _goal(options: SelectOptions) -> str:
    return options.size if options.objective == "size" else options.objective


def propose(
    trials: Sequence[Trial],
    options: SelectOptions,
    seconds: Callable[[str], float],
    impossible: Collection[str] = (),
) -> list[Proposal]:
    """What to try next, the best bet first; empty where nothing is left that could be better.

    Args:
      trials: Of this search, in order.
      options: Objective and constraints.
      seconds: What a recipe is expected to take, steps of earlier trials left out.
      impossible: Those of `steps_of` that the model does not allow.
    """
    tried = {trial.recipe for trial in trials}
    openers = [Proposal(name, "it takes no training") for name in OPENERS if name not in tried]
    if openers:
        return openers
    return [
        each
        for each in [*_remedies(trials, options), *_moves(trials, options, seconds, impossible)]
        if each.recipe not in tried
    ]


def _remedies(trials: Sequence[Trial], options: SelectOptions) -> Iterator[Proposal]:
    """Where int8 alone loses too much: its layers one by one before anything that is trained."""
    plain = next((trial for trial in trials if trial.recipe == ENDS[0]), None)
    if plain is not None and plain.lossy and plain.excess is not None and options.max_metric_drop is not None:
        yield Proposal(RESCUE, "int8 loses too much, and perhaps few of its layers are to blame")


def _moves(
    trials: Sequence[Trial], options: SelectOptions, seconds: Callable[[str], float], impossible: Collection[str]
) -> list[Proposal]:
    """Points next to those that held, and those that qat may repair, by what they promise per second."""
    on_grid = {point.recipe: point for point in _points(trials)}
    made = [each for each in trials if each.recipe in on_grid and each.excess is not None]
    if not made:
        return []
    lost = [on_grid[trial.recipe] for trial in trials if trial.lossy and trial.recipe in on_grid]
    lost += [_point(f"{step}+{_QAT}") for step in impossible if step != _QAT]
    best = min(made, key=lambda each: (each.excess, each.goal, each.recipe))
    scored: dict[str, tuple[float, Proposal]] = {}
    for trial in made:
        start = on_grid[trial.recipe]
        held = trial is best or not trial.excess
        for point, why in [*_repairs(trial, start), *(_further(start, lost, options) if held else ())]:
            worth = _gain(trial, start, point, best, options) / max(seconds(point.recipe), 1.0)
            known = point.recipe in on_grid or any(point.holds(each) for each in lost) or point.end in impossible
            if worth > 0 and not known and (point.recipe not in scored or scored[point.recipe][0] < worth):
                scored[point.recipe] = (worth, Proposal(point.recipe, why))
    return [each for _, each in sorted(scored.values(), key=lambda pair: (-pair[0], pair[1].recipe))]


def _gain(trial: Trial, start: Point, point: Point, best: Trial, options: SelectOptions) -> float:
    """How much better than the best a point may be, as the logarithm of a ratio; qat counts for a little by itself."""
    other = _WORTH_OF_QAT if point.end != start.end else 0.0
    if options.objective == "metric":
        return other
    assert trial.goal is not None, "only trials with a file are moved from"
    assert best.goal is not None, "only a trial with a file is the best"
    if best.excess:  # nothing meets the constraints yet: any way out is one
        return other + math.log(start.share / point.share)
    return other + math.log(best.goal * start.share / (trial.goal * point.share))


def _points(trials: Sequence[Trial]) -> Iterator[Point]:
    """The trials that lie on the grid."""
    for trial in trials:
        if trial.recipe.split("+")[-1] in ENDS:
            yield _point(trial.recipe)


def _point(recipe: str) -> Point:
    *steps, end = recipe.split("+")
    named = dict(step.split("@") for step in steps)
    positions = [strengths.index(float(named[axis])) + 1 if axis in named else 0 for axis, strengths in AXES.items()]
    return Point(tuple(positions), end)


def _repairs(trial: Trial, point: Point) -> Iterator[tuple[Point, str]]:
    """The same after qat, where int8 loses too much."""
    if point.end == ENDS[0] and trial.lossy:
        yield dataclasses.replace(point, end=_QAT), f"{trial.recipe} loses too much, qat may give it back"


def _further(start: Point, lost: Sequence[Point], options: SelectOptions) -> Iterator[tuple[Point, str]]:
    """One axis further from a point that held, and where that is known to lose too much, half way there."""
    goal = _goal(options)
    for axis in SHRINKS[goal]:
        now, top = start.positions[list(AXES).index(axis)], len(AXES[axis])
        ahead = {each: start.at(axis, each) for each in range(now + 1, top + 1)}
        limit = next((each for each, point in ahead.items() if any(point.holds(other) for other in lost)), None)
        if limit is not None:
            position, why = (now + limit) // 2, f"between {start.recipe}, which held, and what did not"
        else:
            position = FIRST[axis] if now == 0 else min(now + 2, top)
            why = f"{start.recipe} held, so " + ("stronger" if now else f"{axis} too")
        if position in ahead:
            yield ahead[position], why
    if goal == "metric":
        yield dataclasses.replace(start, end=_QAT), f"qat may add to {start.recipe}"
