import pathlib

import keras
import numpy as np
import pytest
import tf_keras
from keras import layers

from components.artifacts import Batches, TrainedModel
from components.compression.compress import load, unsupported
from components.compression.kernels import kernels
from components.compression.lowrank import (
    Ranks,
    choose_factorisable,
    choose_ranks,
    factorise,
    factors,
    report,
    smallest_rank,
)
from components.compression.quantize import choose_quantizable
from components.delivery.export import export
from components.delivery.proof import check, match, read_proof
from components.errors import ConfigError, ModelError
from components.options import ExportOptions, LowRankOptions, PruneOptions, QatOptions
from components.recipe import parse_recipe
from components.tracing import Trace

from .conftest import OPTIONS, SPEC, batches_of, carry_out, draw, trained


def of_rank(rank: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A random kernel (..., inputs, outputs) of that rank."""
    random = np.random.default_rng(seed)
    product = random.normal(size=(shape[-2], rank)) @ random.normal(size=(rank, shape[-1]))
    return product.reshape(shape).astype(np.float32)


def twin() -> tf_keras.Model:
    """Kernels of known rank: a strided 1 x 1 convolution with normalization behind it (3), two dense ones (2 and 5)."""
    tf_keras.utils.set_random_seed(0)
    kinds = tf_keras.layers
    image = kinds.Input((9, 9, 12))
    x = kinds.Conv2D(16, 1, strides=2, padding="same", use_bias=False, name="point")(image)
    x = kinds.ReLU(name="relu")(kinds.BatchNormalization(name="norm")(x))
    x = kinds.Conv2D(8, 3, name="inner")(x)
    x = kinds.Dense(24, activation="tanh", name="hidden")(kinds.Flatten(name="flat")(x))
    model = tf_keras.Model(image, kinds.Dense(20, name="out")(x))
    for name, rank in (("point", 3), ("hidden", 2), ("out", 5)):
        layer = model.get_layer(name)
        kernel, *rest = layer.get_weights()
        layer.set_weights([of_rank(rank, kernel.shape), *(each + 0.5 for each in rest)])
    return model


def reasons(chosen) -> dict[str, str]:
    return {each.layer: each.reason for each in chosen.untreated}


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("energy", "rank"), [(0.76, 1), (0.77, 2), (0.95, 2), (0.96, 3)])
def test_the_worked_example_of_the_rank_holds(energy, rank):
    assert smallest_rank(np.diag([4.0, 2.0, 1.0]), energy) == rank


def test_a_matrix_of_zeros_has_rank_one():
    assert smallest_rank(np.zeros((4, 3)), 0.9) == 1


def test_the_error_of_the_product_is_the_energy_that_was_left_out():
    matrix = np.random.default_rng(1).normal(size=(30, 20))
    rank = smallest_rank(matrix, 0.8)
    thin, wide = factors(matrix, rank)
    lost = np.square(matrix - thin.astype(np.float64) @ wide).sum() / np.square(matrix).sum()
    thinner, narrower = factors(matrix, rank - 1)
    assert lost <= 0.2 < np.square(matrix - thinner.astype(np.float64) @ narrower).sum() / np.square(matrix).sum()
    assert np.linalg.norm(thin) == pytest.approx(np.linalg.norm(wide), rel=1e-5)


def test_a_kernel_of_known_rank_is_factorised_without_loss():
    model = twin()
    ranks = choose_ranks(model, LowRankOptions(), 0.999999)
    assert ranks.of == {"point": 3, "hidden": 2, "out": 5}
    made, first_of = factorise(model, ranks)
    x = np.random.default_rng(0).random((4, 9, 9, 12), np.float32)
    expected = model(x, training=False).numpy()
    np.testing.assert_allclose(made(x, training=False), expected, atol=1e-5 * np.abs(expected).max())
    assert {kernel.name: kernel.values.shape for kernel in kernels(made)} == {
        "point_factor": (1, 1, 12, 3),
        "point": (1, 1, 3, 16),
        "inner": (3, 3, 16, 8),
        "hidden_factor": (72, 2),
        "hidden": (2, 24),
        "out_factor": (24, 5),
        "out": (5, 20),
    }
    assert first_of == {name: f"{name}_factor" for name in ranks.of}
    assert report(model, ranks, first_of)["hidden"] == {
        "rank": 2,
        "factor": "hidden_factor",
        "weights_before": 72 * 24,
        "weights_after": 2 * (72 + 24),
    }


# --- which layers ------------------------------------------------------------------------------------------------


def test_layers_that_cannot_pay_or_may_not_be_touched_are_told_apart():
    kinds = tf_keras.layers
    image = kinds.Input((8, 8, 8))
    shared = kinds.Conv2D(8, 1, name="shared")
    x = shared(shared(image))
    x = kinds.Conv2D(8, 1, groups=2, name="grouped")(x)
    x = kinds.DepthwiseConv2D(1, name="depth")(x)
    x = kinds.Dense(8, kernel_constraint="non_neg", name="positive")(kinds.Conv2D(8, 3, name="wide")(x))
    x = kinds.Dense(8, trainable=False, name="frozen")(kinds.GlobalAveragePooling2D()(x))
    x = kinds.Dense(1, name="left_out")(kinds.Dense(2, name="narrow")(kinds.Dense(8, name="good")(x)))
    chosen = choose_factorisable(tf_keras.Model(image, x), LowRankOptions(exclude=["left_out"], minimum_rank=2))
    assert chosen.names == {"good"}
    assert reasons(chosen) == {
        "shared": "the layer is called more than once",
        "grouped": "its convolution works in groups",
        "depth": "only dense kernels and convolutions of side 1 are factorised",
        "wide": "only dense kernels and convolutions of side 1 are factorised",
        "positive": "its kernel_constraint would not hold for a product",
        "frozen": "the layer is frozen (trainable=False)",
        "narrow": "too small: factors of rank 2 hold no fewer weights than its 16",
        "left_out": "excluded by compress.lowrank.exclude",
    }


def test_a_kernel_whose_energy_is_spread_evenly_stays_and_says_so():
    rows = tf_keras.layers.Input((10,))
    x = tf_keras.layers.Dense(10, name="even")(rows)
    model = tf_keras.Model(rows, tf_keras.layers.Dense(10, name="steep")(x))
    model.get_layer("even").set_weights([np.eye(10, dtype=np.float32), np.zeros(10, np.float32)])
    model.get_layer("steep").set_weights([of_rank(1, (10, 10)), np.zeros(10, np.float32)])
    ranks = choose_ranks(model, LowRankOptions(), 0.5)  # rank 5: 5 x 20 weights for 100
    assert ranks.of == {"steep": 1}
    assert reasons(ranks.chosen) == {"even": "to keep 0.5 of its energy takes rank 5, which saves no weights"}
    assert choose_ranks(model, LowRankOptions(minimum_rank=3), 0.5).of == {"steep": 3}


def test_excluding_a_layer_that_is_not_there_names_the_nearest_one():
    for choice in (lambda o: choose_factorisable(twin(), o), lambda o: choose_ranks(twin(), o, 0.9)):
        with pytest.raises(
            ConfigError, match=r"compress\.lowrank\.exclude: .* no layer 'hiden'; did you mean 'hidden'"
        ):
            choice(LowRankOptions(exclude=["hiden"]))


# --- the new twin ------------------------------------------------------------------------------------------------


def test_a_name_that_is_taken_is_not_given_twice():
    rows = tf_keras.layers.Input((9,))
    x = tf_keras.layers.Dense(9, name="a")(rows)
    model = tf_keras.Model(rows, tf_keras.layers.Dense(1, name="a_factor")(x))
    made, first_of = factorise(model, Ranks(choose_factorisable(model, LowRankOptions()), {"a": 2}))
    assert first_of == {"a": "a_factor_"}
    assert [layer.name for layer in made.layers[1:]] == ["a_factor_", "a", "a_factor"]


def test_the_first_layer_is_linear_and_the_second_keeps_name_bias_activation_and_normalization():
    model = twin()
    model.get_layer("hidden").kernel_regularizer = tf_keras.regularizers.L2(0.01)
    made, _ = factorise(model, choose_ranks(model, LowRankOptions(), 0.999999))
    first, second = made.get_layer("hidden_factor"), made.get_layer("hidden")
    assert (first.use_bias, first.activation.__name__) == (False, "linear")
    assert (second.use_bias, second.activation.__name__) == (True, "tanh")
    assert first.kernel_regularizer is not None
    assert second.kernel_regularizer is not None
    assert (made.get_layer("point_factor").strides, made.get_layer("point").strides) == ((2, 2), (1, 1))
    annotated = choose_quantizable(made, QatOptions())
    assert "norm" in annotated.names, "normalization behind a factorised kernel is no longer folded"
    np.testing.assert_array_equal(
        model.get_layer("hidden").get_weights()[0], twin().get_layer("hidden").get_weights()[0]
    )


def test_branches_inner_activations_and_one_dimensional_convolutions_are_kept():
    """The graph around a factorised layer: it is used twice, and joined again."""
    kinds = tf_keras.layers
    rows = kinds.Input((6, 10), name="rows")
    x = kinds.Conv1D(10, 1, dilation_rate=1, name="first")(rows)
    a = kinds.Dense(10, activation="relu", name="a")(x)
    model = tf_keras.Model(rows, kinds.Add(name="sum")([kinds.Dense(10, name="b")(a), x, rows]) * 2.0)
    for name in ("first", "a", "b"):
        layer = model.get_layer(name)
        kernel, bias = layer.get_weights()
        layer.set_weights([of_rank(2, kernel.shape), bias + 0.1])
    made, _ = factorise(model, choose_ranks(model, LowRankOptions(), 0.9999))
    x = np.random.default_rng(0).random((3, 6, 10), np.float32)
    expected = model(x).numpy()
    np.testing.assert_allclose(made(x), expected, atol=1e-5 * np.abs(expected).max())
    assert made.get_layer("first_factor").filters == 2


# --- through the file --------------------------------------------------------------------------------------------


def thin_model() -> keras.Model:
    """Point and hidden are near to rank 2 and 3, so energy 0.9 pays; normalization stands behind the convolution."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 1), name="image")
    x = layers.ReLU(name="stem_relu")(layers.Conv2D(12, 3, strides=2, padding="same", name="stem")(image))
    x = layers.Conv2D(16, 1, use_bias=False, name="point")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization(momentum=0.9, name="norm")(x))
    x = layers.Dense(32, activation="relu", name="hidden")(layers.Flatten(name="flatten")(x))
    model = keras.Model(image, layers.Dense(3, name="logits")(x), name="thin")
    for name, rank in (("point", 2), ("hidden", 3)):
        kernel = model.get_layer(name).kernel
        kernel.assign(of_rank(rank, kernel.shape) * 0.1 + 0.05 * kernel.numpy())
    return model


@pytest.fixture(scope="module")
def thin(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    model = thin_model()
    model.compile(keras.optimizers.Adam(0.002), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*draw(192, 0), batch_size=32, epochs=6, verbose=0)
    return trained(tmp_path_factory.mktemp("thin"), model)


@pytest.fixture(scope="module")
def carried(tmp_path_factory: pytest.TempPathFactory, thin: TrainedModel, batches: Batches):
    folder, done = tmp_path_factory.mktemp("lowrank"), {}
    return lambda recipe: carry_out(recipe, folder, thin, batches, done)


def file_of(made, folder: pathlib.Path, format: str, calibration: np.ndarray) -> pathlib.Path:
    model, recipe = load(made), made.facts["recipe"]
    options = ExportOptions()
    return export(recipe, format, model, SPEC, "logits", options, calibration, folder, seed=0, trace=Trace()).file


@pytest.mark.parametrize("format", ["float32", "int8"])
def test_the_file_holds_kernels_of_the_new_shapes(format, carried, calibration, tmp_path):
    made = carried("lowrank")
    ranks = {layer: each["rank"] for layer, each in made.facts["reports"]["lowrank@0.9"].items()}
    assert set(ranks) == {"point", "hidden"}
    shapes = {promise.layer: promise.shape for promise in made.promises}
    assert shapes == {
        "point_factor": (ranks["point"], 1, 1, 12),
        "point": (16, 1, 1, ranks["point"]),
        "hidden_factor": (ranks["hidden"], 256),
        "hidden": (32, ranks["hidden"]),
    }
    proof = read_proof(file_of(made, tmp_path, format, calibration))
    assert check(proof, made.promises, format) == []
    assert {promise.layer: kernel.shape for promise, kernel in match(proof.weights, made.promises)} == shapes
    assert len(proof.weights) == 6


def test_a_file_without_the_new_shapes_breaks_the_promise(carried, thin, calibration, tmp_path):
    model, options = keras.saving.load_model(thin.file), ExportOptions()
    whole = export("float32", "float32", model, SPEC, "logits", options, calibration, tmp_path, seed=0, trace=Trace())
    broken = check(read_proof(whole.file), carried("lowrank").promises, "float32")
    assert len(broken) == 4
    assert broken[0].startswith("layer 'point_factor': no conv2d kernel of shape (")


@pytest.mark.parametrize(
    "recipe",
    ["lowrank+prune+qat", "lowrank+prune+cluster", pytest.param("lowrank+cluster+qat", marks=pytest.mark.slow)],
)
def test_later_steps_work_on_both_parts_and_keep_their_shapes(recipe, carried, calibration, tmp_path):
    made = carried(recipe)
    format = "int8" if recipe.endswith("qat") else "float32"
    assert check(read_proof(file_of(made, tmp_path, format, calibration)), made.promises, format) == []
    promises = {promise.layer: promise for promise in made.promises}
    first = {promise.layer: promise.shape for promise in carried("lowrank").promises}
    assert {layer: promises[layer].shape for layer in first} == first
    assert (promises["hidden_factor"].sparsity > 0.6) == ("prune" in recipe)
    assert (promises["hidden_factor"].distinct == 6) == ("cluster" in recipe)
    assert made.facts["reports"] == carried("lowrank").facts["reports"]


def test_the_factorised_model_still_does_its_task(carried):
    x, y = draw(200, 9)
    for recipe in ("lowrank", "lowrank+prune+qat"):
        assert np.mean(np.argmax(load(carried(recipe))(x, training=False), -1) == y) > 0.8, recipe


@pytest.mark.slow  # a tree of its own
def test_what_no_later_step_treats_is_still_promised(thin, batches, tmp_path):
    """Also: a layer excluded by its name is excluded with both its parts, and may still be trained."""
    options = OPTIONS.model_copy(
        update={
            "prune": PruneOptions(epochs=1, exclude=["hidden"], dense_share=0),
            "qat": QatOptions(epochs=1, exclude=["hidden"]),
        }
    )
    done = {}
    carry_out("lowrank+prune+qat", tmp_path, thin, batches, done, options=options)
    for recipe, made in done.items():
        promises = {promise.layer: promise for promise in made.promises}
        for layer in ("hidden_factor", "hidden"):
            assert (promises[layer].sparsity, promises[layer].quantized) == (0, False), (recipe, layer)
    assert promises["point_factor"].sparsity > 0
    assert promises["point_factor"].quantized
    untreated = {(each["layer"], each["reason"]) for each in made.facts["untreated"]}
    assert ("hidden_factor", "qat: excluded by compress.qat.exclude") in untreated
    before, after = (load(done[recipe]) for recipe in ("lowrank@0.9+prune@0.7", "lowrank@0.9+prune@0.7+qat"))
    moved = after.get_layer("hidden_factor").get_weights()[0] - before.get_layer("hidden_factor").get_weights()[0]
    assert np.abs(moved).max() > 0, "a layer that is only thinner has been frozen"


class _StopAt(Trace):
    """Stops the training as a kill would, in the middle of its second epoch."""

    def __init__(self) -> None:
        super().__init__(on_progress=self._stop)

    def _stop(self, done: float, total: float, note: str) -> None:
        if done > 1.4:
            raise KeyboardInterrupt


def test_a_step_that_was_stopped_goes_on_to_the_same_bytes(thin, batches, carried, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        carry_out("lowrank", tmp_path, thin, batches, {}, trace=_StopAt())
    heard: list[float] = []
    trace = Trace(on_progress=lambda done, *_: heard.append(done))
    again, whole = carry_out("lowrank", tmp_path, thin, batches, {}, trace=trace), carried("lowrank")
    assert min(heard) > 1, "an epoch that was done has been done again"
    assert (again.folder / "twin.json").read_bytes() == (whole.folder / "twin.json").read_bytes()
    assert again.facts == whole.facts
    with np.load(again.folder / "weights.npz") as ours, np.load(whole.folder / "weights.npz") as theirs:
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs.files)


def test_at_an_energy_that_saves_nothing_the_step_says_what_it_looked_at(thin, batches, tmp_path):
    with pytest.raises(
        ModelError,
        match=r"lowrank@0\.999999: the model has no layer to work on \('stem': only dense .*'point': to keep 0\.999999 of its "
        r"energy takes rank \d+, which saves no weights; .*\); drop the recipes with lowrank\.",
    ):
        carry_out("lowrank@0.999999", tmp_path, thin, batches, {})


def test_before_a_run_only_shapes_count_because_the_weights_are_still_random():
    recipes = [parse_recipe("lowrank@0.999+qat", OPTIONS.strengths)]
    lines = unsupported(thin_model(), recipes, OPTIONS)
    assert lines == [
        "lowrank leaves layer 'stem' (Conv2D) alone: only dense kernels and convolutions of side 1 are factorised"
    ]
    image = keras.Input((8, 8, 1))
    bare = keras.Model(image, layers.Dense(1, name="out")(layers.Flatten()(image)), name="bare")
    assert unsupported(bare, recipes, OPTIONS) == [
        "lowrank leaves layer 'out' (Dense) alone: too small: factors of rank 1 hold no fewer weights than its 64",
        "lowrank finds nothing to work on in model 'bare': its recipes will fail; drop them.",
    ]


def test_it_runs_on_two_devices(mirrored, thin, tmp_path):
    few = batches_of(SPEC, train=draw(64, 0), validation=draw(32, 1))
    made = carry_out("lowrank", tmp_path, thin, few, {}, strategy=mirrored)
    assert set(made.facts["reports"]["lowrank@0.9"]) == {"point", "hidden"}
