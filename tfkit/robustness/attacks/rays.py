"""Rays: the distance to the boundary along a direction, by labels, and the line search that shortens it.

What OPT-attack and Sign-OPT share: both minimise g(theta), the least length at which the example plus that much of the
unit direction theta is adversarial.
"""

from __future__ import annotations

import abc
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import BlackBoxAttack, Search
from tfkit.robustness.attacks.starts import check_pool, first_points

_DOUBLINGS = 10
_TRIES = 15


def unit(directions: np.ndarray) -> np.ndarray:
    """Returns rows of length 1; a row of zeros stays."""
    return np.asarray(directions / np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-30))


def along(x: np.ndarray, theta: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Returns the points `length`, (batch,), from `x` along unit directions, both (batch, features)."""
    return np.asarray(x + length.astype(x.dtype)[:, None] * theta)


def bisect(
    search: Search, rows: np.ndarray, theta: np.ndarray, low: np.ndarray, high: np.ndarray, tolerance: float
) -> np.ndarray:
    """Narrows brackets of g, clean at `low` and adversarial at `high`, to `tolerance` times their greatest length.

    Returns:
        (n,): the adversarial ends; infinite where they already were.
    """
    low, high = low.copy(), high.copy()
    wanted = tolerance * high
    while len(open_ := np.flatnonzero(np.isfinite(high) & (high - low > wanted))):
        open_ = open_[np.isin(rows[open_], search.active(np.unique(rows[open_])))]
        if not len(open_):
            break
        middle = (low[open_] + high[open_]) / 2
        found = search.adversarial(along(search.x[rows[open_]], theta[open_], middle), rows[open_])
        high[open_[found]], low[open_[~found]] = middle[found], middle[~found]
    return high


def distance_along(
    search: Search, rows: np.ndarray, theta: np.ndarray, guess: np.ndarray, tolerance: float, width: float = 0.01
) -> np.ndarray:
    """Returns g near a guess, (n,): a bracket of `width` times the guess, widened geometrically, then bisection.

    It is infinite where nothing adversarial is met before the guess has grown about thousandfold.
    """
    x = search.x[rows]
    beyond = search.adversarial(along(x, theta, guess), rows)
    low, high = np.where(beyond, 0.0, guess), np.where(beyond, guess, np.inf)
    unknown = np.arange(len(rows))
    for _ in range(_DOUBLINGS):
        # Shrinks where the guess was adversarial, grows where not, until the answer is the other.
        tried = np.where(beyond[unknown], guess[unknown] * max(0.0, 1 - width), guess[unknown] * (1 + width))
        alive = (tried > 0) & np.isin(rows[unknown], search.active(np.unique(rows[unknown])))
        unknown, tried = unknown[alive], tried[alive]
        if not len(unknown):
            break
        found = search.adversarial(along(x[unknown], theta[unknown], tried), rows[unknown])
        high[unknown[found]], low[unknown[~found]] = tried[found], tried[~found]
        unknown = unknown[found == beyond[unknown]]
        width *= 2
    return bisect(search, rows, theta, low, high, tolerance)


def distance_if_less(
    search: Search, rows: np.ndarray, theta: np.ndarray, best: np.ndarray, tolerance: float
) -> np.ndarray:
    """Returns g where it is less than `best`, (n,), at the price of one query where it is not: infinite there."""
    nearer = search.adversarial(along(search.x[rows], theta, best * (1 - tolerance)), rows)
    found = np.full(len(rows), np.inf)
    if nearer.any():
        part = np.flatnonzero(nearer)
        found[part] = distance_along(search, rows[part], theta[part], best[part] * (1 - tolerance), tolerance)
    return found


class RayAttack(BlackBoxAttack):
    """Base of the attacks that descend g.

    Args:
        directions: random ones of which the search keeps the nearest to begin with.
        step_size: first length of a step of the direction.
        smoothing: first length of the perturbations of the direction from which the gradient is estimated.
        pool: (images, classes) to start from; None to start from noise.
        **settings: of `BlackBoxAttack`.
    """

    def __init__(
        self,
        directions: int = 10,
        step_size: float = 0.2,
        smoothing: float = 0.005,
        pool: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.directions = checks.integer("directions", directions, 1)
        self.step_size = checks.number("step_size", step_size, 1e-6)
        self.smoothing = checks.number("smoothing", smoothing, 1e-6, 1)
        self.pool = check_pool(pool)

    @abc.abstractmethod
    def gradient(
        self,
        search: Search,
        rows: np.ndarray,
        theta: np.ndarray,
        length: np.ndarray,
        smoothing: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Estimates the gradient of g at unit directions `theta`, (n, features), where it is `length`, (n,)."""

    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Takes the nearest of some directions and descends from it until the queries are used."""
        rows, best_theta, best = self._first(search, rng)
        theta, length = np.zeros_like(search.x), np.full(len(search.x), np.inf)
        theta[rows], length[rows] = best_theta, best
        step, smoothing = np.full(len(theta), self.step_size), np.full(len(theta), self.smoothing)
        while len(rows := search.active(rows)):
            gradient = self.gradient(search, rows, theta[rows], length[rows], smoothing[rows], rng)
            better, shorter, step[rows] = self._line_search(
                search, rows, theta[rows], length[rows], gradient, step[rows]
            )
            improved = shorter < length[rows]
            theta[rows], length[rows] = better, shorter
            # Where no step helps, the estimate is refined by a smaller perturbation.
            smoothing[rows[~improved]] = np.maximum(smoothing[rows[~improved]] * 0.5, 1e-4)
            step[rows] = np.where(step[rows] < 1e-4, self.step_size, step[rows])

    def _first(self, search: Search, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds a direction for each row: a start's, or one of some random ones if that is nearer."""
        rows, far = first_points(search, rng, self.pool)
        delta = far - search.x[rows]
        theta, high = unit(delta), np.linalg.norm(delta, axis=1).astype(np.float64)
        length = bisect(search, rows, theta, np.zeros(len(rows)), high, 1e-3)
        for _ in range(self.directions - 1):
            other = unit(rng.standard_normal(theta.shape, dtype=np.float32))
            found = distance_if_less(search, rows, other, length, 1e-3)
            nearer = found < length
            theta[nearer], length[nearer] = other[nearer], found[nearer]
        return rows, theta, length

    def _line_search(
        self,
        search: Search,
        rows: np.ndarray,
        theta: np.ndarray,
        length: np.ndarray,
        gradient: np.ndarray,
        step: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Doubles the step while g falls; if the first one does not help, shrinks it until one does."""
        best_theta, best, step = theta.copy(), length.copy(), step.copy()
        growing, shrinking = np.ones(len(rows), bool), np.zeros(len(rows), bool)
        kept = step.copy()
        for attempt in range(_TRIES):
            left = np.flatnonzero(growing | shrinking)
            left = left[np.isin(rows[left], search.active(rows[left]))]
            if not len(left):
                break
            tried = unit(theta[left] - step[left, None].astype(np.float32) * gradient[left])
            found = distance_if_less(search, rows[left], tried, best[left], 1e-4)
            nearer = found < best[left]
            take = left[nearer]
            best_theta[take], best[take], kept[take] = tried[nearer], found[nearer], step[take]
            if attempt == 0:
                shrinking[left[~nearer]] = True
            else:
                shrinking[take] = False
            growing[left[~nearer]] = False
            step[left] *= np.where(shrinking[left], 0.25, 2.0)
            shrinking &= step > 1e-5
        improved = best < length
        return best_theta, best, np.where(improved, kept, np.maximum(step, 1e-5))
