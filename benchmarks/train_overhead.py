"""What training through trimline costs per step, against the same model and data in a hand-written `model.fit`.

    .venv/bin/python benchmarks/train_overhead.py                 # pictures and a table, some minutes on two cores

Bar: at most 1.05x of `model.fit` on in-memory float32 arrays, per step, after the first epoch. Counted is all that
an epoch costs: updates, validation, and trimline's checkpoint (`model.fit` here writes none). `fit` is compiled without
XLA, which is the faster way on a CPU for these models; `--xla` adds what `compile` does by default. Rounds are
interleaved; a ratio is that of the medians over all epochs but the first of each round. The ratio of processor time
is told beside that of wall time, because it holds on a busy machine too.

Also printed: what the data alone cost per batch, against `from_tensor_slices(...).shuffle(rows).batch().prefetch()`.
"""

import argparse
import json
import logging
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

from components.artifacts import PreparedData  # noqa: E402
from components.data.dataset import make_batches, read  # noqa: E402
from components.data.preprocess import preprocess  # noqa: E402
from components.options import ArraysSource, Augmentation, ModelOptions, PreprocessOptions, TrainOptions  # noqa: E402
from components.tracing import Trace  # noqa: E402
from components.training.model import build  # noqa: E402
from components.training.train import train  # noqa: E402

OUT = pathlib.Path(__file__).resolve().parent / "out"
BAR = 1.05
Seconds = list[tuple[float, float]]  # wall, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000, help="rows before a tenth is held out for validation")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4, help="per round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--xla", action="store_true", help="also model.fit as compile makes it by default")
    parser.add_argument(
        "--models", nargs="+", default=["cnn", "mlp"], help="mlp trains on a table, the rest on pictures"
    )
    options = parser.parse_args()
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    results = {}
    for model in options.models:
        with tempfile.TemporaryDirectory() as folder:
            results[model] = compare(model, options, pathlib.Path(folder))
        show(model, results[model])
    OUT.mkdir(exist_ok=True)
    report = {"bar": BAR, "options": vars(options), "cores": os.cpu_count(), "results": results}
    (OUT / "train_overhead.json").write_text(json.dumps(report, indent=1) + "\n")


def prepare(model: str, rows: int, folder: pathlib.Path) -> PreparedData:
    """Random rows of a learnable problem, through trimline's own preprocessing."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, rows)
    if model == "mlp":
        x = (rng.normal(size=(rows, 20)) + np.eye(10, 20)[y]).astype("float32")
    else:
        x = rng.integers(0, 128, (rows, 28, 28, 1), dtype=np.uint8)
        x[np.arange(rows), y + 5] += 100
    np.savez(folder / "source.npz", x=x, y=y)
    (folder / "data").mkdir()
    options = PreprocessOptions.model_validate({"splits": {"test": 0, "validation": 0.1, "calibration": 0}})
    source = ArraysSource(kind="arrays", train=str(folder / "source.npz"))
    return preprocess(source, options, folder / "data", task="classification", seed=0, trace=Trace())


def compare(name: str, options: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    data = prepare(name, options.rows, folder)
    arrays = {split: read(data, split) for split in ("train", "validation")}
    steps = data.rows("train") // options.batch
    ways = {"fit": False, "fit-xla": True} if options.xla else {"fit": False}
    taken: dict[str, Seconds] = {"trimline": [], **{way: [] for way in ways}}
    loading: dict[str, Seconds] = {"trimline": [], "from_tensor_slices": []}
    for number in range(options.rounds):
        (folder / f"run-{number}").mkdir()
        taken["trimline"] += through_trimline(name, data, options, folder / f"run-{number}")
        for way, xla in ways.items():
            taken[way] += by_hand(name, data, arrays, options, xla=xla)
        loading["trimline"].append(
            load(make_batches(data, augmentation=Augmentation()).training(options.batch, 0, 0), steps)
        )
        loading["from_tensor_slices"].append(load(usual(arrays["train"], options.batch), steps))
    result: dict[str, Any] = {"steps": steps}
    for place, clock in enumerate(("wall", "processor")):
        per_step = {
            key: statistics.median(each[place] for each in epochs) / steps * 1e6 for key, epochs in taken.items()
        }
        per_batch = {
            key: statistics.median(each[place] for each in all_) / steps * 1e6 for key, all_ in loading.items()
        }
        result[clock] = {
            "us_per_step": per_step,
            "ratio": {way: per_step["trimline"] / per_step[way] for way in ways},
            "us_per_batch_of_data": per_batch,
            "data_ratio": per_batch["trimline"] / per_batch["from_tensor_slices"],
        }
    return {**result, "epoch_seconds": taken}


def clocks() -> tuple[float, float]:
    """Wall and processor time, seconds."""
    return time.perf_counter(), time.process_time()


def between(times: list[tuple[float, float]]) -> Seconds:
    """From each of `times` to the next."""
    return [tuple(each) for each in np.diff(times, axis=0).tolist()]


def through_trimline(name: str, data: PreparedData, options: argparse.Namespace, folder: pathlib.Path) -> Seconds:
    """Seconds of each epoch but the first, from one end of updates to the next: validation and checkpoint between."""
    ends: list[tuple[float, float]] = []

    def progress(done: float, total: float, note: str) -> None:
        if done == int(done):
            ends.append(clocks())

    train(
        TrainOptions(epochs=options.epochs, batch_size=options.batch),
        lambda: build(ModelOptions(name=name), data.spec, seed=0),
        ModelOptions(name=name),
        make_batches(data, augmentation=Augmentation()),
        folder,
        strategy=tf.distribute.get_strategy(),
        seed=0,
        trace=Trace(on_progress=progress),
    )
    return between(ends[: options.epochs])


class _Ends(keras.callbacks.Callback):
    """When the updates of each epoch ended, to cut at the same place as `through_trimline`."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.times = steps, []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if batch == self.steps - 1:
            self.times.append(clocks())


def by_hand(
    name: str,
    data: PreparedData,
    arrays: dict[str, tuple[np.ndarray, np.ndarray]],
    options: argparse.Namespace,
    *,
    xla: bool,
) -> Seconds:
    """Seconds of each epoch but the first, of what one would write without trimline."""
    x, y = arrays["train"]
    steps = len(x) // options.batch
    x, y = x[: steps * options.batch], y[: steps * options.batch]
    model = build(ModelOptions(name=name), data.spec, seed=0)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], jit_compile=xla)
    ends = _Ends(steps)
    model.fit(
        x,
        y,
        batch_size=options.batch,
        epochs=options.epochs,
        validation_data=arrays["validation"],
        validation_batch_size=options.batch,
        callbacks=[ends],
        verbose=0,
    )
    return between(ends.times)


def usual(arrays: tuple[np.ndarray, np.ndarray], batch: int) -> tf.data.Dataset:
    made = tf.data.Dataset.from_tensor_slices(arrays).shuffle(len(arrays[0]), seed=0).repeat()
    return made.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def load(dataset: tf.data.Dataset, steps: int) -> tuple[float, float]:
    """What it takes to draw the second epoch; destroying the iterator, which may wait a second, is not timed."""
    iterator = iter(dataset)
    pull: Callable[[Any], Any] = tf.function(lambda it: _pull(it, steps))
    pull(iterator)
    started = clocks()
    pull(iterator)
    return between([started, clocks()])[0]


def _pull(iterator: Any, steps: int) -> Any:
    seen = tf.constant(0.0)
    for _ in tf.range(steps):
        x, _ = next(iterator)
        seen += tf.reshape(x, [-1])[0]
    return seen


def show(model: str, result: dict[str, Any]) -> None:
    for clock in ("wall", "processor"):
        found = result[clock]
        times = "  ".join(f"{key} {value:.0f}" for key, value in found["us_per_step"].items())
        data = "  ".join(f"{key} {value:.0f}" for key, value in found["us_per_batch_of_data"].items())
        ratio = found["ratio"]["fit"]
        print(
            f"{model:6} {clock:10} us/step: {times}   ratio {ratio:.3f} (bar {BAR}: {'reached' if ratio <= BAR else 'MISSED'})"
        )
        print(f"{'':17} data alone, us/batch: {data}   ratio {found['data_ratio']:.3f}", flush=True)


if __name__ == "__main__":
    main()
