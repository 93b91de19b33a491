"""Trains in a process of its own, so that a test can kill it: python -m killed FOLDER DIE_AT.

The repository's root and this folder are on PYTHONPATH. DIE_AT is the epoch (with a fraction) at which the process
kills itself with SIGKILL; at 0 it lives.
"""

import functools
import os
import pathlib
import signal
import sys

import numpy as np
import tensorflow as tf
from conftest import batches_of, draw_pictures

from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.model import build
from components.training.train import train

OPTIONS = TrainOptions(
    epochs=5,
    batch_size=32,
    optimizer={"name": "adamw", "weight_decay": 1e-3, "schedule": "cosine", "warmup_epochs": 1, "learning_rate": 0.01},
    early_stopping={"patience": 4},
)
MODEL = ModelOptions(name="cnn", options={"filters": [8, 8], "dropout": 0.3})


def main(folder: pathlib.Path, die_at: float) -> None:
    def progress(done: float, total: float, note: str) -> None:
        if die_at and done >= die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    batches = batches_of(**draw_pictures())
    builder = functools.partial(build, MODEL, batches.spec, seed=3)
    trace = Trace(on_progress=progress, on_warning=print)
    made = train(OPTIONS, builder, MODEL, batches, folder, strategy=tf.distribute.get_strategy(), seed=3, trace=trace)
    weights = build(ModelOptions(file=str(made.file)), batches.spec, seed=0).get_weights()
    np.savez(folder / "weights.npz", *weights)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), float(sys.argv[2]))
