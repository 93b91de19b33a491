"""A stable 64-bit hash of every row at once, so that the same row lands in the same split wherever it is read.

Version 1, fixed for good (a change would move rows between splits). A row is a set of named parts, each a run of bytes:

    part = fold over its bytes, eight at a time, little-endian, the last word padded with zeros; starts from its length
    row  = finish(sum of part * odd number drawn from the part's name  +  number drawn from the salt)

so neither the order of the rows nor that of the columns matters. It is not cryptographic: it spreads, it does not
protect. Vectorised because a `hashlib` call per row would cost as much as reading the file (about 1 microsecond each).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

_A = np.uint64(0x9E3779B97F4A7C15)
_B = np.uint64(0xC2B2AE3D27D4EB4F)
_C = np.uint64(0xBF58476D1CE4E5B9)
_D = np.uint64(0x94D049BB133111EB)
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(9)], np.uint64)


@dataclasses.dataclass(frozen=True)
class Part:
    """One named run of bytes for every row.

    Attributes:
      name: Column name; the same bytes under another name hash differently.
      data: uint8, any length.
      starts: int64 (rows,), first byte of each row's run in `data`.
      ends: int64 (rows,), one past the last.
    """

    name: str
    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def row_hashes(parts: Iterable[Part], salt: str) -> np.ndarray:
    """One uint64 per row, over all parts.

    >>> rows = Part("cell", np.frombuffer(b"abab", np.uint8), np.array([0, 2]), np.array([2, 4]))
    >>> bool(np.equal(*row_hashes([rows], salt="")))
    True
    """
    total: np.ndarray | None = None
    for part in parts:
        share = _finish(_fold(part)) * np.uint64(_drawn("part", part.name) | 1)
        total = share if total is None else total + share
    if total is None:
        raise ValueError("row_hashes: at least one part is needed, got none.")
    return _finish(total + np.uint64(_drawn("salt", salt)))


def bytes_hash(content: bytes, salt: str) -> int:
    """The hash of one big record, say a picture's file: BLAKE2b, cut to 64 bits."""
    digest = hashlib.blake2b(content, digest_size=8, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest, "little")


def fractions(hashes: np.ndarray) -> np.ndarray:
    """uint64 (rows,) to float64 in [0, 1), evenly spread."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def mixed(hashes: np.ndarray, number: int) -> np.ndarray:
    """Other hashes for the same rows; distinct by position, so that exact duplicates draw apart."""
    positions = np.arange(len(hashes), dtype=np.uint64) + np.uint64(number * int(_A) % 2**64)
    return _finish(hashes ^ _finish(positions))


def _drawn(purpose: str, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest(), "little")


def _finish(words: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): every input bit moves every output bit."""
    words = (words ^ (words >> np.uint64(30))) * _C
    words = (words ^ (words >> np.uint64(27))) * _D
    return words ^ (words >> np.uint64(31))


def _fold(part: Part) -> np.ndarray:
    lengths = part.ends - part.starts
    padded = np.zeros(len(part.data) + 8, np.uint8)  # the last word may reach beyond the last byte
    padded[:-8] = part.data
    words = np.ndarray(len(part.data) + 1, "<u8", padded, strides=(1,))  # an unaligned word at every byte
    state = (lengths + 1).astype(np.uint64) * _A  # an empty cell is something, too
    longest = int(lengths.max(initial=0))
    for offset in range(0, longest, 8):
        left = lengths - offset
        live = None if left.min() > 0 else np.flatnonzero(left > 0)
        starts, left, before = (
            (part.starts, left, state) if live is None else (part.starts[live], left[live], state[live])
        )
        word = words[starts + offset] & _MASKS[np.minimum(left, 8)]
        after = (before ^ (word * _B)) * _A
        after ^= after >> np.uint64(29)
        if live is None:
            state = after
        else:
            state[live] = after
    return state
