"""HopSkipJump: steps along a gradient direction that is estimated from labels at the boundary.

Paper: Chen, Jordan, Wainwright. HopSkipJumpAttack: A Query-Efficient Decision-Based Attack. S&P 2020,
https://arxiv.org/abs/1904.02144

Differs: all examples take their steps together. What is left of the budget is used to its last query.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import BlackBoxAttack, Search
from tfkit.robustness.attacks.norms import distances
from tfkit.robustness.attacks.starts import check_pool, first_points, to_boundary

# Values of noise held at once.
_BLOCK = 20_000_000


def estimate_direction(signed: np.ndarray, plain: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Estimates where the boundary rises, from labels around a point on it (equation 16 of the paper).

    Args:
        signed: (batch, features): sum of unit directions, each times +1 if adversarial there, else -1.
        plain: (batch, features): sum of the same directions.
        mean: (batch,): of these signs.

    Returns:
        (batch, features): the sum of the directions weighted by the signs less their mean, of length 1. Where all
        signs agree, that would be nothing: there it is the signed sum.

    >>> estimate_direction(np.array([[1.0, 3.0]]), np.array([[0.0, 3.0]]), np.array([1 / 3]))
    array([[0.4472136 , 0.89442719]])
    """
    mean = mean.astype(signed.dtype)[:, None]
    direction = np.where(np.abs(mean) == 1, signed, signed - mean * plain)
    return np.asarray(direction / np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-30))


class HopSkipJump(BlackBoxAttack):
    """HopSkipJump, for L2 and L-infinity.

    Args:
        first_samples: queries of the first estimate; the t-th takes sqrt(t) times as many.
        most_samples: queries of an estimate at most.
        gamma: the bisection's tolerance, times the square root of the number of features.
        pool: (images, classes) to start from; None to start from noise.
        **settings: of `BlackBoxAttack`.
    """

    norms = ("l2", "linf")

    def __init__(
        self,
        first_samples: int = 100,
        most_samples: int = 10_000,
        gamma: float = 1.0,
        pool: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.first_samples = checks.integer("first_samples", first_samples, 2)
        self.most_samples = checks.integer("most_samples", most_samples, 2)
        self.gamma = checks.number("gamma", gamma, 1e-6)
        self.pool = check_pool(pool)

    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Estimates, steps and bisects, until the queries are used."""
        features = search.x.shape[1]
        # gamma / features for linf, gamma / features^1.5 for L2 (appendix of the paper).
        theta = self.gamma / features / (np.sqrt(features) if self.norm == "l2" else 1.0)
        tolerance = max(theta, 1e-5)
        rows, far = first_points(search, rng, self.pool)
        points = np.zeros_like(search.x)
        points[rows] = to_boundary(search, rows, far, self.norm, tolerance)
        step = 0
        while len(rows := search.active(rows)):
            step += 1
            length = distances(points[rows] - search.x[rows], self.norm)
            if step == 1:
                delta = np.full(len(rows), 0.1 * (self.bounds[1] - self.bounds[0]))
            else:
                delta = theta * length * (np.sqrt(features) if self.norm == "l2" else features)
            samples = min(int(self.first_samples * np.sqrt(step)), self.most_samples, search.left(rows))
            direction = self._direction(search, rows, points[rows], delta, samples, rng)
            if self.norm == "linf":
                direction = np.sign(direction)
            far, moved = self._stride(search, rows, points[rows], direction, length / np.sqrt(step))
            rows, far = rows[moved], far[moved]
            if len(rows):
                points[rows] = to_boundary(search, rows, far, self.norm, tolerance)
            rows = np.flatnonzero(np.isfinite(search.distance))

    def _direction(
        self,
        search: Search,
        rows: np.ndarray,
        points: np.ndarray,
        delta: np.ndarray,
        samples: int,
        rng: np.random.Generator,
    ) -> np.ndarray:
        features = points.shape[1]
        if self.quantize_levels is not None:
            # A smaller radius would be rounded away.
            level = (self.bounds[1] - self.bounds[0]) / (self.quantize_levels - 1)
            delta = np.maximum(delta, level * np.sqrt(features))
        delta = delta.astype(np.float32)[:, None, None]
        signed, plain, count = np.zeros_like(points), np.zeros_like(points), np.zeros(len(rows))
        block = max(1, _BLOCK // points.size)
        for at in range(0, samples, block):
            shape = (len(rows), min(block, samples - at), features)
            noise = rng.standard_normal(shape, dtype=np.float32)
            noise /= np.sqrt(np.einsum("bsf,bsf->bs", noise, noise))[..., None]
            around = search.hold(points[:, None] + delta * noise)
            found = search.adversarial(around.reshape(-1, features), np.repeat(rows, shape[1])).reshape(shape[:2])
            # The direction really asked about, after the box has cut it.
            noise = (around - points[:, None]) / delta
            signs = np.where(found, 1, -1).astype(np.float32)
            signed += np.einsum("bs,bsf->bf", signs, noise)
            plain += noise.sum(axis=1)
            count += signs.sum(axis=1)
        return estimate_direction(signed, plain, count / samples)

    def _stride(
        self, search: Search, rows: np.ndarray, points: np.ndarray, direction: np.ndarray, size: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Steps of `size`, halved until they end beyond the boundary; and which of them do."""
        far, moved = points.copy(), np.zeros(len(rows), bool)
        for _ in range(15):
            left = np.flatnonzero(~moved)
            if not len(left):
                break
            proposed = search.hold(points[left] + size.astype(np.float32)[left, None] * direction[left])
            found = search.adversarial(proposed, rows[left])
            far[left[found]], moved[left[found]] = proposed[found], True
            size = np.where(moved, size, size / 2)
        return far, moved
