"""Examples per second of a training on a GPU: ResNet-50 and the transformer, trimline against `fit` at its best published setting.

    .venv/bin/python benchmarks/gpu_step.py                                   # on a machine with a GPU
    .venv/bin/python benchmarks/gpu_step.py --device cpu --side 64 --rows 64 --batch 8 --epochs 2      # that it runs at all

`fit` is set as the guides of Keras and TensorFlow say for speed: `mixed_bfloat16`, `jit_compile=True`, 32 steps per execution, tf.data with
prefetch (keras.io/api/mixed_precision, tensorflow.org/xla). trimline runs its training stage with its defaults, from its own files on disk,
a checkpoint an epoch counted. Pictures are random, 224 x 224 x 3 as stored; models have random weights. Every figure comes from a process of
its own, the ways take turns, the first epoch of each is not counted; medians over the rounds.

No bar: there was no GPU where this was written, and it has been run on a CPU only.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

OUT = pathlib.Path(__file__).resolve().parent / "out"
WAYS = ("fit", "trimline")
CLASSES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "transformer"], choices=("resnet50", "transformer"))
    parser.add_argument("--device", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rows", type=int, default=6400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4, help="per process; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    if options.way:
        print(json.dumps({"fit": by_hand, "trimline": through_trimline}[options.way](options)))
        return
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, pathlib.Path(folder))
        for model in options.models:
            found[model] = {way: [] for way in WAYS}
            for _ in range(options.rounds):
                for way in WAYS:
                    found[model][way].append(measured(way, model, folder))
            report(model, found[model])
    OUT.mkdir(exist_ok=True)
    (OUT / "gpu_step.json").write_text(json.dumps({"options": vars(options), "found": found}, indent=1) + "\n")


def measured(way: str, model: str, folder: str) -> dict[str, Any]:
    # A later option counts, so the rest is as it was given.
    command = [sys.executable, *sys.argv, "--way", way, "--folder", folder, "--models", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(model: str, found: dict[str, list[dict[str, Any]]]) -> None:
    speed = {way: statistics.median(each["examples_per_second"] for each in all_) for way, all_ in found.items()}
    for way, value in speed.items():
        print(f"{model:12} {way:9} {value:9.1f} examples/s on {found[way][0]['device']}")
    print(f"{model:12} {speed['trimline'] / speed['fit']:.2f}x of fit at its best setting; trimline said:")
    for line in found["trimline"][-1]["told"]:
        print(f"{'':13}{line}", flush=True)


def prepare(options: argparse.Namespace, folder: pathlib.Path) -> None:
    import numpy as np

    from components.data.preprocess import preprocess
    from components.options import ArraysSource, PreprocessOptions
    from components.tracing import Trace

    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (options.rows, options.side, options.side, 3), dtype=np.uint8)
    np.savez(folder / "source.npz", x=x, y=np.arange(options.rows) % CLASSES)
    shares = {"splits": {"test": 0, "validation": 0, "calibration": 0}, "block_rows": 64}
    source = ArraysSource(kind="arrays", train=str(folder / "source.npz"))
    made = PreprocessOptions.model_validate(shares)
    preprocess(source, made, folder / "data", task="classification", seed=0, trace=Trace())


def model_of(name: str, spec: Any) -> Any:
    import keras

    from components.options import ModelOptions
    from components.training.model import build

    if name == "transformer":  # about the shape of ViT-S/16
        options = {"width": 384, "depth": 12, "heads": 6, "hidden": 1536, "patch": max(spec.input_shape[0] // 14, 1)}
        return build(ModelOptions(name="transformer", options=options), spec, seed=0)
    keras.utils.set_random_seed(0)
    return keras.applications.ResNet50(
        weights=None, input_shape=spec.input_shape, classes=len(spec.labels), classifier_activation=None
    )


def through_trimline(options: argparse.Namespace) -> dict[str, Any]:
    import tensorflow as tf

    from components.artifacts import PreparedData
    from components.data.dataset import make_batches
    from components.options import Augmentation, ModelOptions, TrainOptions
    from components.tracing import Trace
    from components.training.train import train

    data = PreparedData(pathlib.Path(options.folder) / "data")
    ends: list[float] = []
    told: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainOptions(epochs=options.epochs, batch_size=options.batch),
            lambda: model_of(options.models[0], data.spec),
            ModelOptions(builder="a:b", outputs="logits"),
            make_batches(data, augmentation=Augmentation()),
            pathlib.Path(folder),
            strategy=tf.distribute.get_strategy(),
            seed=0,
            trace=Trace(
                on_progress=lambda done, *_: ends.append(time.perf_counter()) if done == int(done) else None,
                on_telling=told.append,
            ),
        )
    return {**speed(ends, data.rows("train") // options.batch * options.batch), "told": told}


def by_hand(options: argparse.Namespace) -> dict[str, Any]:
    import keras
    import tensorflow as tf

    from components.artifacts import PreparedData
    from components.data.dataset import read

    data = PreparedData(pathlib.Path(options.folder) / "data")
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = model_of(options.models[0], data.spec)
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
        steps_per_execution=min(32, options.rows // options.batch),
    )
    with tf.device("CPU:0"):
        rows = tf.data.Dataset.from_tensor_slices(read(data, "train")).shuffle(2048, seed=0)
    batches = rows.batch(options.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    ends: list[float] = []
    told = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: ends.append(time.perf_counter()))
    model.fit(batches, epochs=options.epochs, callbacks=[told], shuffle=False, verbose=0)
    return speed(ends, data.rows("train") // options.batch * options.batch)


def speed(ends: list[float], rows: int) -> dict[str, Any]:
    """Of the epochs but the first, by the times at which they ended."""
    import tensorflow as tf

    each = [rows / (after - before) for before, after in zip(ends, ends[1:], strict=False)]
    gpus = tf.config.list_physical_devices("GPU")
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "a GPU") if gpus else "CPU"
    return {"examples_per_second": statistics.median(each), "device": name}


if __name__ == "__main__":
    main()
