"""Argument checks whose messages name the argument, the rule, what arrived, and where it helps, the remedy."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def describe(value: Any) -> str:
    """Returns a short description of `value`: its type, and its shape if it has one.

    >>> describe(3)
    '3 (int)'
    """
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {tuple(shape)}, dtype {getattr(value, 'dtype', '?')}"
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than some thousand digits.
        text = "a number too long to write"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def error(name: str, rule: str, received: Any, remedy: str = "") -> ValueError:
    """Returns, for the caller to raise, the error for an argument that breaks its rule.

    Args:
        name: the argument's name.
        rule: what it must be, as the end of the sentence "Argument `name` must be ...".
        received: the value that arrived.
        remedy: what to do instead; left out if empty.

    >>> str(error("rank", "at least 1", 0, "Pass the wanted rank."))
    'Argument `rank` must be at least 1. Received: 0 (int). Pass the wanted rank.'
    """
    return ValueError(f"Argument `{name}` must be {rule}. Received: {describe(received)}. {remedy}".rstrip())


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, open_high: bool = False) -> float:
    """Returns `value` as a float if it is a finite number in [low, high], or in [low, high) if `open_high`.

    Raises:
        ValueError: if it is not.

    >>> number("sparsity", 0.9, 0, 1)
    0.9
    """
    try:
        converted = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # An integer or fraction that no float holds.
        converted = math.inf
    if not (math.isfinite(converted) and low <= converted <= high and not (open_high and value == high)):
        raise error(name, f"a number in [{low:g}, {high:g}{')' if open_high else ']'}", value)
    return converted


def integer(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """Returns `value` as an int if it is an integer from `low` to `high`, both included.

    Raises:
        ValueError: if it is not.

    >>> integer("bits", 4, 1, 8)
    4
    """
    inside = type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))
    if not (inside and (low is None or value >= low) and (high is None or value <= high)):
        bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise error(name, " ".join(["an integer", " and ".join(bounds)]).rstrip(), value)
    return int(value)


def choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """Returns `value` if it is one of `allowed`.

    Raises:
        ValueError: if it is not; the message lists what is.

    >>> choice("mode", "linear", ("linear", "density"))
    'linear'
    """
    if not isinstance(value, str) or value not in allowed:
        raise error(name, "one of " + ", ".join(repr(item) for item in sorted(allowed)), value)
    return value
