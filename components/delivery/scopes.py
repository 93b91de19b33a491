"""Scopes: layer names inside the names of a file's tensors.

'net_1/relu_1/Relu;net_1/stem_1/convolution' --Scopes(layers).of()--> ['relu', 'stem']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence


class Scopes:
    """Finds layers in the names of tensors.

    Keras 3 enters each scope twice, so TensorFlow numbers it: layer 'conv' shows as 'conv_1' and layer 'conv_1' as
    'conv_1_2'; tf_keras leaves names as they are. Which of the two a file follows, its names tell together.

    Args:
      layers: Names of all layers.
      names: Of all tensors of the file.
    """

    def __init__(self, layers: Sequence[str], names: Iterable[str]) -> None:
        self.layers = frozenset(layers)
        scopes = {part for name in names for path in _paths(name) for part in path}
        numbered = {_stem(part) for part in scopes if part not in self.layers} & self.layers
        exact = {part for part in scopes & self.layers if _stem(part) == part or _stem(part) not in self.layers}
        self.numbered = len(numbered) > len(exact)

    def of(self, names: Iterable[str]) -> list[str]:
        """The innermost layer of each operation in joined tensor names, in order; none where no scope is a layer's."""
        found = [self._innermost(path) for name in names for path in _paths(name)]
        return [layer for layer in found if layer is not None]

    def _innermost(self, path: Sequence[str]) -> str | None:
        return next((layer for part in reversed(path) if (layer := self._layer(part)) is not None), None)

    def _layer(self, part: str) -> str | None:
        spellings = (_stem(part), part) if self.numbered else (part, _stem(part))
        return next((each for each in spellings if each in self.layers), None)


def _paths(name: str) -> Iterator[list[str]]:
    """Scopes of each operation in a joined name, without the operation itself: 'a/b/Relu;a/c/Conv2D' -> [a, b], [a, c]."""
    for operation in name.split(";"):
        yield operation.split("/")[:-1]


def _stem(part: str) -> str:
    return re.sub(r"_\d+$", "", part)
