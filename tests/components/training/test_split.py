import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import read_json
from components.errors import ConfigError
from components.options import ModelOptions, TrainOptions
from components.tracing import Trace
from components.training.loop import Loop, make_loss
from components.training.split import Split, beside_their_inputs, beside_their_weights, gradients, placed
from components.training.train import train

HERE = pathlib.Path(__file__).parent
ADAM = TrainOptions(batch_size=16)


def build(dropout: float = 0.0) -> keras.Model:
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, name="first")(inputs)
    x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.ops.relu(x)
    y = keras.layers.Conv2D(8, 3, padding="same", activation="relu", name="second")(x)
    x = keras.layers.Add(name="sum")([x, y])
    x = keras.layers.Flatten(name="flat")(x)
    x = keras.Sequential([keras.Input((512,)), keras.layers.Dense(32, "relu", name="hidden")], name="block")(x)
    x = keras.layers.Dropout(dropout, name="drop")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="out")(x), name="small")


def places(model: keras.Model) -> dict[str, int]:
    return {variable.path: int(variable.value.device[-1]) for variable in model.variables}


def trained(pictures, folder, options: dict, split=None, model=build) -> tuple[list, dict, list[str]]:
    folder.mkdir()
    told: list[str] = []
    made = train(
        TrainOptions.model_validate({"epochs": 2, "batch_size": 16, **options}),
        model,
        ModelOptions(builder="a:b"),
        pictures,
        folder,
        strategy=tf.distribute.get_strategy(),
        seed=1,
        trace=Trace(on_telling=told.append),
        split=split,
    )
    return keras.saving.load_model(made.file).get_weights(), read_json(folder / "history.json"), told


@pytest.fixture
def split(two_devices) -> Split:
    return Split(tuple(two_devices), {"first|norm": 0, "second": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 1e-3}},
        {"accumulate": 2, "rematerialize": True, "optimizer": {"name": "adamw", "learning_rate": 0.01, "ema": 0.9}},
        {"precision": "mixed_float16", "transfer": {"lora": 2, "frozen": ["norm"]}},
    ],
)
def test_a_split_model_learns_what_a_whole_one_does(pictures, tmp_path, split, options):
    model = functools.partial(build, 0.2)
    whole, history, _ = trained(pictures, tmp_path / "whole", options, model=model)
    ours, split_history, told = trained(pictures, tmp_path / "split", options, split, model)
    for one, other in zip(ours, whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert split_history["val_loss"] == pytest.approx(history["val_loss"], rel=1e-5)
    assert any(line.startswith("split: CPU:0 first to ") and "; CPU:1 second to out (" in line for line in told)


def test_weights_and_optimizer_lie_where_their_layer_computes_and_come_back(pictures, split):
    model = build()
    before, kinds = [variable.numpy() for variable in model.variables], [type(layer) for layer in model.layers]
    with placed(model, split, ADAM) as there:
        parts = there.parts
        # What no pattern names goes with the one before it: the activation with norm, the rest with second.
        assert parts[0].layers[:2] == ("first", "norm")
        assert parts[1].layers == ("second", "sum", "flat", "hidden", "drop", "out")
        assert parts[0].weight_bytes == 4 * (9 * 8 + 4 * 8)
        assert parts[1].weight_bytes == 4 * (9 * 64 + 8 + 512 * 32 + 32 + 32 * 3 + 3)
        found = places(model)
        assert {name: at for name, at in found.items() if at == 0}.keys() == {
            name for name in found if name.startswith(("first", "norm"))
        }
        for variable in model.trainable_variables:
            variable.assign_add(tf.ones(variable.shape))
    assert set(places(model).values()) == {0}
    assert [type(layer) for layer in model.layers] == kinds
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), old + 1 if variable.trainable else old)


def test_an_optimizers_slots_lie_beside_their_weights(pictures, tmp_path, split, monkeypatch):
    seen = {}

    def look(loss, variables):
        optimizer = seen["maker"]
        seen["slots"] = {each.path: int(each.value.device[-1]) for each in optimizer.variables if len(each.shape)}
        return gradients(loss, variables)

    from components.training import loop, maker

    made = maker.Maker.optimizer
    monkeypatch.setattr(maker.Maker, "optimizer", lambda *given: seen.setdefault("maker", made(*given)))
    monkeypatch.setattr(loop, "gradients", look)
    trained(pictures, tmp_path / "run", {"epochs": 1, "optimizer": {"name": "adam", "ema": 0.9}}, split)
    assert len(seen["slots"]) == 3 * 9  # two moments and an average of each weight
    for path, at in seen["slots"].items():
        assert at == ("first" not in path and "norm" not in path), path


def test_gradients_and_updates_are_computed_where_their_layer_is(split):
    model = build()
    with placed(model, split, ADAM):
        optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
        beside_their_weights(optimizer)
        optimizer.build(model.trainable_variables)

        @tf.function
        def update(x):
            for _ in tf.range(2):
                found = gradients(tf.reduce_sum(model(x, training=True) ** 2), model.trainable_variables)
                with beside_their_inputs():
                    optimizer.apply(found, model.trainable_variables)

        graph = update.get_concrete_function(tf.TensorSpec((16, 8, 8, 1))).graph
    where = collections.defaultdict(set)
    squares = set()
    for each in walked(graph):
        if each.type in ("Conv2D", "Conv2DBackpropFilter", "MatMul"):
            where[each.type].add((each.inputs[0].shape[-1], each.device[-1]))
        elif each.type == "Square" and "/adam" in each.name:
            squares.add((each.name, each.device[-1]))
    assert where["Conv2D"] == {(1, "0"), (8, "1")}
    assert where["Conv2DBackpropFilter"] == {(1, "0"), (8, "1")}
    assert {at for _, at in where["MatMul"]} == {"1"}  # forward and both gradients of hidden and out
    # Adam squares the gradient of each weight.
    assert collections.Counter(at for _, at in squares) == {"0": 3, "1": 6}


def walked(graph):
    """Operations of a graph and of the bodies of its loops and branches."""
    yield from graph.get_operations()
    for function in graph._functions.values() if isinstance(graph._functions, dict) else graph._functions:
        if getattr(function, "graph", None) is not None:
            yield from walked(function.graph)


def test_without_a_layout_runs_of_layers_need_about_the_same():
    inputs = keras.Input((4,))
    x = inputs
    for name in "abcdef":
        x = keras.layers.Dense(4, name=name)(x)
    model = keras.Model(inputs, keras.layers.Dense(40, name="wide")(x))
    one = TrainOptions(batch_size=1)
    with placed(model, Split(("CPU:0", "CPU:0")), one) as there:
        assert [part.layers for part in there.parts] == [("a", "b", "c", "d", "e", "f"), ("wide",)]
    with placed(model, Split(("CPU:0",) * 4), one) as there:
        # More devices would not lower the largest need.
        assert [len(part.layers) for part in there.parts] == [6, 1, 0, 0]
        assert str(there).endswith("; CPU:0 no layer; CPU:0 no layer")


def test_activations_of_many_examples_outweigh_weights():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(400, name="heavy")(inputs)  # 2,000 weights, 400 numbers an example
    for name in "abcd":
        x = keras.layers.Activation("relu", name=name)(x)
    model = keras.Model(inputs, x)

    def runs(**options):
        with placed(model, Split(("CPU:0", "CPU:0")), TrainOptions(**options)) as there:
            return [len(part.layers) for part in there.parts]

    assert runs(batch_size=1) == [1, 4]
    assert runs(batch_size=100) == [2, 3]
    assert runs(batch_size=100, accumulate=100) == [1, 4]  # one at a time


def test_a_layer_shared_with_a_nested_model_is_placed_once_and_comes_back(two_devices):
    shared = keras.layers.Dense(4, name="shared")
    inner = keras.Sequential([keras.Input((4,)), shared], name="inner")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="out")(inner(shared(inputs))))
    kernel = shared.kernel._value
    with placed(model, Split(tuple(two_devices), {"shared": 1, "out": 0}), ADAM) as there:
        assert [part.layers for part in there.parts] == [("out",), ("shared",)]
        assert there.home == two_devices[0]  # beside the last layer, not on the last device
        shared.kernel.assign(np.ones((4, 4)))
    assert shared.kernel._value is kernel
    assert type(shared) is keras.layers.Dense
    np.testing.assert_array_equal(kernel.numpy(), np.ones((4, 4)))


def test_sums_over_parts_of_a_batch_lie_beside_their_weights(split):
    """The gradient of `hidden` has the shape of no other tensor, nor has that of `first`."""
    model = build()
    with placed(model, split, ADAM) as there:
        optimizer = keras.optimizers.Adam()
        beside_their_weights(optimizer)
        optimizer.build(model.trainable_variables)
        loss = make_loss("classification", "logits")
        loop = Loop(
            model, optimizer, loss, "classification", tf.distribute.get_strategy(), accumulate=4, home=there.home
        )
        specs = tf.TensorSpec((16, 8, 8, 1)), tf.TensorSpec((16,), tf.int32)
        graph = tf.function(loop.update).get_concrete_function(*specs).graph
    kernels = {(512, 32): "1", (3, 3, 1, 8): "0"}
    seen = collections.Counter()
    for each in walked(graph):
        shape = tuple(each.outputs[0].shape) if each.outputs and each.outputs[0].shape.rank is not None else None
        if shape in kernels and each.type not in ("ReadVariableOp", "Const"):
            assert each.device[-1:] == kernels[shape], (each.name, each.type, each.device)
            seen[shape, each.type] += 1
    assert {shape for shape, kind in seen if kind == "AddV2"} == set(kernels)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"third": 0}, r"strategy\.layout: 'third' names no layer of the model; it has first, norm, "),
        ({"first": 2}, r"strategy\.layout 'first': 2 must be below the 2 devices; 0 is the first\."),
    ],
)
def test_a_wrong_layout_is_named(layout, message):
    model = build()
    with pytest.raises(ConfigError, match=message), placed(model, Split(("CPU:0",) * 2, layout), ADAM):
        pass


def test_a_subclassed_model_cannot_be_cut():
    class Own(keras.Model):
        pass

    message = r"strategy\.name=split cuts functional and Sequential models, got Own 'own'; build it as one of them"
    with (
        pytest.raises(ConfigError, match=message),
        placed(Own(name="own"), Split(("CPU:0",) * 2), ADAM),
    ):
        pass


def test_a_sequential_model_is_cut(two_devices):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, name="a"), keras.layers.Dense(2, name="b")])
    x = np.ones((2, 3), "float32")
    before = model(x).numpy()
    with placed(model, Split(tuple(two_devices), {"b": 1}), ADAM) as there:
        assert [part.layers for part in there.parts] == [("a",), ("b",)]
        given = model(x)
        assert given.device[-1] == "1"
        np.testing.assert_array_equal(given, before)


@pytest.mark.slow  # ten processes
def test_each_device_needs_less_memory_than_one_with_all_layers(tmp_path):
    def peaks(devices):
        folder = tmp_path / str(devices)
        folder.mkdir()
        environment = os.environ | {"PYTHONPATH": f"{HERE.parents[2]}{os.pathsep}{HERE}"}
        command = [sys.executable, "-m", "parts", folder, str(devices)]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)

    (whole,) = peaks(1)
    assert max(peaks(2)) < 0.85 * whole
    assert max(peaks(4)) < 0.65 * whole
