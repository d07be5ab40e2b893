"""Checks of the numbers that editors take."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from tl_backward._integers import is_integer


def require_whole(**settings: Any) -> None:
    """Refuse what is no whole number of at least 1, by the name of its argument."""
    for argument, value in settings.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{argument} must be a whole number of at least 1, got {value!r}")


def require_positive(**settings: Any) -> None:
    """Refuse what is no positive finite number, by the name of its argument."""
    for argument, value in settings.items():
        if not _is_number(value) or not value > 0:
            raise ValueError(f"{argument} must be a positive finite number, got {value!r}")


def require_not_negative(**settings: Any) -> None:
    """Refuse what is no finite number of at least 0, by the name of its argument."""
    for argument, value in settings.items():
        if not _is_number(value) or value < 0:
            raise ValueError(f"{argument} must be a finite number of at least 0, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
