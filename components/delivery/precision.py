"""Precision by layer: which operators of an integer file compute in float32 or int16, and what the file then promises.

export.keep_float, export.int16 + operators --precisions()--> {operator's output: precision}
                                            --promised()--> promises, one for each kernel concerned
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from components.artifacts import Promise, attention_parts
from components.delivery.owners import Operation
from components.delivery.proof import OPERATORS_OF_KIND, Kernel, fits
from components.errors import ConfigError
from components.options import ExportOptions

KINDS = {operator: kind for kind, operators in OPERATORS_OF_KIND.items() for operator in operators}


def precisions(operations: Sequence[Operation], classes: Mapping[str, str], options: ExportOptions) -> dict[str, str]:
    """Name of an operator's first output -> 'float32' or 'int16', for the operators of layers that options name.

    Args:
      operations: Of the model's float file.
      classes: Name -> class of all layers of the model.
      options: Whose `keep_float` goes before its `int16`.

    Raises:
      ConfigError: A pattern fits no layer, or none that has an operator of its own.
    """
    found: dict[str, str] = {}
    for key, precision in (("int16", "int16"), ("keep_float", "float32")):
        for pattern in getattr(options, key):
            found |= dict.fromkeys(_outputs(f"export.{key}", pattern, operations, classes), precision)
    return found


def _outputs(key: str, pattern: str, operations: Sequence[Operation], classes: Mapping[str, str]) -> list[str]:
    layers = {layer for layer in classes if layer == pattern or re.fullmatch(pattern, layer)}
    # The name of an attention means all that its twin makes of it.
    parts = [attention_parts(layer) for layer in layers]
    layers.update(each for names in parts if classes.get(names[-1]) == "Scores" for each in names)
    if not layers:
        near = difflib.get_close_matches(pattern, classes, 1, 0.0)
        raise ConfigError(f"{key}: the model has no layer '{pattern}'; did you mean '{near[0]}'?")
    found = [each.name for each in operations if not layers.isdisjoint(each.layers)]
    if not found:
        others = ", ".join(dict.fromkeys(each.layers[0] for each in operations if each.layers))
        raise ConfigError(
            f"{key}: layer '{min(layers)}' has no operator of its own in the file, it is folded into a neighbour; name one of {others}."
        )
    return found


def promised(
    promises: Sequence[Promise], operations: Sequence[Operation], kernels: Sequence[Kernel], chosen: Mapping[str, str]
) -> list[Promise]:
    """`promises` with the precision of each kernel that `chosen` concerns, and new ones for kernels without a promise.

    Args:
      promises: Of the compression steps.
      operations: Of the float file.
      kernels: Of the float file.
      chosen: See `precisions`.
    """
    layers = {each.name: each.layer for each in operations}
    free = [kernel for kernel in kernels if kernel.used_as in chosen]
    made = []
    for promise in promises:
        kernel = next((each for each in free if layers[each.used_as] == promise.layer and fits(each, promise)), None)
        if kernel is not None:
            free.remove(kernel)
            promise = dataclasses.replace(promise, precision=chosen[kernel.used_as])
        made.append(promise)
    return made + [
        Promise(layer=layers[each.used_as], kind=KINDS[each.operator], shape=each.shape, precision=chosen[each.used_as])
        for each in free
    ]


def kept_in_float(
    operations: Sequence[Operation], chosen: Mapping[str, str], classes: Mapping[str, str]
) -> list[dict[str, Any]]:
    """What `keep_float` left alone, as entries of `untreated`."""
    layers = dict.fromkeys(each.layer for each in operations if chosen.get(each.name) == "float32")
    reason = "stays float32: export.keep_float names it"
    return [{"layer": layer, "class": classes.get(layer, ""), "reason": reason} for layer in layers]
