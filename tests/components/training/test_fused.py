import keras
import numpy as np
import pytest
import tensorflow as tf

from components.compression.twin import to_twin
from components.training.fused import FusedBatchNormalization, fused_normalization


def normalized(rank, layer=keras.layers.BatchNormalization, **arguments):
    """A model of nothing but a batch normalization with weights that are not those that it starts with."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((4, 5, 6, 3)[5 - rank :])
    made = keras.Model(inputs, layer(name="norm", **arguments)(inputs))
    rng = np.random.default_rng(0)
    made.set_weights([rng.uniform(0.5, 2, each.shape) for each in made.get_weights()])
    return made


def one_update(model, x):
    """Outputs in training, gradients by inputs and weights, and all weights afterwards."""
    x = tf.constant(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        given = model(x, training=True)
        loss = tf.reduce_sum(tf.cast(given, tf.float32) ** 3)
    gradients = tape.gradient(loss, [x, *model.trainable_variables])
    return [given.numpy(), *(each.numpy() for each in gradients), *model.get_weights()]


@pytest.mark.parametrize("arguments", [{}, {"scale": False}, {"center": False, "momentum": 0.5, "epsilon": 0.1}])
@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_outputs_gradients_and_moving_statistics_are_those_of_the_standard_layer(rank, arguments):
    x = np.random.default_rng(2).normal(2, 3, (7, *(4, 5, 6, 3)[5 - rank :])).astype("float32")
    models = [normalized(rank, **arguments) for _ in range(2)]
    usual = one_update(models[0], x)
    with fused_normalization(models[1]) as count:
        assert count == 1
        fused = one_update(models[1], x)
    for ours, theirs in zip(fused, usual, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=2e-3)
    np.testing.assert_allclose(models[1](x), models[0](x), rtol=1e-5, atol=1e-5)


def test_the_update_holds_the_fused_kernel_and_not_without_the_block():
    model = normalized(4)

    def kernels():
        function = tf.function(lambda x: model(x, training=True)).get_concrete_function(tf.TensorSpec((2, 5, 6, 3)))
        return [each.name for each in function.graph.get_operations() if each.type == "FusedBatchNormV3"]

    with fused_normalization(model):
        assert len(kernels()) == 1
    assert kernels() == []


def test_after_the_block_and_after_an_error_in_it_the_model_saves_standard_layers(tmp_path):
    inner = normalized(4)
    inputs = keras.Input((5, 6, 3))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="outer")(inner(inputs)))

    def train():
        with fused_normalization(model) as count:
            assert count == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    found = [type(layer) for layer in again._flatten_layers() if "Normalization" in type(layer).__name__]
    assert found == [keras.layers.BatchNormalization] * 2


class Mine(keras.layers.BatchNormalization):
    """A subclass with a way of its own."""

    def call(self, inputs, training=None, mask=None):
        return inputs + 1.0


def test_a_subclass_of_the_users_is_left_alone():
    model = normalized(2, Mine)
    with fused_normalization(model) as count:
        assert count == 0
        assert type(model.get_layer("norm")) is Mine


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [({"axis": 1}, (7, 5, 6, 3)), ({"dtype": "float64"}, (7, 5, 6, 3)), ({"renorm": True}, (7, 5, 6, 3))],
)
def test_what_the_kernel_cannot_do_is_computed_as_before(arguments, shape):
    x = np.random.default_rng(2).normal(2, 3, shape).astype("float32")
    models = [normalized(4, **arguments) for _ in range(2)]
    usual = one_update(models[0], x)
    with fused_normalization(models[1]):
        for ours, theirs in zip(one_update(models[1], x), usual, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_frozen_layer_keeps_its_statistics():
    model = normalized(4)
    model.trainable = False
    before = model.get_weights()
    with fused_normalization(model):
        model(np.ones((2, 5, 6, 3), "float32"), training=True)
    for ours, theirs in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_layer_itself_saves_loads_clones_and_becomes_a_twin(tmp_path):
    model = normalized(4, FusedBatchNormalization)
    x = np.random.default_rng(2).normal(2, 3, (7, 5, 6, 3)).astype("float32")
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (loaded, clone):
        assert type(other.get_layer("norm")) is FusedBatchNormalization
        np.testing.assert_array_equal(other(x), model(x))
    np.testing.assert_allclose(to_twin(model)(x), model(x), rtol=1e-5, atol=1e-5)
