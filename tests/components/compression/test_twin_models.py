"""Whole models and single layers of many kinds, each there and back; and what Keras 3 has to run itself."""

import keras
import numpy as np
import pytest
import tf_keras
from keras import layers, ops

from components.compression import twin as twins
from components.compression.compress import load
from components.compression.hosted import Hosted
from components.compression.kernels import sparsity
from components.compression.twin import TOLERANCE, from_twin, to_twin

from .conftest import carry_out, draw, scrambled, trained


def there_and_back(model: keras.Model) -> tf_keras.Model:
    """Asserts that the twin computes the same, survives its own configuration, and comes back with changed weights."""
    scrambled(model)
    twin = to_twin(model)
    feed = twins._one_or_all([np.random.default_rng(1).permutation(each, axis=-1) for each in twins._examples(model)])
    expected = keras.tree.flatten(model(feed))
    assert all(np.ptp(each) > 1e-3 for each in expected), "an output that is nearly constant shows nothing"
    revived = tf_keras.models.model_from_json(twin.to_json())
    revived.set_weights(twin.get_weights())
    for each in (twin, revived):
        for ours, theirs in zip(expected, keras.tree.flatten(each(feed)), strict=True):
            assert twins._difference(ours, theirs) <= TOLERANCE
    for variable in twin.trainable_variables:
        variable.assign(variable * 1.1)
    back = from_twin(twin, model)
    for ours, theirs in zip(keras.tree.flatten(back(feed)), keras.tree.flatten(twin(feed)), strict=True):
        assert twins._difference(ours, theirs) <= TOLERANCE
    assert [np.array_equal(a, b) for a, b in zip(model.trainable_weights, back.trainable_weights, strict=True)] == [
        False for _ in model.trainable_weights
    ]
    return twin


# --- whole models ------------------------------------------------------------------------------------------------


def text_classifier() -> keras.Model:
    """A transformer: token and position embeddings, a padding mask, a causal block, a feed-forward block."""
    words = keras.Input((12,), dtype="int32")
    x = layers.Embedding(20, 8, mask_zero=True)(words)
    x = x + layers.Embedding(12, 8)(ops.arange(12))
    mask = ops.expand_dims(ops.not_equal(words, 0), 1)
    attended = layers.MultiHeadAttention(2, 4)(x, x, attention_mask=mask, use_causal_mask=True)
    x = layers.LayerNormalization()(layers.Add()([x, layers.Dropout(0.1)(attended)]))
    x = layers.LayerNormalization()(x + layers.Dense(8)(layers.Dense(16, activation="gelu")(x)))
    return keras.Model(words, layers.Dense(3, activation="softmax")(ops.mean(x, axis=1)))


def recurrent() -> keras.Model:
    words = keras.Input((9,), dtype="int32")
    x = layers.Embedding(10, 4, mask_zero=True)(words)
    x = layers.LSTM(5, return_sequences=True)(x)
    x, *state = layers.GRU(5, return_sequences=True, return_state=True)(x)
    return keras.Model(words, layers.Dense(2)(layers.SimpleRNN(5)(x, initial_state=state)))


def u_net() -> keras.Model:
    image = keras.Input((16, 16, 2))
    a = layers.Conv2D(4, 3, padding="same", activation="relu")(image)
    b = layers.Conv2D(6, 3, padding="same", activation="relu")(layers.MaxPooling2D()(a))
    c = layers.GroupNormalization(2)(layers.Conv2D(8, 3, padding="same")(layers.AveragePooling2D(2)(b)))
    b = layers.Concatenate()([layers.UpSampling2D(interpolation="bilinear")(c), b])
    b = layers.SpatialDropout2D(0.1)(layers.SeparableConv2D(6, 3, padding="same", activation="silu")(b))
    a = layers.Concatenate()(
        [layers.Conv2DTranspose(4, 2, strides=2)(b), layers.Cropping2D(1)(layers.ZeroPadding2D(1)(a))]
    )
    return keras.Model(image, layers.Conv2D(1, 1, activation="sigmoid")(a))


def autoencoder() -> keras.Model:
    """Encoder and decoder are models of their own; the code is an output too."""
    encoder = keras.Sequential([keras.Input((10,)), layers.Dense(6, "relu"), layers.Dense(2)], name="encoder")
    decoder = keras.Sequential([keras.Input((2,)), layers.Dense(6, "relu"), layers.Dense(10)], name="decoder")
    row = keras.Input((10,))
    code = encoder(row)
    return keras.Model(row, {"code": code, "row": decoder(code)})


def two_towers() -> keras.Model:
    """One tower for both sides, called twice."""
    side = keras.Input((6,))
    tower = keras.Model(side, layers.UnitNormalization()(layers.Dense(4)(ops.relu(layers.Dense(5)(side) * 2.0))))
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    return keras.Model([a, b], layers.Dot(axes=1)([tower(a), tower(b)]))


def signal() -> keras.Model:
    wave = keras.Input((32, 3))
    x = layers.Conv1D(4, 3, strides=2, padding="same", activation="relu6")(wave)
    x = layers.SeparableConv1D(5, 3, padding="same", activation="relu")(x)
    x = layers.BatchNormalization()(layers.Conv1DTranspose(4, 2, strides=2)(x))
    x = layers.Bidirectional(layers.GRU(3, return_sequences=True))(layers.MaxPooling1D()(x))
    return keras.Model(wave, layers.GlobalAveragePooling1D()(layers.TimeDistributed(layers.Dense(3))(x)))


MODELS = [text_classifier, u_net, autoencoder, two_towers, signal]


@pytest.mark.parametrize("build", MODELS)
def test_a_whole_model_goes_there_and_back(build):
    there_and_back(build())


def test_a_mask_reaches_the_layers_behind_it():
    words = keras.Input((9,), dtype="int32")
    model = scrambled(keras.Model(words, layers.LSTM(5)(layers.Embedding(10, 4, mask_zero=True)(words))))
    twin = to_twin(model)
    short, padded = np.array([[3, 4, 5, 6, 0, 0, 0, 0, 0]]), np.array([[3, 4, 5, 6, 1, 1, 1, 1, 1]])
    np.testing.assert_allclose(twin(short), model(short), rtol=1e-5)
    assert not np.allclose(twin(short), twin(padded))
    assert not [each for each in twin.layers if isinstance(each, Hosted)]


def test_a_mask_that_is_an_input_is_used():
    rows, mask = keras.Input((5, 3)), keras.Input((5,), dtype="bool")
    model = scrambled(keras.Model([rows, mask], layers.LSTM(4)(rows, mask=mask)))
    twin, x = to_twin(model), np.random.default_rng(0).random((2, 5, 3), np.float32)
    for keep in (np.ones((2, 5), bool), np.arange(5) < np.array([[2], [4]])):
        np.testing.assert_allclose(twin([x, keep]), model([x, keep]), rtol=1e-5)


# --- operations --------------------------------------------------------------------------------------------------


def test_operations_on_tensors_run_as_keras_3_has_them():
    """Broadcasting, constants, slices, several outputs, dtypes; none has an entry."""
    a, b = keras.Input((6, 4), name="a"), keras.Input((4,), name="b")
    x = ops.cumsum(a, axis=1) / (1.0 + ops.abs(b)[:, None, :])
    left, right = ops.split(x[..., ::-1], 2, axis=-1)
    x = ops.where(ops.greater(left, right), left**2, ops.einsum("btc,c->btc", right, np.array([2.0, 3.0], "float32")))
    x = ops.stack([x, ops.cast(ops.argmax(a, axis=-1, keepdims=True), "float32") + x], axis=-1)
    x = ops.reshape(ops.logsumexp(ops.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0))), axis=-1), (-1, 14))
    twin = there_and_back(keras.Model([a, b], [layers.Dense(3)(x), ops.matmul(a, ops.expand_dims(b, -1))]))
    assert sum(isinstance(each, Hosted) for each in twin.layers) == 19


def test_operations_that_tfmot_knows_as_layers_become_these():
    image = keras.Input((8, 8, 4), name="image")
    x = layers.Conv2D(4, 3, padding="same", name="conv")(image)
    x = ops.relu(ops.concatenate([ops.relu6(x) + image, ops.silu(x) * x], axis=-1))
    x = ops.transpose(ops.reshape(x, (-1, 16, 32)), (0, 2, 1))
    twin = there_and_back(keras.Model(image, [ops.mean(image, axis=(1, 2)), x]))
    kinds = {type(each).__name__ for each in twin.layers}
    assert kinds == {
        *("InputLayer", "Conv2D", "Activation", "Add", "Multiply", "Concatenate"),
        *("Reshape", "Permute", "GlobalAveragePooling2D"),
    }


# --- layers that tf_keras lacks ----------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """Sublayers, dropout, statistics, a frozen weight, two inputs and an argument."""

    def __init__(self, width: int, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.dense, self.drop = layers.Dense(width, activation=scaled_tanh), layers.Dropout(0.5)
        self.norm = layers.BatchNormalization(momentum=0.5)

    def build(self, shape):
        self.offset = self.add_weight(shape=(self.width,), initializer="ones", trainable=False, name="offset")
        self.dense.build(shape)
        self.norm.build((*shape[:-1], self.width))

    def call(self, x, other, scale=1.0, training=False):
        x = self.drop(self.norm(self.dense(x), training=training), training=training)
        return scale * x + other * self.offset

    def get_config(self):
        return super().get_config() | {"width": self.width}


@keras.saving.register_keras_serializable("tests")
def scaled_tanh(x):
    return 1.7 * ops.tanh(x)


def with_block() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((5,), name="b")
    return keras.Model([a, b], layers.Dense(2, name="head")(Block(5, name="block")(a, b, scale=0.5)))


def test_a_layer_of_ones_own_is_hosted_without_an_entry():
    twin = there_and_back(with_block())
    block = twin.get_layer("block")
    assert isinstance(block, Hosted)
    assert [each.shape.as_list() for each in block.carried] == [[5], [4, 5], [5], [5], [5], [5], [5]]


def test_a_hosted_layer_trains_with_its_statistics_and_its_own_random_numbers():
    model = scrambled(with_block())
    random = np.random.default_rng(0)
    x, y = [random.random((64, n), np.float32) for n in (4, 5)], random.random((64, 2), np.float32)

    def trained(epochs: int, start: list[np.ndarray] | None = None) -> list[np.ndarray]:
        twin = to_twin(model)
        twin.set_weights(start or first)
        twin.compile(tf_keras.optimizers.SGD(0.01), "mse")
        twin.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
        return twin.get_weights()

    first = to_twin(model).get_weights()
    names = [weight.path.split("/")[-1] for weight in model.get_layer("block").weights]
    one, two = trained(1), trained(2)
    block = to_twin(model).get_layer("block")
    changed = [not np.array_equal(a, b) for a, b in zip(first, two, strict=True)]
    twin_names = [each.name.split(":")[0].split("/")[-1] for each in to_twin(model).weights]
    still = {name for name, each in zip(twin_names, changed, strict=True) if not each}
    assert still == {"offset"}, names
    assert any(each.dtype == "int64" for each in block.weights)
    for a, b in zip(trained(1, one), two, strict=True):  # random states are weights: training goes on, not over
        np.testing.assert_array_equal(a, b)


def test_frozen_weights_stay_frozen_in_a_hosted_layer():
    model = scrambled(with_block())
    model.get_layer("block").trainable = False
    twin = to_twin(model)
    assert twin.get_layer("block").trainable_weights == []
    assert len(twin.trainable_weights) == 2


def test_a_function_of_ones_own_leaves_the_kernel_to_tfmot():
    row = keras.Input((4,))
    twin = there_and_back(keras.Model(row, layers.Dense(3, activation=scaled_tanh, name="dense")(row)))
    assert [(each.name, type(each).__name__) for each in twin.layers[1:]] == [
        ("dense", "Dense"),
        ("dense_activation", "Hosted"),
    ]


# Made in the test: a layer that holds a random generator would start TensorFlow while tests are collected.
ONE_LAYER = {
    "RMSNormalization": lambda: layers.RMSNormalization(),
    "GroupQueryAttention": lambda: layers.GroupQueryAttention(4, 2, 2),
    "LayerNormalization": lambda: layers.LayerNormalization(axis=[1, 2]),
    "AdaptiveAveragePooling1D": lambda: layers.AdaptiveAveragePooling1D(3),
    "EinsumDense": lambda: layers.EinsumDense("abc,cd->abd", (None, 5), bias_axes="d"),
    "LSTM": lambda: layers.LSTM(3, activation=scaled_tanh),
    "TimeDistributed": lambda: layers.TimeDistributed(keras.Sequential([layers.Dense(4), layers.Dense(2)])),
}


@pytest.mark.parametrize("kind", ONE_LAYER)
def test_layers_of_keras_3_go_there_and_back(kind):
    rows, layer = keras.Input((6, 8)), ONE_LAYER[kind]()
    there_and_back(keras.Model(rows, layer(rows, rows) if kind == "GroupQueryAttention" else layer(rows)))


def test_a_layer_called_with_several_tensors_gets_no_mask_as_in_keras_3():
    """GRU hands its mask on, and Keras 3 passes it to the next recurrent layer only where that has no initial state."""
    kinds = {each.name.rstrip("_0123456789"): type(each).__name__ for each in there_and_back(recurrent()).layers}
    assert (kinds["lstm"], kinds["gru"], kinds["simple_rnn"]) == ("LSTM", "GRU", "Hosted")


def test_dropout_drops_in_training_and_only_there():
    row = keras.Input((50,))
    twin = to_twin(keras.Model(row, layers.Dropout(0.5)(row)))
    ones = np.ones((4, 50), np.float32)
    assert set(np.unique(twin(ones, training=True))) == {0.0, 2.0}
    assert set(np.unique(twin(ones, training=False))) == {1.0}


@keras.saving.register_keras_serializable("tests")
class Taxed(keras.layers.Layer):
    """A layer of Keras 3 alone: adds the mean of its outputs to the loss, and a tenth of the squares of its weights."""

    def build(self, shape):
        self.scale = self.add_weight((shape[-1],), regularizer=keras.regularizers.L2(0.1), name="scale")

    def call(self, x):
        made = x * self.scale
        self.add_loss(keras.ops.mean(made))
        return made


def test_what_a_hosted_layer_adds_to_the_loss_is_added_to_the_twin_s():
    row = keras.Input((3,))
    model = keras.Model(row, Taxed(name="taxed")(row))
    model.get_layer("taxed").scale.assign([1.0, 2.0, 3.0])
    twin = to_twin(model)
    twin(np.ones((2, 3), np.float32), training=True)
    assert float(sum(twin.losses)) == pytest.approx(2.0 + 0.1 * 14)
    twin.get_layer("taxed").set_weights([np.zeros(3, np.float32)])
    twin.compile("sgd", "mse")
    assert twin.evaluate(np.ones((2, 3)), np.ones((2, 3)), verbose=0) == pytest.approx(1.0)
    twin.get_layer("taxed").set_weights([np.full(3, 2.0, np.float32)])
    assert twin.evaluate(np.ones((2, 3)), np.ones((2, 3)), verbose=0) == pytest.approx(1.0 + 2.0 + 0.1 * 12)


def test_convnext_s_own_layers_go_there_and_back():
    from keras.src.applications.convnext import LayerScale, StochasticDepth

    row = keras.Input((5,))
    twin = there_and_back(
        keras.Model(row, row + StochasticDepth(0.5, name="drop")(LayerScale(0.1, 5, name="scale")(row)))
    )
    assert [type(twin.get_layer(name)).__name__ for name in ("scale", "drop")] == ["Hosted", "StochasticDepth"]


def test_stochastic_depth_drops_whole_examples_and_keeps_the_mean():
    from keras.src.applications.convnext import StochasticDepth

    row = keras.Input((5,))
    drop = to_twin(keras.Model(row, StochasticDepth(0.25, name="drop")(row))).get_layer("drop")
    drop._random_generator._generator.reset_from_seed(3)
    values = drop(np.ones((4000, 5), np.float32), training=True).numpy()
    assert set(np.unique(values)) == {0.0, np.float32(1 / 0.75)}
    assert (values.std(axis=1) == 0).all()
    assert values.mean() == pytest.approx(1, abs=0.03)


# --- saved, and from keras.applications --------------------------------------------------------------------------


@tf_keras.saving.register_keras_serializable("tests")
class TwinOfScaled(tf_keras.layers.Layer):
    """What a user writes to give a layer a twin: the same weights and outputs."""

    def build(self, shape):
        self.scale = self.add_weight("scale", shape=(shape[-1],))

    def call(self, x):
        return x * self.scale


@keras.saving.register_keras_serializable("tests")
class Scaled(layers.Layer):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")

    def call(self, x):
        return x * self.scale


@pytest.mark.parametrize(
    "entry", [pytest.param(True, id="with an entry", marks=pytest.mark.slow), pytest.param(False, id="hosted")]
)
def test_a_compressed_model_with_a_layer_of_ones_own_is_saved_and_loaded(entry, monkeypatch, tmp_path, batches):
    if entry:
        monkeypatch.setitem(twins.TWINS, "Scaled", lambda layer, name: [TwinOfScaled(name=name)])
    image = keras.Input((8, 8, 1), name="image")
    x = Scaled(name="scaled")(layers.Conv2D(8, 3, name="conv")(image)) * 2.0
    x = layers.Dense(16, name="hidden")(layers.Flatten()(x))
    base = trained(tmp_path / "train", scrambled(keras.Model(image, layers.Dense(3)(ops.relu(x)))))
    made = carry_out("prune@0.5+qat", tmp_path, base, batches, done := {})
    pictures = draw(4, 5)[0]
    assert made.folder == done["prune@0.5+qat"].folder
    pruned = load(done["prune@0.5"])
    assert type(pruned.get_layer("scaled")) is (TwinOfScaled if entry else Hosted)
    assert sparsity(pruned.get_layer("hidden").kernel.numpy()) >= 0.5
    np.testing.assert_array_equal(pruned(pictures), load(done["prune@0.5"])(pictures))
    np.testing.assert_array_equal(load(made)(pictures, training=False), load(made)(pictures, training=False))
    assert {each["layer"] for each in made.facts["untreated"] if each["reason"].startswith("qat")} >= {"scaled"}


SMALL = (
    "ConvNeXtTiny DenseNet121 EfficientNetB0 EfficientNetV2B0 InceptionV3 MobileNet MobileNetV2 MobileNetV3Small "
    "NASNetMobile ResNet50 ResNet50V2 VGG16 Xception"
)


@pytest.mark.slow  # a minute each, most of it TensorFlow building graphs
@pytest.mark.parametrize("name", SMALL.split())
def test_a_small_member_of_each_family_has_a_twin_and_comes_back(name):
    from benchmarks.twin_applications import twin

    found = twin(name)
    assert found["spread"] > 50 * TOLERANCE, "outputs that are nearly constant show nothing"
    # Rounding adds up over a hundred layers, and no twin is closer than the model is to itself; to_twin judges each alone.
    assert found["difference"] <= 10 * max(TOLERANCE, found["sensitivity"])
    assert found["back"] == 0
    assert found["tfmot"].startswith("ValueError: `prune_low_magnitude` can only prune an object")
