"""Checks of arguments that strategies, policies and allocators share."""

from __future__ import annotations

from typing import Any


def check_smoothing(name: str, value: Any) -> None:
    """Check that `value` is a number above 0 and below 1.

    Raises:
        TypeError: Naming the argument, where it is no number.
        ValueError: Where it is another one.
    """
    check_float(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name}: found {value}, expected a number above 0 and below 1")


def check_float(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a number."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: found {value!r} ({type(value).__name__}), expected a float")
