import keras
import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import read_json
from components.errors import ConfigError
from components.options import ModelOptions, TrainOptions, TransferOptions
from components.tracing import Trace
from components.training.train import train
from components.training.transfer import merged, transferred

FILE = ModelOptions(name="linear")  # only says that the outputs are logits


def pretrained():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(6, 3, activation="relu", name="body_conv")(inputs)
    x = keras.layers.BatchNormalization(name="body_norm")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(12, "relu", name="hidden")(x)
    return keras.Model(inputs, keras.layers.Dense(3, name="logits")(x))


def run(folder, batches, *, trace=None, **options):
    folder.mkdir(exist_ok=True)
    options = {"batch_size": 32, "epochs": 4, "optimizer": {"learning_rate": 0.01}, **options}
    strategy = tf.distribute.get_strategy()
    made = train(
        TrainOptions(**options), pretrained, FILE, batches, folder, strategy=strategy, seed=3, trace=trace or Trace()
    )
    return keras.saving.load_model(made.file), made


def changed(model):
    """Names of the layers whose weights are not those of the pretrained model."""
    start = pretrained()
    return {
        layer.name
        for layer in model.layers
        if layer.weights
        and any(
            not np.array_equal(a, b)
            for a, b in zip(layer.get_weights(), start.get_layer(layer.name).get_weights(), strict=True)
        )
    }


def test_frozen_layers_keep_every_bit_statistics_too(pictures, tmp_path):
    model, _ = run(tmp_path, pictures, transfer={"frozen": ["body_.*"]})
    assert changed(model) == {"hidden", "logits"}
    assert all(layer.trainable for layer in model.layers)  # what is saved trains as it was built to


def test_layers_are_unfrozen_at_their_epoch_at_a_lower_rate(pictures, tmp_path):
    transfer = {"frozen": ["body_.*", "hidden"], "unfreeze_epoch": 3, "unfreeze_rate": 0.1}
    model, made = run(tmp_path / "four", pictures, transfer=transfer)
    assert changed(model) == {"body_conv", "body_norm", "hidden", "logits"}
    rates = read_json(made.folder / "history.json")["learning_rate"]
    # That of the update after each epoch's last.
    assert rates == [pytest.approx(each) for each in (0.01, 0.001, 0.001, 0.001)]
    until, _ = run(tmp_path / "two", pictures, transfer=transfer, epochs=2)
    assert changed(until) == {"logits"}


@pytest.mark.parametrize("at", [1.5, 2.5])
def test_a_stopped_transfer_goes_on_in_its_stage(at, pictures, tmp_path):
    def interrupt(done, total, note):
        if done > at:
            raise KeyboardInterrupt

    options = {
        "transfer": {"frozen": ["body_.*"], "unfreeze_epoch": 3},
        "optimizer": {"ema": 0.9},
        "checkpoint_every": "0.001s",
    }
    whole, _ = run(tmp_path / "whole", pictures, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", pictures, trace=Trace(on_progress=interrupt), **options)
    cut, _ = run(tmp_path / "cut", pictures, **options)
    for ours, theirs in zip(cut.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_lora_changes_kernels_by_a_matrix_of_its_rank_and_leaves_a_standard_model(pictures, tmp_path):
    model, made = run(tmp_path, pictures, epochs=10, transfer={"lora": 2})
    assert made.facts["parameters"] == pretrained().count_params()
    difference = model.get_layer("hidden").get_weights()[0] - pretrained().get_layer("hidden").get_weights()[0]
    assert np.linalg.matrix_rank(difference, tol=1e-5) == 2
    head = model.get_layer("logits").get_weights()[0] - pretrained().get_layer("logits").get_weights()[0]
    assert np.linalg.matrix_rank(head, tol=1e-5) == 3  # the last layer trains whole
    assert not any(getattr(layer, "lora_enabled", False) for layer in model.layers)


def test_a_merged_model_answers_as_the_corrected_one():
    model = pretrained()
    x = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype("float32")
    with transferred(model, TransferOptions(lora=3)) as stages:
        names = sorted(variable.name for variable in stages.variables)
        assert names.count("lora_kernel_a") == 2
        for variable in model.trainable_variables:
            variable.assign(np.random.default_rng(1).normal(size=variable.shape))
        np.testing.assert_allclose(merged(model, pretrained)(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_names_no_layer_or_leaves_none_is_refused(pictures, tmp_path):
    message = (
        r"train\.transfer\.frozen: 'bodyy' names no layer of the model; it has body_conv, body_norm, hidden, logits\."
    )
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, pictures, transfer={"frozen": ["bodyy"]})
    with pytest.raises(ConfigError, match=r"train\.transfer\.frozen=\['\.\*'\] leaves nothing to train"):
        run(tmp_path, pictures, transfer={"frozen": [".*"]})
