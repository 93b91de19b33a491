"""A small learnable problem and a trained Keras 3 model of it, as the stages before compression leave them."""

import pathlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import Batches, CompressedModel, DataSpec, TrainedModel, write_json
from components.compression.compress import compress
from components.delivery.export import export
from components.options import (
    ChannelsOptions,
    ClusterOptions,
    CompressOptions,
    ExportOptions,
    LowRankOptions,
    PruneOptions,
    QatOptions,
)
from components.recipe import parse_recipe
from components.tracing import Trace

SPEC = DataSpec(task="classification", input_name="image", input_shape=(8, 8, 1), labels=("top", "middle", "bottom"))
OPTIONS = CompressOptions(
    lowrank=LowRankOptions(epochs=2),
    channels=ChannelsOptions(epochs=3, multiple=2),
    prune=PruneOptions(epochs=3, frequency=2),
    cluster=ClusterOptions(epochs=2, clusters=6),
    qat=QatOptions(epochs=2),
)


def draw(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """8 x 8 pictures with a brighter row at the top, in the middle or at the bottom, under noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count).astype(np.int32)
    pictures = random.uniform(0, 0.6, (count, 8, 8, 1)).astype(np.float32)
    pictures[np.arange(count), 1 + 2 * labels] += 0.4
    return pictures, labels


def batches_of(spec: DataSpec, **splits: tuple[np.ndarray, np.ndarray]) -> Batches:
    """Batches over arrays: epoch e depends on (seed, e) only."""

    def training(batch_size: int, seed: int, first_epoch: int) -> tf.data.Dataset:
        x, y = splits["train"]

        def epochs():
            epoch = first_epoch
            while True:
                order = np.random.default_rng([seed, epoch]).permutation(len(x))
                for start in range(0, len(x) - batch_size + 1, batch_size):
                    rows = order[start : start + batch_size]
                    yield x[rows], y[rows]
                epoch += 1

        signature = tuple(tf.TensorSpec((batch_size, *each.shape[1:]), each.dtype) for each in (x, y))
        return tf.data.Dataset.from_generator(epochs, output_signature=signature)

    def ordered(split: str, batch_size: int) -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices(splits[split]).batch(batch_size)

    rows = {name: len(splits[name][0]) if name in splits else 0 for name in ("train", "validation")}
    return Batches(spec=spec, training=training, ordered=ordered, rows=rows)


def small_model() -> keras.Model:
    """Convolutions with and without normalization, a residual sum, a 1 x 1 kernel, a depthwise one, dropout, dense."""
    layers = keras.layers
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(image)
    x = layers.ReLU(name="stem_relu")(layers.BatchNormalization(momentum=0.9, name="stem_norm")(x))
    y = layers.Conv2D(8, 3, padding="same", use_bias=False, name="inner")(x)
    y = layers.BatchNormalization(momentum=0.9, name="inner_norm")(y)
    x = layers.ReLU(name="sum_relu")(layers.Add(name="sum")([x, y]))
    x = layers.ReLU(name="point_relu")(layers.Conv2D(16, 1, name="point")(x))
    x = layers.DepthwiseConv2D(3, name="depth")(x)
    x = layers.Dropout(0.1, name="dropout")(layers.Flatten(name="flatten")(x))
    x = layers.Dense(16, activation="relu", name="hidden")(x)
    return keras.Model(image, layers.Dense(3, name="logits")(x), name="small")


def scrambled(model: keras.Model) -> keras.Model:
    """With weights that no two layers share; variances positive."""
    random = np.random.default_rng(0)
    for weight in model.weights:
        low = 0.5 if "variance" in weight.path else -0.5
        weight.assign(random.uniform(low, 1.0, weight.shape))
    return model


def small_batches() -> Batches:
    return batches_of(SPEC, train=draw(192, 0), validation=draw(60, 1))


def trained(folder: pathlib.Path, model: keras.Model, outputs: str = "logits") -> TrainedModel:
    """`model` as the train stage leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "model.keras")
    write_json(folder / "trained.json", {"outputs": outputs})
    return TrainedModel(folder)


def train_small(folder: pathlib.Path) -> TrainedModel:
    """The small model, good at its task."""
    keras.utils.set_random_seed(0)
    model = small_model()
    model.compile(keras.optimizers.Adam(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*draw(192, 0), batch_size=32, epochs=10, verbose=0)
    return trained(folder, model)


def write_int8(model: Any, rows: np.ndarray, outputs: int, folder: pathlib.Path) -> pathlib.Path:
    """The int8 file of a model with logits, calibrated on `rows` where it brings no ranges; its input is called x."""
    spec = DataSpec(
        task="classification", input_name="x", input_shape=rows.shape[1:], labels=tuple(map(str, range(outputs)))
    )
    exact = ExportOptions(short_scales=False)  # so that the file can be held against what was trained
    return export("qat", "int8", model, spec, "logits", exact, rows, folder, seed=0, trace=Trace()).file


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """The small model, trained once."""
    return train_small(tmp_path_factory.mktemp("train"))


@pytest.fixture(scope="session")
def batches() -> Batches:
    return small_batches()


@pytest.fixture(scope="session")
def calibration() -> np.ndarray:
    return draw(64, 2)[0]


def carry_out(
    recipe: str, folder: pathlib.Path, base: TrainedModel, batches: Batches, done: dict[str, CompressedModel], **more
) -> CompressedModel:
    """Every training step of `recipe` that is not in `done` yet."""
    given = {"options": OPTIONS, "strategy": tf.distribute.get_strategy(), "seed": 3, "trace": Trace()} | more
    options, made = given.pop("options"), None
    for path in parse_recipe(recipe, OPTIONS.strengths).prefixes():
        name = "+".join(map(str, path))
        if name not in done:
            (folder / name).mkdir(parents=True, exist_ok=True)
            done[name] = compress(path[-1], path, options, base, made, batches, folder / name, batch_size=32, **given)
        made = done[name]
    assert made is not None
    return made


@pytest.fixture(scope="session")
def compressed(
    tmp_path_factory: pytest.TempPathFactory, base: TrainedModel, batches: Batches
) -> Callable[[str], CompressedModel]:
    """recipe -> the finished artifact, each step carried out once for all tests."""
    folder, done = tmp_path_factory.mktemp("compress"), {}
    return lambda recipe: carry_out(recipe, folder, base, batches, done)
