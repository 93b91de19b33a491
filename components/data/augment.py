"""Augment: random changes of a whole batch at once, as a function of (batch, seed) and nothing else."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from components.artifacts import DataSpec
from components.errors import ConfigError
from components.options import Augmentation

Tensor = Any  # tf.Tensor; TensorFlow ships no usable types
_PICTURES_ONLY = ("flip", "shift", "rotation", "zoom")


def check_augmentation(augmentation: Augmentation, spec: DataSpec) -> None:
    """Refuses what the data cannot take.

    Raises:
      ConfigError: A change of geometry is asked for, and the data are not pictures.
    """
    if spec.input_name == "image":
        return
    for name in _PICTURES_ONLY:
        if value := getattr(augmentation, name):
            raise ConfigError(
                f"train.augmentation.{name}={value} is for pictures, and a row of this data set is "
                f"{spec.input_shape[0]} features: remove it, or use train.augmentation.noise."
            )


def augment(x: Tensor, seed: Tensor, augmentation: Augmentation, pixels: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Changes each example of a batch on its own; what is off costs nothing and changes no bit.

    Args:
      x: float32 (batch, height, width, channels) in the range `pixels`, or (batch, n) where only `noise` is on.
      seed: int64 (2,); the same seed gives the same changes.
      augmentation: Flip, then one affine change (zoom, rotation, shift; what comes in from outside is black), then noise.
      pixels: Black and white.

    Returns:
      float32, shape of `x`; pictures stay in their range, so that noise shifts no range that int8 is calibrated for.
    """
    seeds = tf.random.split(seed, 3)
    if augmentation.flip:
        x = _flipped(x, seeds[0])
    if augmentation.shift or augmentation.rotation or augmentation.zoom:
        x = _moved(x, seeds[1], augmentation, pixels)
    if augmentation.noise:
        noisy = x + tf.random.stateless_normal(tf.shape(x), seeds[2], stddev=augmentation.noise)
        x = tf.clip_by_value(noisy, *pixels) if len(x.shape) == 4 else noisy
    return x


def _flipped(x: Tensor, seed: Tensor) -> Tensor:
    chosen = tf.random.stateless_uniform((tf.shape(x)[0], 1, 1, 1), seed) < 0.5
    return tf.where(chosen, tf.reverse(x, [2]), x)


def _moved(x: Tensor, seed: Tensor, augmentation: Augmentation, pixels: tuple[float, float]) -> Tensor:
    height, width = x.shape[1], x.shape[2]
    draw = tf.random.stateless_uniform((4, tf.shape(x)[0]), seed, -1.0, 1.0)
    angle = draw[0] * math.radians(augmentation.rotation)
    scale = 1.0 + draw[1] * augmentation.zoom
    # One factor each: graph optimisation would reassociate two, and eager bits would differ from those of tf.data.
    down, right = draw[2] * (augmentation.shift * height), draw[3] * (augmentation.shift * width)
    transforms = affine(angle, scale, down, right, (height, width))
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=x,
        transforms=transforms,
        output_shape=[height, width],
        fill_value=pixels[0],
        interpolation="BILINEAR",
        fill_mode="CONSTANT",
    )
    # Rounding in the interpolation may leave the range by one unit in the last place.
    return tf.clip_by_value(tf.ensure_shape(moved, x.shape), *pixels)


def affine(angle: Tensor, scale: Tensor, down: Tensor, right: Tensor, size: tuple[int, int]) -> Tensor:
    """The maps that turn by `angle`, enlarge by `scale` about the centre, then move by (`down`, `right`).

    Args:
      angle: float32 (batch,), radians; positive turns clockwise as seen on the screen (y points down).
      scale: float32 (batch,), above 0; 2 shows a picture twice as large.
      down: float32 (batch,), pixels.
      right: float32 (batch,), pixels.
      size: (height, width), pixels.

    Returns:
      float32 (batch, 8), from output to input coordinates, as `ImageProjectiveTransformV3` takes them.
    """
    cos, sin = tf.cos(angle) / scale, tf.sin(angle) / scale
    middle_y, middle_x = (size[0] - 1) / 2, (size[1] - 1) / 2
    from_x, from_y = middle_x + right, middle_y + down
    zero = tf.zeros_like(angle)
    return tf.stack(
        [
            cos,
            sin,
            middle_x - cos * from_x - sin * from_y,
            -sin,
            cos,
            middle_y + sin * from_x - cos * from_y,
            zero,
            zero,
        ],
        axis=1,
    )
