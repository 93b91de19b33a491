import warnings

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from tensorflow_model_optimization.python.core.quantization.keras.collab_opts.cluster_preserve import (
    cluster_utils,
    default_8bit_cluster_preserve_quantize_scheme,
)

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
from components.delivery.proof import read_proof
from components.errors import ConfigError
from components.options import QatOptions

from .conftest import write_int8

layers = tf_keras.layers


def reasons(twin: tf_keras.Model, **options) -> dict[str, str]:
    return {each.layer: each.reason for each in choose_quantizable(twin, QatOptions(**options)).untreated}


def test_convolution_normalization_and_relu_are_all_quantized():
    image = layers.Input((8, 8, 1))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(image))
    twin = tf_keras.Model(image, layers.Dense(2)(layers.Flatten()(layers.ReLU()(x))))
    assert reasons(twin) == {}


def test_what_is_not_known_is_left_alone_with_the_reason():
    image = layers.Input((8, 8, 2), name="image")
    shared = layers.Conv2D(2, 1, name="shared")
    x = layers.BatchNormalization(name="first")(image)
    x = layers.Conv2D(2, 3, activation="relu", padding="same", name="active")(x)
    x = layers.BatchNormalization(name="late")(x)
    x = layers.Multiply(name="times")([shared(x), shared(image)])
    x = layers.Activation("softplus", name="soft")(layers.UpSampling3D(name="up")(layers.Reshape((8, 8, 2, 1))(x)))
    x = layers.Activation(hard_silu, name="swish")(layers.Conv3D(2, 1, activation="elu", name="deep")(x))
    twin = tf_keras.Model(image, x)
    known = "neither tfmot nor trimline has a quantization for"
    assert reasons(twin) == {
        "shared": "tfmot cannot quantize a layer that is called more than once",
        "soft": f"{known} the activation 'softplus'",
        "up": f"{known} UpSampling3D",
        "deep": f"{known} Conv3D",
    }


@pytest.mark.parametrize("normalized", [True, False])
def test_an_activation_that_tfmot_does_not_know_stands_between_layers_that_are_quantized(normalized):
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(4, 3, name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x) if normalized else x
    x = layers.Activation("softplus", name="soft")(x)
    twin = tf_keras.Model(image, layers.Conv2D(2, 3, name="head")(x))
    names = choose_quantizable(twin, QatOptions()).names
    model = quantize(twin, names, {})
    assert {"quant_conv", "soft", "quant_head"} <= {layer.name for layer in model.layers}
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


def pointwise() -> tf_keras.Model:
    """What tfmot's collaborative schemes are known to fail on: side 1, one input channel, a branch; half of it zeros."""
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 1), name="x")
    x = layers.Conv2D(16, 1, activation="relu", name="first")(image)
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="wide")(x)
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(8, 1, name="point")(x))
    x = layers.Flatten()(layers.Concatenate()([layers.Conv2D(4, 1, name="branch")(x), x]))
    twin = tf_keras.Model(image, layers.Dense(3, name="out")(x))
    for kernel in kernels(twin):
        values = np.round(kernel.values * 10) / 10
        kernel.variable.assign(np.where(np.abs(values) < np.quantile(np.abs(values), 0.5), 0, values))
    return twin


def learn(model: tf_keras.Model) -> np.ndarray:
    """Trains on noise, 16 updates; returns the rows."""
    random = np.random.default_rng(0)
    rows = random.random((64, *model.input_shape[1:]), np.float32)
    model.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(rows, random.integers(0, 3, 64), batch_size=8, epochs=2, verbose=0)
    return rows


@pytest.mark.parametrize(("pruned", "clustered"), [(True, False), (False, True), (True, True)])
def test_known_faults_of_tfmot_do_not_reach_the_file(pruned, clustered, tmp_path):
    """PCQAT zeroes kernels of side 1 (tensorflow/model-optimization issue 979), CQAT loses clusters (issue 1056), zeros drift
    under PQAT (pull request 721)."""
    twin = pointwise()
    before = {kernel.name: kernel for kernel in kernels(twin)}
    keep = {name: kept(each, pruned=pruned, distinct=64 if clustered else 0) for name, each in before.items()}
    model = quantize(twin, choose_quantizable(twin, QatOptions()).names, keep)
    proof = read_proof(write_int8(model, learn(model), 3, tmp_path))
    after = trained_kernels(model)
    shapes = {each.shape: each for each in proof.weights}
    for name, kernel in before.items():
        old, new = kernel.values, after[name]
        promise = kernel.promise(new, pruned=pruned, distinct=64 if clustered else 0, quantized=True)
        found = shapes[promise.shape]
        assert not np.array_equal(new, old), f"{name} did not learn"
        assert found.sparsity < 1, f"{name} was zeroed"
        if pruned:
            np.testing.assert_array_equal(new == 0, old == 0)
            assert found.sparsity >= sparsity(old) > 0.2, f"zeros of {name} drifted"
        if clustered:
            assert len(np.unique(new)) <= len(np.unique(old)), f"{name} lost its clusters"
            assert found.distinct <= len(np.unique(old)), f"{name} has more codes than clusters"


@pytest.mark.slow  # of the dependency, not of ours: once it fails, `Keeping` may be needed no longer
def test_tfmot_itself_still_loses_clusters():
    twin = pointwise()
    before = twin.get_layer("wide").kernel.numpy()
    annotated = tfmot.quantization.keras.quantize_annotate_model(twin)
    scheme = default_8bit_cluster_preserve_quantize_scheme.Default8BitClusterPreserveQuantizeScheme(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says which layers it does not cluster
        model = tfmot.quantization.keras.quantize_apply(annotated, scheme)
    learn(model)
    after = trained_kernels(cluster_utils.strip_clustering_cqat(model))["wide"]
    assert len(np.unique(after)) > 2 * len(np.unique(before))


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
