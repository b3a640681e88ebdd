"""Argument checks: what passes, what does not, and what the message says."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit.internal import checks


@pytest.mark.parametrize(
    ("value", "low", "high", "passes"),
    [
        (0, 0, 1, True),
        (1, 0, 1, True),
        (np.float32(0.5), 0, 1, True),
        (1.0000001, 0, 1, False),
        (-1e-9, 0, 1, False),
        (float("nan"), 0, 1, False),
        (float("inf"), 0, float("inf"), False),
        (True, 0, 1, False),
        ("0.5", 0, 1, False),
        (None, 0, 1, False),
    ],
)
def test_number(value, low, high, passes):
    if passes:
        assert checks.number("share", value, low, high) == float(value)
    else:
        with pytest.raises(ValueError, match="Argument `share` must be a number in"):
            checks.number("share", value, low, high)


def test_open_end():
    assert checks.number("share", 0.999, 0, 1, open_high=True) == 0.999
    with pytest.raises(ValueError, match=r"\[0, 1\)\. Received: 1 \(int\)"):
        checks.number("share", 1, 0, 1, open_high=True)


@pytest.mark.parametrize(
    ("value", "passes"),
    [(1, True), (8, True), (np.int64(3), True), (0, False), (9, False), (2.0, False), (True, False)],
)
def test_integer(value, passes):
    if passes:
        result = checks.integer("bits", value, 1, 8)
        assert result == value and type(result) is int
    else:
        with pytest.raises(ValueError, match="`bits` must be an integer at least 1 and at most 8"):
            checks.integer("bits", value, 1, 8)


def test_choice_lists_what_is_allowed():
    with pytest.raises(ValueError, match="one of 'a', 'b'. Received: 'c'"):
        checks.choice("mode", "c", ("b", "a"))
    with pytest.raises(ValueError, match="Received: 3"):
        checks.choice("mode", 3, ("a",))


def test_arrays_are_described_by_shape():
    assert "ndarray of shape (2, 3), dtype float64" in str(checks.error("x", "smaller", np.zeros((2, 3))))


@pytest.mark.parametrize("value", [10**400, -(10**400), 10**9999], ids=["400", "minus 400", "9999"])
def test_what_no_float_holds_is_refused_as_anything_else_out_of_range(value):
    with pytest.raises(ValueError, match="`rate` must be a number in"):
        checks.number("rate", value)
    with pytest.raises(ValueError, match="`rate` must be an integer at most 3"):
        checks.integer("rate", abs(value), None, 3)
