"""Sign-OPT: OPT-attack with only the sign of each difference, which is one query.

Paper: Cheng, Singh, Chen, Chen, Liu, Hsieh. Sign-OPT: A Query-Efficient Hard-label Adversarial Attack. ICLR 2020,
https://arxiv.org/abs/1909.10773

Differs: a step's direction is first asked whether it is nearer than the best, and only then measured.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import Search
from tfkit.robustness.attacks.rays import RayAttack, along, unit


class SignOPT(RayAttack):
    """Sign-OPT.

    Args:
        samples: signs an estimate.
        smoothing: first length of the perturbations. Ten times the paper's: g is known to 1e-4 of its length, beside
            which what shorter ones change is lost.
        **settings: of `RayAttack`.
    """

    def __init__(self, samples: int = 200, smoothing: float = 0.01, **settings: Any) -> None:
        super().__init__(smoothing=smoothing, **settings)
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
        """Returns the mean of directions, each signed by whether g grows along it."""
        total = np.zeros_like(theta)
        samples = max(1, min(self.samples, search.left(rows)))
        block = max(1, 20_000_000 // theta.size)
        for at in range(0, samples, block):
            shape = (len(rows), min(block, samples - at), theta.shape[1])
            directions = unit(rng.standard_normal(shape, dtype=np.float32))
            near = unit(theta[:, None] + smoothing.astype(np.float32)[:, None, None] * directions)
            repeated = np.repeat(rows, shape[1])
            points = along(search.x[repeated], near.reshape(-1, shape[2]), np.repeat(length, shape[1]))
            # Adversarial at the old distance: the boundary has come nearer, g falls.
            signs = np.where(search.adversarial(points, repeated), -1, 1).reshape(shape[:2]).astype(np.float32)
            total += np.einsum("bs,bsf->bf", signs, directions)
        return unit(total)
