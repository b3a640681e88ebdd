"""The search for certified radii that both peers are given; it stands beside the programs that run in their places.

Nothing but NumPy is imported: the environments of the peers have no more in common.
"""

from __future__ import annotations

import resource
from collections.abc import Callable

import numpy as np


def radii(
    margins: Callable[[np.ndarray, np.ndarray], np.ndarray], count: int, first: float, tolerance: float
) -> np.ndarray:
    """Doubling, then bisection over the batch; finished examples leave.

    Args:
        margins: lower bounds (chosen, rows) for places of examples and their radii.
        count: of examples.
        first: radius to try.
        tolerance: of a radius, relative.
    """
    low, high = np.zeros(count), np.full(count, np.inf)
    trial = np.full(count, first)
    active = np.ones(count, bool)
    while active.any():
        chosen = np.flatnonzero(active)
        good = margins(chosen, trial[chosen]).min(1) > 0
        low[chosen[good]], high[chosen[~good]] = trial[chosen[good]], trial[chosen[~good]]
        open_end = np.isinf(high)
        active = open_end | (high - low > tolerance * np.where(open_end, 0, high))
        active &= ~(high < 1e-6)
        trial = np.where(open_end, 2 * low, (low + np.where(open_end, 0, high)) / 2)
    return low


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
