"""Whole journeys on real data against the bars of this project.

    TRIMLINE_DATA=FOLDER .venv/bin/python benchmarks/journeys.py fashion_mnist adult

Runs the template of that name (about 45 minutes for fashion_mnist on two cores, 3 for adult) and prints each bar with the
figure. Nothing here was tuned on the test split: templates were chosen on validation rows.
"""

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable

import pipeline

HERE = pathlib.Path(__file__).resolve().parent


def fashion_mnist(results: pipeline.Results, seconds: float) -> list[tuple[str, float, bool]]:
    by_recipe = {variant["recipe"]: variant for variant in results.variants if variant["status"] == "ok"}
    whole, plain = by_recipe["float32"], by_recipe["int8"]
    pruned = next(
        v
        for name, v in by_recipe.items()
        if name.startswith("prune") and name.endswith("+qat") and "cluster" not in name
    )
    best = max(v["metric"] for name, v in by_recipe.items() if name.endswith(("int8", "qat")))
    ratio = pruned["gzip_bytes"] / plain["gzip_bytes"]
    return [
        ("parameters below 100,000", plain["parameters"], plain["parameters"] < 100_000),
        ("int8 accuracy at least 0.92", plain["metric"], plain["metric"] >= 0.92),
        ("best 8-bit accuracy (no bar)", best, True),
        ("int8 within 0.005 of float32", plain["metric_drop"], plain["metric_drop"] <= 0.005),
        ("prune+qat gzip at most 0.55x of int8", ratio, ratio <= 0.55),
        ("prune+qat loses at most 0.01", pruned["metric_drop"], pruned["metric_drop"] <= 0.01),
        ("float32 accuracy (no bar)", whole["metric"], True),
        ("stages take at most 60 minutes", seconds / 60, seconds <= 3600),
    ]


def adult(results: pipeline.Results, seconds: float) -> list[tuple[str, float, bool]]:
    integer = [v for v in results.variants if v["status"] == "ok" and v["recipe"].endswith(("int8", "qat"))]
    plain = next(v for v in integer if v["recipe"] == "int8")
    return [
        ("parameters below 10,000", plain["parameters"], plain["parameters"] < 10_000),
        ("int8 accuracy at least 0.855", plain["metric"], plain["metric"] >= 0.855),
        ("stages, minutes (no bar)", seconds / 60, True),
    ]


BARS: dict[str, Callable[[pipeline.Results, float], list[tuple[str, float, bool]]]] = {
    "fashion_mnist": fashion_mnist,
    "adult": adult,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", nargs="+", choices=sorted(BARS))
    parser.add_argument("--workspace", default="workspace")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if "TRIMLINE_DATA" not in os.environ:
        sys.exit("journeys: set TRIMLINE_DATA to the folder that holds fashion_mnist/ and adult/.")
    for name in arguments.templates:
        overrides = [f"workspace={arguments.workspace}", f"seed={arguments.seed}"]
        clock = time.monotonic()
        results = pipeline.run(pipeline.load_config(name, overrides))
        print(f"{name}: walked in {(time.monotonic() - clock) / 60:.1f} minutes (less where stages were cached)")
        rows = BARS[name](results, sum(results.data["seconds"].values()))
        for bar, figure, reached in rows:
            print(f"  {bar:40} {figure:12.4f}  {'reached' if reached else 'MISSED'}")
        out = HERE / "out" / f"{name}-seed{arguments.seed}.json"
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps({"bars": rows, "results": results.data}, indent=1) + "\n")


if __name__ == "__main__":
    main()
