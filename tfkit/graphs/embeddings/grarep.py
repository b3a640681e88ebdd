"""GraRep: a factorisation for each number of steps, side by side.

Paper: Cao, Lu, Xu. GraRep: learning graph representations with global structural information. CIKM 2015,
https://doi.org/10.1145/2806416.2806512
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.graphs.embeddings.base import Embedding, singular_factors
from tfkit.graphs.normalization import row_normalize
from tfkit.internal import checks


class GraRep(Embedding):
    """U sqrt(S) of log(A^k[i, j] / sum over i of A^k[i, j]) - log(b / nodes), cut at 0, for k = 1..steps.

    A is the transition matrix. Memory: dense matrices of nodes * nodes * 8 bytes, three of them.

    Args:
        dimension: a multiple of `steps`; each step gets its share.
        steps: the longest.
        negatives: b.
        normalize: rows of each step to unit norm, as the authors' programs do.
        seed: of the solver's start.
    """

    def __init__(
        self,
        dimension: int = 128,
        *,
        steps: int = 4,
        negatives: float = 1.0,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(dimension, seed=seed)
        self.steps = checks.integer("steps", steps, 1)
        if dimension % self.steps:
            raise checks.error("dimension", f"a multiple of steps = {steps}", dimension)
        self.negatives = checks.number("negatives", negatives, 1e-9)
        self.normalize = bool(normalize)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        step = sp.csr_array(row_normalize(adjacency), dtype=np.float64)
        power, parts = np.eye(step.shape[0]), []
        for _ in range(self.steps):
            power = step @ power
            u, s, _ = singular_factors(log_ratios(power, self.negatives), self.dimension // self.steps, self.seed)
            part = u * np.sqrt(s)
            if self.normalize:
                part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
            parts.append(part)
        return np.concatenate(parts, axis=1)


def log_ratios(power: np.ndarray, negatives: float) -> np.ndarray:
    """Returns max(log(power / column sums) - log(negatives / nodes), 0), and 0 where `power` is 0."""
    columns = power.sum(axis=0)
    ratio = np.divide(power, columns, out=np.zeros_like(power), where=columns > 0)
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(ratio) - np.log(negatives / len(power)), 0)
