"""OPT-attack: descent of the distance to the boundary along a direction, its gradient by finite differences.

Paper: Cheng, Le, Chen, Yi, Zhang, Hsieh. Query-Efficient Hard-Label Black-Box Attack: An Optimization-based Approach.
ICLR 2019, https://arxiv.org/abs/1807.04457

Differs: a direction is first asked whether it is nearer than the best, which is one query, and only then measured. The
first directions hold one towards a start image or noise that is surely adversarial.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import Search
from tfkit.robustness.attacks.rays import RayAttack, distance_along, unit

# Of the perturbation: how finely g is measured, and the first bracket. A difference is about this large.
_PRECISION, _WIDTH = 0.1, 0.1


def randomized_gradient(
    length: np.ndarray, moved: np.ndarray, directions: np.ndarray, smoothing: np.ndarray
) -> np.ndarray:
    """Returns the randomized gradient-free estimate, (batch, features), the mean of (g(theta + b u) - g(theta)) / b u.

    Args:
        length: (batch,): g(theta).
        moved: (batch, samples): g(theta + b u); what is not finite counts as no difference.
        directions: (batch, samples, features): u.
        smoothing: (batch,): b.
    """
    rise = np.where(np.isfinite(moved), moved - length[:, None], 0.0) / smoothing[:, None]
    return np.asarray(np.einsum("bs,bsf->bf", rise, directions) / moved.shape[1], directions.dtype)


class OPTAttack(RayAttack):
    """OPT-attack.

    Args:
        samples: finite differences an estimate.
        **settings: of `RayAttack`.
    """

    def __init__(self, samples: int = 20, **settings: Any) -> None:
        super().__init__(**settings)
        self.samples = checks.integer("samples", samples, 1)

    def gradient(
        self,
        search: Search,
        rows: np.ndarray,
        theta: np.ndarray,
        length: np.ndarray,
        smoothing: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Measures g at perturbed directions, all at once."""
        shape = (len(rows), self.samples, theta.shape[1])
        directions = unit(rng.standard_normal(shape, dtype=np.float32))
        near = unit(theta[:, None] + smoothing.astype(np.float32)[:, None, None] * directions).reshape(-1, shape[2])
        tolerance = _PRECISION * float(smoothing.min())
        repeated = np.repeat(rows, self.samples)
        moved = distance_along(
            search, repeated, near, np.repeat(length, self.samples), tolerance, _WIDTH * float(smoothing.min())
        )
        gradient = randomized_gradient(length, moved.reshape(shape[:2]), directions, smoothing)
        return unit(gradient)
