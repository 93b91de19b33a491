"""Select: which measured variant ships, and why.

    variants --drops()--> variants with drops --select()--> Selection

A variant is one entry of `results.json` (docs/results-format.md). Each is measured on its own and cached on its own;
what relates it to float32 is computed here, from numbers alone: no TensorFlow.

Choosing on the test split would make its figure a promise that the next data breaks. So the drop that decides is the
one on the validation split, wherever it was measured; the test split is only reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from components.errors import ConstraintError
from components.options import SelectOptions

REFERENCE = "float32"
LOWER_IS_BETTER = ("rmse",)
# Below this ratio two latencies are told apart by noise only (facts of the machine: 3 % between repeats).
SLOWER = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection:
    """What was picked.

    Attributes:
      recipe: Of the variant that ships.
      because: The reason in words, with numbers.
      ranking: Recipes that meet every constraint, best first.
      misses: {recipe: why not} for every other variant.
    """

    recipe: str
    because: str
    ranking: tuple[str, ...]
    misses: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {**dataclasses.asdict(self), "ranking": list(self.ranking)}


def failed(recipe: str, reason: str, status: str = "failed") -> dict[str, Any]:
    """The entry of a variant that could not be made or measured; `status` is 'failed' or 'skipped'."""
    empty = dict.fromkeys(
        ("file", "sha256", "metric", "metric_drop", "validation_metric", "validation_drop", "bytes", "gzip_bytes")
    )
    return {
        "recipe": recipe,
        "status": status,
        "reason": reason,
        **empty,
        "parameters": None,
        "latency_ms": None,
        "proof": None,
    }


def drops(variants: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fills `metric_drop` (test) and `validation_drop` of every variant from the float32 one.

    Positive is worse, whichever way the metric points. None where the variant or float32 has no such figure.

    >>> a, b = drops([{"recipe": "float32", "metric_name": "accuracy", "metric": 0.9, "validation_metric": None},
    ...               {"recipe": "int8", "metric_name": "accuracy", "metric": 0.875, "validation_metric": 0.9}])
    >>> b["metric_drop"], b["validation_drop"]
    (0.025, None)
    """
    reference = next((variant for variant in variants if variant["recipe"] == REFERENCE), None)
    return [
        {
            **variant,
            "metric_drop": _drop(reference, variant, "metric"),
            "validation_drop": _drop(reference, variant, "validation_metric"),
        }
        for variant in variants
    ]


def _drop(reference: Mapping[str, Any] | None, variant: Mapping[str, Any], key: str) -> float | None:
    if reference is None or reference.get(key) is None or variant.get(key) is None:
        return None
    return drop(reference[key], variant[key], variant.get("metric_name", ""))


def drop(reference: float, value: float, metric_name: str) -> float:
    """What is lost from `reference` to `value`; positive is worse, whichever way the metric points."""
    lost = reference - value
    # Rounded: 0.9 - 0.875 is no tidier in binary, and a limit of 0.025 must hold for it.
    return round(-lost if metric_name in LOWER_IS_BETTER else lost, 9) + 0.0


def remarks(variants: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the user should know before trusting a figure.

    Integer files that are slower than float32 here, and sparse storage that does not pay.
    """
    working = {variant["recipe"]: variant for variant in variants if variant["status"] == "ok"}
    return [*_slower_integers(working), *_useless_storage(working)]


def _slower_integers(working: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if REFERENCE not in working:
        return []
    base = working[REFERENCE]["latency_ms"]
    slower = {
        recipe: variant["latency_ms"]["p50"]
        for recipe, variant in working.items()
        if "int8" in variant["proof"]["weight_dtypes"] and variant["latency_ms"]["p50"] > SLOWER * base["p50"]
    }
    if not slower:
        return []
    told = ", ".join(f"{recipe} {milliseconds:.3g} ms" for recipe, milliseconds in slower.items())
    return [
        f"slower than float32 ({base['p50']:.3g} ms) on {base['cpu']}: {told}; integer kernels are not faster on every CPU, "
        "so measure on the target before choosing one for speed."
    ]


def _useless_storage(working: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Files that leave zeros out and are neither smaller in flash nor faster than the same file with them."""
    told = []
    for recipe, sparse in working.items():
        # Alone, 'float32' is not written behind training steps: see `Recipe`.
        dense = working.get(recipe.removesuffix("+sparse").removesuffix("+float32"))
        if not recipe.endswith("+sparse") or dense is None:
            continue
        smaller = sparse["bytes"] < dense["bytes"]
        took, takes = (variant["latency_ms"]["p50"] for variant in (dense, sparse))
        if not smaller and takes * SLOWER > took:
            told.append(
                f"{recipe} has {sparse['bytes']:,} raw bytes and takes {takes:.3g} ms, with zeros stored {dense['bytes']:,} bytes and {took:.3g} ms "
                f"on {sparse['latency_ms']['cpu']}: sparse storage is neither smaller nor faster here, so drop '+sparse'."
            )
    return told


def select(variants: Sequence[Mapping[str, Any]], options: SelectOptions) -> Selection:
    """Picks the best variant among those that meet every constraint.

    Args:
      variants: Entries of `results.json`, after `drops`.
      options: Objective and constraints.

    Returns:
      The choice. Ties fall to the better metric, then to fewer bytes, then to the recipe's name.

    Raises:
      ConstraintError: No variant meets every constraint; the message says for each constraint who comes nearest.
    """
    misses = {variant["recipe"]: _miss(variant, options) for variant in variants}
    eligible = sorted((v for v in variants if not misses[v["recipe"]]), key=lambda variant: _order(variant, options))
    if not eligible:
        raise ConstraintError(_nearest(variants, options))
    return Selection(
        recipe=eligible[0]["recipe"],
        because=_because(eligible, variants, options),
        ranking=tuple(variant["recipe"] for variant in eligible),
        misses={recipe: miss for recipe, miss in misses.items() if miss},
    )


def deciding_drop(variant: Mapping[str, Any]) -> float | None:
    """The drop that constraints are checked on: validation where it was measured, else test."""
    on_validation = variant.get("validation_drop")
    return variant.get("metric_drop") if on_validation is None else on_validation


def _size(variant: Mapping[str, Any], options: SelectOptions) -> int:
    return variant["gzip_bytes" if options.size == "gzip" else "bytes"]


def _score(variant: Mapping[str, Any]) -> float:
    """The metric that decides, such that lower is better."""
    value = variant.get("validation_metric")
    value = variant["metric"] if value is None else value
    return value if variant.get("metric_name") in LOWER_IS_BETTER else -value


def _order(variant: Mapping[str, Any], options: SelectOptions) -> tuple[float, float, int, str]:
    size = _size(variant, options)
    score = _score(variant)
    goal = {"size": size, "latency": variant["latency_ms"]["p50"], "metric": score}[options.objective]
    return (float(goal), score, size, str(variant["recipe"]))


def constrained(variant: Mapping[str, Any], options: SelectOptions) -> dict[str, tuple[float | None, float]]:
    """{constraint: (what the variant has, limit)} of every constraint that was set."""
    found = {
        "max_metric_drop": (deciding_drop(variant), options.max_metric_drop),
        "max_bytes": (_size(variant, options), options.max_bytes),
        "max_latency_ms": (variant["latency_ms"]["p50"], options.max_latency_ms),
    }
    return {name: (value, limit) for name, (value, limit) in found.items() if limit is not None}


def _miss(variant: Mapping[str, Any], options: SelectOptions) -> str:
    """Why the variant cannot be chosen; '' where it can."""
    if variant["status"] != "ok":
        return f"{variant['status']}: {variant['reason']}"
    return "; ".join(
        f"{name} is {_number(name, limit)}, {'not known' if value is None else f'it has {_number(name, value)}'}"
        for name, (value, limit) in constrained(variant, options).items()
        if value is None or value > limit
    )


def _number(constraint: str, value: float) -> str:
    return {"max_metric_drop": f"{value:.4f}", "max_bytes": f"{value:,.0f}", "max_latency_ms": f"{value:.3g}"}[
        constraint
    ]


def _because(
    eligible: Sequence[Mapping[str, Any]], variants: Sequence[Mapping[str, Any]], options: SelectOptions
) -> str:
    best = eligible[0]
    goal = {
        "size": f"{options.size} {_size(best, options):,} bytes, the smallest",
        "latency": f"{best['latency_ms']['p50']:.3g} ms median, the fastest",
        "metric": f"{best.get('metric_name', 'metric')} {abs(_score(best)):.4f} on {_split(best)}, the best",
    }[options.objective]
    rules = []
    if options.max_metric_drop is not None:
        rules.append(f"lose at most {options.max_metric_drop:.4f}")
    if options.max_bytes is not None:
        rules.append(f"have at most {options.max_bytes:,} {options.size} bytes")
    if options.max_latency_ms is not None:
        rules.append(f"take at most {options.max_latency_ms:g} ms")
    lost = deciding_drop(best)
    tail = "" if lost is None else f"; lost {lost:.4f} on {_split(best)}"
    among = f" that {' and '.join(rules)}" if rules else ""
    return f"{goal} of {len(eligible)} of {len(variants)} variants{among}{tail}"


def _split(variant: Mapping[str, Any]) -> str:
    return "test" if variant.get("validation_metric") is None else "validation"


def _nearest(variants: Sequence[Mapping[str, Any]], options: SelectOptions) -> str:
    """Says for each constraint which working variant comes nearest to it, and by how much it misses."""
    working = [variant for variant in variants if variant["status"] == "ok"]
    if not working:
        reasons = "; ".join(f"{v['recipe']}: {v['reason']}" for v in variants[:3]) or "none was made"
        return f"select: 0 of {len(variants)} variants work ({reasons}); repair the first one that failed."
    parts = []
    for name in constrained(working[0], options):
        known = [(value, v["recipe"]) for v in working if (value := constrained(v, options)[name][0]) is not None]
        limit = constrained(working[0], options)[name][1]
        parts.append(_distance(name, limit, min(known) if known else None))
    return f"select: none of {len(working)} variants meets every constraint: {'; '.join(parts)}. Loosen one, or add recipes."


def _distance(name: str, limit: float, best: tuple[float, str] | None) -> str:
    if best is None:
        return f"{name}={_number(name, limit)} cannot be checked, no variant has the figure"
    value, recipe = best
    if value <= limit:
        return f"{name}={_number(name, limit)} is met by '{recipe}' with {_number(name, value)}"
    return f"{name}={_number(name, limit)} is missed by {_number(name, value - limit)} at least ('{recipe}', {_number(name, value)})"
