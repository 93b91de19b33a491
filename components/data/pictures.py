"""Pictures in class folders: listed, read, decoded."""

from __future__ import annotations

import hashlib
import io
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageOps

from components.errors import DataError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif"})
_GREY_MODES = frozenset({"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L"})


def listing(root: pathlib.Path) -> list[str]:
    """Every picture below a class folder of `root`, as 'class/name.png', mixed by a hash of that path.

    Mixed, because neighbours end up in one file, and a file of one class only would shuffle badly. Hidden files and
    other suffixes are no records.

    Raises:
      DataError: There is no picture.
    """
    found = [
        path.relative_to(root).as_posix()
        for folder in root.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]
    if not found:
        raise DataError(
            f"{root}: one folder a class with {', '.join(sorted(SUFFIXES))} files is needed, got no picture."
        )
    return sorted(found, key=lambda name: (hashlib.blake2b(name.encode(), digest_size=8).digest(), name))


def classes(root: pathlib.Path) -> list[str]:
    """Names of the class folders, sorted."""
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def first(root: pathlib.Path) -> pathlib.Path | None:
    """The first picture by name: it fixes the size where the options name none."""
    for name in classes(root):
        for path in sorted((root / name).rglob("*")):
            if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
                return path
    return None


def decode(content: bytes) -> np.ndarray:
    """A picture file to uint8 (h, w, 1) where it is grey, else (h, w, 3).

    The first frame; turned as its EXIF tag says; transparency is dropped; more than 8 bits are cut to the upper 8.

    Raises:
      ValueError: Not a picture, damaged, or too large to be trusted.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as opened:
                picture = ImageOps.exif_transpose(opened)
                return _pixels(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"a picture that Pillow reads is needed, got: {error}") from error


def _pixels(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):
        deep = np.asarray(picture)
        return (np.clip(deep, 0, 65535) >> 8).astype(np.uint8)[:, :, None]
    if picture.mode in _GREY_MODES:
        return np.asarray(picture.convert("L"))[:, :, None]
    return np.asarray(picture.convert("RGB"))
