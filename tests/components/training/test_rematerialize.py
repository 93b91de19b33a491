import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.errors import ModelError
from components.training.precision import computed_in
from components.training.rematerialize import rematerialized

HERE = pathlib.Path(__file__).parent


def build():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((16, 8))
    x = keras.layers.Dense(16, "gelu", name="hidden")(inputs)
    x = keras.layers.Add()([x, keras.layers.MultiHeadAttention(2, 8, name="attention")(x, value=x)])
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.MultiHeadAttention(2, 8, dropout=0.1, name="random")(x, x)
    x = keras.Sequential([keras.Input((16, 16)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(8)], name="block")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="out")(keras.layers.GlobalAveragePooling1D()(x)))


def gradients(model, x, xla=False):
    @tf.function(jit_compile=xla)
    def compute(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x, training=True) ** 2)
        return [loss, *tape.gradient(loss, model.trainable_variables)]

    return [tf.convert_to_tensor(each).numpy() for each in compute(tf.constant(x))]  # of an embedding: some rows


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-6), ("mixed_bfloat16", 0.02)])
def test_gradients_are_the_same_and_layers_with_state_are_left_alone(tmp_path, xla, precision, tolerance):
    x = np.random.default_rng(0).normal(size=(4, 16, 8)).astype("float32")
    usual, model = build(), build()
    with computed_in(usual, precision, "CPU"):
        usual = gradients(usual, x, xla)
    with rematerialized(model) as names, computed_in(model, precision, "CPU"):
        assert names == ["hidden", "attention", "block", "out"]
        again = gradients(model, x, xla)
    for ours, theirs in zip(again, usual, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=tolerance * max(1.0, np.abs(theirs).max()))
    assert all("call" not in vars(layer) for layer in model.layers)
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(x), model(x))


@pytest.mark.parametrize("xla", [False, True])
def test_masks_and_whole_numbers_are_computed_with_again(xla):
    def build():
        keras.utils.set_random_seed(1)
        words = keras.Input((7,), dtype="int32")
        x = keras.layers.Embedding(10, 4, mask_zero=True)(words)
        x = keras.layers.MultiHeadAttention(2, 4)(x, x)
        return keras.Model(words, keras.layers.Dense(2)(keras.layers.GRU(3)(x)))

    words = np.random.default_rng(0).integers(0, 10, (4, 7))
    usual, model = gradients(build(), words, xla), build()
    with rematerialized(model) as names:
        assert len(names) == 3  # the GRU has a random state
        again = gradients(model, words, xla)
    for ours, theirs in zip(again, usual, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_model_whose_layers_all_have_state_is_refused():
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()], name="stateful")
    message = r"train\.rematerialize: every layer of model 'stateful' .*; drop the option\."
    with pytest.raises(ModelError, match=message), rematerialized(model):
        pass


@pytest.mark.slow  # five processes
def test_parts_and_computing_again_need_less_memory(tmp_path):
    def peak(**more):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        environment = os.environ | {"PYTHONPATH": f"{HERE.parents[2]}{os.pathsep}{HERE}"}
        command = [sys.executable, "-m", "peak", folder, json.dumps({"epochs": 1, "batch_size": 32, **more})]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    plain = peak()
    assert peak(accumulate=8) < 0.5 * plain
    assert peak(rematerialize=True) < 0.75 * plain
    assert peak(xla=True, rematerialize=True) < 0.75 * peak(xla=True)
