"""Examples per second of a training on a GPU: ResNet-50 and the transformer, trimline against `fit` at its best published setting.

    .venv/bin/python benchmarks/gpu_step.py                                   # on a machine with a GPU
    .venv/bin/python benchmarks/gpu_step.py --device cpu --side 64 --rows 64 --batch 8 --epochs 2      # that it runs at all

`fit` is set as the guides of Keras and TensorFlow say for speed: `mixed_bfloat16`, `jit_compile=True`, many steps per execution
(keras.io/api/mixed_precision, tensorflow.org/xla); its batches lie ready in memory as float32, in one order. trimline runs its training
stage with its defaults, from its own files on disk, shuffled, checkpoints counted. Pictures are random, 224 x 224 x 3 as
stored; models have random weights. Ways take turns epoch by epoch, see turns.py; the first epoch of each is not counted.

No bar.
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import sys
import tempfile
from typing import Any

from turns import Turns, ratios, take_turns

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # two processes share it

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
    parser.add_argument("--epochs", type=int, default=8, help="of each way; one more comes before and is not counted")
    parser.add_argument("--precision", default="auto", help="of trimline")
    parser.add_argument(
        "--at-once",
        action="store_true",
        help="start all at once, where time is short; with a --precision, as none can be measured",
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    if options.way:
        {"fit": by_hand, "trimline": through_trimline}[options.way](options)
        return
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options, pathlib.Path(folder))
        groups = [options.models] if options.at_once else [[model] for model in options.models]
        for models in groups:
            report |= compare(models, options, folder)
    OUT.mkdir(exist_ok=True)
    (OUT / "gpu_step.json").write_text(json.dumps({"options": vars(options), "found": report}, indent=1) + "\n")


def compare(models: list[str], options: argparse.Namespace, folder: str) -> dict[str, Any]:
    # A later option counts, so the rest is as it was given.
    given = [sys.executable, *sys.argv, "--folder", folder, "--models"]
    commands = {f"{model} {way}": [*given, model, "--way", way] for model in models for way in WAYS}
    found, told = take_turns(commands, options.epochs, options.at_once)
    report = {}
    for model in models:
        fit, ours = f"{model} fit", f"{model} trimline"
        for way in (fit, ours):
            speed = 1e6 / statistics.median(each["wall"] for each in found[way])
            print(f"{way:22} {speed:9.1f} examples/s on {told[way][0]}")
        middle, low, high = ratios(found[fit], found[ours])
        print(f"{model:12} {middle:.2f}x of fit at its best setting (pairs {low:.2f}x to {high:.2f}x); trimline said:")
        for line in told[ours][1:]:
            print(f"{'':13}{line}", flush=True)
        report[model] = {
            "ratio": middle,
            "told": told[ours],
            "us_per_example": {way: found[way] for way in (fit, ours)},
        }
    return report


def prepare(options: argparse.Namespace, folder: pathlib.Path) -> None:
    import numpy as np

    from components.data.preprocess import preprocess
    from components.options import ArraysSource, PreprocessOptions
    from components.tracing import Trace

    logging.getLogger("apache_beam").setLevel(logging.ERROR)
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


def through_trimline(options: argparse.Namespace) -> None:
    import tensorflow as tf

    from components.artifacts import PreparedData
    from components.data.dataset import make_batches
    from components.options import Augmentation, ModelOptions, TrainOptions
    from components.tracing import Trace
    from components.training.train import train

    data = PreparedData(pathlib.Path(options.folder) / "data")
    turns, told = Turns(data.rows("train") // options.batch * options.batch), [device()]
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainOptions(epochs=options.epochs + 2, batch_size=options.batch, precision=options.precision),
            lambda: model_of(options.models[0], data.spec),
            ModelOptions(builder="a:b", outputs="logits"),
            make_batches(data, augmentation=Augmentation()),
            pathlib.Path(folder),
            strategy=tf.distribute.get_strategy(),
            seed=0,
            trace=Trace(
                on_progress=lambda done, *_: turns(told) if done == int(done) else None,
                on_telling=told.append,
            ),
        )


def by_hand(options: argparse.Namespace) -> None:
    import keras
    import tensorflow as tf

    from components.artifacts import PreparedData
    from components.data.dataset import read

    data = PreparedData(pathlib.Path(options.folder) / "data")
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    model = model_of(options.models[0], data.spec)
    steps = data.rows("train") // options.batch
    model.compile(
        "adam",
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=True,
        steps_per_execution=min(32, steps),
    )
    x, y = (each[: steps * options.batch] for each in read(data, "train"))
    with tf.device("CPU:0"):
        batches = tf.data.Dataset.from_tensor_slices(
            (x.reshape(steps, options.batch, *x.shape[1:]), y.reshape(steps, options.batch))
        )
    turns = Turns(len(x))
    ended = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: turns([device()]))
    model.fit(
        batches.prefetch(tf.data.AUTOTUNE), epochs=options.epochs + 2, callbacks=[ended], shuffle=False, verbose=0
    )


def device() -> str:
    """What computes."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    return str(tf.config.experimental.get_device_details(gpus[0]).get("device_name", "a GPU")) if gpus else "CPU"


if __name__ == "__main__":
    main()
