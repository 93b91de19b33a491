"""Errors by layer: where a quantized file departs from the float one, and which layer is to blame.

    float file + file + rows --errors_by_layer()--> layers, the one that adds most noise first

Both files run over the same rows and every tensor is compared. Noise of one layer goes through all that follow, so the
signal-to-noise ratio alone points at the end of the network; what a layer adds to the noise of its inputs points at its cause.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from components.delivery.activations import Activations
from components.errors import ContractError

VIEWS = ("EXPAND_DIMS", "RESHAPE", "SQUEEZE")
"""These mix channels and places up, and change no value: their noise is that of their input."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerError:
    """One layer of a quantized file.

    Attributes:
      layer: Keras layer name, or the tensor's name where no layer is found in it.
      operators: Built-in operators that the layer became, in the order in which they run.
      snr_db: Signal-to-noise ratio of its output, decibels; of the worst where it has several. The signal is what varies
        within a channel (last axis) over rows and places: a constant, however large, tells a network nothing.
      added: Noise that it adds to that of its worst input, as a share of its own signal, both as powers; 0 at least.
    """

    layer: str
    operators: tuple[str, ...]
    snr_db: float
    added: float


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
    shares = _noise_shares(reference, other, inputs)
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
        )
    if found.keys().isdisjoint(each.layer for each in reference.operations[:-1]) and len(reference.operations) > 1:
        raise ContractError(
            f"{file}: must be the same model as {float_file}, but no tensor has a name of the other; export both again."
        )
    return sorted(found.values(), key=lambda each: -each.added)


def _noise_shares(reference: Activations, other: Activations, inputs: np.ndarray) -> dict[int, float]:
    """By the tensor's number in the float file: power of the noise as a share of that of the signal."""
    places = {each.name: place for place, each in enumerate(reference.tensors)}
    of_other = {each.index: place for place, each in enumerate(other.tensors)}
    pairs = {places[name]: of_other[each.index] for name, each in other.by_name(places).items()}
    sums: dict[int, _Sums] = {place: _Sums() for place in pairs}
    for example in inputs:
        wanted, got = reference.run(example), other.run(example)
        for place, partner in pairs.items():
            sums[place].add(wanted[place], got[partner])
    return _by_index(reference, sums)


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
