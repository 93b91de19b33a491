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
import contextlib
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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "out"
BARS = {("resnet8", "fit"): (2.0, 2.2), ("mobilenet", "fit"): (1.5, None), ("mlp", "fit"): (3.0, None)}
BARS[("resnet8", "torch")] = (1.0, None)
MARK = "turn "  # what a way says, among all that its libraries print; torch_resnet8.py has it, too


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
    ways = ["fit", "trimline"] + (["torch"] if options.torch and model == "resnet8" else [])
    with contextlib.ExitStack() as stack:
        runners = {way: stack.enter_context(Runner(way, model, options, folder)) for way in ways}
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for epoch in range(options.epochs):
            for way in ways if epoch % 2 else reversed(ways):
                found[way].append(runners[way].epoch())
        told = runners["trimline"].told
    for way, epochs in found.items():
        wall, processor = (statistics.median(each[key] for each in epochs) for key in ("wall", "processor"))
        print(f"{model:9} {way:8} {1e6 / wall:8.0f} examples/s   {processor:7.1f} us of processor an example")
    print(f"{'':9} trimline said:")
    for line in told:
        print(f"{'':11}{line}")
    ratios = {}
    for way in ways:
        if way == "trimline":
            continue
        pairs = [
            [theirs[key] / ours[key] for key in ("wall", "processor")]
            for theirs, ours in zip(found[way], found["trimline"], strict=True)
        ]
        wall, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        low, *_, high = sorted(pair[0] for pair in pairs)
        bar, bar_processor = BARS[(model, way)]
        verdict = "reached" if wall >= bar and processor >= (bar_processor or 0) else "MISSED"
        more = f", {bar_processor} by processor time" if bar_processor else ""
        print(
            f"{model:9} {wall:.2f}x of {way} (pairs {low:.2f}x to {high:.2f}x), {processor:.2f}x by processor time (bar {bar}{more}: {verdict})",
            flush=True,
        )
        ratios[way] = {"wall": wall, "processor": processor}
    return {"ratios": ratios, "told": told, "us_per_example": found}


class Runner(contextlib.AbstractContextManager["Runner"]):
    """One way in a process of its own: the first epoch done, it makes another when asked.

    It says what it was told, a JSON list, and after each epoch {"wall", "processor": microseconds an example}.
    """

    def __init__(self, way: str, model: str, options: argparse.Namespace, folder: str) -> None:
        if way == "torch":
            command = [options.torch, str(HERE / "torch_resnet8.py"), f"--updates={options.rows // options.batch}"]
        else:
            command = [sys.executable, __file__, "--way", way, "--folder", folder, "--models", model]
        command += [f"--batch={options.batch}", f"--epochs={options.epochs}"]
        self._command = command
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told: list[str] = self._heard()

    def epoch(self) -> dict[str, float]:
        """Asks for one more."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._heard()

    def _heard(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        sys.exit(f"train_speed: a process ended early: {' '.join(self._command)}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()


class Turns:
    """The side of the one who trains: to be called at the end of each epoch; returns when the next is asked for."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._since: tuple[float, float] | None = None

    def __call__(self, told: list[str]) -> None:
        """`told` is said once."""
        if self._since is None:
            said: Any = told
        else:
            took = (now - then for now, then in zip(clocks(), self._since, strict=True))
            said = dict(zip(("wall", "processor"), (1e6 * each / self._rows for each in took), strict=True))
        print(MARK + json.dumps(said), flush=True)
        sys.stdin.readline()
        self._since = clocks()


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


def clocks() -> tuple[float, float]:
    """Wall and processor time, seconds."""
    return time.perf_counter(), time.process_time()


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
