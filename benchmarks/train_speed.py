"""Examples per second in training: trimline as it is used, `keras.Model.fit` with its defaults, and PyTorch.

    .venv/bin/python benchmarks/train_speed.py                       # resnet8 and mobilenet, some minutes on two cores
    .venv/bin/python benchmarks/train_speed.py --models mlp          # the Adult table; TRIMLINE_DATA names its folder
    .venv/bin/python benchmarks/train_speed.py --models resnet8 --torch PYTHON     # PYTHON has torch 2.13

Pictures are 32 x 32 x 3, random, batch 128; the table comes in fit's default batches of 32; Adam. trimline reads them from
disk, through its own preprocessing and its whole training stage: updates and a checkpoint an epoch count. `fit` has float32
arrays in memory and compiles as `compile` does by default. Each way is a process of its own that stands still while another one trains; they take turns
epoch by epoch, the first epoch of each is not counted, and a ratio is the median of those of epochs side by side: a shared
machine is now faster, now slower, for seconds at a time.

Bars: resnet8 2.0x of fit (2.2x by processor time), mobilenet 1.5x, mlp 3x, resnet8 1.0x of PyTorch at its best setting
(channels last, bfloat16, torch.compile).
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

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "out"
BARS = {("resnet8", "fit"): (2.0, 2.2), ("mobilenet", "fit"): (1.5, None), ("mlp", "fit"): (3.0, None)}
BARS[("resnet8", "torch")] = (1.0, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["resnet8", "mobilenet"], choices=("resnet8", "mobilenet", "mlp")
    )
    parser.add_argument("--rows", type=int, default=6400, help="pictures of an epoch")
    parser.add_argument("--batch", type=int, help="default: 128, for mlp 32, which is that of fit")
    parser.add_argument("--epochs", type=int, default=12, help="of each way; one more comes before and is not counted")
    parser.add_argument("--torch", help="a Python interpreter that has torch")
    parser.add_argument("--way", choices=("fit", "trimline"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    given = options.batch
    if options.way:
        {"fit": by_hand, "trimline": through_trimline}[options.way](options)
        return
    results = {}
    for model in options.models:
        options.batch = given or (32 if model == "mlp" else 128)
        with tempfile.TemporaryDirectory() as folder:
            results[model] = compare(model, options, folder)
    OUT.mkdir(exist_ok=True)
    report = {"options": vars(options), "cores": os.cpu_count(), "results": results}
    (OUT / "train_speed.json").write_text(json.dumps(report, indent=1) + "\n")


def compare(model: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    prepare(model, options.rows, pathlib.Path(folder))
    own = [f"--batch={options.batch}", f"--epochs={options.epochs}"]
    given = ["--folder", folder, "--models", model, *own]
    commands = {way: [sys.executable, __file__, "--way", way, *given] for way in ("fit", "trimline")}
    if options.torch and model == "resnet8":
        updates = f"--updates={options.rows // options.batch}"
        commands["torch"] = [options.torch, str(HERE / "torch_resnet8.py"), updates, *own]
    found, told = take_turns(commands, options.epochs)
    for way, epochs in found.items():
        wall, processor = (statistics.median(each[key] for each in epochs) for key in ("wall", "processor"))
        print(f"{model:9} {way:8} {1e6 / wall:8.0f} examples/s   {processor:7.1f} us of processor an example")
    print(f"{'':9} trimline said:")
    for line in told["trimline"]:
        print(f"{'':11}{line}")
    all_ = {}
    for way in [each for each in commands if each != "trimline"]:
        wall, low, high = ratios(found[way], found["trimline"])
        processor, *_ = ratios(found[way], found["trimline"], "processor")
        bar, bar_processor = BARS[(model, way)]
        verdict = "reached" if wall >= bar and processor >= (bar_processor or 0) else "MISSED"
        more = f", {bar_processor} by processor time" if bar_processor else ""
        print(
            f"{model:9} {wall:.2f}x of {way} (pairs {low:.2f}x to {high:.2f}x), {processor:.2f}x by processor time (bar {bar}{more}: {verdict})",
            flush=True,
        )
        all_[way] = {"wall": wall, "processor": processor}
    return {"ratios": all_, "told": told["trimline"], "us_per_example": found}


def prepare(model: str, rows: int, folder: pathlib.Path) -> None:
    import numpy as np

    from components.data.preprocess import preprocess
    from components.options import ArraysSource, PreprocessOptions
    from components.tracing import Trace
    from pipeline.config import load_config

    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    (folder / "data").mkdir()
    if model == "mlp":
        config = load_config("adult")
        source, options = config.source, config.preprocess
    else:
        rng = np.random.default_rng(0)
        x, y = rng.integers(0, 256, (rows, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, rows)
        np.savez(folder / "source.npz", x=x, y=y)
        options = PreprocessOptions.model_validate({"splits": {"test": 0, "validation": 0, "calibration": 0}})
        source = ArraysSource(kind="arrays", train=str(folder / "source.npz"))
    preprocess(source, options, folder / "data", task="classification", seed=0, trace=Trace())


def through_trimline(options: argparse.Namespace) -> None:
    import tensorflow as tf

    from components.artifacts import PreparedData
    from components.data.dataset import make_batches
    from components.options import Augmentation, ModelOptions, TrainOptions
    from components.tracing import Trace
    from components.training import precision
    from components.training.model import build
    from components.training.train import train

    precision.WORTH_MEASURING = 0  # a training that lasts measures; these are cut short
    data = PreparedData(pathlib.Path(options.folder) / "data")
    model = ModelOptions(name=options.models[0])
    told: list[str] = []
    turns = Turns(data.rows("train") // options.batch * options.batch)
    with tempfile.TemporaryDirectory() as folder:
        train(
            TrainOptions(epochs=options.epochs + 2, batch_size=options.batch),
            lambda: build(model, data.spec, seed=0),
            model,
            make_batches(data, augmentation=Augmentation()),
            pathlib.Path(folder),
            strategy=tf.distribute.get_strategy(),
            seed=0,
            trace=Trace(
                on_progress=lambda done, total, note: turns(told) if done == int(done) else None,
                on_telling=told.append,
            ),
        )


def by_hand(options: argparse.Namespace) -> None:
    import keras

    from components.artifacts import PreparedData
    from components.data.dataset import read
    from components.options import ModelOptions
    from components.training.model import build

    data = PreparedData(pathlib.Path(options.folder) / "data")
    x, y = read(data, "train")
    model = build(ModelOptions(name=options.models[0]), data.spec, seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    turns = Turns(len(x))
    ended = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: turns([]))
    held_out = read(data, "validation") if data.rows("validation") else None
    model.fit(
        x,
        y,
        batch_size=options.batch,
        epochs=options.epochs + 2,
        validation_data=held_out,
        validation_batch_size=options.batch,
        callbacks=[ended],
        verbose=0,
    )


if __name__ == "__main__":
    main()
