"""Where the noise of a quantized file comes from; each time with one layer made bad on purpose."""

import math

import keras
import numpy as np
import pytest

from components.delivery.errors_by_layer import errors_by_layer
from components.delivery.measure import predict
from components.delivery.owners import layer_classes
from components.errors import ContractError
from components.options import ExportOptions
from tests.components.delivery.conftest import spoilt

ROWS = 48


def found(toy, folder, format, options=None):
    whole = toy.export(folder / "float32", "float32").file
    file = toy.export(folder / format, format, options=options).file
    return errors_by_layer(whole, file, toy.inputs[:ROWS], list(layer_classes(toy.model))), whole, file


@pytest.mark.parametrize(("layer", "consumer"), [("pointwise", "hidden"), ("hidden", "head")])
def test_the_layer_that_was_made_bad_comes_out_worst(layer, consumer, toy, tmp_path):
    healthy, *_ = found(toy, tmp_path / "healthy", "int8")
    assert {each.layer for each in healthy} == {"stem", "depthwise", "pointwise", "flat", "hidden", "head"}
    assert min(each.snr_db for each in healthy) > 15
    bad, *_ = found(spoilt(toy, layer, consumer), tmp_path / "bad", "int8")
    assert bad[0].layer == layer
    assert bad[0].snr_db < 10
    assert bad[0].added > 2 * bad[1].added
    assert bad[0].blames_output
    assert bad[0].readers[-1] == consumer


def test_a_layer_whose_weights_are_to_blame_is_told_from_one_whose_output_is(toy, tmp_path):
    """4-bit weights, float outputs: nothing is rounded behind the layer."""
    errors, *_ = found(toy, tmp_path, "int4_weights")
    assert errors[0].added > 0
    assert {(each.rounding, each.blames_output) for each in errors if each.added} == {(0.0, False)}
    readers = {each.layer: each.readers for each in errors}
    assert readers["pointwise"] == ("flat", "hidden")
    assert readers["head"] == ()


def test_noise_that_only_passes_through_is_not_charged(toy, tmp_path):
    bad, *_ = found(spoilt(toy, "pointwise", "hidden"), tmp_path, "int8")
    flat = next(each for each in bad if each.layer == "flat")
    assert (flat.operators, flat.added) == (("RESHAPE",), 0)
    assert flat.snr_db == bad[0].snr_db


def test_keeping_the_worst_layer_in_float_takes_its_noise_away(toy, tmp_path):
    ruined = spoilt(toy, "hidden", "head")
    before, *_ = found(ruined, tmp_path / "a", "int8")
    after, *_ = found(ruined, tmp_path / "b", "int8", ExportOptions(keep_float=[before[0].layer, "head"]))
    by_layer = {each.layer: each for each in after}
    assert by_layer["hidden"].added < 0.1 * before[0].added


def test_the_ratio_is_that_of_the_answers(toy, tmp_path):
    errors, whole, file = found(toy, tmp_path, "int8")
    wanted, got = (predict(path, toy.inputs[:ROWS]).astype(np.float64) for path in (whole, file))
    ratio = np.sum((wanted - wanted.mean(axis=0)) ** 2) / np.sum((wanted - got) ** 2)
    head = next(each for each in errors if each.layer == "head")
    assert head.snr_db == pytest.approx(
        10 * math.log10(ratio), abs=0.5
    )  # XNNPACK rounds otherwise than the built-in kernels


def test_weights_in_few_bits_are_compared_as_well_and_4_bits_are_worse_than_8(toy, tmp_path):
    four, eight = (
        {each.layer: each.snr_db for each in found(toy, tmp_path / format, format)[0]}
        for format in ("int4_weights", "int8_weights")
    )
    assert four["head"] < eight["head"] - 10


def test_a_file_is_equal_to_itself(toy, tmp_path):
    whole = toy.export(tmp_path, "float32").file
    errors = errors_by_layer(whole, whole, toy.inputs[:3], list(layer_classes(toy.model)))
    assert {(each.snr_db, each.added) for each in errors} == {(math.inf, 0.0)}


def test_files_of_two_models_are_refused(toy, tmp_path):
    other = keras.Sequential(
        [keras.Input((12, 12, 1), name="y"), keras.layers.Flatten(), keras.layers.Dense(4, name="z")]
    )
    whole = toy.export(tmp_path / "a", "float32").file
    strange = toy.export(tmp_path / "b", "float32", model=other).file
    with pytest.raises(ContractError, match=r"must be the same model as .*; export both again\."):
        errors_by_layer(whole, strange, toy.inputs[:3], [])
