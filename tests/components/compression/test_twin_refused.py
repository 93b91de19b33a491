"""Models that cannot be twinned are refused with the layer, and wrong twins are found."""

import json

import keras
import pytest
import tf_keras
from keras import layers, ops

from components.compression import twin as twins
from components.compression.twin import to_twin
from components.errors import ModelError
from tests.components.compression.test_twin_models import two_towers, with_block

from .conftest import scrambled

NEXT = "; replace the layer, add it to components.compression.twin.TWINS, or keep to recipes without prune, cluster and qat."


@keras.saving.register_keras_serializable("tests")
class Noisy(layers.Layer):
    """Draws from the generator that all of Keras shares."""

    def call(self, x, training=False):
        return x + keras.random.normal(ops.shape(x)) if training else x


def refusal(model: keras.Model) -> str:
    with pytest.raises(ModelError) as caught:
        to_twin(model)
    return str(caught.value)


def test_a_layer_whose_random_numbers_cannot_be_repeated_is_refused():
    row = keras.Input((4,))
    assert refusal(keras.Model(row, Noisy(name="noisy")(row))) == (
        "layer 'noisy' (Noisy) has no tf_keras twin, so tfmot cannot compress the model: in training it changes a variable that is not its own, "
        "as keras.random functions without seed=keras.random.SeedGenerator() do" + NEXT
    )


def test_a_layer_that_keras_cannot_save_is_refused():
    row = keras.Input((4,))
    got = refusal(keras.Model(row, layers.Lambda(lambda x: x * 2, name="mine")(row)))
    assert got.startswith("layer 'mine' (Lambda) has no tf_keras twin, so tfmot cannot compress the model: ")
    assert "lambda" in got
    assert got.endswith(NEXT)


@tf_keras.saving.register_keras_serializable("tests")
class Halved(tf_keras.layers.Layer):
    def call(self, x):
        return x * 0.5


def test_a_wrong_twin_is_named_inside_a_nested_model_too(monkeypatch):
    monkeypatch.setitem(twins.TWINS, "Flatten", lambda layer, name: [Halved(name=name)])
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(3), layers.Flatten(name="wrong"), layers.Dense(2)])
    row = keras.Input((3,))
    got = refusal(scrambled(keras.Model(row, layers.Dense(2, name="after")(inner(row)), name="outer")))
    assert got.startswith("the twin of model 'outer' differs by ")
    assert got.endswith(
        "of its largest output, 1e-05 is allowed; first at layer 'wrong' (Flatten): "
        "replace that layer, or correct its entry in components.compression.twin.TWINS."
    )


def test_rounding_that_adds_up_is_no_fault_of_the_twin_up_to_a_limit(monkeypatch):
    model = scrambled(two_towers())
    monkeypatch.setattr(twins, "_first_difference", lambda *_: None)  # what it says where each layer alone is right
    monkeypatch.setattr(twins, "_difference", lambda *_: 9e-4)
    to_twin(model)
    monkeypatch.setattr(twins, "_difference", lambda *_: 2e-3)
    assert refusal(model).endswith(
        "differs by 2.0e-03 of its largest output, 0.001 is allowed, though no layer does on its own: the model blows rounding up; "
        "train it further, or look at its normalization (variances near zero)."
    )


def test_a_hosted_layer_is_kept_as_json_that_nothing_rewrites():
    config = to_twin(with_block()).get_layer("block").get_config()
    assert json.loads(config["held"])["config"]["width"] == 5
    assert json.loads(config["arguments"])[1] == {"scale": 0.5}
