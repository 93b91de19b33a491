import pathlib

import keras
import numpy as np
import pytest

from components.artifacts import DataSpec
from components.compression.hosted import Hosted
from components.compression.twin import from_twin, to_twin
from components.errors import ConfigError, ModelError
from components.options import ModelOptions
from components.training.model import build, load, outputs_of

PICTURES = DataSpec(task="classification", input_name="image", input_shape=(28, 28, 1), labels=tuple("abcde"))
ROWS = DataSpec(task="classification", input_name="features", input_shape=(7,), labels=("no", "yes"))
VALUE = DataSpec(task="regression", input_name="features", input_shape=(7,))
FOLDED = ["linear", "mlp", "cnn", "resnet8", "mobilenet", "wide_and_deep"]
ZOO = [*FOLDED, "transformer"]


@pytest.mark.parametrize("name", ZOO)
def test_every_entry_of_the_zoo_gives_finite_logits_of_the_contracts_shape(name):
    model = build(ModelOptions(name=name), PICTURES, seed=1)
    given = model(np.random.default_rng(0).random((2, 28, 28, 1), np.float32)).numpy()
    assert given.shape == (2, 5)
    assert np.isfinite(given).all()
    assert model.inputs[0].name == "image"
    assert outputs_of(model, ModelOptions(name=name)) == "logits"


@pytest.mark.parametrize("name", ["linear", "mlp", "transformer", "wide_and_deep"])
def test_tables_get_one_output_for_a_regression(name):
    model = build(ModelOptions(name=name), VALUE, seed=1)
    assert (model.input_shape, model.output_shape) == ((None, 7), (None, 1))
    assert model.inputs[0].name == "features"


@pytest.mark.parametrize("name", ["cnn", "resnet8", "mobilenet"])
def test_a_picture_model_refuses_rows_and_names_models_that_take_them(name):
    with pytest.raises(ConfigError, match=rf"model\.name={name} takes pictures .* rows of shape \(7,\); use mlp"):
        build(ModelOptions(name=name), ROWS, seed=1)


@pytest.mark.parametrize("spec", [PICTURES, ROWS], ids=["pictures", "rows"])
def test_the_transformer_becomes_a_twin_of_layers_that_tf_keras_has_and_comes_back(spec):
    model = build(ModelOptions(name="transformer", options={"dropout": 0.1}), spec, seed=1)
    x = np.random.default_rng(0).random((3, *spec.input_shape), np.float32)
    twin = to_twin(model)
    np.testing.assert_allclose(twin(x), model(x), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(layer, Hosted) for layer in twin.layers)
    np.testing.assert_array_equal(from_twin(twin, model)(x), model(x))


def test_a_transformer_that_does_not_fit_says_what_would():
    with pytest.raises(ConfigError, match=r"model\.options\.width=30 must be a multiple of heads=4; use 32\."):
        build(ModelOptions(name="transformer", options={"width": 30, "heads": 4}), PICTURES, seed=1)
    with pytest.raises(
        ConfigError, match=r"model\.options\.patch=29 must fit into pictures of 28 x 28; use 28 or less"
    ):
        build(ModelOptions(name="transformer", options={"patch": 29}), PICTURES, seed=1)


@pytest.mark.parametrize("name", FOLDED)
def test_the_zoo_holds_only_layers_that_tfmot_treats_and_that_fold(name):
    allowed = "InputLayer Dense Conv2D DepthwiseConv2D BatchNormalization ReLU Add Dropout Flatten MaxPooling2D GlobalAveragePooling2D"
    layers = build(
        ModelOptions(name=name, options={} if name == "linear" else {"dropout": 0.1}), PICTURES, seed=1
    ).layers
    assert {type(layer).__name__ for layer in layers} <= set(allowed.split())
    for layer in layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            before = layer.input._keras_history.operation
            assert isinstance(before, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)


def test_resnet8_has_the_size_that_mlperf_tiny_has_on_cifar10():
    spec = DataSpec(task="classification", input_name="image", input_shape=(32, 32, 3), labels=tuple("0123456789"))
    assert build(ModelOptions(name="resnet8"), spec, seed=1).count_params() == 78_426  # 78,666 with 240 conv biases


def test_the_width_multiplier_scales_the_mobilenet():
    sizes = [
        build(ModelOptions(name="mobilenet", options={"width": width}), PICTURES, seed=1).count_params()
        for width in (0.5, 1.0, 2)
    ]
    assert sizes == sorted(sizes)
    assert 3 < sizes[2] / sizes[1] < 4


def test_the_seed_alone_fixes_the_initial_weights():
    first, again, other = (build(ModelOptions(name="resnet8"), PICTURES, seed=seed).get_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": 3}, r"model\.name=mlp has no option 'unit' \(did you mean 'units'\?\); legal: dropout, units\."),
        ({"zzz": 3}, r"model\.name=mlp has no option 'zzz'; legal: dropout, units\."),
        ({"dropout": 1.5}, r"model\.options\.dropout of mlp: .*less than 1, got 1\.5; the default is 0\.0\."),
        ({"units": [0]}, r"model\.options\.units\.0 of mlp: .*, got 0; the default is \[64, 32\]\."),
    ],
)
def test_a_wrong_option_is_named_with_what_would_be_right(options, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelOptions(name="mlp", options=options), ROWS, seed=1)


def test_mobilenet_strides_and_blocks_must_pair():
    with pytest.raises(ConfigError, match=r"strides has 5 entries for 2 blocks; give one stride a block\."):
        build(ModelOptions(name="mobilenet", options={"blocks": [8, 8]}), PICTURES, seed=1)


# --- builders ----------------------------------------------------------------------------------------------------

BUILDERS = """
import keras

def from_spec(spec, width: int = 4):
    return keras.Sequential([keras.Input(spec.input_shape), keras.layers.Dense(width), keras.layers.Dense(spec.outputs)])

def from_parts(input_shape, outputs):
    return keras.Sequential([keras.Input(input_shape), keras.layers.Dense(outputs, activation="softmax")])

def broken(spec):
    raise RuntimeError("no luck")

def not_a_model(spec):
    return [1, 2]

def too_wide(spec):
    return keras.Sequential([keras.Input(spec.input_shape), keras.layers.Dense(9)])

def takes_pictures(spec):
    inputs = keras.Input((8, 8, 1))
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))

def two_inputs(spec):
    a, b = keras.Input(spec.input_shape), keras.Input(spec.input_shape)
    return keras.Model([a, b], keras.layers.Dense(spec.outputs)(keras.layers.Add()([a, b])))

@keras.saving.register_keras_serializable("test")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x

def own_layer(spec):
    return keras.Sequential([keras.Input(spec.input_shape), Twice(), keras.layers.Dense(spec.outputs)])
"""


@pytest.fixture
def builders(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "my_models.py"
    file.write_text(BUILDERS)
    return file


def test_a_builder_takes_the_contract_and_its_options(builders):
    model = build(ModelOptions(builder=f"{builders}:from_spec", options={"width": 5}), ROWS, seed=1)
    assert [layer.units for layer in model.layers] == [5, 2]


def test_a_builder_may_ask_for_shape_and_outputs_instead(builders):
    options = ModelOptions(builder=f"{builders}:from_parts")
    model = build(options, ROWS, seed=1)
    assert (model.input_shape, model.output_shape) == ((None, 7), (None, 2))
    assert outputs_of(model, options) == "probabilities"


def test_a_builder_is_found_by_import_path(builders, monkeypatch):
    monkeypatch.syspath_prepend(builders.parent)
    assert build(ModelOptions(builder="my_models:from_spec"), ROWS, seed=1).output_shape == (None, 2)


def test_a_builder_gives_the_same_layer_names_and_weights_each_time(builders):
    options = ModelOptions(builder=f"{builders}:from_spec")
    first, again = build(options, ROWS, seed=4), build(options, ROWS, seed=4)
    assert [layer.name for layer in first.layers] == [layer.name for layer in again.layers] == ["dense", "dense_1"]
    assert all(np.array_equal(a, b) for a, b in zip(first.get_weights(), again.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("function", "options", "error", "message"),
    [
        ("from_spec", {"widht": 1}, ConfigError, r"has no option 'widht' \(did you mean 'width'\?\); legal: width\."),
        ("from_spek", {}, ConfigError, r"has no function 'from_spek'; did you mean 'from_spec'\?"),
        ("broken", {}, ModelError, r"raised RuntimeError: no luck\."),
        ("not_a_model", {}, ModelError, r"must return a keras\.Model \(Keras 3\), got builtins\.list\."),
        ("too_wide", {}, ModelError, r"returns \(9,\), the data have 2 classes: \(2,\); end it with Dense\(2\)\."),
        (
            "takes_pictures",
            {},
            ModelError,
            r"takes \(8, 8, 1\), the data are \(7,\); build it on keras\.Input\(\(7,\)\)\.",
        ),
        ("two_inputs", {}, ModelError, r"has 2 inputs and 1 outputs; one of each is needed"),
    ],
)
def test_what_is_wrong_with_a_builder_is_said_in_one_line(builders, function, options, error, message):
    with pytest.raises(error, match=message) as raised:
        build(ModelOptions(builder=f"{builders}:{function}", options=options), ROWS, seed=1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_colon", r"must be 'package\.module:function' or 'file\.py:function'"),
        (
            "no_such_package_at_all:f",
            r"cannot import 'no_such_package_at_all' .*; install it, or give 'file\.py:function'\.",
        ),
        ("absent.py:f", r"no file absent\.py; give the path of an existing \.py file\."),
        ("json:dump", r"json:dump\(obj, fp.* cannot be called: missing a required argument: 'fp'; take \(spec\)"),
    ],
)
def test_a_builder_that_cannot_be_found_or_called_is_a_configuration_error(path, message):
    with pytest.raises(ConfigError, match=message):
        build(ModelOptions(builder=path), ROWS, seed=1)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    inputs = keras.Input((7,))
    model = keras.Model(inputs, keras.layers.Softmax()(keras.layers.Dense(2)(inputs)))
    model.save(tmp_path / "saved.keras")
    return tmp_path / "saved.keras"


def test_a_keras_file_comes_with_its_weights(saved):
    options = ModelOptions(file=str(saved))
    model = build(options, ROWS, seed=9)
    assert np.array_equal(model.get_weights()[0], load(saved).get_weights()[0])
    assert outputs_of(model, options) == "probabilities"
    assert outputs_of(model, options.model_copy(update={"outputs": "logits"})) == "logits"


def test_a_file_whose_shapes_do_not_fit_names_both(saved):
    with pytest.raises(ModelError, match=r"takes \(7,\), the data are \(28, 28, 1\); .*preprocess\.image_size"):
        build(ModelOptions(file=str(saved)), PICTURES, seed=1)
    with pytest.raises(ModelError, match=r"returns \(2,\), the data have one value \(regression\): \(1,\)"):
        build(ModelOptions(file=str(saved)), VALUE, seed=1)


def test_a_file_takes_no_options(saved):
    with pytest.raises(ConfigError, match=r"saved\.keras has no option 'units'; legal: none\."):
        build(ModelOptions(file=str(saved), options={"units": 3}), ROWS, seed=1)


def test_a_file_that_is_absent_or_damaged_is_told_apart(saved):
    with pytest.raises(ConfigError, match=r"absent\.keras must be an existing \.keras file"):
        build(ModelOptions(file=str(saved.with_name("absent.keras"))), ROWS, seed=1)
    saved.write_bytes(saved.read_bytes()[:500])
    with pytest.raises(ModelError, match=r"saved\.keras cannot be loaded by Keras 3\.") as raised:
        build(ModelOptions(file=str(saved)), ROWS, seed=1)
    assert "\n" not in str(raised.value)


def test_an_unknown_layer_class_in_a_file_is_named(tmp_path):
    class Odd(keras.layers.Layer):
        def call(self, x):
            return x

    keras.Sequential([keras.Input((7,)), Odd(), keras.layers.Dense(2)]).save(tmp_path / "odd.keras")
    with pytest.raises(ModelError, match=r"odd\.keras uses 'Odd', which this process does not know"):
        load(tmp_path / "odd.keras")


def test_the_builders_module_teaches_its_own_layers_to_load(builders, tmp_path):
    options = ModelOptions(builder=f"{builders}:own_layer")
    model = build(options, ROWS, seed=1)
    model.save(tmp_path / "own.keras")
    del keras.saving.get_custom_objects()["test>Twice"]  # as in a process that never ran the builder
    with pytest.raises(ModelError, match="Twice"):
        load(tmp_path / "own.keras")
    assert np.array_equal(load(tmp_path / "own.keras", options).get_weights()[0], model.get_weights()[0])
