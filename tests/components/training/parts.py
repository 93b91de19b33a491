"""Memory of each device: a training whose devices are processes of their own, so that the kernel tells what each one needs.

    python -m parts FOLDER DEVICES      prints the peak of each device in bytes above its idle state, as JSON

One device has all layers; two or four share them as `Split` without a layout cuts them.
"""

import json
import os
import pathlib
import socket
import subprocess
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np
import tensorflow as tf
from conftest import batches_of

from components.artifacts import DataSpec
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.split import Split
from components.training.train import train

JOB, WIDTH, LAYERS, ROWS = "part", 1536, 8, 2048


def main(folder: pathlib.Path, count: int) -> None:
    addresses = [f"127.0.0.1:{_port()}" for _ in range(count)]
    servers = [_start(addresses, index) for index in range(count)]
    try:
        tf.config.experimental_connect_to_cluster(tf.train.ClusterSpec({JOB: addresses}))
        idle = [_peak(each) for each in servers]
        _train(folder, [f"/job:{JOB}/replica:0/task:{index}/device:CPU:0" for index in range(count)])
        print(json.dumps([_peak(each) - before for each, before in zip(servers, idle, strict=True)]))
    finally:
        for each in servers:
            each.kill()


def serve(addresses: list[str], index: int) -> None:
    server = tf.distribute.Server(tf.train.ClusterSpec({JOB: addresses}), job_name=JOB, task_index=index)
    print("ready", flush=True)
    server.join()


def _build() -> keras.Model:
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Dense(WIDTH, "relu") for _ in range(LAYERS)]
    return keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(3)])


def _train(folder: pathlib.Path, devices: list[str]) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2 * ROWS, 64)).astype("float32"), rng.integers(0, 3, 2 * ROWS).astype("int32")
    spec = DataSpec(task="classification", input_name="features", input_shape=(64,), labels=("a", "b", "c"))
    train(
        TrainOptions(epochs=1, batch_size=ROWS),
        _build,
        ModelOptions(builder="a:b"),
        batches_of(spec, train=rows, validation=tuple(each[:64] for each in rows)),
        folder,
        strategy=tf.distribute.get_strategy(),
        seed=1,
        trace=Trace(),
        split=Split(tuple(devices)),
    )


def _start(addresses: list[str], index: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "parts", "serve", json.dumps(addresses), str(index)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout.readline() == "ready\n"
    return server


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _peak(process: subprocess.Popen) -> int:
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(json.loads(sys.argv[2]), int(sys.argv[3]))
    else:
        main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
