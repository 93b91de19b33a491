"""Zeros: where they lie in a kernel, and how TFLite stores a kernel without them.

    stored weights + sparsity parameters --densify()--> dense kernel --find_zeros()--> Zeros

Numbers only: no TensorFlow, and of the flatbuffer only the objects that its parser made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from components.recipe import BLOCKS, MOST, block_side, zeros_of

LARGEST = 1 << 28  # weights that are unpacked: 1 GB in float32; a larger shape is a damaged one
_DENSE = 0  # DimensionType in the schema; 1 is SPARSE_CSR
# A pattern is named where it explains this share of the zeros, since rounding to int8 adds single ones. The converter
# decides by the same share whether it stores blocks (kBlockOverRandomSparsityRatio in its dense_to_sparse pass).
_EXPLAINED = 0.9


# --- storage -----------------------------------------------------------------------------------------------------


def storage(sparsity: Any) -> str:
    """'dense', 'sparse' (weight by weight) or 'sparse 1x16' (block by block), from a tensor's sparsity parameters."""
    if sparsity is None:
        return "dense"
    sides = [
        str(sparsity.dimMetadata[_level_of_block(sparsity, number)].denseSize) for number in range(_blocks(sparsity))
    ]
    return f"sparse {'x'.join(['1'] * (2 - len(sides)) + sides)}" if sides else "sparse"


def _blocks(sparsity: Any) -> int:
    return 0 if sparsity.blockMap is None else len(sparsity.blockMap)


def _level_of_block(sparsity: Any, number: int) -> int:
    """Position in the walk of block axis `number`; these are counted behind the kernel's own axes."""
    order = [int(axis) for axis in sparsity.traversalOrder]
    return order.index(len(order) - _blocks(sparsity) + number)


def densify(stored: np.ndarray, sparsity: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The dense kernel behind a sparse one; what is not stored is zero.

    A kernel of n axes, k of them blocked, is walked along n + k: over the blocks, then inside each. A level of the walk
    goes through all places of its axis (dense), or through those that are listed for each place of the level above.

    Args:
      stored: The values that are stored, in the order of the walk.
      sparsity: `SparsityParametersT` of the schema.
      shape: Of the kernel.

    Returns:
      An array of `shape` and the type of `stored`.

    Raises:
      ValueError, IndexError: The parameters contradict each other, `stored` or `shape`.

    Example: [[0, 0, 1, 2], [3, 4, 0, 0]] in blocks of 1x2 stores 1, 2, 3, 4. Level 0 is dense (2 rows); level 1 lists block 1
    for row 0 and block 0 for row 1 (segments 0, 1, 2; indices 1, 0); level 2 is dense (2 weights in a block).

    Source: SparsityParameters in tensorflow/lite/schema/schema.fbs
    """
    order = [int(axis) for axis in sparsity.traversalOrder]
    blocked = [int(axis) for axis in sparsity.blockMap] if _blocks(sparsity) else []
    size = float(np.prod(shape, dtype=np.float64))
    if sorted(order) != list(range(len(shape) + len(blocked))) or len({*blocked}) < len(blocked) or size > LARGEST:
        raise ValueError(f"a kernel of shape {shape} cannot be walked along {order} with blocks in {blocked}")
    walked = [np.zeros(1, np.int64)]
    for level in sparsity.dimMetadata:
        walked = _descend(walked, level, int(size))
    along = dict(zip(order, walked[1:], strict=True))
    for number, axis in enumerate(blocked):
        side = sparsity.dimMetadata[_level_of_block(sparsity, number)].denseSize
        along[axis] = along[axis] * side + along[len(shape) + number]
    dense = np.zeros(shape, stored.dtype)
    if len(walked[0]) != len(stored):
        raise ValueError(f"{len(walked[0])} places for {len(stored)} stored weights")
    dense[tuple(along[axis] for axis in range(len(shape)))] = stored
    return dense


def _descend(walked: list[np.ndarray], level: Any, most: int) -> list[np.ndarray]:
    """One level further: for each place so far its index along every axis walked, the new one last."""
    places = len(walked[0])
    if level.format == _DENSE:
        counts = np.full(places, level.denseSize)
        index = np.tile(np.arange(min(level.denseSize, most)), places if places * level.denseSize <= most else 0)
    else:
        counts = np.diff(np.asarray(level.arraySegments.values, np.int64))
        index = np.asarray(level.arrayIndices.values, np.int64)
    if len(counts) != places or counts.sum() != len(index):
        raise ValueError(f"a level of {places} places does not fit {len(counts)} segments of {len(index)} indices")
    return [*(np.repeat(each, counts) for each in walked), index]


# --- patterns ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zeros:
    """Where the zeros of a kernel lie along its last axis.

    Attributes:
      pattern: '1x16', '1x4' or 'm:n' where that explains nearly all of them, else ''.
      groups: {n: fewest zeros in any aligned group of n}, 2 <= n <= 16, where there are any; keys are text, as in JSON.
      blocks: {'1x4', '1x16': fraction of the kernel in blocks that are all zero}, where there are any; dense kernels only.
    """

    pattern: str = ""
    groups: Mapping[str, int] = dataclasses.field(default_factory=dict)
    blocks: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def lack(self, pattern: str, sparsity: float, tolerance: float) -> str | None:
        """What is missing of a promised pattern, in words; None where it holds.

        Args:
          pattern: 'm:n' or one of BLOCKS.
          sparsity: Fraction of the kernel that was promised in zero blocks; of no meaning for m:n, which holds everywhere.
          tolerance: Of fractions.
        """
        if pattern in BLOCKS:
            held = self.blocks.get(pattern, 0.0)
            promised = f"sparsity {sparsity:.4f} in blocks of {pattern} was promised"
            return f"{promised}, the file holds {held:.4f}" if held < sparsity - tolerance else None
        zeros, group = zeros_of(pattern)
        fewest = self.groups.get(str(group), 0)
        promised = f"{zeros} zeros in each {group} inputs were promised"
        return f"{promised}, the file holds a group with {fewest}" if fewest < zeros else None


def find_zeros(zero: np.ndarray, operator: str) -> Zeros:
    """Looks for patterns.

    Args:
      zero: bool, in TFLite's layout; True where the weight is zero.
      operator: Patterns are looked for in CONV_2D and FULLY_CONNECTED, whose last axis is that of the inputs.
    """
    inputs = zero.shape[-1]
    if operator not in ("CONV_2D", "FULLY_CONNECTED") or not zero.any():
        return Zeros()
    fewest = {n: int(zero.reshape(-1, n).sum(axis=1).min()) for n in range(2, MOST + 1) if inputs % n == 0}
    fitting = [each for each in BLOCKS if operator == "FULLY_CONNECTED" and inputs % block_side(each) == 0]
    whole = {each: float(zero.reshape(-1, block_side(each)).all(axis=1).mean()) for each in fitting}
    enough = _EXPLAINED * float(zero.mean())
    named = [each for each in reversed(fitting) if whole[each] >= enough]
    named += [f"{zeros}:{n}" for n, zeros in fewest.items() if n > zeros and zeros / n >= enough]
    return Zeros(
        pattern=named[0] if named else "",
        groups={str(n): zeros for n, zeros in fewest.items() if zeros},
        blocks={each: share for each, share in whole.items() if share},
    )
