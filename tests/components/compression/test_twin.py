import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tf_keras
from keras import layers

from components.compression import twin as twins
from components.compression.twin import from_twin, same_kernels, to_twin
from components.errors import ModelError

from .conftest import scrambled


def convolutions() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((9, 9, 3)),
            layers.Rescaling(2.0, -1.0),
            layers.ZeroPadding2D(1),
            layers.Conv2D(4, 3, strides=2, activation="silu", kernel_regularizer="l2", kernel_constraint="max_norm"),
            layers.BatchNormalization(epsilon=1e-3, momentum=0.9),
            layers.LeakyReLU(0.1),
            layers.SeparableConv2D(5, 3, padding="same", activation="relu6"),
            layers.DepthwiseConv2D(2, depth_multiplier=2),
            layers.Conv2DTranspose(3, 2, strides=2),
            layers.MaxPooling2D(),
            layers.Dropout(0.2),
            layers.GlobalAveragePooling2D(keepdims=True),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )


def two_ways_in_and_out() -> keras.Model:
    a, b = keras.Input((8, 8, 3), name="a"), keras.Input((4,), name="b")
    picture = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(2, 3, name="first"), layers.Flatten()], name="p")
    table = keras.Sequential([layers.Dense(4, name="first"), layers.ReLU(6.0)], name="t")
    shared = layers.Dense(4, name="shared")
    x = layers.Concatenate()([picture(a), shared(table(b)) + shared(b)])
    return keras.Model([a, b], [layers.Dense(2)(x), keras.ops.mean(x * 2.0 + 1, axis=-1, keepdims=True)])


def sequences() -> keras.Model:
    words = keras.Input((7,), dtype="int32")
    x = layers.Embedding(10, 4, mask_zero=True)(words)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    return keras.Model(words, layers.Dense(2)(layers.GRU(4)(x)))


def attention() -> keras.Model:
    rows = keras.Input((7, 6))
    x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 3)(rows, rows) + rows)
    x = layers.Conv1D(3, 3, padding="causal", activation="gelu")(layers.TimeDistributed(layers.Dense(3))(x))
    scale = layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[1.0, 4.0, 9.0])
    return keras.Model(rows, scale(layers.GlobalMaxPooling1D()(x)))


def activations() -> keras.Model:
    x = rows = keras.Input((6,))
    for name in ("hard_silu", "hard_sigmoid", "relu6", "leaky_relu", "elu", "gelu", "log_softmax", "hard_tanh"):
        x = layers.Dense(6, activation=name)(x)
        x = layers.Activation(name)(x)
    return keras.Model(rows, x)


MODELS = [convolutions, two_ways_in_and_out, sequences, attention, activations]


@pytest.mark.parametrize("build", MODELS)
def test_a_twin_gives_the_same_outputs_and_its_weights_come_back(build):
    model = scrambled(build())
    examples = twins._examples(model)
    feed = examples if len(examples) > 1 else examples[0]
    twin = to_twin(model)
    for ours, theirs in zip(keras.tree.flatten(model(feed)), keras.tree.flatten(twin(feed)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

    for variable in twin.variables:
        variable.assign(variable + 1)
    before = model.get_weights()
    made = from_twin(twin, model)
    constants = sum(len(layer.weights) for layer in model.layers if isinstance(layer, layers.Normalization))
    changed = [np.array_equal(new, old + 1) for new, old in zip(made.get_weights(), before, strict=True)]
    assert changed.count(False) == constants
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), before, strict=True))


def test_layers_keep_their_names_and_nested_ones_get_the_outer_name_only_where_two_are_alike():
    names = [layer.name for layer in to_twin(two_ways_in_and_out()).layers]
    assert {"a", "b", "shared", "p_first", "t_first"} <= set(names)


def test_regularizers_constraints_momentum_and_frozen_layers_carry_over():
    model = convolutions()
    model.layers[2].trainable = False
    twin = to_twin(model)
    convolution, normalization = twin.layers[3], twin.layers[4]
    assert convolution.kernel_regularizer.l2 == pytest.approx(0.01)
    assert convolution.kernel_constraint.max_value == 2
    assert not convolution.trainable
    assert normalization.momentum == 0.9
    assert normalization.trainable


def test_a_model_in_bfloat16_has_a_float32_twin():
    keras.utils.set_random_seed(0)
    rows = keras.Input((4,))
    inner = keras.Sequential([layers.Dense(3, dtype="mixed_bfloat16", name="inside")], name="inner")
    model = keras.Model(rows, layers.Dense(2, dtype="mixed_bfloat16", name="outside")(inner(rows)))
    twin = to_twin(model)
    assert {layer.compute_dtype for layer in twin.layers} == {"float32"}
    assert np.array_equal(twin.get_layer("inside").kernel, inner.layers[0].kernel)


class Doubled(layers.Layer):
    def call(self, x):
        return x * 2.0


@tf_keras.saving.register_keras_serializable("tests")
class TwinOfDoubled(tf_keras.layers.Layer):
    def call(self, x):
        return x * 2.0


def with_doubled() -> keras.Model:
    rows = keras.Input((4,))
    return keras.Model(rows, Doubled(name="mine")(rows))


def test_a_layer_of_your_own_can_be_given_a_twin(monkeypatch):
    monkeypatch.setitem(twins.TWINS, "Doubled", lambda layer, name: [TwinOfDoubled(name=name)])
    assert to_twin(with_doubled()).get_layer("mine")(np.ones((1, 4)))[0, 0] == 2


def test_a_twin_that_computes_something_else_is_found_out(monkeypatch):
    monkeypatch.setitem(twins.TWINS, "Doubled", lambda layer, name: [tf_keras.layers.Activation("linear", name=name)])
    with pytest.raises(ModelError, match=r"differs by 5.0e-01 .* first at layer 'mine' \(Doubled\)"):
        to_twin(with_doubled())


def test_a_subclassed_model_is_refused_with_the_way_out():
    class Mine(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ModelError, match=r"\(Mine\) is not a built functional or sequential model.*keras\.Input"):
        to_twin(Mine())


def test_a_wrapped_twin_does_not_go_back(base):
    model = keras.saving.load_model(base.file)
    twin = tf_keras.models.clone_model(to_twin(model), clone_function=lambda each: _renamed(each))
    with pytest.raises(ModelError, match=r"twin of layer 'stem' \(Conv2D\): expected weights \(3, 3, 1, 8\), got none"):
        from_twin(twin, model)


def _renamed(layer):
    return type(layer).from_config(layer.get_config() | {"name": f"other_{layer.name}"})


def test_keras_3_stays_keras_3_beside_tfmot():
    code = (
        "import components.compression.compress, keras, tf_keras\n"
        "import keras.layers as fresh\n"
        "assert keras.__version__.startswith('3.') and tf_keras.__version__.startswith('2.')\n"
        "model = keras.Sequential([keras.Input((2,)), fresh.Dense(1)])\n"
        "model.compile('adam', 'mse')\n"
        "model.fit(keras.ops.ones((4, 2)), keras.ops.ones((4, 1)), verbose=0)\n"
        "assert isinstance(model, keras.Model) and not isinstance(model, tf_keras.Model)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_on_the_kernels_of_keras_a_deep_twin_gives_the_same_bits():
    inputs = x = keras.Input((8, 8, 3))
    for _ in range(24):
        x = layers.BatchNormalization()(layers.Conv2D(8, 3, padding="same", activation="silu")(x))
    model = scrambled(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x))))
    twin = to_twin(model)
    shown = np.random.default_rng(1).random((4, 8, 8, 3), np.float32)
    expected = model(shown, training=False)
    with same_kernels(twin):
        np.testing.assert_array_equal(twin(shown, training=False), expected)
    assert [each.fused for each in twin.layers if hasattr(each, "fused")] == [True] * 24
