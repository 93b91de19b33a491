import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from components.compression.kernels import kernels, sparsity
from components.compression.quantize import (
    calibrate,
    choose_quantizable,
    kept,
    like_json,
    quantize,
    trained_kernels,
)
from components.compression.twin_layers import hard_silu
from components.errors import ConfigError
from components.options import QatOptions

layers = tf_keras.layers


def reasons(twin: tf_keras.Model, **options) -> dict[str, str]:
    return {each.layer: each.reason for each in choose_quantizable(twin, QatOptions(**options)).untreated}


def test_convolution_normalization_and_relu_are_all_quantized():
    image = layers.Input((8, 8, 1))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(image))
    twin = tf_keras.Model(image, layers.Dense(2)(layers.Flatten()(layers.ReLU()(x))))
    assert reasons(twin) == {}


def test_what_tfmot_refuses_is_left_alone_with_the_reason():
    image = layers.Input((8, 8, 2), name="image")
    shared = layers.Conv2D(2, 1, name="shared")
    x = layers.BatchNormalization(name="first")(image)
    x = layers.Conv2D(2, 3, activation="relu", padding="same", name="active")(x)
    x = layers.BatchNormalization(name="late")(x)
    x = layers.Multiply(name="times")([shared(x), shared(image)])
    x = layers.Activation(hard_silu, name="swish")(layers.UpSampling3D(name="up")(layers.Reshape((8, 8, 2, 1))(x)))
    twin = tf_keras.Model(image, x)
    got = reasons(twin)
    assert set(got) == {"first", "late", "times", "shared", "swish", "up"}
    assert "right behind a Conv2D" in got["first"]
    assert "right behind a Conv2D" in got["late"]
    assert "called more than once" in got["shared"]
    assert got["swish"] == "tfmot has no quantization for the activation 'hard_silu'"
    assert got["times"] == "tfmot has no quantization for Multiply"


@pytest.mark.parametrize("normalized", [True, False])
def test_an_activation_that_tfmot_does_not_know_stands_between_layers_that_are_quantized(normalized):
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x) if normalized else x
    x = layers.Activation(hard_silu, name="swish")(x)
    twin = tf_keras.Model(image, layers.Conv2D(2, 3, name="head")(x))
    names = choose_quantizable(twin, QatOptions()).names
    model = quantize(twin, names, {})
    assert {"quant_conv", "swish", "quant_head"} <= {layer.name for layer in model.layers}
    pictures = np.random.default_rng(0).random((4, 8, 8, 1), np.float32)
    calibrate(model, [(pictures, None)], tf.distribute.get_strategy())
    model(pictures, training=True)  # sets the ranges of kernels
    off = np.abs(model(pictures, training=False) - twin(pictures, training=False)).max()
    assert off < 0.05 * np.abs(twin(pictures)).max()


def test_normalization_behind_an_excluded_convolution_is_left_alone_with_it():
    image = layers.Input((8, 8, 1))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 3, name="conv")(image))
    twin = tf_keras.Model(image, layers.Dense(2)(layers.Flatten()(x)))
    assert reasons(twin, exclude=["conv"]) == {
        "conv": "excluded by compress.qat.exclude",
        "norm": "'conv', into which it would be folded, is not quantized",
    }
    with pytest.raises(ConfigError, match=r"no layer 'cnv'; did you mean 'conv'"):
        reasons(twin, exclude=["cnv"])


def branches() -> tf_keras.Model:
    """Where tfmot's own schemes lose zeros: a kernel before a separate ReLU, and kernels that feed a Concatenate."""
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 2))
    a = layers.ReLU()(layers.Conv2D(8, 3, padding="same", name="before_relu")(image))
    b = layers.Conv2D(8, 1, name="left")(a)
    c = layers.Conv2D(8, 3, padding="same", name="right")(a)
    x = layers.Flatten()(layers.Concatenate()([b, c]))
    x = layers.Dense(8, activation="relu", name="dense_alone")(layers.Dense(8, name="free")(x))
    twin = tf_keras.Model(image, layers.Dense(3, name="out")(x))
    for kernel in kernels(twin):
        if kernel.name != "free":  # a layer without zeros, which switches tfmot's preservation off for all after it
            values = kernel.values
            values[np.abs(values) < np.quantile(np.abs(values), 0.6)] = 0
            kernel.variable.assign(values)
    return twin


def train_quantized(twin: tf_keras.Model, keep: dict) -> tf_keras.Model:
    model = quantize(twin, choose_quantizable(twin, QatOptions()).names, keep)
    model.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    random = np.random.default_rng(0)
    model.fit(random.random((64, 8, 8, 2)), random.integers(0, 3, 64), batch_size=8, epochs=2, verbose=0)
    return model


def test_every_zero_stays_zero_while_all_else_learns():
    twin = branches()
    before = {kernel.name: kernel.values for kernel in kernels(twin)}
    keep = {k.name: kept(k, pruned=True, distinct=0) for k in kernels(twin) if k.name != "free"}
    after = trained_kernels(train_quantized(twin, keep))
    assert set(after) == set(before)
    for name, values in after.items():
        assert not np.array_equal(values, before[name]), f"{name} did not learn"
        if name != "free":
            assert sparsity(before[name]) > 0.5
            np.testing.assert_array_equal(values == 0, before[name] == 0)


@pytest.mark.parametrize("distinct", [1000, 1])
def test_equal_weights_stay_equal_while_they_learn(distinct):
    """In the whole kernel where it holds few enough values, else within each output channel."""
    twin = branches()
    for kernel in kernels(twin):
        kernel.variable.assign(np.round(kernel.values * 10) / 10)
    before = {kernel.name: kernel.values for kernel in kernels(twin)}
    keep = {kernel.name: kept(kernel, pruned=False, distinct=distinct) for kernel in kernels(twin)}
    after = trained_kernels(train_quantized(twin, keep))
    for name, values in after.items():
        assert not np.array_equal(values, before[name]), f"{name} did not learn"
        shared = (
            [(values, before[name])]
            if distinct > 1
            else list(zip(_channels(values), _channels(before[name]), strict=True))
        )
        for new, old in shared:
            for value in np.unique(old):
                assert len(np.unique(new[old == value])) == 1
    if distinct == 1:  # channels went different ways
        assert len(np.unique(after["right"])) > len(np.unique(before["right"]))


def _channels(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1]).T


def test_what_is_kept_is_shared_by_the_kernel_or_told_apart_by_output_channel():
    inputs = layers.Input((3,))
    twin = tf_keras.Model(inputs, layers.Dense(2, use_bias=False)(inputs))
    (kernel,) = kernels(twin)
    kernel.variable.assign([[0.0, 5.0], [7.0, 5.0], [7.0, 0.0]])
    whole = kept(kernel, pruned=True, distinct=3)
    np.testing.assert_array_equal(whole.mask, [[0, 1], [1, 1], [1, 0]])
    np.testing.assert_array_equal(whole.index, [[0, 1], [2, 1], [2, 0]])
    assert (whole.groups, whole.one_range) == (3, True)
    channels = kept(kernel, pruned=False, distinct=2)
    np.testing.assert_array_equal(channels.index, [[0, 3], [1, 3], [1, 2]])
    assert (channels.mask, channels.groups, channels.one_range) == (None, 4, False)
    again = like_json(kernel, whole.to_json())
    assert (again.mask.shape, again.index.shape, again.groups, again.one_range) == ((3, 2), (3, 2), 3, True)
    assert like_json(kernel, kept(kernel, pruned=True, distinct=0).to_json()).index is None


def test_ranges_start_at_what_the_data_show_and_all_else_stays():
    tf_keras.utils.set_random_seed(0)
    inputs = layers.Input((4,))
    x = layers.Dense(16, activation="relu", kernel_initializer="ones", name="wide")(inputs)
    twin = tf_keras.Model(inputs, layers.Dense(2, name="out")(x))
    model = quantize(twin, choose_quantizable(twin, QatOptions()).names, {})
    others = {v.name: v.numpy() for v in model.variables if "activation" not in v.name}
    batch = np.array([[0, 0, 0, 0], [5, 5, 5, 5]], np.float32)  # the hidden layer reaches 20, the start is 6
    calibrate(model, [(batch, None)] * 20, tf.distribute.get_strategy())
    ranges = {v.name: float(v) for v in model.variables if "activation" in v.name}
    assert ranges["quant_wide/post_activation_max:0"] == pytest.approx(20, rel=0.01)
    assert ranges["quant_wide/post_activation_min:0"] == pytest.approx(0, abs=0.01)
    assert all(np.array_equal(v.numpy(), others[v.name]) for v in model.variables if v.name in others)
