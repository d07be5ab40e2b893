"""Checking and formatting integers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from numbers import Integral
from typing import Any


def is_integer(value: Any) -> bool:
    """Whether this is a Python or numpy integer, not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def as_ranges(integers: Iterable[int]) -> str:
    """Integers in ascending order, with three or more consecutive ones as a range.

    Example:
        >>> as_ranges([4, 0, 1, 2, 7, 8])
        '0 to 2, 4, 7, 8'
    """
    runs = groupby(enumerate(sorted(set(integers))), lambda pair: pair[1] - pair[0])
    parts: list[str] = []
    for _, pairs in runs:
        run = [number for _, number in pairs]
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)
    return ", ".join(parts)
