"""Prints by how many bytes the memory of this process grew at most while it trained: python -m peak FOLDER OPTIONS.

The repository's root and this folder are on PYTHONPATH; OPTIONS are those of training, as JSON.
"""

import pathlib
import sys

import keras
import numpy as np
import tensorflow as tf
from conftest import batches_of

from components.artifacts import DataSpec
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.train import train


def build() -> keras.Model:
    """Few weights and large activations, in blocks that are models of their own."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((128, 128, 1))
    for _ in range(6):
        block = keras.Sequential([keras.Input(x.shape[1:])])
        for _ in range(3):
            block.add(keras.layers.Conv2D(8, 3, padding="same", activation="tanh"))
        x = block(x)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))


def kilobytes(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def main(folder: str, options: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 128, 128, 1)).astype("float32"), rng.integers(0, 2, 32).astype("int32")
    spec = DataSpec(task="classification", input_name="x", input_shape=(128, 128, 1), labels=("a", "b"))
    batches = batches_of(spec, train=(x, y), validation=(x[:2], y[:2]))
    before = kilobytes("VmRSS")
    train(
        TrainOptions.model_validate_json(options),
        build,
        ModelOptions(builder="peak:build"),
        batches,
        pathlib.Path(folder),
        strategy=tf.distribute.get_strategy(),
        seed=0,
        trace=Trace(),
    )
    print((kilobytes("VmHWM") - before) * 1024)


if __name__ == "__main__":
    main(*sys.argv[1:])
