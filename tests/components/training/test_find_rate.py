import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from components.artifacts import DataSpec
from components.errors import ModelError
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.find_rate import HIGHEST, LOWEST, Found, draw, find_rate
from components.training.split import Split

LINEAR = ModelOptions(name="linear")


def line(make_batches, curvature, value=1.0):
    """A noisy y = x w with the loss `curvature` (w - 1)^2: SGD converges below a rate of 1 / curvature, and flies off above."""
    x = np.full((64, 1), math.sqrt(curvature), "float32")
    noise = np.random.default_rng(0).normal(0, 0.3 * math.sqrt(curvature), x.shape).astype("float32")
    spec = DataSpec(task="regression", input_name="x", input_shape=(1,))
    return make_batches(spec, train=(x, x * np.float32(value) + noise))


def build():
    inputs = keras.Input((1,))
    return keras.Model(inputs, keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(inputs), name="line")


def run(batches, trace=None, split=None, **options):
    options = TrainOptions(batch_size=16, optimizer={"name": "sgd", **options})
    strategy = tf.distribute.get_strategy()
    return find_rate(options, build, LINEAR, batches, strategy=strategy, seed=0, trace=trace or Trace(), split=split)


@pytest.mark.parametrize("curvature", [3.0, 30.0])
def test_the_suggestion_is_below_the_rate_at_which_theory_says_that_the_loss_explodes(curvature, make_batches):
    found = run(line(make_batches, curvature), schedule="cosine", warmup_epochs=1)
    limit = 1 / curvature
    assert limit / 100 < found.suggested < limit
    assert limit / 10 < found.at_lowest < 20 * limit  # the moving average lags a little
    assert found.rates[0] == pytest.approx(LOWEST)
    assert found.rates[-1] < HIGHEST  # it ended when the loss exploded
    ratios = np.diff(np.log(found.rates))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert found.losses[0] == pytest.approx(curvature * 1.09, rel=0.5)


def test_a_split_model_is_tested_where_its_layers_are(make_batches, two_devices):
    whole = run(line(make_batches, 3.0))
    ours = run(line(make_batches, 3.0), split=Split(tuple(two_devices), {"dense.*": 1}))
    assert ours.losses == pytest.approx(whole.losses, rel=1e-4)


def test_the_average_is_corrected_for_its_start():
    assert Found([1, 2, 3], [5, 5, 5], [5, 4, 6]).at_lowest == 2
    assert Found([1, 2, 3], [5, 5, 5], [5, 4, 6]).suggested == 0.2


def test_a_loss_that_is_never_finite_is_told(make_batches):
    with pytest.raises(ModelError, match=r"find-rate: the loss of model 'line' is not finite at the first update"):
        run(line(make_batches, 1.0, value=np.inf))


def test_progress_is_told_and_the_picture_drawn(make_batches, tmp_path):
    told = []
    found = run(line(make_batches, 1.0), Trace(on_progress=lambda *a: told.append(a)))
    assert told[0][:2] == (1, 200)
    assert len(told) == len(found.rates)
    draw(found, tmp_path / "rates.png", chosen=1e-3)
    with Image.open(tmp_path / "rates.png") as picture:
        assert picture.size == (1050, 600)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50
