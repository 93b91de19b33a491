import numpy as np
import pytest
import tf_keras

from components.compression.kernels import kernels, sparsity
from components.compression.prune import _schedule, _spread, choose_prunable, prune, strip
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
