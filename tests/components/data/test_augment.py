import numpy as np
import pytest
import tensorflow as tf

from components.artifacts import DataSpec
from components.data.augment import affine, augment, check_augmentation
from components.errors import ConfigError
from components.options import Augmentation

PICTURES = DataSpec(task="classification", input_name="image", input_shape=(9, 9, 1), labels=("a", "b"))
TABLE = DataSpec(task="regression", input_name="features", input_shape=(5,))
EACH = [
    Augmentation(flip=True),
    Augmentation(shift=0.3),
    Augmentation(rotation=45),
    Augmentation(zoom=0.5),
    Augmentation(noise=0.2),
    Augmentation(flip=True, shift=0.1, rotation=10, zoom=0.1, noise=0.05),
]


def pictures(count: int = 64, shape: tuple[int, ...] = (9, 9, 3)) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 256, (count, *shape))
    return values.astype(np.float32) * np.float32(1 / 255)


def both_ways(x: np.ndarray, options: Augmentation, seed: int = 1) -> np.ndarray:
    """Runs `augment` eagerly and inside tf.data, and requires the same bits."""
    key = tf.constant([seed, 0], tf.int64)
    eager = augment(tf.constant(x), key, options).numpy()
    mapped = tf.data.Dataset.from_tensors(x).map(lambda each: augment(each, key, options))
    assert mapped.element_spec.shape == x.shape
    assert next(mapped.as_numpy_iterator()).tobytes() == eager.tobytes()
    return eager


def test_what_is_off_changes_no_bit() -> None:
    x = pictures()
    assert both_ways(x, Augmentation()).tobytes() == x.tobytes()


@pytest.mark.parametrize("options", EACH, ids=repr)
def test_pictures_change_stay_in_range_and_depend_on_the_seed_only(options: Augmentation) -> None:
    x = pictures()
    found = both_ways(x, options)
    assert found.dtype == np.float32
    assert found.shape == x.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert found.tobytes() != x.tobytes()
    assert found.tobytes() == both_ways(x, options).tobytes()
    assert found.tobytes() != both_ways(x, options, seed=2).tobytes()


def test_flip_mirrors_about_half_of_the_pictures_and_leaves_the_others() -> None:
    x = pictures(400)
    found = both_ways(x, Augmentation(flip=True))
    same = (found == x).all((1, 2, 3))
    mirrored = (found == x[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_each_picture_of_a_batch_is_changed_on_its_own() -> None:
    x = np.repeat(pictures(1), 32, axis=0)
    for options in EACH[1:]:
        found = both_ways(x, options)
        assert len({each.tobytes() for each in found}) == 32


def test_a_shift_moves_by_at_most_its_share_of_the_side() -> None:
    x = np.zeros((200, 20, 40, 1), np.float32)
    x[:, 10, 20] = 1
    found = both_ways(x, Augmentation(shift=0.1))[..., 0]
    rows = (found.sum(2) * np.arange(20)).sum(1) / found.sum((1, 2)) - 10
    columns = (found.sum(1) * np.arange(40)).sum(1) / found.sum((1, 2)) - 20
    assert 1.8 < np.abs(rows).max() <= 2.001
    assert 3.6 < np.abs(columns).max() <= 4.001
    assert abs(rows.mean()) < 0.3
    assert abs(columns.mean()) < 0.6


def test_a_rotation_keeps_the_distance_to_the_centre_and_reaches_its_angle() -> None:
    x = np.zeros((200, 41, 41, 1), np.float32)
    x[:, 20, 35] = 1
    found = both_ways(x, Augmentation(rotation=30))[..., 0]
    down = (found.sum(2) * np.arange(41)).sum(1) / found.sum((1, 2)) - 20
    right = (found.sum(1) * np.arange(41)).sum(1) / found.sum((1, 2)) - 20
    np.testing.assert_allclose(np.hypot(down, right), 15, atol=0.3)
    angles = np.degrees(np.arctan2(down, right))
    assert 27 < angles.max() < 31.5
    assert -31.5 < angles.min() < -27


def test_a_zoom_changes_the_size_about_the_centre_both_ways() -> None:
    x = np.zeros((200, 41, 41, 1), np.float32)
    x[:, 10:31, 10:31] = 1
    area = both_ways(x, Augmentation(zoom=0.5))[:, :, :, 0].sum((1, 2)) / 21**2
    assert 0.25 <= area.min() < 0.3
    assert 2.1 < area.max() <= 2.3


def moved(angle: float, scale: float, down: float, right: float) -> np.ndarray:
    x = np.zeros((1, 5, 5, 1), np.float32)
    x[0, 1, 3] = 1
    maps = affine(*(tf.constant([value], tf.float32) for value in (angle, scale, down, right)), (5, 5))
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=x, transforms=maps, output_shape=[5, 5], fill_value=0.0, interpolation="BILINEAR", fill_mode="CONSTANT"
    ).numpy()[0, :, :, 0]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ((0, 1, 0, 0), (1, 3)),
        ((0, 1, 2, 0), (3, 3)),
        ((0, 1, 0, -2), (1, 1)),
        ((np.pi / 2, 1, 0, 0), (3, 3)),  # clockwise: from the upper right to the lower right
        ((np.pi, 1, 0, 0), (3, 1)),
        ((np.pi / 2, 1, 0, -1), (3, 2)),  # turned first, moved after
        ((0, 2, 0, 0), (0, 4)),
    ],
)
def test_a_map_brings_a_pixel_where_it_belongs(
    change: tuple[float, float, float, float], place: tuple[int, int]
) -> None:
    found = moved(*change)
    assert np.unravel_index(found.argmax(), found.shape) == place
    assert found[place] == pytest.approx(1, abs=1e-5)


def test_what_comes_in_from_outside_is_zero() -> None:
    x = np.ones((50, 9, 9, 1), np.float32)
    assert both_ways(x, Augmentation(shift=0.4)).min() == 0


def test_what_comes_in_from_outside_is_black_in_the_range_of_the_pixels() -> None:
    x = np.full((50, 9, 9, 1), 0.5, np.float32)
    found = augment(tf.constant(x), tf.constant([1, 0], tf.int64), Augmentation(shift=0.4, noise=3.0), (-1.0, 1.0))
    assert (found.numpy().min(), found.numpy().max()) == (-1, 1)


def test_noise_has_the_standard_deviation_that_was_asked_for_and_tables_are_not_clipped() -> None:
    x = np.full((500, 20), 0.5, np.float32)
    found = both_ways(x, Augmentation(noise=2.0)) - x
    assert found.std() == pytest.approx(2, rel=0.05)
    assert abs(found.mean()) < 0.1
    assert found.min() < -4


def test_tables_take_noise_only_and_pictures_take_all() -> None:
    check_augmentation(Augmentation(noise=0.1), TABLE)
    for options in EACH:
        check_augmentation(options, PICTURES)
    with pytest.raises(
        ConfigError, match=r"train\.augmentation\.rotation=45\.0 is for pictures, and .* is 5 features: remove it, or"
    ):
        check_augmentation(Augmentation(rotation=45), TABLE)
