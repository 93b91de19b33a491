"""Channels: whole filters and neurons are removed, so that shapes shrink and every runtime saves their work.

    twin --choose_channels(strength)--> Cut --shrink()--> smaller twin, to be fine-tuned

Filters with small scales of the batch normalization behind them go first (Liu et al. 2017, arXiv 1708.06519), or those
with small norms (Li et al. 2017, arXiv 1608.08710). tfmot has nothing for this (its issues 541 and 732).
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tf_keras

from components.compression.channel_groups import MAKERS, Channels, Flow, by_groups, has_kernel, trace_channels
from components.compression.kernels import Kernel, Untreated, check_excluded, choose
from components.errors import ModelError
from components.options import ChannelsOptions


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is removed.

    Attributes:
      channels: Of the twin.
      kept: bool, by number of a channel.
      untreated: Layers whose channels all stay, with reasons.
    """

    channels: Channels
    kept: np.ndarray
    untreated: list[Untreated]

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers with a kernel that becomes smaller."""
        return frozenset(
            name
            for name, flow in self.channels.flows.items()
            if has_kernel(flow.layer) and not (self.kept[flow.inputs].all() and self.kept[flow.outputs].all())
        )

    def facts(self, before: tf_keras.Model, after: tf_keras.Model) -> dict[str, Any]:
        """As `facts["reports"]` of the artifact lists it: sizes and channels as [before, after]."""
        return {
            "multiply_adds": [self.channels.multiply_adds(), self.channels.multiply_adds(self.kept)],
            "parameters": [before.count_params(), after.count_params()],
            "groups": [
                {
                    "layers": list(group.layers),
                    "channels": [len(group.numbers), int(np.count_nonzero(self.kept[group.numbers]))],
                }
                for group in self.channels.groups()
            ],
        }


def choose_channels(twin: tf_keras.Model, options: ChannelsOptions, strength: float) -> Cut:
    """Which channels are removed.

    Args:
      twin: Without wrappers; its weights decide.
      options: Importance, least number and multiple of what is kept.
      strength: Share of the multiply-adds to remove, in (0, 1). At least this much goes, and so little beyond it that no
        step of any group could have stayed.

    Raises:
      ConfigError: `options.exclude` names an unknown layer.
      ModelError: Not so much can be removed; says how much can.
    """
    check_excluded("channels", options.exclude, twin)
    channels = trace_channels(twin, options.exclude)
    steps = _steps(channels, options, importance(channels, options))
    target = (1 - strength) * channels.multiply_adds()
    cut = Cut(channels, _down_to(target, channels, steps), _untreated(twin, channels, options))
    if steps and channels.multiply_adds(cut.kept) > target:
        raise ModelError(_too_much(twin, cut, options, strength))
    return cut


def _too_much(twin: tf_keras.Model, cut: Cut, options: ChannelsOptions, strength: float) -> str:
    most = 1 - cut.channels.multiply_adds(cut.kept) / cut.channels.multiply_adds()
    fixed = ", ".join(f"'{each.layer}'" for each in cut.untreated[:3]) or "none"
    return (
        f"channels@{strength:g}: at most {most:.4f} of the multiply-adds of model '{twin.name}' can be removed, "
        f"with compress.channels.minimum={options.minimum} and layers that cannot shrink ({fixed}); "
        f"write channels@{math.floor(most * 100) / 100:g} or less."
    )


def _untreated(twin: tf_keras.Model, channels: Channels, options: ChannelsOptions) -> list[Untreated]:
    def refuse(kernel: Kernel) -> str | None:
        if kernel.name in options.exclude:
            return "excluded by compress.channels.exclude"
        if not kernel.layer.trainable:
            return "the layer is frozen (trainable=False)"
        return channels.refusal(kernel.name)

    # The slopes of a PReLU are cut along with the layer before it.
    return [each for each in choose(twin, refuse).untreated if each.kind != "PReLU"]


# --- in which order channels go ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Step:
    """Channels that go together: `numbers`, of the group number `group`."""

    group: int
    numbers: np.ndarray


def _down_to(target: float, channels: Channels, steps: Sequence[_Step]) -> np.ndarray:
    """Which channels stay (bool, by number) once no more than `target` multiply-adds are left, or no step is."""

    def kept(count: int) -> np.ndarray:
        mask = np.ones(channels.count, bool)
        for step in steps[:count]:
            mask[step.numbers] = False
        return mask

    # More steps, fewer multiply-adds: the first count that is low enough is found by halving.
    count = bisect.bisect_left(range(len(steps)), -target, key=lambda each: -channels.multiply_adds(kept(each)))
    mask, closed = kept(count), set()
    for step in reversed(steps[:count]):  # the last one may have been a large one: others come back where there is room
        mask[step.numbers] = True
        if step.group in closed or channels.multiply_adds(mask) > target:
            mask[step.numbers] = False
            closed.add(step.group)
    return mask


def _steps(channels: Channels, options: ChannelsOptions, values: np.ndarray) -> list[_Step]:
    """Step after step until nothing more may go: the least important channels of the whole network first.

    Taking the same share of every group instead was worse on validation rows (ResNet-8, Fashion-MNIST, half of the
    multiply-adds, 200 updates after the cut): 0.861 against 0.863 by batch_norm, 0.835 against 0.845 by l2.
    """
    found = []
    for number, group in enumerate(channels.groups()):
        ascending = group.numbers[np.argsort(values[group.numbers], kind="stable")]
        counts = _counts(len(ascending), options)
        for before, after in itertools.pairwise(counts):
            numbers = ascending[len(ascending) - before : len(ascending) - after]
            found.append((float(values[numbers].mean()), _Step(number, numbers)))
    return [step for _, step in sorted(found, key=lambda each: each[0])]


def _counts(size: int, options: ChannelsOptions) -> list[int]:
    """How many channels a group may keep, from all to fewest.

    Example: 30 channels in multiples of 8, at least 4: 30, 24, 16, 8. Of 12, which are fewer than two multiples: 12, 11,
    down to 4.
    """
    multiple = options.multiple if size >= 2 * options.multiple else 1
    least = -(-options.minimum // multiple) * multiple
    return [size, *range((size - 1) // multiple * multiple, least - 1, -multiple)]


def importance(channels: Channels, options: ChannelsOptions) -> np.ndarray:
    """float64, by number: how much a channel matters, 1 on average over the channels of a layer.

    The mean over all layers that make the channel, so that a residual stream is judged by everything that is added to it.
    """
    total, makers = np.zeros(channels.count), np.zeros(channels.count)
    for flow in channels.flows.values():
        if has_kernel(flow.layer):
            values = _values(flow, options.importance)
            np.add.at(total, flow.outputs, values / (values.mean() or 1.0))
            np.add.at(makers, flow.outputs, 1.0)
    return total / np.maximum(makers, 1.0)


def _values(flow: Flow, kind: str) -> np.ndarray:
    """One value for each output channel; the norm is that of the kernel with batch normalization folded into it.

    Behind normalization the size of a kernel means nothing: twice the kernel gives the same output. Measured as in
    `_steps`, two seeds: 0.845, without folding 0.830.
    """
    scale, gamma = _normalization(flow)
    if kind == "batch_norm" and gamma is not None:
        return np.abs(gamma)
    rows = _by_output(flow.layer)
    return np.abs(scale) * (np.abs(rows).sum(axis=1) if kind == "l1" else np.sqrt(np.square(rows).sum(axis=1)))


def _by_output(layer: Any) -> np.ndarray:
    """The kernel as float64 (output channels, all else)."""
    if type(layer) is tf_keras.layers.DepthwiseConv2D:
        kernel = layer.depthwise_kernel.numpy()
        return kernel.reshape(-1, kernel.shape[-2] * kernel.shape[-1]).T.astype(np.float64)
    kernel = np.moveaxis(layer.kernel.numpy(), MAKERS[type(layer)][1], 0)
    return kernel.reshape(len(kernel), -1).astype(np.float64)


def _normalization(flow: Flow) -> tuple[np.ndarray, np.ndarray | None]:
    """(factor of each channel, gamma) of the batch normalization right behind a layer; ones and None without."""
    behind = [node.layer for node in flow.layer._outbound_nodes]
    if len(behind) != 1 or type(behind[0]) is not tf_keras.layers.BatchNormalization:
        return np.ones(len(flow.outputs)), None
    norm = behind[0]
    gamma = norm.gamma.numpy() if norm.scale else None
    return (1.0 if gamma is None else gamma) / np.sqrt(norm.moving_variance.numpy() + norm.epsilon), gamma


# --- the smaller twin --------------------------------------------------------------------------------------------


def shrink(twin: tf_keras.Model, cut: Cut) -> tf_keras.Model:
    """A copy of `twin` without the channels that `cut` removes; the weights of what stays are those of `twin`."""
    made = tf_keras.models.clone_model(twin, clone_function=lambda layer: _smaller(layer, cut))
    for layer in twin.layers:
        flow = cut.channels.flows.get(layer.name)
        if flow is not None and layer.weights:
            made.get_layer(layer.name).set_weights([_cut(layer, weight, flow, cut.kept) for weight in layer.weights])
    return made


def _smaller(layer: Any, cut: Cut) -> Any:
    config = layer.get_config()
    flow = cut.channels.flows.get(layer.name)
    if flow is not None:
        width = int(np.count_nonzero(cut.kept[flow.outputs]))
        for key in ("filters", "units"):
            if type(layer) in MAKERS and key in config:
                config[key] = width
        if "groups" in config:
            config["groups"] = flow.groups_left(cut.kept)
        if type(layer) is tf_keras.layers.Reshape:
            config["target_shape"] = (*layer.output_shape[1:-1], width)
    return type(layer).from_config(config)


def _cut(layer: Any, weight: Any, flow: Flow, kept: np.ndarray) -> np.ndarray:
    values = weight.numpy()
    if not (has_kernel(layer) and values.ndim > 1):  # a bias, or what normalization holds for each channel
        return values[..., kept[flow.outputs]] if values.shape[-1:] == flow.outputs.shape else values
    if type(layer) is tf_keras.layers.DepthwiseConv2D:
        return values[..., kept[flow.inputs], :]
    of_input, of_output = MAKERS[type(layer)]
    if by_groups(layer):  # what is left of the groups sees as many inputs as before
        return np.compress(kept[flow.outputs], values, of_output)
    # Of groups the kernel holds the inputs of one; all lose theirs at the same places.
    values = np.compress(kept[flow.inputs][: values.shape[of_input]], values, of_input)
    return np.compress(kept[flow.outputs], values, of_output)
