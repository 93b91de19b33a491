"""Layers found in the names of real files: Keras 3 numbers its scopes, tf_keras does not, the converter fuses and drops names."""

import keras
import numpy as np
import pytest
import tf_keras

from components.artifacts import DataSpec
from components.delivery.export import export
from components.delivery.owners import layer_classes, operations
from components.options import ExportOptions
from components.tracing import Trace

SPEC = DataSpec(task="classification", input_name="x", input_shape=(6, 6, 1), labels=("a", "b"))


def chain(library):
    """Layers that Keras names itself: 'conv2d' and 'conv2d_1' differ by the number that Keras 3 puts behind any scope."""
    layers = library.layers
    return [
        layers.Conv2D(2, 3, padding="same", name="conv2d"),
        layers.Conv2D(2, 3, padding="same", name="conv2d_1"),
        layers.BatchNormalization(name="bn"),
        layers.ReLU(name="relu"),
        layers.Conv2D(2, 3, padding="same", name="conv2d_2"),
        layers.Flatten(name="flat"),
        layers.Dense(5, activation="relu", name="dense"),
        layers.Dense(5, activation="relu", name="dense_1"),
        layers.Dense(2, name="dense_2"),
    ]


def written(model, folder, format="float32"):
    rows = np.random.default_rng(0).random((8, 6, 6, 1), np.float32)
    file = export(format, format, model, SPEC, "logits", ExportOptions(), rows, folder, seed=0, trace=Trace())
    return file.file.read_bytes()


@pytest.mark.parametrize("library", [keras, tf_keras])
@pytest.mark.parametrize("past", [0, 1])
def test_layers_that_differ_by_a_number_are_told_apart_in_both_libraries(library, past, tmp_path):
    model = library.Sequential([library.layers.InputLayer((6, 6, 1)), *chain(library)])
    for _ in range(past):
        model(np.zeros((1, 6, 6, 1), np.float32))
    found = [(each.kind, each.layers) for each in operations(written(model, tmp_path), list(layer_classes(model)))]
    assert found[0] == ("CONV_2D", ("conv2d",))
    assert found[1] == (
        "CONV_2D",
        ("conv2d_1", "relu"),
    )  # batch normalization is folded into the kernel without a trace
    assert found[2:] == [
        ("CONV_2D", ("conv2d_2",)),
        ("RESHAPE", ("flat",)),
        ("FULLY_CONNECTED", ("dense",)),
        ("FULLY_CONNECTED", ("dense_1",)),
        ("FULLY_CONNECTED", ("dense_2",)),
    ]


def test_a_layer_inside_a_nested_model_is_found_and_so_is_one_used_twice(tmp_path):
    inner = keras.Sequential([keras.Input((6, 6, 2)), *chain(keras)[1:4]], name="inner")
    shared = keras.layers.Conv2D(2, 1, name="shared")
    given = keras.Input((6, 6, 1))
    twice = keras.layers.Add(name="sum")([shared(given), shared(given * 2)])
    made = keras.layers.Dense(2, name="head")(keras.layers.Flatten()(inner(twice)))
    model = keras.Model(given, made)
    assert layer_classes(model)["conv2d_1"] == "Conv2D"
    found = [each.layer for each in operations(written(model, tmp_path), list(layer_classes(model)))]
    assert found.count("shared") == 2
    assert {"conv2d_1", "sum", "head"} <= set(found)


def test_equal_biases_of_two_layers_do_not_make_one_the_owner_of_the_other(tmp_path):
    model = keras.Sequential([keras.Input((6, 6, 1)), *chain(keras)])  # all biases are zero, so one tensor holds them
    found = operations(written(model, tmp_path), list(layer_classes(model)))
    dense = [each.layers for each in found if each.kind == "FULLY_CONNECTED"]
    assert dense == [("dense",), ("dense_1",), ("dense_2",)]
