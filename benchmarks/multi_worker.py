"""What training through trimline costs per step under MultiWorkerMirroredStrategy, against a hand-written loop under it.

    .venv/bin/python benchmarks/multi_worker.py                   # two processes over loopback, some minutes on two cores

Bar: at most 1.05x of the plain loop per step, after the first epoch. The plain loop is the usual one: a `tf.function` of one
step around `strategy.run`, the loss reduced each step, data dealt out by `experimental_distribute_dataset`. Ours counts
all that an epoch costs, its checkpoint too; there is no validation split. Both run in the same two processes, interleaved,
and a ratio is that of the medians over all epochs but the first of each round. The ratio of processor time (of worker 0) is
told beside that of wall time.

Also printed: examples per second of two workers and of one process by itself on this host. They share its cores, so that two
are slower here; what is seen is what the team costs, not what more machines would give.
"""

import argparse
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

OUT = pathlib.Path(__file__).resolve().parent / "out"
BAR = 1.05
WAYS = ("trimline", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_000)
    parser.add_argument("--batch", type=int, default=128, help="global")
    parser.add_argument("--epochs", type=int, default=3, help="per round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)  # given to the processes
    options = parser.parse_args()
    if options.folder is not None:
        work(options, options.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.folder = pathlib.Path(folder)
        prepare(options)
        two, alone = start(options, 2), start(options, 1)
    result = summary(options, two, alone)
    for clock in ("wall", "processor"):
        found = result[clock]
        times = "  ".join(f"{way} {found['us_per_step'][way]:.0f}" for way in WAYS)
        reached = "reached" if found["ratio"] <= BAR else "MISSED"
        print(f"{options.model:6} {clock:10} us/step: {times}   ratio {found['ratio']:.3f} (bar {BAR}: {reached})")
    speed = result["examples_per_second"]
    print(f"{'':6} examples/s: two workers {speed['two_workers']:.0f}, one process {speed['one_process']:.0f}")
    OUT.mkdir(exist_ok=True)
    told = {name: value for name, value in vars(options).items() if name != "folder"}
    report = {"bar": BAR, "options": told, "cores": os.cpu_count(), "results": result}
    (OUT / "multi_worker.json").write_text(json.dumps(report, indent=1) + "\n")


def prepare(options: argparse.Namespace) -> None:
    """Random pictures of a learnable problem, through trimline's own preprocessing."""
    import numpy as np

    from components.data.preprocess import preprocess
    from components.options import ArraysSource, PreprocessOptions
    from components.tracing import Trace

    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, options.rows)
    x = rng.integers(0, 128, (options.rows, 28, 28, 1), dtype=np.uint8)
    x[np.arange(options.rows), y + 5] += 100
    np.savez(options.folder / "source.npz", x=x, y=y)
    (options.folder / "data").mkdir()
    chosen = PreprocessOptions.model_validate({"splits": {"test": 0, "validation": 0, "calibration": 0}})
    source = ArraysSource(kind="arrays", train=str(options.folder / "source.npz"))
    preprocess(source, chosen, options.folder / "data", task="classification", seed=0, trace=Trace())


def start(options: argparse.Namespace, workers: int) -> dict[str, Any]:
    """Runs the processes; returns what number 0 measured."""
    sockets = [socket.socket() for _ in range(workers)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    addresses = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    own = ("rows", "batch", "epochs", "rounds", "model", "folder")
    command = [sys.executable, __file__, *(f"--{name}={getattr(options, name)}" for name in own)]
    running = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        more = {"TF_CONFIG": json.dumps(task)} if workers > 1 else {}
        running.append(subprocess.Popen(command, env={**os.environ, **more}))
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit("a worker failed; its message is above.")
    return json.loads((options.folder / f"times-{workers}.json").read_text())


def work(options: argparse.Namespace, folder: pathlib.Path) -> None:
    """One process: both ways by turns, under one strategy."""
    import tensorflow as tf

    task = json.loads(os.environ.get("TF_CONFIG", '{"cluster": {"worker": [""]}, "task": {"index": 0}}'))
    index, workers = task["task"]["index"], len(task["cluster"]["worker"])
    strategy = tf.distribute.MultiWorkerMirroredStrategy() if workers > 1 else tf.distribute.get_strategy()
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            times["trimline"] += through_trimline(options, folder, pathlib.Path(scratch), strategy, (index, workers))
        times["plain"] += by_hand(options, folder, strategy, number)
    if index == 0:
        (folder / f"times-{workers}.json").write_text(json.dumps(times))


def clocks() -> tuple[float, float]:
    """Wall and processor time, seconds."""
    return time.perf_counter(), time.process_time()


def between(times: list[tuple[float, float]]) -> list[list[float]]:
    """From each of `times` to the next."""
    return [
        [later - earlier for earlier, later in zip(a, b, strict=True)] for a, b in zip(times, times[1:], strict=False)
    ]


def through_trimline(
    options: argparse.Namespace, folder: pathlib.Path, scratch: pathlib.Path, strategy: Any, place: tuple[int, int]
) -> list[list[float]]:
    """Seconds of each epoch but the first, from one end of updates to the next: the checkpoint lies between."""
    from components.artifacts import PreparedData, Share
    from components.data.dataset import make_batches
    from components.options import Augmentation, ModelOptions, TrainOptions
    from components.tracing import Trace
    from components.training.model import build
    from components.training.train import train

    data, ends = PreparedData(folder / "data"), []

    def progress(done: float, total: float, note: str) -> None:
        if done == int(done):
            ends.append(clocks())

    train(
        TrainOptions(epochs=options.epochs, batch_size=options.batch),
        lambda: build(ModelOptions(name=options.model), data.spec, seed=0),
        ModelOptions(name=options.model),
        make_batches(data, augmentation=Augmentation(), share=Share(*place)),
        scratch,
        strategy=strategy,
        seed=0,
        trace=Trace(on_progress=progress),
    )
    return between(ends[: options.epochs])


def by_hand(options: argparse.Namespace, folder: pathlib.Path, strategy: Any, seed: int) -> list[list[float]]:
    """Seconds of each epoch but the first, of what one would write without trimline."""
    import keras
    import tensorflow as tf

    from components.artifacts import PreparedData
    from components.data.dataset import read
    from components.options import ModelOptions
    from components.training.model import build

    data = PreparedData(folder / "data")
    x, y = read(data, "train")
    steps = len(x) // options.batch
    made = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(len(x), seed=seed).repeat()
    iterator = iter(
        strategy.experimental_distribute_dataset(
            made.batch(options.batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        )
    )
    with strategy.scope():
        model = build(ModelOptions(name=options.model), data.spec, seed=0)
        optimizer = keras.optimizers.Adam(1e-3)
        optimizer.build(model.trainable_variables)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            each = keras.losses.sparse_categorical_crossentropy(y, model(x, training=True), from_logits=True)
            loss = tf.reduce_sum(each) / options.batch
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    @tf.function
    def advance(iterator: Any) -> Any:
        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(step, args=next(iterator)), axis=None)

    ends = []
    for _ in range(options.epochs):
        total = 0.0
        for _ in range(steps):
            total += advance(iterator)
        float(total)
        ends.append(clocks())
    return between(ends)


def summary(options: argparse.Namespace, two: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    steps = options.rows // options.batch
    result: dict[str, Any] = {"steps": steps, "epoch_seconds": {"two_workers": two, "one_process": alone}}
    for place, clock in enumerate(("wall", "processor")):
        taken = {way: statistics.median(each[place] for each in two[way]) / steps * 1e6 for way in WAYS}
        result[clock] = {"us_per_step": taken, "ratio": taken["trimline"] / taken["plain"]}
    speed = {
        name: options.batch * steps / statistics.median(each[0] for each in times["trimline"])
        for name, times in (("two_workers", two), ("one_process", alone))
    }
    return {**result, "examples_per_second": speed}


if __name__ == "__main__":
    main()
