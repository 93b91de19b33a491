"""Trains a small model on a GPU, or beside it on the processor, and prints what came of it: python -m on_gpu FOLDER WANTED.

WANTED, as JSON: "options" of training; "model": 'cnn', 'mlp', 'wide' or 'deep', the large one of `peak`; "devices": how many logical GPUs the
first GPU is cut into, 0 for the processor; "strategy": its name. Printed, as JSON: "weights", "loss" by epoch, "said": the memory that the training told, "memory": the peak of each
logical GPU in bytes after the first update, in which XLA tries kernels in memory of their own.
"""

import json
import pathlib
import sys

import keras
import numpy as np
import peak
import tensorflow as tf
from conftest import batches_of, draw_pictures

from components.artifacts import DataSpec
from components.options import ModelOptions, StrategyOptions, TrainOptions
from components.tracing import Trace
from components.training.model import build
from components.training.train import train
from pipeline.strategy import make_split, make_strategy

MEBIBYTES = 4096  # of each logical GPU
MODELS = {
    "cnn": ModelOptions(name="cnn", options={"filters": [8, 8]}),
    "mlp": ModelOptions(name="mlp", options={"units": [256, 128]}),
    "wide": ModelOptions(name="mlp", options={"units": [4096] * 9}),
    "deep": ModelOptions(builder="peak:build"),
}


def main(folder: str, wanted: dict) -> None:
    count = wanted["devices"]
    gpus = tf.config.list_physical_devices("GPU")
    tf.config.set_visible_devices(gpus[:1] if count else [], "GPU")
    if count:
        parts = [tf.config.LogicalDeviceConfiguration(memory_limit=MEBIBYTES)] * count
        tf.config.set_logical_device_configuration(gpus[0], parts)
    tf.config.experimental.enable_tensor_float_32_execution(False)  # else products agree to three digits only
    model, fresh = MODELS[wanted["model"]], list(range(count))

    def forget(*_: object) -> None:
        while fresh:
            tf.config.experimental.reset_memory_stats(f"GPU:{fresh.pop()}")

    data = large_pictures() if wanted["model"] == "deep" else draw_pictures()
    batches = batches_of(**data)
    options = StrategyOptions(name=wanted["strategy"], devices=count if wanted["strategy"] != "default" else None)
    made = train(
        TrainOptions.model_validate(wanted["options"]),
        peak.build if wanted["model"] == "deep" else lambda: build(model, batches.spec, seed=0),
        model,
        batches,
        pathlib.Path(folder),
        strategy=make_strategy(options),
        seed=0,
        trace=Trace(on_progress=forget),
        split=make_split(options),
    )
    memory = [tf.config.experimental.get_memory_info(f"GPU:{place}")["peak"] for place in range(count)]
    weights = keras.saving.load_model(made.file).get_weights()
    found = {
        "weights": [each.ravel()[:1000].tolist() for each in weights],
        "loss": json.loads((made.folder / "history.json").read_text())["loss"],
        "memory": memory,
        "said": made.facts["speed"]["memory_bytes"],
    }
    print(json.dumps(found))


def large_pictures() -> dict:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(256, 128, 128, 1)).astype("float32"), rng.integers(0, 2, 256).astype("int32")
    spec = DataSpec(task="classification", input_name="x", input_shape=(128, 128, 1), labels=("a", "b"))
    return {"spec": spec, "train": (x, y), "validation": (x[:2], y[:2])}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
