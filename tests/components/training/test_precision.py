import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training import maker, precision
from components.training.loop import Loop
from components.training.model import build
from components.training.precision import Choice, choose, computed_in, measured, multiply_adds
from components.training.train import train

DEFAULT = tf.distribute.get_strategy()


def policies(model):
    return {layer.name: layer.dtype_policy.name for layer in model.layers if layer.weights}


@pytest.fixture
def network():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Rescaling(2.0, name="rescale")(inputs)
    x = keras.layers.Conv2D(4, 3, name="first")(x)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = keras.layers.Conv2D(4, 3, name="mine", dtype="float64")(x)
    x = keras.layers.Dense(5, name="hidden")(keras.layers.Flatten()(x))
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def test_what_lies_between_the_ends_computes_in_it_inside_the_block_only(network):
    before = policies(network)
    with computed_in(network, "mixed_bfloat16", "CPU"):
        assert policies(network) == {
            "first": "mixed_bfloat16",
            "norm": "mixed_bfloat16",
            "depthwise": "float32",  # slow in bfloat16 on a CPU
            "mine": "float64",
            "hidden": "mixed_bfloat16",
            "logits": "float32",
        }
        assert network.get_layer("rescale").dtype_policy.name == "float32"
        assert all(variable.dtype == "float32" for variable in network.get_layer("first").variables)
        assert network(np.ones((2, 8, 8, 1), "float32")).dtype == tf.float32
    assert policies(network) == before
    with computed_in(network, "mixed_float16", "GPU"):
        assert policies(network)["depthwise"] == "mixed_float16"


def test_a_model_of_one_kernel_has_nothing_between():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with computed_in(model, "mixed_bfloat16", "CPU"):
        assert [layer.dtype_policy.name for layer in model.layers] == ["float32"]


def test_multiply_adds_are_those_counted_by_hand():
    inputs = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(4, 3, strides=2, padding="same")(inputs)
    inner = keras.Sequential([keras.Input((4, 4, 4)), keras.layers.DepthwiseConv2D(3, padding="same")])
    x = keras.layers.Dense(5)(keras.layers.Flatten()(inner(x)))
    assert multiply_adds(keras.Model(inputs, x)) == 16 * 9 * 2 * 4 + 16 * 9 * 4 + 64 * 5
    steps = keras.Input((7, 3))
    assert multiply_adds(keras.Model(steps, keras.layers.LSTM(2)(steps))) == 7 * (3 * 8 + 2 * 8)


def clocks(**seconds):
    return lambda name: lambda: seconds[name]


def test_another_precision_is_taken_only_where_it_is_clearly_faster():
    slower = measured(["float32", "mixed_bfloat16"], clocks(float32=0.010, mixed_bfloat16=0.030))
    assert slower.precision == "float32"
    near = measured(["float32", "mixed_bfloat16"], clocks(float32=0.0114, mixed_bfloat16=0.010))
    assert str(near) == (
        "float32 (no other is 1.15 times as fast; an update took float32 11.4 ms, mixed_bfloat16 10.0 ms)"
    )
    faster = measured(["float32", "mixed_bfloat16"], clocks(float32=0.025, mixed_bfloat16=0.010))
    assert str(faster) == (
        "mixed_bfloat16 (2.50 times as fast as float32; an update took float32 25.0 ms, mixed_bfloat16 10.0 ms)"
    )
    assert faster.milliseconds == {"float32": 25.0, "mixed_bfloat16": 10.0}


def test_one_slow_round_of_five_decides_nothing():
    times = {"float32": iter([0.02, 0.02, 0.5, 0.02, 0.02]), "mixed_bfloat16": iter([0.01, 0.01, 0.01, 0.01, 0.9])}
    assert measured(list(times), lambda name: lambda: next(times[name])).precision == "mixed_bfloat16"


def untimed(name):
    raise AssertionError("nothing is to be timed")


def test_what_the_user_says_and_what_a_tpu_has_is_not_measured(network, tmp_path):
    said = choose(TrainOptions(precision="mixed_float16"), network, 10**9, "CPU", untimed, tmp_path)
    assert str(said) == "mixed_float16 (as train.precision says)"
    assert choose(TrainOptions(), network, 10**9, "TPU", untimed, tmp_path).precision == "mixed_bfloat16"


def test_short_trainings_and_models_of_one_kernel_stay_in_float32_unmeasured(network, tmp_path):
    short = choose(TrainOptions(), network, 1000, "CPU", untimed, tmp_path)
    assert short == Choice("float32", "too short a training to measure another")
    single = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert choose(TrainOptions(), single, 10**15, "CPU", untimed, tmp_path).precision == "float32"


def test_a_measured_choice_holds_for_all_attempts_at_a_training(network, tmp_path):
    first = choose(TrainOptions(), network, 10**12, "CPU", clocks(float32=0.03, mixed_bfloat16=0.01), tmp_path)
    assert first.precision == "mixed_bfloat16"
    assert json.loads((tmp_path / precision.CHOICE).read_text())["precision"] == "mixed_bfloat16"
    assert choose(TrainOptions(), network, 10**12, "CPU", untimed, tmp_path) == first


def run(folder, options, batches, model, **arguments):
    folder.mkdir(exist_ok=True)
    return train(
        options,
        lambda: build(model, batches.spec, seed=3),
        model,
        batches,
        folder,
        strategy=DEFAULT,
        seed=3,
        **arguments,
    )


@pytest.mark.parametrize("name", ["mixed_bfloat16", pytest.param("mixed_float16", marks=pytest.mark.slow)])
def test_a_model_trained_in_reduced_precision_learns_and_is_saved_as_a_float32_one(name, pictures, tmp_path):
    model = ModelOptions(name="resnet8", options={"filters": 8})
    options = TrainOptions(epochs=10, batch_size=16, precision=name, optimizer={"learning_rate": 0.003})
    told = []
    made = run(tmp_path, options, pictures, model, trace=Trace(on_telling=told.append))
    assert made.facts["precision"] == name
    assert made.facts["validation"]["accuracy"] > 0.8
    assert told[:1] == [f"precision: {name} (as train.precision says); 7 batch normalizations on the fused kernel"]
    loaded = keras.saving.load_model(made.file)
    assert {layer.dtype_policy.name for layer in loaded.layers} == {"float32"}
    x, y = next(iter(pictures.ordered("validation", 50)))
    # Judged in float32 now: within a row or two of what was told.
    assert np.mean(loaded(x).numpy().argmax(1) == y) == pytest.approx(made.facts["validation"]["accuracy"], abs=0.05)


def test_measuring_leaves_no_trace_in_the_weights(pictures, tmp_path, monkeypatch):
    model = ModelOptions(name="cnn", options={"filters": [8, 8], "dropout": 0.3})
    options = TrainOptions(epochs=2, batch_size=32)
    plain = run(tmp_path / "plain", options, pictures, model, trace=Trace())
    monkeypatch.setattr(precision, "WORTH_MEASURING", 0)
    monkeypatch.setattr(precision, "WORTH_CHANGING", 1e9)  # measured, and never changed
    told, made = [], []
    monkeypatch.setattr(maker, "Loop", lambda *a, **k: made.append(Loop(*a, **k)) or made[-1])
    timed = run(tmp_path / "timed", options, pictures, model, trace=Trace(on_telling=told.append))
    assert "no other is" in told[0]
    assert len(made) == 2  # of the two that were compiled for measuring, one trains
    for ours, theirs in zip(
        *(keras.saving.load_model(each.file).get_weights() for each in (plain, timed)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert not (tmp_path / "timed" / precision.CHOICE).exists()


@pytest.mark.parametrize(
    ("kind", "wanted", "compiled"),
    [("CPU", "auto", False), ("GPU", "auto", True), ("CPU", True, True), ("GPU", False, False), ("TPU", True, False)],
)
def test_xla_is_asked_for_on_gpus_and_never_twice(monkeypatch, tmp_path, kind, wanted, compiled):
    """On a TPU the strategy compiles whatever it runs."""
    monkeypatch.setattr(maker.Maker, "kind", property(lambda self: kind))
    given = dict.fromkeys(("model", "variables", "batches", "strategy", "lesson"))
    made = maker.Maker(options=TrainOptions(xla=wanted), steps=1, outputs="logits", seed=0, folder=tmp_path, **given)
    assert made._xla is compiled
