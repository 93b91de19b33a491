"""How well and how soon ResNet-8 learns Fashion-MNIST: trimline's training stage against a hand-written Keras 3 script.

    TRIMLINE_DATA=FOLDER .venv/bin/python benchmarks/train_accuracy.py --seeds 0 1 2

Two questions, each over the same seeds, validation rows and initial weights, every training in a process of its own, the
ways taking turns:

- equal: both with batch 128, Adam at 1e-3 and the same epochs. Accuracy of trimline's precision and fused normalization
  against `fit`; bar: within 0.003.
- soon: seconds until 0.90 of the validation rows are right at the end of an epoch, imports and tracing counted.
  trimline with the settings below, the script with Keras's defaults (batch 32, Adam at 1e-3). Bar: 0.4x.

The test split is read by neither.
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

STARTED = time.perf_counter()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

OUT = pathlib.Path(__file__).resolve().parent / "out"
TARGET = 0.90
EQUAL = {"batch_size": 128, "epochs": 6}
SOON = {
    "batch_size": 128,
    "epochs": 6,
    "optimizer": {"learning_rate": 4e-3, "schedule": "cosine", "warmup_epochs": 0.5},
}
DEFAULTS = {"batch_size": 32, "epochs": 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--questions", nargs="+", default=["equal", "soon"], choices=("equal", "soon"))
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        question, way = options.work.split("-")
        print(json.dumps({"fit": by_hand, "trimline": through_trimline}[way](question, options)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(pathlib.Path(folder))
        for seed in options.seeds:
            for question in options.questions:
                for way in ("fit", "trimline"):
                    command = [sys.executable, __file__, "--work", f"{question}-{way}", "--folder", folder]
                    done = subprocess.run(
                        [*command, "--seeds", str(seed)], stdout=subprocess.PIPE, text=True, check=True
                    )
                    each = json.loads(done.stdout.splitlines()[-1])
                    found.setdefault(f"{question}-{way}", []).append(each)
                    print(f"seed {seed} {question:5} {way:8} {json.dumps(each)}", flush=True)
    report(found)
    OUT.mkdir(exist_ok=True)
    (OUT / "train_accuracy.json").write_text(json.dumps(found, indent=1) + "\n")


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    if "equal-fit" in found:
        means = {
            way: statistics.mean(each["accuracy"][-1] for each in found[f"equal-{way}"]) for way in ("fit", "trimline")
        }
        apart = means["trimline"] - means["fit"]
        verdict = "reached" if abs(apart) <= 0.003 or apart > 0 else "MISSED"
        print(f"equal: fit {means['fit']:.4f}, trimline {means['trimline']:.4f}, {apart:+.4f} (bar 0.003: {verdict})")
        for key in ("seconds", "processor"):
            ratio = statistics.median(
                theirs[key] / ours[key]
                for theirs, ours in zip(found["equal-fit"], found["equal-trimline"], strict=True)
            )
            print(f"equal: {ratio:.2f}x as fast by {key}, all counted")
    if "soon-fit" in found:
        for key in ("seconds_to_target", "processor_to_target"):
            pairs = zip(found["soon-trimline"], found["soon-fit"], strict=True)
            ratios = [ours[key] / theirs[key] for ours, theirs in pairs if ours[key] and theirs[key]]
            missing = len(found["soon-fit"]) - len(ratios)
            ratio = statistics.median(ratios) if ratios else float("nan")
            print(
                f"soon: {ratio:.2f}x by {key} (bar 0.4; {missing} seeds in which one of them did not come to {TARGET})"
            )


def prepare(folder: pathlib.Path) -> None:
    from components.data.preprocess import preprocess
    from components.tracing import Trace
    from pipeline.config import load_config

    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    config = load_config("fashion_mnist")
    (folder / "data").mkdir()
    preprocess(config.source, config.preprocess, folder / "data", task="classification", seed=0, trace=Trace())


def facts(accuracy: list[float], ends: list[tuple[float, float]]) -> dict[str, Any]:
    reached = next((ends[place] for place, value in enumerate(accuracy) if value >= TARGET), (None, None))
    return {
        "accuracy": accuracy,
        "seconds": ends[-1][0],
        "processor": ends[-1][1],
        "seconds_to_target": reached[0],
        "processor_to_target": reached[1],
    }


def clocks() -> tuple[float, float]:
    """Since the process began: wall and processor time, seconds."""
    return time.perf_counter() - STARTED, time.process_time()


def through_trimline(question: str, options: argparse.Namespace) -> dict[str, Any]:
    import tensorflow as tf

    from components.artifacts import PreparedData, read_json
    from components.data.dataset import make_batches
    from components.options import Augmentation, ModelOptions, TrainOptions
    from components.tracing import Trace
    from components.training.model import build
    from components.training.train import train

    data, model, seed = (
        PreparedData(pathlib.Path(options.folder) / "data"),
        ModelOptions(name="resnet8"),
        options.seeds[0],
    )
    ends = []

    class Ears(Trace):
        def scalar(self, name: str, value: float, step: int = 0) -> None:
            if name == "accuracy/validation":  # told at the end of each epoch
                ends.append(clocks())

    with tempfile.TemporaryDirectory() as folder:
        made = train(
            TrainOptions.model_validate(EQUAL if question == "equal" else SOON),
            lambda: build(model, data.spec, seed=seed),
            model,
            make_batches(data, augmentation=Augmentation()),
            pathlib.Path(folder),
            strategy=tf.distribute.get_strategy(),
            seed=seed,
            trace=Ears(),
        )
        accuracy = read_json(made.folder / "history.json")["val_accuracy"]
        return {**facts(accuracy, ends), "precision": made.facts["precision"]}


def by_hand(question: str, options: argparse.Namespace) -> dict[str, Any]:
    import keras

    from components.artifacts import PreparedData
    from components.data.dataset import read
    from components.options import ModelOptions
    from components.training.model import build

    data = PreparedData(pathlib.Path(options.folder) / "data")
    x, y = read(data, "train")
    model = build(ModelOptions(name="resnet8"), data.spec, seed=options.seeds[0])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    ends: list[tuple[float, float]] = []
    chosen = EQUAL if question == "equal" else DEFAULTS

    def told(epoch: int, logs: dict[str, float]) -> None:
        ends.append(clocks())
        model.stop_training = question == "soon" and logs["val_accuracy"] >= TARGET

    history = model.fit(
        x,
        y,
        batch_size=chosen["batch_size"],
        epochs=chosen["epochs"],
        validation_data=read(data, "validation"),
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=told)],
        verbose=0,
    ).history
    return facts(history["val_accuracy"], ends)


if __name__ == "__main__":
    main()
