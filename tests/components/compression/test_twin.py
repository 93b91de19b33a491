import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tf_keras
from keras import layers

from components.compression import twin as twins
from components.compression.twin import for_integers, from_twin, same_kernels, to_twin
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


def attending(options=(), call=(), other=False, mask=None) -> keras.Model:
    """One attention over rows, or from rows to others; perhaps with a mask that the rows themselves give."""
    rows = keras.Input((5, 8))
    looked_at = [keras.Input((5, 7)), keras.Input((5, 6))] if other else [rows]
    given = {"attention_mask": keras.ops.expand_dims(rows[..., 0] > -0.2, mask)} if mask else {}
    layer = layers.MultiHeadAttention(2, 3, name="attention", **dict(options))
    x = layer(rows, *looked_at, **given, **dict(call)) if other else layer(rows, rows, **given, **dict(call))
    x = x[0] if isinstance(x, (tuple, list)) else x
    return keras.Model([rows, *looked_at] if other else rows, layers.Dense(2)(x))


ATTENTIONS = {
    "itself": {},
    "others, by keys of their own": {"other": True},
    "wider values, no biases, dropout": {"options": {"value_dim": 5, "use_bias": False, "dropout": 0.5}},
    "another width": {"options": {"output_shape": 4, "kernel_regularizer": "l2"}},
    "what came before": {"call": {"use_causal_mask": True}},
    "what a mask allows": {"mask": 1},
    "what a mask with an axis for heads allows": {"mask": (1, 2)},
    "what a constant allows": {"call": {"attention_mask": np.tri(5, dtype=bool)}},
    "what a constant of three axes allows": {"call": {"attention_mask": np.tri(5)[np.newaxis]}},
    "both": {"mask": 1, "call": {"use_causal_mask": True}},
    "in bfloat16": {"options": {"dtype": "mixed_bfloat16"}, "call": {"use_causal_mask": True}},
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_kernels_of_an_attention_are_dense_layers_of_the_twin(name):
    model = scrambled(attending(**ATTENTIONS[name]))
    twin = to_twin(model)
    parts = ("attention_query", "attention_key", "attention_value", "attention")
    assert all(type(twin.get_layer(part)) is tf_keras.layers.Dense for part in parts)
    (attention,) = (layer for layer in model.layers if layer.name == "attention")
    before = [weight.numpy().reshape(-1) for weight in attention.weights]
    carried = [weight.numpy().reshape(-1) for part in parts for weight in twin.get_layer(part).weights]
    assert len(before) == (4 if name.startswith("wider") else 8)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(before, carried, strict=True))
    again = tf_keras.models.model_from_json(twin.to_json())
    again.set_weights(twin.get_weights())
    examples = twins._examples(model)
    feed = examples if len(examples) > 1 else examples[0]
    tolerance = 0.05 if name == "in bfloat16" else 1e-5
    np.testing.assert_allclose(again(feed), model(feed), rtol=1e-4, atol=tolerance)
    assert {layer.compute_dtype for layer in twin.layers} == {"float32"}
    for variable in twin.variables:
        variable.assign(variable + 1)
    made = from_twin(twin, model)
    assert all(np.array_equal(new, old + 1) for new, old in zip(made.get_weights(), model.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("equation", "shape", "bias", "dense"),
    [
        ("abc,cd->abd", (None, 4), "d", True),
        ("...x,xy->...y", 4, None, True),
        ("abc,cd->abd", (None, 4), "bd", False),  # a bias by place
        ("abc,bcd->abd", (5, 4), "d", False),  # a kernel by place
        ("abc,cde->abde", (None, 2, 4), "de", False),
    ],
)
def test_an_einsum_over_the_last_axis_is_a_dense_layer_of_the_twin(equation, shape, bias, dense):
    shape = shape if bias != "bd" else (5, 4)
    rows = keras.Input((5, 3))
    x = layers.EinsumDense(equation, shape, bias_axes=bias, activation="hard_silu", name="sum")(rows)
    model = scrambled(keras.Model(rows, x))
    twin = to_twin(model)
    assert type(twin.get_layer("sum")) is (tf_keras.layers.Dense if dense else tf_keras.layers.EinsumDense)
    for variable in twin.variables:
        variable.assign(variable + 1)
    made = from_twin(twin, model)
    assert all(np.array_equal(new, old + 1) for new, old in zip(made.get_weights(), model.get_weights(), strict=True))


def test_an_attention_drops_the_share_of_its_scores_that_it_should_in_training_alone():
    twin = to_twin(scrambled(attending({"dropout": 0.5})))
    scores = twin.get_layer("attention_scores")
    same = [np.ones((4, 200, 6), np.float32)] * 3
    np.testing.assert_allclose(scores(same, training=False), 1, rtol=1e-5)
    found = scores(same, training=True).numpy()  # sums of kept scores, twice as large
    assert found.mean() == pytest.approx(1, abs=0.02)
    assert found[..., 0].std() == pytest.approx(1 / 200**0.5, rel=0.2)
    assert not np.array_equal(found[..., 0], found[..., 3])


def frozen_attention() -> keras.Model:
    model = attending()
    model.get_layer("attention").trainable = False
    return model


def test_a_frozen_attention_stays_frozen_and_regularizers_carry_over():
    twin = to_twin(frozen_attention())
    assert not twin.get_layer("attention_query").trainable
    twin = to_twin(attending({"kernel_regularizer": keras.regularizers.L2(0.03)}))
    assert twin.get_layer("attention_key").kernel_regularizer.l2 == pytest.approx(0.03)


def masked_attention() -> keras.Model:
    words = keras.Input((5,), dtype="int32")
    x = layers.Embedding(9, 8, mask_zero=True)(words)
    return keras.Model(words, layers.Dense(2)(layers.MultiHeadAttention(2, 3, name="attention")(x, x)))


def attention_over_pictures() -> keras.Model:
    picture = keras.Input((3, 4, 8))
    return keras.Model(picture, layers.MultiHeadAttention(2, 3, name="attention")(picture, picture))


def called_in_two_ways(**second) -> keras.Model:
    rows = keras.Input((5, 8))
    layer = layers.MultiHeadAttention(2, 4, name="attention")
    x = layer(layer(rows, rows), rows, **second)
    return keras.Model(rows, x[0] if isinstance(x, (tuple, list)) else x)


def beside_a_namesake(kind: str) -> keras.Model:
    rows = keras.Input((5, 8), name="attention_query" if kind == "input" else "rows")
    x = layers.Dense(8, name="attention_query")(rows) if kind == "layer" else rows
    return keras.Model(rows, layers.MultiHeadAttention(2, 4, name="attention")(x, x, use_causal_mask=True))


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (masked_attention, "Hosted"),
        (attention_over_pictures, "MultiHeadAttention"),
        (lambda: attending({"kernel_constraint": "max_norm"}), "MultiHeadAttention"),
        (lambda: attending(call={"return_attention_scores": True}), "MultiHeadAttention"),
        (lambda: called_in_two_ways(use_causal_mask=True), "MultiHeadAttention"),
        (lambda: called_in_two_ways(return_attention_scores=True), "MultiHeadAttention"),
        (lambda: called_in_two_ways(attention_mask=np.tri(5, dtype=bool)), "MultiHeadAttention"),
        (lambda: beside_a_namesake("layer"), "Hosted"),
        (lambda: beside_a_namesake("input"), "Hosted"),
    ],
)
def test_an_unusual_attention_is_one_layer_of_the_twin(build, kind):
    model = scrambled(build())
    twin = to_twin(model)
    assert type(twin.get_layer("attention")).__name__ == kind
    assert from_twin(twin, model).count_params() == model.count_params()


@pytest.mark.parametrize("second", [{}, {"attention_mask": "rows"}])
def test_a_shared_attention_is_shared_in_the_twin(second):
    rows = keras.Input((5, 8))
    layer = layers.MultiHeadAttention(2, 4, name="attention")
    given = {"attention_mask": keras.ops.expand_dims(rows[..., 0] > -0.2, 1)} if second else {}
    twin = to_twin(scrambled(keras.Model(rows, layer(layer(rows, rows), rows, **given))))
    assert len(twin.get_layer("attention_query")._inbound_nodes) == 2


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((6, 8), True), ((6, 2, 4), True), ((48,), True), ((8, 6), False), ((4, 3, 4), False), ((6, 9), False)],
)
def test_axes_side_by_side_may_be_one_and_no_others(shape, fits):
    values = [np.arange(48.0).reshape(6, 8)]
    found = twins._laid_out(values, [np.zeros(shape)])
    assert (found is not None) == fits
    if found is not None:
        np.testing.assert_array_equal(found[0].reshape(-1), np.arange(48))


def test_a_twin_of_another_model_does_not_come_back():
    one, other = (
        keras.Sequential([keras.Input((size,)), layers.Dense(7 - size, use_bias=False, name="d")]) for size in (3, 4)
    )
    with pytest.raises(ModelError, match=r"twin of layer 'd' \(Dense\): expected weights \(4, 3\), got \(3, 4\)"):
        from_twin(to_twin(one), other)


@pytest.mark.parametrize("name", ["what came before", "what a mask allows", "what a constant allows"])
def test_an_integer_file_is_made_of_the_twin_where_an_attention_has_a_mask(name):
    made = for_integers(scrambled(attending(**ATTENTIONS[name])))
    assert type(made.get_layer("attention_scores")).__name__ == "Scores"


@pytest.mark.parametrize(
    "build",
    [
        convolutions,
        attending,
        lambda: attending(call={"use_causal_mask": False}),
        lambda: called_in_two_ways(use_causal_mask=True),  # whose twin masks as Keras 3 does
        lambda: beside_a_namesake("layer"),
    ],
)
def test_an_integer_file_is_made_of_the_model_itself_elsewhere(build):
    model = build()
    assert for_integers(model) is model


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
