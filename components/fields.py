"""Texts of the configuration that must be of a form: regular expressions, and durations as 90s, 30m, 2h."""

from __future__ import annotations

import re
from typing import Annotated

import pydantic


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be a regular expression, got '{pattern}': {error}; correct it") from None
    return pattern


Pattern = Annotated[str, pydantic.AfterValidator(_regular)]

_UNITS = {"s": 1, "m": 60, "h": 3600}


def in_seconds(duration: str) -> float:
    """A duration in seconds.

    Raises:
      ValueError: It is not a positive number and s, m or h.

    >>> in_seconds("1.5h")
    5400.0
    """
    number, unit = duration[:-1], duration[-1:]
    if unit not in _UNITS or not re.fullmatch(r"\d+(\.\d+)?", number) or not float(number):
        raise ValueError(f"must be a positive number and s, m or h, got '{duration}'; write for instance 30m")
    return float(number) * _UNITS[unit]


def _duration(text: str) -> str:
    in_seconds(text)
    return text


Duration = Annotated[str, pydantic.AfterValidator(_duration)]
