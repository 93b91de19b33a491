"""Precision: the dtype in which a training computes, and the choice of the one that is fast here.

Weights, optimizer, normalization statistics, the first and the last kernel's surroundings and the loss stay float32
throughout: what changes is the dtype of the activations and of the copies of the kernels that an update computes with
(Micikevicius et al. 2018, arXiv 1710.03740; bfloat16: Kalamkar et al. 2019, arXiv 1905.12322).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from components.artifacts import read_json, write_json
from components.options import TrainOptions

FLOAT32, BFLOAT16, FLOAT16 = "float32", "mixed_bfloat16", "mixed_float16"

_KERNELS = ("kernel", "depthwise_kernel", "pointwise_kernel", "recurrent_kernel")
# A training of fewer multiply-adds is over in about a minute on two cores, and tracing another update takes seconds.
WORTH_MEASURING = 3e12
# Below this gain the standard precision stays: it is what everyone compares with.
WORTH_CHANGING = 1.15
_ROUNDS = 5
CHOICE = "precision.json"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A precision and why it is this one.

    Attributes:
      precision: 'float32', 'mixed_bfloat16' or 'mixed_float16'.
      reason: For the user, without a full stop.
      milliseconds: Per update by precision, where it was measured; of processor time on a CPU.
    """

    precision: str
    reason: str
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.precision} ({self.reason})"


@contextlib.contextmanager
def computed_in(model: keras.Model, precision: str, kind: str) -> Iterator[None]:
    """Layers of `model` compute in `precision` inside the block, and as before after it.

    From the first trainable kernel up to the last one, exclusive: inputs are standardised and outputs told in float32.

    Args:
      model: Built; its weights stay as they are.
      precision: See `Choice`.
      kind: 'CPU', 'GPU' or 'TPU', where it computes.
    """
    before = [(layer, layer.dtype_policy) for layer in _between_the_ends(model, kind)] if precision != FLOAT32 else []
    # A policy of the user's own choice is no business of ours.
    before = [(layer, policy) for layer, policy in before if getattr(policy, "name", "") == FLOAT32]
    for layer, _ in before:
        layer.dtype_policy = precision
    try:
        yield
    finally:
        for layer, policy in before:
            layer.dtype_policy = policy


def choose(
    options: TrainOptions,
    model: keras.Model,
    examples: int,
    kind: str,
    timers: Callable[[str], Callable[[], float]],
    folder: pathlib.Path,
) -> Choice:
    """What `options.precision` says, or, for auto, the fastest of those that this device computes.

    A choice that was measured is kept in `folder`: a training that goes on after a kill must not choose anew.

    Args:
      options: Of the training.
      model: Built.
      examples: That the whole training shows to it.
      kind: 'CPU', 'GPU' or 'TPU'.
      timers: Precision -> a function that makes some updates and returns seconds per update, on a CPU of its processor's
        time.
      folder: Of the training.
    """
    if options.precision != "auto":
        return Choice(options.precision, "as train.precision says")
    if kind == "TPU":
        return Choice(BFLOAT16, "what a TPU multiplies in")
    others = [each for each in candidates(kind) if _between_the_ends(model, kind)]
    if options.privacy is not None and FLOAT16 in others:
        others.remove(FLOAT16)  # its scaled loss would be clipped at another norm
    if not others:
        return Choice(FLOAT32, "nothing to compute in another precision here")
    # Three times the forward pass: one for it, two for both gradients.
    work = 3.0 * multiply_adds(model) * examples
    if work < WORTH_MEASURING:
        return Choice(FLOAT32, "too short a training to measure another")
    kept = folder / CHOICE
    if kept.exists():
        return Choice(**read_json(kept))
    choice = measured([FLOAT32, *others], timers)
    write_json(kept, dataclasses.asdict(choice))
    return choice


def measured(precisions: list[str], timers: Callable[[str], Callable[[], float]]) -> Choice:
    """Times `precisions` in turn, round by round; the first one stays unless another is clearly faster."""
    ready = {each: timers(each) for each in precisions}
    taken: dict[str, list[float]] = {each: [] for each in precisions}
    for _ in range(_ROUNDS):
        for each, timer in ready.items():
            taken[each].append(timer())
    middle = {each: statistics.median(times) for each, times in taken.items()}
    usual, best = precisions[0], min(precisions, key=middle.__getitem__)
    gain = middle[usual] / middle[best]
    told = ", ".join(f"{each} {seconds * 1e3:.1f} ms" for each, seconds in middle.items())
    if gain >= WORTH_CHANGING:
        reason = f"{gain:.2f} times as fast as {usual}; an update took {told}"
    else:
        best, reason = usual, f"no other is {WORTH_CHANGING} times as fast; an update took {told}"
    return Choice(best, reason, {each: seconds * 1e3 for each, seconds in middle.items()})


def candidates(kind: str) -> list[str]:
    """Precisions beside float32 that are worth a try on the devices here.

    A CPU: bfloat16, which oneDNN computes natively on newer ones; measuring tells. A GPU: bfloat16 from compute
    capability 8.0 on, float16 from 7.0 on (its tensor cores), none before.
    """
    if kind == "CPU":
        return [BFLOAT16]
    capabilities = [
        tf.config.experimental.get_device_details(each).get("compute_capability", (0, 0))
        for each in tf.config.list_physical_devices("GPU")
    ]
    if not capabilities or min(capabilities) < (7, 0):
        return []
    return [BFLOAT16] if min(capabilities) >= (8, 0) else [FLOAT16]


def kind_of(strategy: tf.distribute.Strategy) -> str:
    """'TPU', 'GPU' or 'CPU': what the replicas of `strategy` compute on."""
    if isinstance(strategy, tf.distribute.TPUStrategy):
        return "TPU"
    return "GPU" if tf.config.list_logical_devices("GPU") else "CPU"


def multiply_adds(model: keras.Model) -> float:
    """Of one example's forward pass: the weights of each layer's kernels times the positions at which it applies them.

    Attention's products of two activations, pooling and the like are not counted: it is the order of magnitude.
    """
    total = 0.0
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            total += multiply_adds(layer)
            continue
        weights = sum(math.prod(each.shape) for each in layer.trainable_variables if each.name in _KERNELS)
        # A recurrent layer applies its kernels at each time of its input, and may return the last one only.
        tensor = layer.input if isinstance(layer, keras.layers.RNN) else layer.output
        shape = tensor.shape if hasattr(tensor, "shape") else ()
        total += weights * math.prod(side for side in shape[1:-1] if side)
    return total


def _between_the_ends(model: keras.Model, kind: str) -> list[Any]:
    """Layers from the first trainable kernel up to the last one, exclusive; none in a model of one kernel."""
    layers = [layer for layer in model._flatten_layers() if not hasattr(layer, "layers")]
    kernels = [place for place, layer in enumerate(layers) if _has_kernel(layer)]
    if len(kernels) < 2:
        return []
    chosen = layers[kernels[0] : kernels[-1]]
    # oneDNN has no quick depthwise convolution in bfloat16: it took three times as long as in float32.
    slow = (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D) if kind == "CPU" else ()
    return [layer for layer in chosen if not isinstance(layer, slow)]


def _has_kernel(layer: Any) -> bool:
    return any(variable.name in _KERNELS for variable in layer.trainable_variables)
