"""Texts as rows of token numbers. The rule is fixed, nothing is learned from the data: the same text gives the same
numbers in training, in the field, and years later.

    files --load()--> x (rows, length) int32, y (rows,) text

0 is padding. A byte of UTF-8 is token 1 to 256; a word, in small letters, is 1 + CRC-32 modulo `vocabulary` - 1, so that
two words may share a token (Weinberger et al. 2009, arXiv 0902.2206).
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import zlib

import numpy as np

from components.data.csvfile import readable
from components.errors import DataError
from components.options import TextSource

_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class TextRule:
    """How a text becomes a row; as `TextSource` has it."""

    tokens: str
    length: int
    vocabulary: int
    learn: str


def rule_of(source: TextSource) -> TextRule:
    """The rule of a source."""
    return TextRule(source.tokens, source.length, source.vocabulary, source.learn)


def tokens(text: str, rule: TextRule) -> np.ndarray:
    """Every token of `text`, int32 (tokens,).

    >>> tokens("Aé", TextRule("bytes", 4, 257, "class")).tolist()
    [66, 196, 170]
    """
    if rule.tokens == "bytes":
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8).astype(np.int32) + 1
    numbers = [1 + zlib.crc32(word.encode("utf-8")) % (rule.vocabulary - 1) for word in _WORD.findall(text.lower())]
    return np.array(numbers, np.int32)


def row(text: str, rule: TextRule) -> np.ndarray:
    """The first `length` tokens, int32 (length,), zeros behind a shorter text: what a classifier takes.

    The input of a shipped model is this as float32.
    """
    made = np.zeros(rule.length, np.int32)
    found = tokens(text, rule)[: rule.length]
    made[: len(found)] = found
    return made


def listing(root: pathlib.Path, learn: str) -> list[pathlib.Path]:
    """Text files in order: `root/CLASS/*.txt`, or all below `root` where the next token is learned."""
    return sorted(path for path in root.glob("*/*.txt" if learn == "class" else "**/*.txt") if path.is_file())


def load(folder: str, rule: TextRule) -> tuple[np.ndarray, np.ndarray]:
    """(x, y); a row a file with its folder's name, or a row a window with the token behind it.

    Windows do not overlap, nor does one hold the label of another: no text is in two splits.

    Raises:
      DataError: There is no text, or none long enough for a window.
    """
    root = pathlib.Path(folder)
    files = listing(root, rule.learn)
    if not files:
        wanted = "one folder a class with .txt files in it" if rule.learn == "class" else ".txt files"
        raise DataError(f"{root}: {wanted} must be there, got none; check the path.")
    if rule.learn == "class":
        return np.stack([row(_text(path), rule) for path in files]), np.array([path.parent.name for path in files])
    windows = np.concatenate([_windows(tokens(_text(path), rule), rule.length + 1) for path in files])
    if not len(windows):
        raise DataError(
            f"{root}: a text must have more than source.length={rule.length} tokens, got none that has; lower the length."
        )
    return windows[:, :-1], windows[:, -1].astype(str)


def _windows(found: np.ndarray, width: int) -> np.ndarray:
    count = len(found) // width
    return found[: count * width].reshape(count, width)


def _text(path: pathlib.Path) -> str:
    with readable(path):
        return path.read_text(encoding="utf-8", errors="surrogateescape")
