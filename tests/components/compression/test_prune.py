import numpy as np
import pytest
import tf_keras

from components.compression.kernels import kernels, sparsity
from components.compression.prune import _schedule, choose_prunable, prune, strip
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
    chosen = choose_prunable(twin(), PruneOptions())
    assert chosen.names == {"wide", "hidden", "out"}
    assert "hold 0.01 of all weights together" in reasons(chosen)["tiny"]
    assert "does not prune depthwise" in reasons(chosen)["depth"]
    assert choose_prunable(twin(), PruneOptions(dense_share=0.0)).names == {"tiny", "wide", "hidden", "out"}


def test_excluded_and_frozen_layers_stay_dense():
    model = twin()
    model.get_layer("wide").trainable = False
    chosen = choose_prunable(model, PruneOptions(exclude=["out"]))
    assert chosen.names == {"hidden"}
    assert reasons(chosen)["out"] == "excluded by compress.prune.exclude"
    assert "frozen" in reasons(chosen)["wide"]


def test_excluding_a_layer_that_is_not_there_names_the_nearest_one():
    with pytest.raises(
        ConfigError, match=r"compress\.prune\.exclude: the model has no layer 'hiden'; did you mean 'hidden'"
    ):
        choose_prunable(twin(), PruneOptions(exclude=["hiden"]))


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
    chosen = choose_prunable(model, PruneOptions())
    bare = strip(prune(model, chosen, PruneOptions(), sparsity=0.5, updates=10))
    assert [layer.name for layer in bare.layers] == [layer.name for layer in model.layers]
    assert all(np.array_equal(a, b) for a, b in zip(bare.get_weights(), model.get_weights(), strict=True))
    assert {sparsity(kernel.values) for kernel in kernels(bare)} == {0.0}
