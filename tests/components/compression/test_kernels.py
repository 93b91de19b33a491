import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert.interpreter import Interpreter

from components.compression.kernels import choose, distinct_per_channel, kernels, sparsity, wrap

layers = tf_keras.layers


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((6,), lambda: layers.Dense(5)),
        ((6, 4), lambda: layers.Conv1D(5, 3)),
        ((6, 7, 3), lambda: layers.Conv2D(5, (2, 3))),
        ((6, 7, 3), lambda: layers.DepthwiseConv2D((2, 3), depth_multiplier=2)),
        ((6, 7, 3), lambda: layers.Conv2DTranspose(5, (2, 3))),
        ((6, 7, 5, 3), lambda: layers.Conv3D(4, (2, 3, 2))),
    ],
)
def test_a_promise_has_the_kernels_shape_and_values_as_the_file_lays_them_out(shape, make):
    tf_keras.utils.set_random_seed(0)
    inputs = layers.Input(shape)
    twin = tf_keras.Model(inputs, make()(inputs))
    (kernel,) = kernels(twin)
    promise = kernel.promise(kernel.values, pruned=False, distinct=0, quantized=False)

    function = tf.function(lambda x: twin(x)).get_concrete_function(tf.TensorSpec((1, *shape)))
    content = tf.lite.TFLiteConverter.from_concrete_functions([function], twin).convert()
    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    sides = [side for side in promise.shape if side != 1]
    stored = [
        interpreter.get_tensor(each["index"])
        for each in interpreter.get_tensor_details()
        if [int(side) for side in each["shape"] if side != 1] == sides and each["dtype"] == np.float32
    ]
    assert any(np.array_equal(np.sort(each, axis=None), np.sort(kernel.values, axis=None)) for each in stored)


def test_sparsity_and_distinct_weights_are_counted_by_output_channel():
    values = np.array([[0, 1], [0, 2], [5, 3], [5, 4]], np.float32)
    assert sparsity(values) == 0.25
    assert distinct_per_channel(values) == 4


def test_layers_with_weights_that_no_step_knows_are_named():
    words = layers.Input((7, 3))
    twin = tf_keras.Model(words, layers.Dense(2, name="out")(layers.LSTM(4, name="memory")(words)))
    chosen = choose(twin, lambda kernel: None)
    assert chosen.names == {"out"}
    assert [each.to_json() for each in chosen.untreated] == [
        {"layer": "memory", "class": "LSTM", "reason": "trimline does not compress LSTM yet"}
    ]


def test_wrapping_copies_so_the_twin_keeps_its_own_weights():
    inputs = layers.Input((3,))
    twin = tf_keras.Model(inputs, layers.Dense(2, name="out")(inputs))
    made = wrap(twin, ["out"], lambda layer: layer)
    made.get_layer("out").kernel.assign(tf.zeros((3, 2)))
    assert np.count_nonzero(twin.get_layer("out").kernel) > 0
