"""Errors by layer: where a quantized file departs from the float one, and which layer is to blame.

    float file + file + rows --errors_by_layer()--> layers, the one that adds most noise first

Both files run over the same rows and every tensor is compared. Noise of one layer goes through all that follow, so the
signal-to-noise ratio alone points at the end of the network; what a layer adds to the noise of its inputs points at its cause.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from components.delivery.activations import Activations
from components.delivery.owners import Operation
from components.errors import ContractError

VIEWS = ("EXPAND_DIMS", "RESHAPE", "SQUEEZE")
"""These mix channels and places up, and change no value: their noise is that of their input."""
ROWS = 64
"""As many rows tell layers apart; every tensor of both files is kept for each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of a quantized file.

    Attributes:
      layer: Keras layer name, or the tensor's name where no layer is found in it.
      operators: Built-in operators that the layer became, in the order in which they run.
      snr_db: Signal-to-noise ratio of its output, decibels; of the worst where it has several. The signal is what varies
        within a channel (last axis) over rows and places: a constant, however large, tells a network nothing.
      added: Noise that it adds to that of its worst input, as a share of its own signal, both as powers; 0 at least.
      rounding: Noise of nothing but its output's rounding to the file's type, likewise; of the worst where it has several.
      readers: Layers that read its output. While they take it as the type that it has, a better layer changes nothing.
    """

    layer: str
    operators: tuple[str, ...]
    snr_db: float
    added: float
    rounding: float = 0.0
    readers: tuple[str, ...] = ()

    @property
    def blames_output(self) -> bool:
        """Whether the type of its output is to blame, more than what it computes with."""
        return self.rounding > self.added / 2


def errors_by_layer(
    float_file: pathlib.Path, file: pathlib.Path, inputs: np.ndarray, layers: Sequence[str]
) -> list[LayerError]:
    """Compares every tensor that both files compute.

    Args:
      float_file: The model in float32.
      file: The same model in any other format.
      inputs: float32 (n, *shape), calibration rows for instance.
      layers: Names of all Keras layers of the model, see `owners.layer_classes`.

    Returns:
      Layers whose output is in both files, the one that adds most noise first.

    Raises:
      ContractError: The files share no tensor, so they are not of one model.
    """
    reference, other = (Activations(path.read_bytes(), layers) for path in (float_file, file))
    shares, rounding = _noise_shares(reference, other, inputs)
    found: dict[str, LayerError] = {}
    for operation in reference.operations:
        share = max((shares[index] for index in operation.outputs if index in shares), default=None)
        if share is None:
            continue
        before = max((shares[index] for index in operation.inputs if index in shares), default=0.0)
        held = found.get(operation.layer)
        found[operation.layer] = LayerError(
            layer=operation.layer,
            operators=(*(held.operators if held else ()), operation.kind),
            snr_db=min(_decibels(share), held.snr_db if held else math.inf),
            added=(share - before if share > before else 0.0) + (held.added if held else 0.0),
            rounding=max([rounding[index] for index in operation.outputs if index in rounding], default=0.0),
            readers=tuple(dict.fromkeys(_readers(reference.operations, operation))),
        )
    if found.keys().isdisjoint(each.layer for each in reference.operations[:-1]) and len(reference.operations) > 1:
        raise ContractError(
            f"{file}: must be the same model as {float_file}, but no tensor has a name of the other; export both again."
        )
    return sorted(found.values(), key=lambda each: -each.added)


def _readers(operations: Sequence[Operation], made: Operation) -> Iterator[str]:
    """Layers of the operators that read what `made` makes, through views of it too."""
    for each in operations:
        if not set(each.inputs).isdisjoint(made.outputs) and each.layer != made.layer:
            yield each.layer
            if each.kind in VIEWS:
                yield from _readers(operations, each)


def _noise_shares(
    reference: Activations, other: Activations, inputs: np.ndarray
) -> tuple[dict[int, float], dict[int, float]]:
    """By the tensor's number in the float file: power of all its noise, and of its own rounding's, as shares of the signal's."""
    places = {each.name: place for place, each in enumerate(reference.tensors)}
    of_other = {each.index: place for place, each in enumerate(other.tensors)}
    pairs = {places[name]: of_other[each.index] for name, each in other.by_name(places).items()}
    noise: dict[int, _Sums] = {place: _Sums() for place in pairs}
    rounding: dict[int, _Sums] = {place: _Sums() for place in pairs}
    for example in inputs:
        wanted, got = reference.run(example), other.run(example)
        for place, partner in pairs.items():
            noise[place].add(wanted[place], got[partner])
            rounding[place].add(wanted[place], other.tensors[partner].rounded(wanted[place]))
    return _by_index(reference, noise), _by_index(reference, rounding)


def _by_index(reference: Activations, sums: Mapping[int, _Sums]) -> dict[int, float]:
    shares = {reference.tensors[place].index: each.share() for place, each in sums.items()}
    for operation in reference.operations:
        before, after = operation.inputs[0], operation.outputs[0]
        if operation.kind in VIEWS and before in shares and after in shares:
            shares[after] = shares[before]
    return shares


class _Sums:
    """Running sums by channel, in float64: a channel's mean may be thousands of times its spread."""

    def __init__(self) -> None:
        self.count = 0
        self.total: np.ndarray | float = 0.0
        self.squares: np.ndarray | float = 0.0
        self.noise = 0.0

    def add(self, wanted: np.ndarray, got: np.ndarray) -> None:
        """Takes one example's values, of equal shape."""
        values = wanted.astype(np.float64).reshape(-1, wanted.shape[-1] if wanted.ndim else 1)
        self.count += len(values)
        self.total = self.total + values.sum(axis=0)
        self.squares = self.squares + np.square(values).sum(axis=0)
        self.noise += float(np.square(values - got.reshape(values.shape)).sum())

    def share(self) -> float:
        """Noise over signal; 0 without noise, infinite where there is noise and nothing varies."""
        signal = float(np.sum(self.squares - np.square(self.total) / max(self.count, 1)))
        if self.noise == 0:
            return 0.0
        return self.noise / signal if signal > 0 else math.inf


def _decibels(share: float) -> float:
    if share == 0:
        return math.inf
    return -10 * math.log10(share) if share < math.inf else -math.inf
