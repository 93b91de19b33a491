"""Preprocessing a CSV of 1,000,000 rows x 20 columns: trimline against a row-wise Beam pipeline as Beam's guide shows it.

Both read the file, learn mean and variance of 16 numbers and the vocabularies of 3 categories, standardise, assign a
split and write TFRecords, on Beam's in-process runner. Runs are interleaved, each in a process of its own; the figure
is the ratio of rows a second. The row-wise pipeline gets the first --naive-rows rows, as it would take minutes.

    python -m benchmarks.preprocess_csv [--rows N] [--naive-rows N] [--repeats N]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

NUMBERS = [f"n{place:02d}" for place in range(16)]
CATEGORIES = {"city": 500, "colour": 12, "shop": 40}
LABEL = "label"
OUT = pathlib.Path(__file__).parent / "out" / "preprocess_csv.json"


def generate(path: pathlib.Path, rows: int, seed: int = 0) -> None:
    """Writes `rows` rows of 16 numbers, 3 categories and a label, about 140 bytes each; no missing cells."""
    draw = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as file:
        file.write(",".join([*NUMBERS, *CATEGORIES, LABEL]) + "\n")
        for start in range(0, rows, 50_000):
            count = min(50_000, rows - start)
            numbers = draw.normal(loc=np.arange(16), scale=1 + np.arange(16), size=(count, 16))
            ids = [draw.integers(0, size, count) for size in CATEGORIES.values()]
            label = (numbers[:, 0] + draw.normal(size=count) > 0).astype(int)
            for row in range(count):
                cells = [f"{value:.4f}" for value in numbers[row]]
                cells += [f"{name}{found[row]}" for name, found in zip(CATEGORIES, ids, strict=True)]
                file.write(",".join(cells) + f",{label[row]}\n")


def ours(path: pathlib.Path, folder: pathlib.Path) -> int:
    from components.data.preprocess import preprocess
    from components.options import CsvSource, PreprocessOptions
    from components.tracing import Trace

    source = CsvSource(kind="csv", train=[str(path)], label=LABEL)
    made = preprocess(source, PreprocessOptions(), folder, task="classification", seed=0, trace=Trace())
    return int(made.manifest["records"]["kept"])


def row_wise(path: pathlib.Path, folder: pathlib.Path) -> int:
    """One dictionary a row, statistics as side inputs, one tf.train.Example a row."""
    import csv
    import hashlib

    import apache_beam as beam
    import tensorflow as tf
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    names = [*NUMBERS, *CATEGORIES, LABEL]

    def parse(line: str) -> dict:
        row = dict(zip(names, next(csv.reader([line])), strict=True))
        return {name: float(cell) if name in NUMBERS else cell for name, cell in row.items()}

    class MeanAndVariance(beam.CombineFn):
        def create_accumulator(self):
            return 0, 0.0, 0.0

        def add_input(self, accumulator, value):
            count, total, squares = accumulator
            return count + 1, total + value, squares + value * value

        def merge_accumulators(self, accumulators):
            return tuple(map(sum, zip(*accumulators, strict=True)))

        def extract_output(self, accumulator):
            count, total, squares = accumulator
            mean = total / count
            return mean, max(squares / count - mean * mean, 1e-12) ** 0.5

    def example(row: dict, moments: dict, vocabulary: dict) -> tuple[str, bytes]:
        numbers = [(row[name] - moments[name][0]) / moments[name][1] for name in NUMBERS]
        ids = [vocabulary[name, row[name]] for name in CATEGORIES]
        content = ",".join(str(cell) for cell in row.values()).encode()
        share = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") / 2**64
        feature = {
            "numbers": tf.train.Feature(float_list=tf.train.FloatList(value=numbers)),
            "ids": tf.train.Feature(int64_list=tf.train.Int64List(value=ids)),
            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[int(row[LABEL])])),
        }
        made = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
        return "test" if share < 0.2 else "train", made

    with beam.Pipeline(runner=FnApiRunner(), options=PipelineOptions([])) as pipeline:
        rows = pipeline | "read" >> beam.io.ReadFromText(str(path), skip_header_lines=1) | "parse" >> beam.Map(parse)
        moments = (
            rows
            | "cells" >> beam.FlatMap(lambda row: [(name, row[name]) for name in NUMBERS])
            | "moments" >> beam.CombinePerKey(MeanAndVariance())
        )
        words = (
            rows
            | "texts" >> beam.FlatMap(lambda row: [(name, row[name]) for name in CATEGORIES])
            | "distinct" >> beam.Distinct()
            | "all" >> beam.combiners.ToList()
            | "numbered" >> beam.Map(lambda found: {word: place for place, word in enumerate(sorted(found))})
        )
        made = rows | "example" >> beam.Map(example, beam.pvalue.AsDict(moments), beam.pvalue.AsSingleton(words))
        for split in ("train", "test"):
            _ = (
                made
                | f"only {split}" >> beam.Filter(lambda pair, split=split: pair[0] == split)
                | f"bytes {split}" >> beam.Values()
                | f"write {split}" >> beam.io.WriteToTFRecord(str(folder / split))
            )
    return sum(1 for _ in path.open("rb")) - 1


def measured(how: str, path: pathlib.Path) -> dict[str, float]:
    """Runs `how` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.preprocess_csv", "--child", how, str(path), folder]
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, check=True, capture_output=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def child(how: str, path: str, folder: str) -> None:
    """Prints one line of JSON: rows, seconds, CPU seconds, peak resident memory. Importing libraries does not count, as
    the row-wise pipeline gets fewer rows to spread it over."""
    for module in ("apache_beam", "components.data.preprocess") + (("tensorflow",) if how == "row_wise" else ()):
        importlib.import_module(module)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    rows = {"ours": ours, "row_wise": row_wise}[how](pathlib.Path(path), pathlib.Path(folder))
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    facts = {
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rows / seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
        "peak_mb": used.ru_maxrss / 1e3,
    }
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--naive-rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*given.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole, part = pathlib.Path(folder) / "whole.csv", pathlib.Path(folder) / "part.csv"
        generate(whole, given.rows)
        generate(part, min(given.naive_rows, given.rows))
        runs: dict[str, list[dict[str, float]]] = {"row_wise": [], "ours": []}
        for repeat in range(given.repeats):
            for how, path in (("row_wise", part), ("ours", whole)):
                runs[how].append(measured(how, path))
                print(repeat, how, json.dumps(runs[how][-1]), flush=True)
        size = whole.stat().st_size
    pairs = zip(runs["ours"], runs["row_wise"], strict=True)
    ratios = [one["rows_per_second"] / other["rows_per_second"] for one, other in pairs]
    result = {
        "what": f"CSV, {given.rows} rows x 20 columns, {size} bytes",
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(
            (other["cpu_seconds"] / other["rows"]) / (one["cpu_seconds"] / one["rows"])
            for one, other in zip(runs["ours"], runs["row_wise"], strict=True)
        ),
        "peak_mb": max(run["peak_mb"] for run in runs["ours"]),
        "bar": {"ratio": 10, "peak_mb": 800},
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "runs": runs,
    }
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        f"ours / row-wise: {result['ratio']:.1f}x rows/s (bar 10x), {result['cpu_ratio']:.1f}x rows per CPU second; our peak {result['peak_mb']:.0f} MB (bar 800)"
    )


if __name__ == "__main__":
    main()
