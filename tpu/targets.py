"""Targets: the slices that a program can be compiled for, and the memory of their chips.

Names as libtpu's topologies have them; memory per device (v2, v3, tpu7x: per core, else per chip) as Google's "TPU versions"
pages tell it, cloud.google.com/tpu/docs.
"""

from __future__ import annotations

import dataclasses
import math
import re

from tpu.errors import TpuError

GIB = 1 << 30
# kind -> (GiB of a device, devices on a chip, numbers in its topology)
_KINDS = {
    "v2": (8, 2, 3),
    "v3": (16, 2, 3),
    "v4": (32, 1, 3),
    "v5e": (16, 1, 2),
    "v5p": (95, 1, 3),
    "v6e": (32, 1, 2),
    "tpu7x": (96, 2, 3),
}


@dataclasses.dataclass(frozen=True)
class Target:
    """A slice.

    Attributes:
      name: 'v5e:2x2'.
      kind: 'v5e'.
      devices: That a strategy sees.
      memory: Of a device, bytes, before the runtime takes its part.
    """

    name: str
    kind: str
    devices: int
    memory: int


def parse_target(text: str) -> Target:
    """Reads 'KIND:AxB' or 'KIND:AxBxC'.

    Raises:
      TpuError: It is none of those.

    >>> parse_target("v5e:2x2").devices
    4
    """
    kind, _, shape = text.partition(":")
    if kind not in _KINDS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        examples = ", ".join(f"{each}:{'2x2' if numbers == 2 else '2x2x1'}" for each, (_, _, numbers) in _KINDS.items())
        raise TpuError(f"--target {text}: a kind and its topology were expected; use for instance one of {examples}.")
    gib, per_chip, numbers = _KINDS[kind]
    sides = [int(side) for side in shape.split("x")]
    if len(sides) != numbers:
        fit = "x".join(["2", "2", "1"][:numbers])
        raise TpuError(
            f"--target {text}: {kind} has a topology of {numbers} numbers, got {len(sides)}; use for instance {kind}:{fit}."
        )
    return Target(text, kind, math.prod(sides) * per_chip, gib * GIB)
