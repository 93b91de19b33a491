"""Single layers of an integer file in float32 or int16: named, written, promised, proven."""

import dataclasses

import keras
import numpy as np
import pytest

from components.artifacts import Promise, read_json
from components.delivery.measure import predict
from components.delivery.owners import Operation
from components.delivery.precision import precisions
from components.delivery.proof import check, read_proof
from components.errors import ConfigError
from components.options import ExportOptions
from components.tracing import Trace

KERNELS = ["stem", "depthwise", "pointwise", "hidden", "head"]


def written(toy, folder, format="int8", **more):
    """The file, and what its kernels are stored and computed in, by layer."""
    options = ExportOptions(**{key: more.pop(key) for key in ("keep_float", "int16", "io") if key in more})
    file = toy.export(folder, format, options=options, **more)
    proof = read_proof(file.file)
    assert check(proof, [Promise.from_json(each) for each in file.facts["promises"]], format) == []
    return file, dict(zip(KERNELS, [(each.dtype, each.computes) for each in proof.weights], strict=True))


def test_named_layers_stay_float_and_the_others_are_integers(toy, tmp_path):
    heard = []
    file, found = written(toy, tmp_path, keep_float=["stem", "head"], trace=Trace(on_warning=heard.append))
    assert found == {
        "stem": ("float32", "float32"),
        "depthwise": ("int8", "int8"),
        "pointwise": ("int8", "int8"),
        "hidden": ("int8", "int8"),
        "head": ("float32", "float32"),
    }
    assert [each["layer"] for each in file.facts["promises"]] == ["stem", "head"]
    reason = "stays float32: export.keep_float names it"
    assert file.facts["untreated"] == [
        {"layer": "stem", "class": "Conv2D", "reason": reason},
        {"layer": "head", "class": "Dense", "reason": reason},
    ]
    assert heard == []
    outputs = predict(file.file, toy.held)
    assert toy.difference(outputs) < 0.04
    assert toy.accuracy(outputs) >= toy.accuracy(toy.model(toy.held, training=False).numpy()) - 0.01


def test_named_layers_take_16_bit_activations(toy, tmp_path):
    file, found = written(toy, tmp_path, int16=["hid.*", "head"], keep_float=["head"])
    assert found == dict.fromkeys(KERNELS, ("int8", "int8")) | {
        "hidden": ("int8", "int16"),
        "head": ("float32", "float32"),
    }
    assert toy.difference(predict(file.file, toy.held)) < 0.05
    layers = [each["layer"] for each in read_json(file.calibration)["tensors"]]
    assert layers == ["input", "stem", "depthwise", "pointwise", "flat", "hidden"]


def test_an_int16x8_file_may_keep_layers_in_float_too(toy, tmp_path):
    _, found = written(toy, tmp_path, "int16x8", keep_float=["hidden"])
    assert found == dict.fromkeys(KERNELS, ("int8", "int16")) | {"hidden": ("float32", "float32")}


def test_a_layer_in_float_lets_a_file_answer_that_int8_ruins(toy, tmp_path):
    model = keras.models.clone_model(toy.model)
    model.set_weights(toy.model.get_weights())
    kernel, bias = model.get_layer("hidden").get_weights()
    # One output of `hidden` becomes huge and `head` ignores it: int8 spends all its codes on that one.
    bias = np.concatenate([bias[:-1], [5000.0]]).astype(np.float32)
    model.get_layer("hidden").set_weights([kernel, bias])
    last, last_bias = model.get_layer("head").get_weights()
    last[-1] = 0
    model.get_layer("head").set_weights([last, last_bias])
    ruined = dataclasses.replace(toy, model=model)
    whole = ruined.accuracy(model(toy.held, training=False).numpy())
    plain, _ = written(ruined, tmp_path / "int8")
    saved, _ = written(ruined, tmp_path / "mixed", keep_float=["hidden", "head"])
    raised, _ = written(ruined, tmp_path / "int16", int16=["hidden", "head"])
    assert ruined.accuracy(predict(plain.file, toy.held)) < whole - 0.2
    assert ruined.accuracy(predict(saved.file, toy.held)) >= whole - 0.02
    assert ruined.accuracy(predict(raised.file, toy.held)) >= whole - 0.05


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_a_mixed_file_takes_and_gives_what_was_asked_for(io, toy, tmp_path):
    file, _ = written(toy, tmp_path, keep_float=["hidden"], io=io)
    proof = read_proof(file.file)
    assert (proof.input_dtype, proof.output_dtype) == (io, io)
    assert toy.difference(predict(file.file, toy.held)) < 0.05


def test_a_float_layer_at_an_end_cannot_take_integers(toy, tmp_path):
    with pytest.raises(
        ConfigError, match=r"export\.io=int8: the output belongs to layer 'head', which stays float32; set"
    ):
        written(toy, tmp_path, keep_float=["head"], io="int8")


@pytest.mark.parametrize("key", ["keep_float", "int16"])
def test_a_layer_that_is_not_there_is_refused_with_the_nearest(key, toy, tmp_path):
    with pytest.raises(ConfigError, match=rf"^export\.{key}: the model has no layer 'haed'; did you mean 'head'\?$"):
        written(toy, tmp_path, **{key: ["haed"]})


def test_a_layer_that_is_folded_away_is_refused_with_those_that_can_be_named():
    operations = [Operation(kind="CONV_2D", inputs=(0,), outputs=(1,), name="out", layers=("stem",))]
    with pytest.raises(ConfigError, match=r"export\.keep_float: layer 'gone' has no operator .*; name one of stem\.$"):
        precisions(operations, {"stem": "Conv2D", "gone": "Dropout"}, ExportOptions(keep_float=["gone"]))


def test_promises_of_compression_steps_gain_the_precision(toy, tmp_path):
    promise = Promise(layer="hidden", kind="dense", shape=(32, 256), sparsity=0.0, distinct=0)
    file, _ = written(toy, tmp_path, keep_float=["hidden"], promises=[promise])
    assert [Promise.from_json(each) for each in file.facts["promises"]] == [
        dataclasses.replace(promise, precision="float32")
    ]


def test_a_kernel_that_has_not_the_precision_promised_is_told(toy, tmp_path):
    proof = read_proof(toy.export(tmp_path, "int8").file)
    hidden = next(each for each in proof.weights if "hidden" in each.name)
    promise = Promise(layer="hidden", kind="dense", shape=hidden.shape, precision="int16")
    assert check(proof, [promise], "int8") == [
        f"layer 'hidden' (tensor '{hidden.short}'): int16 was promised, it is int8 and computes in int8"
    ]
