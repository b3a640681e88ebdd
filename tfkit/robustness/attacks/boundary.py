"""Boundary: a random walk along the decision boundary, always on its far side, ever nearer to the example.

Paper: Brendel, Rauber, Bethge. Decision-Based Adversarial Attacks: Reliable Attacks Against Black-Box Machine Learning
Models. ICLR 2018, https://arxiv.org/abs/1712.04248

Differs: it begins on the boundary, by bisection, not at the first adversarial point. Step sizes adapt after a few
tries, each example's by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import BlackBoxAttack, Search
from tfkit.robustness.attacks.starts import check_pool, first_points, to_boundary

_SHRINK = 0.75
_LEAST, _GREATEST = 1e-7, 1.0


def orthogonal_step(x: np.ndarray, point: np.ndarray, noise: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Returns `point` moved on the sphere around `x`, by `size` of its radius along the tangential part of `noise`.

    All are (batch, features), `size` is (batch,).
    """
    away = point - x
    squared = np.maximum(np.einsum("bi,bi->b", away, away), 1e-30)
    tangent = noise - (np.einsum("bi,bi->b", noise, away) / squared)[:, None] * away
    length = np.sqrt(squared / np.maximum(np.einsum("bi,bi->b", tangent, tangent), 1e-30))
    moved = away + (size * length).astype(x.dtype)[:, None] * tangent
    return np.asarray(x + moved / np.sqrt(1 + size**2).astype(x.dtype)[:, None])


def source_step(x: np.ndarray, point: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Returns `point` moved towards `x` by the share `size`, (batch,), of the way."""
    return np.asarray(point + size.astype(x.dtype)[:, None] * (x - point))


class _StepSize:
    """A step size for each row, kept where a wanted share of the tries succeeds."""

    def __init__(self, rows: int, start: float, tries: int, least: float, greatest: float) -> None:
        self.value = np.full(rows, start)
        self.tries, self.least, self.greatest = tries, least, greatest
        self._tried, self._succeeded = np.zeros(rows), np.zeros(rows)

    def learn(self, rows: np.ndarray, success: np.ndarray) -> None:
        self._tried[rows] += 1
        self._succeeded[rows] += success
        full = rows[self._tried[rows] >= self.tries]
        share = self._succeeded[full] / self._tried[full]
        factor = np.where(share > self.greatest, 1 / _SHRINK, np.where(share < self.least, _SHRINK, 1.0))
        self.value[full] = np.clip(self.value[full] * factor, _LEAST, _GREATEST)
        self._tried[full] = self._succeeded[full] = 0


class Boundary(BlackBoxAttack):
    """The boundary attack.

    Args:
        orthogonal: first orthogonal step, as a share of the distance.
        source: first step towards the example, as a share of the distance.
        check_every: steps between queries that ask about the orthogonal step alone.
        pool: (images, classes) to start from; None to start from noise.
        **settings: of `BlackBoxAttack`.
    """

    def __init__(
        self,
        orthogonal: float = 0.01,
        source: float = 0.01,
        check_every: int = 5,
        pool: tuple[Any, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.orthogonal = checks.number("orthogonal", orthogonal, _LEAST, 1)
        self.source = checks.number("source", source, _LEAST, 1)
        self.check_every = checks.integer("check_every", check_every, 1)
        self.pool = check_pool(pool)

    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Proposes one point an example a step, and takes it if it is adversarial."""
        rows, far = first_points(search, rng, self.pool)
        points = np.zeros_like(search.x)
        points[rows] = to_boundary(search, rows, far)
        # Half of the orthogonal steps should stay beyond the boundary: there it is nearly flat.
        orthogonal = _StepSize(len(points), self.orthogonal, 10, 0.2, 0.5)
        source = _StepSize(len(points), self.source, 20, 0.1, 0.25)
        step = 0
        while len(rows := search.active(rows)):
            x = search.x[rows]
            noise = rng.standard_normal(x.shape, dtype=np.float32)
            sphere = search.hold(orthogonal_step(x, points[rows], noise, orthogonal.value[rows]))
            if step % self.check_every == 0:
                orthogonal.learn(rows, search.adversarial(sphere, rows))
            proposed = search.hold(source_step(x, sphere, source.value[rows]))
            found = search.adversarial(proposed, rows)
            source.learn(rows, found)
            points[rows[found]] = proposed[found]
            step += 1
