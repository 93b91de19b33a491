import dataclasses
import functools
import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from components.artifacts import CompressedModel, Promise
from components.compression.compress import compress, impossible, load, unsupported
from components.delivery.export import export
from components.delivery.proof import check, match, read_proof
from components.errors import ConfigError, ContractError, ModelError
from components.options import (
    CompressDistillation,
    CompressOptions,
    ExportOptions,
    ModelOptions,
    PruneOptions,
    QatOptions,
)
from components.recipe import parse_recipe
from components.tracing import Trace
from components.training.teacher import load_teachers

from .conftest import OPTIONS, SPEC, batches_of, carry_out, draw, small_model, trained

RECIPES = ["prune", "cluster", "prune+cluster", "qat", "prune+qat", "cluster+qat", "prune+cluster+qat"]


def step_of(recipe: str):
    return parse_recipe(recipe, OPTIONS.strengths).steps


def file_of(made: CompressedModel, folder: pathlib.Path, format: str, calibration: np.ndarray, *, sparse: bool = False):
    return export(
        made.facts["recipe"],
        format,
        load(made),
        SPEC,
        "logits",
        ExportOptions(),
        calibration,
        folder,
        sparse=sparse,
        seed=0,
        trace=Trace(),
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_int8_file_holds_what_the_recipe_promised(recipe, compressed, calibration, tmp_path):
    made = compressed(recipe)
    proof = read_proof(file_of(made, tmp_path, "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []
    assert proof.float_operators == ()
    assert {kernel.dtype for kernel in proof.weights} == {"int8"}
    assert len(proof.weights) == 6


@pytest.mark.parametrize("recipe", ["cluster+qat", "prune+cluster+qat"])
def test_a_whole_clustered_kernel_comes_down_to_few_codes_in_the_int8_file(recipe, compressed, calibration, tmp_path):
    made = compressed(recipe)
    proof = read_proof(file_of(made, tmp_path, "int8", calibration).file)
    for promise, kernel in match(proof.weights, made.promises):
        assert kernel.distinct <= 6 or not promise.distinct, promise.layer


@pytest.mark.parametrize(
    ("recipe", "layers", "name"),
    [
        ("prune@2:4+qat", {"inner", "hidden", "point"}, "2:4"),
        pytest.param("prune@0.7:1x16+cluster+qat", {"hidden"}, "1x16", marks=pytest.mark.slow),  # a tree of its own
    ],
)
def test_a_pattern_is_kept_by_every_later_step_and_found_in_the_file(
    recipe, layers, name, base, batches, calibration, tmp_path
):
    short = {name: getattr(OPTIONS, name).model_copy(update={"epochs": 1}) for name in ("prune", "cluster", "qat")}
    short["prune"] = short["prune"].model_copy(update={"dense_share": 0.02})
    options, done = OPTIONS.model_copy(update=short), {}
    made = carry_out(recipe, tmp_path, base, batches, done, options=options)
    for step in done.values():
        patterns = {promise.layer: promise.pattern for promise in step.promises if promise.pattern}
        assert patterns == dict.fromkeys(layers, name), step.facts["recipe"]
    proof = read_proof(file_of(made, tmp_path, "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []
    assert {promise.layer for promise, kernel in match(proof.weights, made.promises) if kernel.zeros.pattern} >= layers
    if name == "1x16":
        sparse = read_proof(file_of(made, tmp_path, "int8", calibration, sparse=True).file)
        assert check(sparse, made.promises, "int8") == []
        assert [kernel.storage for kernel in sparse.weights if kernel.shape == (16, 576)] == ["sparse 1x16"]


@pytest.mark.parametrize("recipe", ["prune", "cluster", "prune+cluster"])
def test_the_float_file_holds_it_too(recipe, compressed, calibration, tmp_path):
    made = compressed(recipe)
    assert check(read_proof(file_of(made, tmp_path, "float32", calibration).file), made.promises, "float32") == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_promises_are_those_of_the_recipe(recipe, compressed):
    promises = {promise.layer: promise for promise in compressed(recipe).promises}
    treated = {"inner", "hidden"}  # logits and point are too small to pay, depthwise is never treated
    sizes = {name: np.prod(promises[name].shape) for name, promise in promises.items() if promise.sparsity}
    zeros = sum(promises[name].sparsity * size for name, size in sizes.items())
    assert zeros == (pytest.approx(0.7 * sum(sizes.values()), rel=0.01) if "prune" in recipe else 0)
    for name in treated:
        assert promises[name].distinct == (6 if "cluster" in recipe else 0), name
        assert promises[name].quantized == ("qat" in recipe), name
    assert promises["inner"].shape == (8, 3, 3, 8)
    assert ("depth" in promises) == ("qat" in recipe)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_compressed_model_still_does_its_task(recipe, compressed, base):
    x, y = draw(200, 9)
    accuracy = np.mean(np.argmax(load(compressed(recipe))(x, training=False), -1) == y)
    assert accuracy > 0.8


def test_the_file_does_not_depend_on_what_the_process_made_before(compressed, calibration, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = [file_of(compressed("qat"), tmp_path / name, "int8", calibration).file for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("recipe", ["prune+cluster", "prune+cluster+qat"])
def test_an_artifact_stands_on_its_own(recipe, compressed, tmp_path):
    made = compressed(recipe)
    moved = CompressedModel(pathlib.Path(shutil.copytree(made.folder, tmp_path / "elsewhere")))
    x, _ = draw(10, 9)
    np.testing.assert_array_equal(load(moved)(x, training=False), load(made)(x, training=False))
    assert not (made.folder / "checkpoints").exists()


def test_carried_out_again_a_recipe_gives_the_same_weights(base, batches, compressed, tmp_path):
    first, again = compressed("prune+cluster+qat"), carry_out("prune+cluster+qat", tmp_path, base, batches, {})
    with np.load(first.folder / "weights.npz") as a, np.load(again.folder / "weights.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    assert first.facts == again.facts


def test_layers_that_a_step_leaves_alone_are_listed_with_step_and_reason(compressed):
    untreated = [(each["layer"], each["reason"]) for each in compressed("prune+cluster+qat").facts["untreated"]]
    assert ("depth", "prune: tfmot does not prune depthwise kernels: few weights, much accuracy") in untreated
    assert ("depth", "cluster: tfmot does not cluster depthwise kernels: unrecoverable loss of accuracy") in untreated
    assert [reason[:33] for layer, reason in untreated if layer == "logits"] == ["prune: among the smallest kernels"]


@pytest.mark.slow  # a tree of its own
def test_what_a_later_step_leaves_out_keeps_what_an_earlier_one_did(base, batches, calibration, tmp_path):
    options = OPTIONS.model_copy(update={"qat": QatOptions(epochs=1, exclude=["inner", "hidden"])})
    made = carry_out("prune+qat", tmp_path, base, batches, {}, options=options)
    promises = {promise.layer: promise for promise in made.promises}
    assert promises["inner"].sparsity > 0.6
    assert not promises["inner"].quantized
    assert promises["point"].quantized
    (tmp_path / "file").mkdir()
    proof = read_proof(file_of(made, tmp_path / "file", "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "prune+qat",
        "prune@2:4",
        "prune+cluster+qat",
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("prune@0.5:1x4", "cluster+qat", "channels+lowrank+prune")
        ),
    ],
)
def test_every_step_runs_on_two_devices_with_the_result_of_one(
    recipe, mirrored, base, batches, calibration, compressed, tmp_path
):
    """Zeros and centroids follow from sums that two devices add up in another order: losses are near, not equal."""
    made = carry_out(recipe, tmp_path, base, batches, {}, strategy=mirrored)
    one = compressed(recipe)
    assert made.facts["validation"]["loss"] == pytest.approx(one.facts["validation"]["loss"], abs=0.05)
    for ours, theirs in zip(made.promises, one.promises, strict=True):
        assert dataclasses.replace(ours, sparsity=0) == dataclasses.replace(theirs, sparsity=0)
        assert ours.sparsity == pytest.approx(theirs.sparsity, abs=0.01)
    (tmp_path / "file").mkdir()
    proof = read_proof(file_of(made, tmp_path / "file", "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []


def taught_by(base, weight: float = 0.9) -> dict:
    """For `carry_out`: the base model as the teacher of every step."""
    like = ModelOptions(file=str(base.file))
    return {
        "options": OPTIONS.model_copy(update={"distill": CompressDistillation(weight=weight)}),
        "teachers": functools.partial(load_teachers, [base.file], SPEC, like, where="compress.distill.teacher"),
    }


def test_a_step_learns_from_the_teacher_alone_at_full_weight(base, tmp_path):
    x, y = draw(192, 0)
    wrong = batches_of(SPEC, train=(x, (y + 1) % 3), validation=draw(60, 1))
    made = carry_out("qat", tmp_path, base, wrong, {}, **taught_by(base, weight=1.0))
    assert made.facts["validation"]["accuracy"] > 0.8, "the labels are all wrong, the teacher is not"


@pytest.mark.slow  # compiles each step's training twice, once of it on two devices
def test_every_step_learns_from_the_teacher_on_two_devices_as_on_one(mirrored, base, batches, compressed, tmp_path):
    one, two = {}, {}
    carry_out("prune+qat", tmp_path / "one", base, batches, one, **taught_by(base))
    carry_out("prune+qat", tmp_path / "two", base, batches, two, strategy=mirrored, **taught_by(base))
    for recipe, made in one.items():
        assert made.facts["validation"] != compressed(recipe).facts["validation"], f"{recipe} did not hear the teacher"
        assert made.facts["validation"]["loss"] == pytest.approx(two[recipe].facts["validation"]["loss"], abs=0.05)


@pytest.mark.parametrize(
    "recipe", ["cluster", pytest.param("cluster+qat", marks=pytest.mark.slow)]
)  # two more trainings
def test_clusters_per_channel_reach_the_file(recipe, base, batches, calibration, tmp_path):
    options = OPTIONS.model_copy(update={"cluster": OPTIONS.cluster.model_copy(update={"per_channel": True})})
    made = carry_out(recipe, tmp_path, base, batches, {}, options=options)
    (tmp_path / "file").mkdir()
    proof = read_proof(file_of(made, tmp_path / "file", "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []


def test_a_model_without_kernels_is_refused(batches, tmp_path):
    image = keras.Input((8, 8, 1))
    model = keras.Model(image, layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(2, depth_multiplier=3)(image)))
    base = trained(tmp_path / "base", model)
    with pytest.raises(
        ModelError, match=r"prune@0\.7: the model has no layer to work on \('depthwise_conv2d\w*': tfmot"
    ):
        carry_out("prune", tmp_path, base, batches, {})


def test_a_damaged_base_or_artifact_is_said(base, batches, compressed, tmp_path):
    broken = shutil.copytree(base.folder, tmp_path / "base")
    (broken / "model.keras").write_bytes(b"PK")
    with pytest.raises(ContractError, match=r"model\.keras: a Keras 3 model was promised.*run train again"):
        carry_out("prune", tmp_path, type(base)(broken), batches, {})
    for name in ("weights.npz", "twin.json", "quantized.json"):
        folder = shutil.copytree(compressed("prune+qat").folder, tmp_path / name)
        (folder / name).write_bytes(b"{")
        with pytest.raises(ContractError, match=r"run (compress|the stage) again"):
            load(CompressedModel(folder))


def test_before_a_run_untreated_layers_and_impossible_steps_are_told():
    recipes = [parse_recipe(text, OPTIONS.strengths) for text in ("int8", "prune+qat", "cluster")]
    lines = unsupported(small_model(), recipes)
    assert (
        "cluster leaves layer 'depth' (DepthwiseConv2D) alone: tfmot does not cluster depthwise kernels: unrecoverable loss of accuracy"
        in lines
    )
    assert not any(line.startswith("qat") for line in lines)
    assert unsupported(small_model(), recipes[:1]) == []

    image = keras.Input((8, 8, 1))
    bare = keras.Model(image, layers.Dense(3)(layers.LSTM(4)(layers.Reshape((8, 8))(image))), name="bare")
    options = CompressOptions(prune=PruneOptions(exclude=["dense"]))
    bare.layers[-1].name = "dense"
    lines = unsupported(bare, recipes[1:2], options)
    assert "prune finds nothing to work on in model 'bare': its recipes will fail; drop them." in lines
    assert any("LSTM" in line and line.startswith("qat leaves") for line in lines)


def rows_model() -> keras.Model:
    """Convolutions over rows, and layers that tfmot does not know."""
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Reshape((8, 8), name="rows")(layers.Rescaling(2.0, offset=-1.0, name="scale")(image))
    x = layers.Conv1D(16, 3, padding="same", use_bias=False, name="first")(x)
    x = layers.Activation("hard_silu", name="swish")(layers.BatchNormalization(momentum=0.9, name="first_norm")(x))
    x = layers.Conv1D(16, 3, padding="same", name="second")(layers.BatchNormalization(momentum=0.9, name="norm")(x))
    x = layers.ReLU(name="relu")(layers.Multiply(name="times")([x, layers.Dense(16, "sigmoid", name="gate")(x)]))
    x = layers.LayerNormalization(name="layer_norm")(layers.MaxPooling1D(name="pool")(x))
    return keras.Model(image, layers.Dense(3, name="logits")(layers.Flatten(name="flatten")(x)), name="rows")


@pytest.mark.slow  # a tree of its own
def test_layers_that_tfmot_does_not_know_go_the_whole_way(batches, calibration, tmp_path):
    keras.utils.set_random_seed(0)
    base = trained(tmp_path / "base", rows_model())
    short = {name: getattr(OPTIONS, name).model_copy(update={"epochs": 1}) for name in ("cluster", "qat")}
    made = carry_out("prune+cluster+qat", tmp_path, base, batches, {}, options=OPTIONS.model_copy(update=short))
    promises = {promise.layer: promise for promise in made.promises}
    assert promises["second"].kind == "conv1d"
    assert (promises["second"].sparsity > 0.5, promises["second"].distinct, promises["second"].quantized) == (
        True,
        6,
        True,
    )
    assert [each for each in made.facts["untreated"] if each["reason"].startswith("qat")] == []
    (tmp_path / "file").mkdir()
    proof = read_proof(file_of(made, tmp_path / "file", "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []
    assert proof.float_operators == ()
    assert {"HARD_SWISH", "RSQRT", "MAX_POOL_2D", "CONV_2D"} <= set(proof.operators)
    (second,) = (kernel for promise, kernel in match(proof.weights, made.promises) if promise.layer == "second")
    assert (second.scales, second.distinct <= 6) == (16, True)


@pytest.mark.parametrize("raised", [{"keep_float": ["attention"]}, {"int16": ["attention_query"]}])
def test_the_kernels_of_an_attention_in_another_precision_keep_what_they_promised(
    raised, batches, calibration, tmp_path
):
    keras.utils.set_random_seed(0)
    base = trained(tmp_path / "base", attention_model())
    short = OPTIONS.prune.model_copy(update={"epochs": 1})
    made = carry_out("prune", tmp_path, base, batches, {}, options=OPTIONS.model_copy(update={"prune": short}))
    (tmp_path / "file").mkdir()
    options = ExportOptions(**raised)
    given = ("int8", load(made), SPEC, "logits", options, calibration, tmp_path / "file")
    file = export("prune+int8", *given, promises=made.promises, seed=0, trace=Trace())
    proof = read_proof(file.file)
    promises = [Promise(**{**each, "shape": tuple(each["shape"])}) for each in file.facts["promises"]]
    assert check(proof, promises, "int8") == []
    found = {promise.layer: kernel for promise, kernel in match(proof.weights, promises)}
    whole = "keep_float" in raised
    for part in ("attention_query", "attention_key", "attention_value", "attention"):
        assert found[part].dtype == ("float32" if whole else "int8")
        assert found[part].sparsity > 0.5
    assert found["attention_query"].computes == ("float32" if whole else "int16")


def attention_model() -> keras.Model:
    """A block of a transformer over the rows of a picture."""
    layers = keras.layers
    image = keras.Input((8, 8, 1), name="image")
    x = layers.Dense(16, name="rows")(layers.Reshape((8, 8))(image))
    x = layers.Add()([x, layers.MultiHeadAttention(2, 8, name="attention")(x, x)])
    x = layers.LayerNormalization(name="norm")(x)
    return keras.Model(image, layers.Dense(3, name="logits")(layers.Flatten()(x)), name="block")


@pytest.mark.slow  # a tree of its own
def test_an_attention_goes_the_whole_way(batches, calibration, tmp_path):
    keras.utils.set_random_seed(0)
    base = trained(tmp_path / "base", attention_model())
    made = carry_out("lowrank@0.7+prune+cluster+qat", tmp_path, base, batches, {})
    promises = {promise.layer: promise for promise in made.promises}
    kernels = [name for name in promises if name.startswith("attention")]
    assert {"attention_query", "attention_key", "attention_value", "attention"} <= set(kernels)
    assert all(promises[name].kind == "dense" for name in kernels)
    assert {(promises[name].sparsity > 0.5, promises[name].distinct, promises[name].quantized) for name in kernels} == {
        (True, 6, True)
    }
    assert [each for each in made.facts["untreated"] if each["reason"].startswith(("prune", "cluster", "qat"))] == []
    (tmp_path / "file").mkdir()
    proof = read_proof(file_of(made, tmp_path / "file", "int8", calibration).file)
    assert check(proof, made.promises, "int8") == []
    assert proof.float_operators == ()
    assert {"BATCH_MATMUL", "SOFTMAX"} <= set(proof.operators)


def test_an_attention_that_is_excluded_is_left_alone_as_a_whole():
    recipes = [parse_recipe(recipe, OPTIONS.strengths) for recipe in ("prune+cluster", "qat")]
    sections = {
        name: getattr(OPTIONS, name).model_copy(update={"exclude": ["attention"]})
        for name in ("prune", "cluster", "qat")
    }
    lines = unsupported(attention_model(), recipes, OPTIONS.model_copy(update=sections))
    for part in ("attention_query", "attention_key", "attention_value", "attention"):
        for step in ("prune", "cluster", "qat"):
            assert f"{step} leaves layer '{part}' (Dense) alone: excluded by compress.{step}.exclude" in lines
    assert "qat leaves layer 'attention_scores' (Scores) alone: excluded by compress.qat.exclude" in lines


@pytest.mark.parametrize("build", [rows_model, attention_model])
def test_before_a_run_layers_with_a_quantization_are_not_called_untreated(build):
    lines = unsupported(build(), [parse_recipe("qat", {})])
    assert lines == []


def test_steps_that_a_trained_model_does_not_allow_are_told_with_the_reason(base, tmp_path):
    steps = [
        parse_recipe(text, {}).steps[0] for text in ("channels@0.1", "channels@0.99", "lowrank@0.9", "prune@0.5", "qat")
    ]
    options = CompressOptions(prune=PruneOptions(exclude=[layer.name for layer in small_model().layers]))
    found = impossible(base, steps, options)
    assert found.keys() == {"channels@0.99", "prune@0.5"}
    assert found["prune@0.5"] == "prune finds nothing to work on in this model."
    assert "channels@0.99" in found["channels@0.99"]

    image = keras.Input((8, 8, 1))
    alone = trained(tmp_path / "alone", keras.Model(image, layers.Flatten()(image)))
    assert impossible(alone, steps[3:], CompressOptions()).keys() == {"prune@0.5", "qat"}
    wrong = CompressOptions(prune=PruneOptions(exclude=["nobody"]))
    assert "nobody" in impossible(base, steps[3:], wrong)["prune@0.5"]


def test_before_a_run_each_pattern_is_told_apart():
    recipes = [parse_recipe(text, {}) for text in ("prune@2:4+int8", "prune@0.9:1x16+qat", "prune@0.5:1x4")]
    lines = unsupported(small_model(), recipes)
    said = "leaves layer 'inner' (Conv2D) alone: 1x16 is a pattern for kernels of dense layers"
    assert f"prune@0.9:1x16 {said}" in lines
    assert f"prune@0.5:1x4 {said.replace('1x16', '1x4')}" in lines
    assert not any(line.startswith("prune@2:4") and "'inner'" in line for line in lines)


def test_the_face_is_json_and_written_last(compressed):
    face = json.loads((compressed("prune").folder / "compressed.json").read_text())
    assert face["recipe"] == "prune@0.7"
    assert face["outputs"] == "logits"
    assert not face["quantized"]
    assert set(face["validation"]) == {"loss", "accuracy"}


def test_excluding_an_unknown_layer_is_refused_before_training(base, batches, tmp_path):
    options = CompressOptions(prune=PruneOptions(exclude=["innner"]))
    with pytest.raises(ConfigError, match=r"did you mean 'inner'"):
        compress(
            *(step_of("prune") + (step_of("prune"),)),
            options,
            base,
            None,
            batches,
            tmp_path,
            strategy=tf.distribute.get_strategy(),
            batch_size=32,
            seed=0,
            trace=Trace(),
        )
