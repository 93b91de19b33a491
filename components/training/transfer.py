"""Transfer: a model that is trained already learns something else, a part of it at a time.

model --transferred()--> what is trained in each epoch; in the end --merged()--> a model as it was built, with new weights
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import keras

from components.errors import ConfigError
from components.options import TransferOptions


class Stages:
    """Which layers train in which epoch. Flags `trainable` alone change, never the layers.

    Attributes:
      variables: All that are trained in some epoch.
    """

    def __init__(self, options: TransferOptions, frozen: list[Any], variables: list[Any]) -> None:
        self._options = options
        self._frozen = frozen
        self.variables = variables

    def enter(self, epoch: int) -> bool:
        """Sets the flags for the epoch after `epoch` whole ones; True where that changed any."""
        opens = self._options.unfreeze_epoch
        trains = opens is not None and epoch + 1 >= opens
        changed = any(layer.trainable != trains for layer in self._frozen)
        for layer in self._frozen:
            layer.trainable = trains
        return changed


@contextlib.contextmanager
def transferred(model: keras.Model, options: TransferOptions) -> Iterator[Stages]:
    """Prepares `model` for the first epoch; after the block its layers train as they did before.

    With `options.lora` every layer that can (Dense, EinsumDense, Embedding, convolutions), but the last and the frozen
    ones, keeps its kernel and trains a correction of that rank beside it (Hu et al. 2021, arXiv 2106.09685).

    Raises:
      ConfigError: A pattern of `options.frozen` names no layer, or nothing is left to train.
    """
    layers = [layer for layer in model._flatten_layers(include_self=False) if not hasattr(layer, "layers")]
    named = [_named(layers, pattern) for pattern in options.frozen]
    frozen = list({id(layer): layer for each in named for layer in each if layer.trainable}.values())
    kernels = [layer for layer in layers if hasattr(layer, "enable_lora") and layer.trainable and layer.weights]
    if options.lora is not None:
        for layer in kernels[:-1]:
            if layer not in frozen:
                layer.enable_lora(options.lora)
    never = options.unfreeze_epoch is None
    kept = {id(variable) for layer in frozen for variable in layer.variables} if never else set()
    stages = Stages(options, frozen, [each for each in model.trainable_variables if id(each) not in kept])
    try:
        stages.enter(0)
        if not model.trainable_variables:
            raise ConfigError(
                f"train.transfer.frozen={list(options.frozen)} leaves nothing to train in the first epoch; name fewer layers."
            )
        yield stages
    finally:
        for layer in frozen:
            layer.trainable = True


def merged(model: keras.Model, build_model: Callable[[], keras.Model]) -> keras.Model:
    """A model as `build_model` makes it with the weights of `model`, corrections of low rank added to their kernels."""
    made = build_model()
    for before, after in zip(model._flatten_layers(), made._flatten_layers(), strict=True):
        if hasattr(before, "layers") or before._layers:
            continue  # its parts come on their own
        if getattr(before, "lora_enabled", False):
            # The property gives the sum; the rest of the layer's weights is as it was.
            after.kernel.assign(before.kernel) if hasattr(before, "kernel") else after.embeddings.assign(
                before.embeddings
            )
            if getattr(before, "bias", None) is not None:
                after.bias.assign(before.bias)
        else:
            after.set_weights(before.get_weights())
    return made


def _named(layers: list[Any], pattern: str) -> list[Any]:
    found = [layer for layer in layers if re.fullmatch(pattern, layer.name)]
    if not found:
        names = ", ".join(layer.name for layer in layers if layer.weights)
        raise ConfigError(f"train.transfer.frozen: '{pattern}' names no layer of the model; it has {names[:300]}.")
    return found
