"""A dense network whose zeros pay: blocks of 1x16 stored sparse in int8, against plain int8, on Fashion-MNIST.

    TRIMLINE_DATA=FOLDER .venv/bin/python benchmarks/sparse_dense.py --seeds 0 1 2

The network is 784-2048-2048-2048-10. Bars, each the mean over the seeds: one thread latency at least 1.3x faster, raw bytes
at most 0.15x, at most 0.5 point of test accuracy lost against plain int8 of the same base model. Nothing was tuned on
the test split.

The time of TFLite's sparse int8 kernel goes with the number of blocks that are left, some 5 ns each on the machine where
this was written; at a sparsity of 0.9 that is no less than XNNPACK needs for all weights. Hence 0.95.

Latency: both files are loaded at once and timed in turns of TURN runs, so that both see the same machine; the ratio is
that of the medians over all turns. What is trained is cached in the workspace: run again, it times again and trains
nothing, so latency can be told on an idle machine later.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time

import numpy as np
from ai_edge_litert.interpreter import Interpreter

import pipeline
from components.machine import processor

OUT = pathlib.Path(__file__).resolve().parent / "out"
PLAIN = "int8"
BARS = {"times faster": 1.3, "of the raw bytes": 0.15, "points lost": 0.5}
TURN = 50  # runs of one file before the other's turn
DROPPED = 5  # of each turn: the other file's weights are in the cache
SETTINGS = [
    "name=sparse_dense",
    "model.name=mlp",
    "model.options={units: [2048, 2048, 2048], dropout: 0.2}",
    "train.epochs=8",
    "train.optimizer.learning_rate=0.001",
    "train.augmentation={}",
    "compress.prune.epochs=8",
    "compress.prune.end=0.5",
    "compress.distill={teacher: base}",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--recipe", default="prune@0.96:1x16+int8+sparse", help="or with qat for int8")
    parser.add_argument("--rounds", type=int, default=40, help=f"turns of {TURN} runs for each file")
    parser.add_argument("--workspace", default="workspace")
    options = parser.parse_args()
    if "TRIMLINE_DATA" not in os.environ:
        sys.exit("sparse_dense: set TRIMLINE_DATA to the folder that holds fashion_mnist/.")
    found = [one_seed(seed, options) for seed in options.seeds]
    means = {name: statistics.mean(each[name] for each in found) for name in BARS}
    for name, bar in BARS.items():
        reached = means[name] >= bar if name == "times faster" else means[name] <= bar
        print(f"{name:18} {means[name]:8.3f}   bar {bar}: {'reached' if reached else 'MISSED'}")
    OUT.mkdir(exist_ok=True)
    report = {"options": vars(options), "bars": BARS, "means": means, "seeds": found, "cpu": processor()}
    (OUT / "sparse_dense.json").write_text(json.dumps(report, indent=1) + "\n")


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Walks the journey, or finds it cached, and times the two files against each other."""
    recipes = f"compress.recipes=[{PLAIN}, '{options.recipe}']"
    settings = [*SETTINGS, recipes, f"seed={seed}", f"workspace={options.workspace}"]
    results = pipeline.run(pipeline.load_config("fashion_mnist", settings))
    variants = {variant["recipe"]: variant for variant in results.variants}
    plain, sparse = variants[PLAIN], variants[options.recipe]
    for variant in (plain, sparse):
        if variant["status"] != "ok":
            sys.exit(f"sparse_dense: {variant['recipe']} {variant['status']}: {variant['reason']}")
    workspace = pathlib.Path(options.workspace)
    took = latencies([workspace / variant["file"] for variant in (plain, sparse)], options.rounds)
    made = {
        "seed": seed,
        "times faster": took[0] / took[1],
        "of the raw bytes": sparse["bytes"] / plain["bytes"],
        "points lost": 100 * (plain["metric"] - sparse["metric"]),
        "float32 accuracy": variants["float32"]["metric"],
        "int8 accuracy": plain["metric"],
        "sparse accuracy": sparse["metric"],
        "int8 ms": took[0],
        "sparse ms": took[1],
        "int8 bytes": plain["bytes"],
        "sparse bytes": sparse["bytes"],
        "int8 gzip bytes": plain["gzip_bytes"],
        "sparse gzip bytes": sparse["gzip_bytes"],
    }
    print(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in made.items()
        )
    )
    return made


def latencies(files: list[pathlib.Path], rounds: int) -> list[float]:
    """Median milliseconds of each file, one thread, timed in turns."""
    interpreters = [Interpreter(str(file), num_threads=1) for file in files]
    example = np.random.default_rng(0).random((1, 28, 28, 1), np.float32)
    for each in interpreters:
        each.allocate_tensors()
        each.set_tensor(each.get_input_details()[0]["index"], example)
    took: list[list[int]] = [[] for _ in files]
    for _ in range(rounds):
        for each, times in zip(interpreters, took, strict=True):
            for run in range(TURN):
                began = time.perf_counter_ns()
                each.invoke()
                if run >= DROPPED:
                    times.append(time.perf_counter_ns() - began)
    return [statistics.median(times) / 1e6 for times in took]


if __name__ == "__main__":
    main()
