import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras

from components.compression.kernels import in_blocks, kernels, sparsity
from components.compression.prune import _global, _schedule, _spread, choose_prunable, prune, strip
from components.errors import ConfigError
from components.options import PruneOptions

layers = tf_keras.layers


def twin() -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(2, 3, name="tiny")(image)  # 18 weights of 2,850: 0.6 %
    x = layers.DepthwiseConv2D(3, name="depth")(layers.Conv2D(16, 3, name="wide")(x))
    x = layers.Dense(32, name="hidden")(layers.Reshape((-1,))(layers.GlobalAveragePooling2D()(x)))
    return tf_keras.Model(image, layers.Dense(64, name="out")(x))


def reasons(chosen) -> dict[str, str]:
    return {each.layer: each.reason for each in chosen.untreated}


def test_the_smallest_kernels_stay_dense_up_to_their_share():
    uniform = PruneOptions(spread="uniform")
    chosen = choose_prunable(twin(), uniform, 0.7)
    assert chosen.names == {"wide", "hidden", "out"}
    assert "hold 0.01 of all weights together" in reasons(chosen)["tiny"]
    assert "does not prune depthwise" in reasons(chosen)["depth"]
    everything = uniform.model_copy(update={"dense_share": 0.0})
    assert choose_prunable(twin(), everything, 0.7).names == {"tiny", "wide", "hidden", "out"}


def test_the_ends_of_every_branch_stay_dense_where_that_is_asked_for():
    image = layers.Input((8, 8, 4))
    x = layers.ReLU()(layers.Conv2D(8, 3, padding="same", name="first")(image))
    y = layers.Conv2D(8, 1, name="shortcut")(image)
    x = layers.Add()([layers.Conv2D(8, 3, padding="same", name="inner")(x), y])
    x = layers.Dense(8, name="hidden")(layers.GlobalAveragePooling2D()(x))
    model = tf_keras.Model(image, [layers.Dense(3, name="head")(x), layers.Dense(2, name="other")(x)])
    options = PruneOptions(dense_share=0.0, dense_ends=True, targets={"other": 0.5})
    chosen = choose_prunable(model, options, 0.7)
    assert chosen.names == {"inner", "hidden", "other"}
    assert reasons(chosen) == dict.fromkeys(
        ["first", "shortcut", "head"], "the first or last kernel (compress.prune.dense_ends)"
    )
    assert choose_prunable(model, PruneOptions(dense_share=0.0, dense_ends=False), 0.7).untreated == []


@pytest.mark.parametrize(("width", "dense"), [(138, {"first", "head"}), (128, set())])
def test_ends_that_hold_few_of_the_weights_stay_dense_unasked(width, dense):
    """Ends of 14 weights a channel beside two kernels of width x width: 0.0519 and 0.0482 of all at 128 and 138."""
    image = layers.Input((8,))
    x = layers.Dense(width, name="inner")(layers.Dense(width, name="first")(image))
    model = tf_keras.Model(image, layers.Dense(6, name="head")(layers.Dense(width, name="second")(x)))
    chosen = choose_prunable(model, PruneOptions(dense_share=0.0), 0.7)
    assert set(reasons(chosen)) == dense
    assert chosen.names == {"first", "inner", "second", "head"} - dense


def test_larger_kernels_become_sparser_so_that_the_mean_is_what_was_asked_for():
    found = [kernel for kernel in kernels(twin()) if kernel.name in ("wide", "hidden", "out")]
    sizes = {kernel.name: kernel.size for kernel in found}
    targets = _spread(found, 0.7)
    assert sum(targets[name] * sizes[name] for name in sizes) == pytest.approx(0.7 * sum(sizes.values()))
    assert targets["out"] > 0.7 > max(targets["hidden"], targets["wide"])


def test_the_worked_example_of_the_spread_holds():
    image = layers.Input((8, 8, 16))
    x = layers.Conv2D(64, 1)(layers.Conv2D(16, 3, name="small")(image))
    model = tf_keras.Model(image, layers.Conv2D(64, 3, name="large")(x))
    targets = _spread([kernel for kernel in kernels(model) if kernel.name in ("small", "large")], 0.8)
    assert targets == {"small": pytest.approx(0.249, abs=1e-3), "large": pytest.approx(0.834, abs=1e-3)}


def test_kernels_too_small_for_any_zeros_stay_dense_and_are_named():
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, name="small")(image)
    model = tf_keras.Model(image, layers.Dense(64, name="large")(layers.Flatten()(x)))
    chosen = choose_prunable(model, PruneOptions(dense_share=0.0, spread="erk"), 0.95)
    assert chosen.names == {"small", "large"}
    chosen = choose_prunable(model, PruneOptions(dense_share=0.0, spread="erk"), 0.5)
    assert chosen.names == {"large"}
    assert reasons(chosen)["small"].startswith("too small for zeros when kernels hold 0.5 on average")


def test_excluded_and_frozen_layers_stay_dense():
    model = twin()
    model.get_layer("wide").trainable = False
    chosen = choose_prunable(model, PruneOptions(exclude=["out"]), 0.7)
    assert chosen.names == {"hidden"}
    assert reasons(chosen)["out"] == "excluded by compress.prune.exclude"
    assert "frozen" in reasons(chosen)["wide"]


def test_excluding_a_layer_that_is_not_there_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"compress\.prune\.exclude: the model has no layer 'hiden'; did you mean 'hidden'"
    ):
        choose_prunable(twin(), PruneOptions(exclude=["hiden"]), 0.7)


@pytest.mark.parametrize("updates", [1, 2, 7, 100, 1234])
@pytest.mark.parametrize("kind", ["polynomial", "constant"])
def test_the_schedule_reaches_its_target_at_an_update_that_changes_masks(updates, kind):
    schedule = _schedule(PruneOptions(schedule=kind, frequency=20, end=0.6), 0.8, updates)
    changing = [step for step in range(1, updates + 1) if bool(schedule(step)[0])]
    assert changing, "no update changes a mask"
    assert float(schedule(changing[-1])[1]) == pytest.approx(0.8)
    assert changing[-1] <= max(1, 0.6 * updates)


def test_a_polynomial_schedule_rises_from_its_start():
    schedule = _schedule(PruneOptions(initial_sparsity=0.3, begin=0.2, end=0.8, frequency=1), 0.9, 100)
    values = [float(schedule(step)[1]) for step in (20, 40, 60, 80)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.3)
    assert not bool(schedule(19)[0])


def test_a_schedule_that_ends_before_it_begins_is_refused():
    with pytest.raises(ConfigError, match=r"compress\.prune\.begin=0\.7 must be below compress\.prune\.end=0\.6"):
        _schedule(PruneOptions(begin=0.7), 0.8, 100)


def test_wrapping_and_stripping_leave_weights_and_names_as_they_were():
    model = twin()
    chosen = choose_prunable(model, PruneOptions(), 0.5)
    bare = strip(prune(model, chosen, PruneOptions(), sparsity=0.5, updates=10))
    assert [layer.name for layer in bare.layers] == [layer.name for layer in model.layers]
    assert all(np.array_equal(a, b) for a, b in zip(bare.get_weights(), model.get_weights(), strict=True))
    assert {sparsity(kernel.values) for kernel in kernels(bare)} == {0.0}


def train(model: tf_keras.Model, updates: int) -> tf_keras.Model:
    """`updates` updates on random data, as the step trains; then stripped."""
    random = np.random.default_rng(0)
    outputs = model.output_shape[-1]
    x = random.normal(size=(updates * 8, *model.input_shape[1:])).astype("float32")
    model.compile(tf_keras.optimizers.Adam(0.01), "mse")
    model.fit(
        x,
        random.normal(size=(updates * 8, outputs)).astype("float32"),
        batch_size=8,
        verbose=0,
        callbacks=[tfmot.sparsity.keras.UpdatePruningStep()],
    )
    return strip(model)


def masked(model: tf_keras.Model) -> tf_keras.Model:
    """The masks of the first update, without training; then stripped. For `schedule="constant"`."""
    for layer in model.layers:
        if hasattr(layer, "pruning_obj"):
            layer.pruning_step.assign(1)
            layer.pruning_obj.conditional_mask_update()
    return strip(model)


def values_of(model: tf_keras.Model) -> dict[str, np.ndarray]:
    return {kernel.name: kernel.values for kernel in kernels(model)}


def dense(*units: int, inputs: int) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    x = image = layers.Input((inputs,))
    for number, width in enumerate(units):
        x = layers.Dense(width, name=f"dense{number}")(x)
    return tf_keras.Model(image, x)


def test_two_of_four_holds_along_the_inputs_of_each_place_and_unit():
    image = layers.Input((8, 8, 8))
    x = layers.Conv2D(16, 3, name="conv")(image)
    model = tf_keras.Model(image, layers.Dense(6, name="out")(layers.GlobalAveragePooling2D()(x)))
    options = PruneOptions(dense_share=0.0)
    chosen = choose_prunable(model, options, 0.5, "2:4")
    start = values_of(model)
    made = values_of(train(prune(model, chosen, options, sparsity=0.5, pattern="2:4", updates=4), 4))
    for name in ("conv", "out"):
        groups = np.moveaxis(made[name], -2, -1).reshape(-1, 4)
        assert set(np.count_nonzero(groups, axis=1)) == {2}, name
        # The masks are those of the weights that the step started from: tfmot picks them at the first update.
        largest = np.argsort(np.abs(np.moveaxis(start[name], -2, -1).reshape(-1, 4)), axis=1)[:, 2:]
        assert (np.take_along_axis(groups, largest, 1) != 0).all(), name


@pytest.mark.parametrize(("pattern", "side", "magnitude"), [("1x4", 4, "l2"), ("1x16", 16, "l1")])
def test_blocks_of_inputs_of_one_unit_go_together_and_the_target_is_reached(pattern, side, magnitude):
    model = dense(32, 1, inputs=64)  # one unit: where tfmot's own blocks fail
    options = PruneOptions(dense_share=0.0, magnitude=magnitude, frequency=1)
    chosen = choose_prunable(model, options, 0.5, pattern)
    assert chosen.names == {"dense0", "dense1"}
    made = values_of(train(prune(model, chosen, options, sparsity=0.5, pattern=pattern, updates=6), 6))
    for name, values in made.items():
        blocks = (values != 0).reshape(-1, side, values.shape[1]).mean(axis=1)
        assert set(np.unique(blocks)) == {0.0, 1.0}, name
        assert sparsity(values) == 0.5, name
    assert sparsity(in_blocks(made["dense0"], pattern)) == 0.5


def block_mask(weights: np.ndarray, magnitude: str, sparsity: float) -> np.ndarray:
    """The mask of a kernel (inputs, units) in blocks of 1x4."""
    model = dense(weights.shape[1], inputs=len(weights))
    model.set_weights([weights, np.zeros(weights.shape[1], np.float32)])
    options = PruneOptions(dense_share=0.0, schedule="constant", magnitude=magnitude)
    chosen = choose_prunable(model, options, sparsity, "1x4")
    made = masked(prune(model, chosen, options, sparsity=sparsity, pattern="1x4", updates=1))
    return (made.get_weights()[0] != 0).astype(np.float32)


def test_l1_counts_the_sum_of_a_block_and_l2_its_largest_weights_more():
    one_large, all_even = [2.0, 0.1, 0.1, 0.1], [0.7, -0.7, 0.7, -0.7]  # sums 2.3 and 2.8, squares 4.03 and 1.96
    weights = np.array([[*one_large, *all_even]], np.float32).T
    assert block_mask(weights, "l1", 0.5).reshape(-1).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert block_mask(weights, "l2", 0.5).reshape(-1).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_l1_blocks_are_those_of_tfmot():
    weights = np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)
    theirs = tfmot.sparsity.keras.prune_low_magnitude(
        layers.Dense(8, input_shape=(32,)),
        pruning_schedule=tfmot.sparsity.keras.ConstantSparsity(0.75, 0),
        block_size=(4, 1),
    )
    tf_keras.Sequential([theirs])
    theirs.layer.kernel.assign(weights)
    _, mask = theirs.pruning_obj._maybe_update_block_mask(tf.constant(weights))
    assert np.array_equal(block_mask(weights, "l1", 0.75), mask.numpy())


@pytest.mark.parametrize(
    ("pattern", "names", "layer", "reason"),
    [
        ("1x4", {"out"}, "wide", "1x4 is a pattern for kernels of dense layers"),
        ("1x4", {"out"}, "hidden", "its 18 inputs do not divide by 4, so 1x4 does not fit"),
        ("1x16", {"out"}, "hidden", "its 18 inputs do not divide by 16, so 1x16 does not fit"),
        ("2:4", {"out"}, "wide", "its 2 inputs do not divide by 4, so 2:4 does not fit"),
        ("1:2", {"wide", "hidden", "out"}, "tiny", "its 1 inputs do not divide by 2, so 1:2 does not fit"),
        ("2:4", {"out"}, "line", "2:4 is a pattern for kernels of dense and conv2d layers"),
    ],
)
def test_kernels_that_a_pattern_does_not_fit_are_left_alone_with_the_reason(pattern, names, layer, reason):
    image = layers.Input((8, 8, 1))
    x = layers.Conv2D(18, 3, name="wide")(layers.Conv2D(2, 3, name="tiny")(image))
    x = layers.Dense(32, name="hidden")(layers.GlobalAveragePooling2D()(x))
    x = layers.Flatten()(layers.Conv1D(4, 1, name="line")(layers.Reshape((4, 8))(x)))
    model = tf_keras.Model(image, layers.Dense(64, name="out")(x))
    chosen = choose_prunable(model, PruneOptions(dense_share=0.0), 0.5, pattern)
    assert chosen.names == names
    assert reasons(chosen)[layer] == reason


def test_one_magnitude_parts_all_kernels():
    model = dense(4, 4, inputs=4)
    first, second = kernels(model)
    small, large = np.arange(1, 17), np.arange(9, 25)
    magnitudes = {first.name: small, second.name: large}
    targets = _global([first, second], 0.5, lambda kernel: magnitudes[kernel.name])
    assert targets == {first.name: 12 / 16, second.name: 4 / 16}  # the 16 smallest: 1..8, then 9..12 of both


def test_no_kernel_is_emptied_and_the_others_take_over():
    model = dense(4, 36, inputs=4)
    first, second = kernels(model)
    magnitudes = {first.name: np.full(16, 0.1), second.name: np.arange(1, 145)}
    targets = _global([first, second], 0.5, lambda kernel: magnitudes[kernel.name])
    assert targets[first.name] == 0.99
    zeros = sum(targets[kernel.name] * kernel.size for kernel in (first, second))
    assert zeros == pytest.approx(0.5 * 160, abs=1)


@pytest.mark.parametrize("pattern", [None, "1x4"])
def test_a_global_target_is_taken_from_the_weights_that_the_step_starts_from(pattern):
    model = dense(64, 64, inputs=64)
    model.layers[1].kernel.assign(model.layers[1].kernel * 0.25)
    options = PruneOptions(spread="global", dense_share=0.0, schedule="constant")
    chosen = choose_prunable(model, options, 0.6, pattern)
    made = values_of(masked(prune(model, chosen, options, sparsity=0.6, pattern=pattern, updates=1)))
    held = {name: sparsity(values) for name, values in made.items()}
    assert sum(held.values()) / 2 == pytest.approx(0.6, abs=0.01)
    assert held["dense0"] > 0.8 > 0.45 > held["dense1"]


@pytest.mark.parametrize("spread", ["uniform", "erk", "global"])
def test_a_layer_with_a_target_of_its_own_gets_it_however_small_it_is(spread):
    model = dense(64, 64, 8, inputs=64)
    options = PruneOptions(targets={"dense2": 0.25}, dense_share=0.1, spread=spread, schedule="constant")
    chosen = choose_prunable(model, options, 0.75)
    assert chosen.names == {"dense0", "dense1", "dense2"}
    made = values_of(masked(prune(model, chosen, options, sparsity=0.75, updates=1)))
    assert sparsity(made["dense2"]) == pytest.approx(0.25, abs=0.002)
    assert (sparsity(made["dense0"]) + sparsity(made["dense1"])) / 2 == pytest.approx(0.75, abs=0.002)


def test_a_target_of_a_layer_that_is_not_there_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"compress\.prune\.targets: the model has no layer 'hiden'; did you mean 'hidden'"
    ):
        choose_prunable(twin(), PruneOptions(targets={"hiden": 0.5}), 0.7)
