import keras
import numpy as np
import pytest

from components.artifacts import DataSpec
from components.compression import twin as twins
from components.compression.twin import TOLERANCE, from_twin, to_twin
from components.delivery.export import export
from components.delivery.measure import predict
from components.errors import ConfigError
from components.options import ExportOptions, ModelOptions, TransferOptions
from components.tracing import Trace
from components.training.model import build
from components.training.transfer import merged, transferred

LENGTH, WORDS = 12, 300
SPEC = DataSpec(task="classification", input_name="features", input_shape=(LENGTH,), labels=tuple("abc"))
SMALL = {"vocabulary": WORDS, "width": 16, "hidden": 32, "depth": 2}
NAMES = ["text_encoder", "causal_lm"]


def make(name, **more):
    return build(ModelOptions(name=name, options={**SMALL, **more}), SPEC, seed=1)


def draw(rows=64):
    return np.random.default_rng(0).integers(0, WORDS, (rows, LENGTH)).astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_answers_alike_and_leads_back(name):
    model, tokens = make(name, dropout=0.1), draw()
    twin = to_twin(model)
    assert twins._difference(model(tokens), twin(tokens)) <= TOLERANCE
    back = from_twin(twin, model)
    assert np.array_equal(back(tokens), model(tokens))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("format", "allowed"), [("float32", 1e-4), ("int8", 0.15)])
def test_an_exported_file_loads_and_answers_as_the_model_does(name, format, allowed, tmp_path):
    model, tokens = make(name), draw()
    file = export(format, format, model, SPEC, "logits", ExportOptions(), tokens, tmp_path, seed=0, trace=Trace())
    expected, given = model(tokens).numpy(), predict(file.file, tokens)
    assert np.abs(given - expected).max() <= allowed * np.abs(expected).max()


@pytest.mark.parametrize("name", NAMES)
def test_it_saves_and_loads_without_any_code_of_ours(name, tmp_path):
    model, tokens = make(name, dropout=0.1), draw()
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert np.array_equal(loaded(tokens), model(tokens))
    assert all(type(layer).__module__.startswith("keras.") for layer in loaded.layers)


def test_a_token_of_the_language_model_sees_none_behind_it_and_one_of_the_encoder_does():
    before = draw(4)
    after = before.copy()
    after[:, -1] = (after[:, -1] + 7) % WORDS
    for name, same in (("causal_lm", True), ("text_encoder", False)):
        model = make(name)
        states = keras.Model(model.input, model.get_layer("norm").output)
        one, two = states(before).numpy()[:, :-1], states(after).numpy()[:, :-1]
        assert np.allclose(one, two, atol=1e-6) is same


def test_numbers_beyond_the_vocabulary_count_as_its_last():
    model = make("text_encoder")
    over, last = np.full((1, LENGTH), WORDS + 9.0, np.float32), np.full((1, LENGTH), WORDS - 1.0, np.float32)
    assert np.array_equal(model(over), model(last))
    assert not np.array_equal(model(last), model(last - 1))


def test_bfloat16_keeps_large_token_numbers_apart():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = make("text_encoder")
    finally:
        keras.config.set_dtype_policy("float32")
    one, two = np.full((1, LENGTH), 289.0, np.float32), np.full((1, LENGTH), 290.0, np.float32)
    assert not np.array_equal(keras.ops.convert_to_numpy(model(one)), keras.ops.convert_to_numpy(model(two)))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_width_and_pictures_are_refused(name):
    with pytest.raises(ConfigError, match=r"width=15 must be a multiple of heads=2; use 16"):
        make(name, width=15)
    pictures = DataSpec(task="classification", input_name="image", input_shape=(8, 8, 1), labels=("a", "b"))
    with pytest.raises(ConfigError, match=r"takes rows of token numbers, got examples of shape \(8, 8, 1\)"):
        build(ModelOptions(name=name), pictures, seed=1)


@pytest.mark.parametrize("name", NAMES)
def test_corrections_of_low_rank_are_merged_into_a_model_that_twins(name):
    model, tokens = make(name), draw()
    before = model(tokens).numpy()
    with transferred(model, TransferOptions(lora=2)) as stages:
        for variable in stages.variables:
            variable.assign_add(0.05 * keras.random.normal(variable.shape, seed=1))
        learned = model(tokens).numpy()
    assert np.abs(learned - before).max() > 0.01
    made = merged(model, lambda: make(name))
    assert np.allclose(made(tokens), learned, atol=1e-5)
    assert made.count_params() == make(name).count_params()
    assert twins._difference(made(tokens), to_twin(made)(tokens)) <= TOLERANCE
