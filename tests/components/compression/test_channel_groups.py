import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from components.compression.channel_groups import Channels, trace_channels
from components.errors import ModelError

layers = tf_keras.layers


def groups(channels: Channels) -> list[tuple[tuple[str, ...], int]]:
    return [(group.layers, len(group.numbers)) for group in channels.groups()]


def picture(*sides: int) -> tf_keras.layers.Input:
    return layers.Input(sides or (8, 8, 1), name="image")


def test_a_residual_sum_ties_and_flattening_repeats_for_every_position():
    image = picture()
    a = layers.Conv2D(4, 3, padding="same", name="a")(image)
    x = layers.Add(name="sum")([a, layers.Conv2D(4, 3, padding="same", name="b")(a)])
    model = tf_keras.Model(image, layers.Dense(3, name="out")(layers.Flatten(name="flat")(x)))
    channels = trace_channels(model)
    assert groups(channels) == [(("a", "b"), 4)]
    assert channels.flows["out"].inputs.shape == (256,)
    assert list(np.unique(channels.flows["out"].inputs, return_counts=True)[1]) == [64] * 4
    assert list(channels.flows["out"].inputs[:4]) == list(channels.flows["a"].outputs)


def test_a_dense_softmax_keeps_its_outputs_and_lets_its_inputs_go():
    image = picture()
    x = layers.Flatten(name="flat")(layers.Conv2D(4, 3, name="a")(image))
    x = layers.Dense(5, activation="softmax", name="gate")(x)
    channels = trace_channels(tf_keras.Model(image, layers.Dense(3, activation="softmax", name="out")(x)))
    assert groups(channels) == [(("a",), 4)]
    assert channels.refusal("gate") == "each sees the others in the softmax of layer 'gate'"
    assert channels.refusal("out") == "each sees the others in the softmax of layer 'out'"


def test_a_concatenation_lines_channels_up_so_a_sum_behind_it_falls_into_two_groups():
    image = picture()
    a, b = (layers.Conv2D(n, 1, name=name)(image) for n, name in ((3, "a"), (5, "b")))
    c = layers.Conv2D(8, 1, name="c")(image)
    x = layers.Maximum(name="max")([layers.Concatenate(name="both")([a, b]), c])
    model = tf_keras.Model(image, layers.Conv2D(2, 1, name="out")(x))
    channels = trace_channels(model)
    assert groups(channels) == [(("a", "c"), 3), (("b", "c"), 5)]
    assert list(channels.flows["c"].outputs[3:]) == list(channels.flows["b"].outputs)


def test_a_concatenation_along_time_ties():
    series = layers.Input((6, 2))
    a, b = (layers.Conv1D(4, 3, name=name)(series) for name in "ab")
    x = layers.GlobalMaxPooling1D()(layers.Concatenate(axis=1)([a, b]))
    assert groups(trace_channels(tf_keras.Model(series, layers.Dense(2, name="out")(x)))) == [(("a", "b"), 4)]


def test_a_depthwise_layer_repeats_each_channel_and_squeeze_and_excite_ties():
    image = picture()
    x = layers.Conv2D(4, 1, name="wide")(image)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    s = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    s = layers.Conv2D(8, 1, activation="sigmoid", name="gate")(layers.Conv2D(2, 1, name="squeeze")(s))
    x = layers.Multiply(name="excite")([x, s])
    channels = trace_channels(tf_keras.Model(image, layers.Conv2D(2, 1, name="out")(x)))
    assert groups(channels) == [(("wide", "depth", "gate"), 4), (("squeeze",), 2)]
    wide = channels.flows["wide"].outputs
    assert list(channels.flows["depth"].outputs) == list(np.repeat(wide, 2))
    assert list(channels.flows["gate"].outputs) == list(np.repeat(wide, 2))


def test_a_gate_of_one_channel_stays_and_ties_nothing():
    image = picture()
    x, gate = layers.Conv2D(4, 1, name="x")(image), layers.Conv2D(1, 1, name="gate")(image)
    model = tf_keras.Model(image, layers.Conv2D(2, 1, name="out")(layers.Multiply(name="gated")([x, gate])))
    channels = trace_channels(model)
    assert groups(channels) == [(("x",), 4)]
    assert channels.refusal("gate") == "its channels are spread over those of another tensor by layer 'gated'"


def test_a_layer_called_twice_ties_what_it_is_called_with_and_a_shared_activation_does_not():
    image = picture()
    shared, relu = layers.Conv2D(3, 1, name="shared"), layers.ReLU(name="relu")
    a, b = (relu(layers.Conv2D(4, 1, name=name)(image)) for name in "ab")
    c, d = (layers.Conv2D(5, 1, name=name)(relu(shared(x))) for name, x in (("c", a), ("d", b)))
    x = layers.Concatenate()([c, d])
    channels = trace_channels(tf_keras.Model(image, layers.Conv2D(2, 1, name="out")(x)))
    assert groups(channels) == [(("a", "b"), 4), (("shared",), 3), (("c",), 5), (("d",), 5)]
    assert channels.flows["shared"].multiply_adds(np.ones(channels.count, bool)) == 2 * 64 * 4 * 3


UNKNOWN = {
    "layer 'norm' (LayerNormalization), which": lambda x: layers.LayerNormalization(name="norm")(x),
    "layer 'soft' (Activation), which": lambda x: layers.Activation("softmax", name="soft")(x),
    "layer 'swap' (Permute), which": lambda x: layers.Permute((3, 1, 2), name="swap")(x),
    "layer 'rows' (Reshape), which": lambda x: layers.Reshape((8, 8, 2, 2), name="rows")(x),
    "layer 'other' (BatchNormalization), which": lambda x: layers.BatchNormalization(axis=1, name="other")(x),
    "layer 'tf.math.multiply' (TFOpLambda), which": lambda x: tf.multiply(x, tf.ones((1, 1, 4))),
    "layer 'scale' (Rescaling), which": lambda x: layers.Rescaling([1.0, 2.0, 3.0, 4.0], name="scale")(x),
}


@pytest.mark.parametrize("words", UNKNOWN)
def test_what_no_rule_is_known_for_freezes_what_goes_in_and_what_comes_out(words):
    tf_keras.backend.reset_uids()
    image = picture()
    x = UNKNOWN[words](layers.Conv2D(4, 1, name="before")(image))
    x = layers.Dense(3, name="behind")(layers.Flatten()(x))
    y = layers.Dense(3, name="free")(layers.Flatten()(image))
    channels = trace_channels(tf_keras.Model(image, layers.Dense(2, name="out")(layers.Concatenate()([x, y]))))
    assert channels.refusal("before") == f"its channels go through {words} trimline cannot cut"
    assert set(channels.flows["behind"].inputs) <= set(channels.frozen)
    assert groups(channels) == [(("behind",), 3), (("free",), 3)]


def test_a_recurrent_layer_freezes_both_sides_though_it_hides_its_channels():
    series = layers.Input((6, 2))
    x = layers.LSTM(4, name="lstm")(layers.Conv1D(4, 3, name="before")(series))
    channels = trace_channels(tf_keras.Model(series, layers.Dense(2, name="out")(x)))
    assert groups(channels) == []
    assert channels.multiply_adds() == 4 * 3 * 2 * 4 + 4 * 2


def test_inputs_and_outputs_stay_and_what_is_added_to_them_too():
    image = picture(8, 8, 4)
    x = layers.Add(name="sum")([image, layers.Conv2D(4, 1, name="added")(image)])
    channels = trace_channels(tf_keras.Model(image, layers.Conv2D(2, 1, name="out")(x)))
    assert groups(channels) == []
    assert channels.refusal("added") == "its channels are those of the model's input 'image'"
    assert channels.refusal("out") == "its channels are those of the model's output"


def test_excluded_and_frozen_layers_keep_both_sides():
    image = picture()
    x = image
    for name in "abcdefg":
        x = layers.Conv2D(4, 1, name=name)(x)
    model = tf_keras.Model(image, x)
    model.get_layer("e").trainable = False
    channels = trace_channels(model, exclude=["c"])
    assert groups(channels) == [(("a",), 4), (("f",), 4)]
    assert channels.refusal("b") == "its channels go through layer 'c', which compress.channels.exclude names"
    assert channels.refusal("d") == "its channels go through layer 'e', which is frozen (trainable=False)"


def test_multiply_adds_are_those_of_every_kernel_at_every_position():
    image = picture(8, 8, 3)
    x = layers.Conv2D(4, 3, strides=2, padding="same", name="conv")(image)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x)
    x = layers.Conv2DTranspose(5, 2, strides=2, name="up")(x)
    x = layers.Dense(6, name="each")(x)
    model = tf_keras.Model(image, layers.Dense(7, name="out")(layers.Flatten()(x)))
    works = {"conv": 16 * 9 * 3 * 4, "depth": 4 * 9 * 8, "up": 4 * 4 * 8 * 5, "each": 16 * 5 * 6, "out": 96 * 7}
    channels = trace_channels(model)
    every = np.ones(channels.count, bool)
    assert {name: made for name, flow in channels.flows.items() if (made := flow.multiply_adds(every))} == works
    kept = every.copy()
    kept[channels.flows["conv"].outputs[:1]] = False
    assert channels.flows["depth"].multiply_adds(kept) == 4 * 9 * 6
    assert channels.flows["up"].multiply_adds(kept) == 4 * 4 * 6 * 5
    assert channels.multiply_adds(kept) == sum(works.values()) - 16 * 9 * 3 - 4 * 9 * 2 - 4 * 4 * 2 * 5


def test_free_sides_are_refused_by_layer_and_next_step():
    image = layers.Input((None, None, 3))
    model = tf_keras.Model(image, layers.Conv2D(4, 3, name="conv")(image))
    with pytest.raises(
        ModelError, match=r"layer 'conv' \(Conv2D\) has free sides \(None, None\).*build the model with"
    ):
        trace_channels(model)
