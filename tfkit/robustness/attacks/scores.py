"""Scores: the losses that attacks on scores lower, as pure functions over log-probabilities."""

from __future__ import annotations

import numpy as np


def margin(scores: np.ndarray, y: np.ndarray, targeted: bool, confidence: float = 0.0) -> np.ndarray:
    """Returns how far each row is from what the attack wants: at most 0 where it has it.

    Args:
        scores: (batch, classes).
        y: int, (batch,): the true classes, or those to reach if targeted.
        targeted: which of them.
        confidence: the margin to reach on the other side.

    Returns:
        (batch,): the score of `y` less the greatest other, or its opposite if targeted; at least -confidence if that
        is positive.

    >>> margin(np.array([[-1.0, -3.0, -2.0]]), np.array([0]), targeted=False)
    array([1.])
    """
    rows = np.arange(len(y))
    mine = scores[rows, y]
    others = scores.copy()
    others[rows, y] = -np.inf
    difference = mine - others.max(axis=1)
    difference = -difference if targeted else difference
    return np.asarray(np.maximum(difference, -confidence) if confidence else difference)


def cross_entropy(scores: np.ndarray, y: np.ndarray, targeted: bool) -> np.ndarray:
    """Returns what to lower, (batch,): the log-probability of the true class, or its opposite if targeted."""
    mine = scores[np.arange(len(y)), y]
    return np.asarray(-mine if targeted else mine)
