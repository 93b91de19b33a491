"""Trains in a process of its own that kills itself: python -m killed FOLDER EPOCH MODEL OPTIONS, the last two as JSON.

The repository's root and this folder are on PYTHONPATH; EPOCH may have a fraction.
"""

import functools
import os
import pathlib
import signal
import sys

import tensorflow as tf
from conftest import batches_of, draw_pictures

from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.model import build
from components.training.train import train


def main(folder: str, epoch: str, model: str, options: str) -> None:
    def progress(done: float, total: float, note: str) -> None:
        if done >= float(epoch):
            os.kill(os.getpid(), signal.SIGKILL)

    batches = batches_of(**draw_pictures())
    chosen = ModelOptions.model_validate_json(model)
    train(
        TrainOptions.model_validate_json(options),
        functools.partial(build, chosen, batches.spec, seed=3),
        chosen,
        batches,
        pathlib.Path(folder),
        strategy=tf.distribute.get_strategy(),
        seed=3,
        trace=Trace(on_progress=progress),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
