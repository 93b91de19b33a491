"""Data of the training tests: a small learnable problem, held in memory."""

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import Batches, DataSpec


def batches_of(spec: DataSpec, **splits: tuple[np.ndarray, np.ndarray]) -> Batches:
    """Batches over arrays, with the promises of `components.data.dataset`."""

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

    def rows_of(batch_size: int, seed: int, epoch: int, step: int) -> np.ndarray:
        order = np.random.default_rng([seed, epoch]).permutation(len(splits["train"][0]))
        return order[step * batch_size : (step + 1) * batch_size]

    rows = {name: len(splits[name][0]) if name in splits else 0 for name in ("train", "validation")}
    return Batches(spec=spec, training=training, ordered=ordered, rows=rows, rows_of=rows_of)


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    return batches_of


def draw_pictures() -> dict:
    """Three classes of 8 x 8 pictures: a brighter row at the top, in the middle or at the bottom, under noise."""
    spec = DataSpec(
        task="classification", input_name="image", input_shape=(8, 8, 1), labels=("top", "middle", "bottom")
    )
    rng = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 3, count).astype(np.int32)
        x = rng.uniform(0, 0.6, (count, 8, 8, 1)).astype(np.float32)
        x[np.arange(count), 1 + 2 * y] += 0.4
        return x, y

    return {"spec": spec, "train": draw(192), "validation": draw(50)}


@pytest.fixture
def pictures() -> Batches:
    return batches_of(**draw_pictures())
