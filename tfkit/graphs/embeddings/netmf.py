"""NetMF: the matrix that DeepWalk factorises without saying so, factorised.

Paper: Qiu, Dong, Ma, Li, Wang, Tang. Network embedding as matrix factorization: unifying DeepWalk, LINE, PTE, and
node2vec. WSDM 2018, https://arxiv.org/abs/1710.02971
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from tfkit.graphs.embeddings.base import Embedding, singular_factors, smooth_eigenpairs, symmetric
from tfkit.graphs.normalization import inverse_power, row_normalize, row_sums
from tfkit.internal import checks


def deepwalk_matrix(adjacency: sp.csr_array, window: int, negatives: float) -> np.ndarray:
    """Returns vol(A) / (b T) * sum over r = 1..T of (D^-1 A)^r D^-1, dense float64: equation (1) of the paper.

    Args:
        adjacency: symmetric.
        window: T.
        negatives: b.
    """
    sums = row_sums(adjacency)
    step = sp.csr_array(row_normalize(adjacency), dtype=np.float64)
    power = np.diag(inverse_power(sums, 1))
    total = np.zeros_like(power)
    for _ in range(window):
        power = step @ power
        total += power
    return total * (sums.sum() / (negatives * window))


class NetMF(Embedding):
    """U sqrt(S) of the singular value decomposition of log max(M, 1), M as in `deepwalk_matrix`.

    Memory: a dense matrix of nodes * nodes * 4 bytes and as much again in between.

    Args:
        dimension: of the vectors.
        window: T; 1 is LINE's matrix, 10 DeepWalk's.
        negatives: b.
        rank: eigenpairs that stand in for D^-1/2 A D^-1/2 in its powers (the paper's algorithm 4, for large windows),
            beside that of eigenvalue 1 of each component; None: exact powers (algorithm 3).
        seed: of the solvers' starts.
    """

    def __init__(
        self,
        dimension: int = 128,
        *,
        window: int = 10,
        negatives: float = 1.0,
        rank: int | None = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(dimension, seed=seed)
        self.window = checks.integer("window", window, 1)
        self.negatives = checks.number("negatives", negatives, 1e-9)
        self.rank = None if rank is None else checks.integer("rank", rank, 1)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        matrix = symmetric(adjacency)
        found = self._exact(matrix) if self.rank is None else self._approximate(matrix, self.rank)
        np.log(np.maximum(found, 1, out=found), out=found)
        u, s, _ = singular_factors(found, self.dimension, self.seed)
        return u * np.sqrt(s)

    def _exact(self, matrix: sp.csr_array) -> np.ndarray:
        return deepwalk_matrix(matrix, self.window, self.negatives)

    def _approximate(self, matrix: sp.csr_array, rank: int) -> np.ndarray:
        sums = np.asarray(row_sums(matrix), np.float64)
        values, vectors = smooth_eigenpairs(matrix, rank, self.seed)
        values = np.minimum(values, 1.0)
        # The mean of the first T powers.
        filtered = np.mean([values**r for r in range(1, self.window + 1)], axis=0)
        root = (vectors * inverse_power(sums, 0.5)[:, None]).astype("float32")
        scale = sums.sum() / self.negatives
        root *= np.sqrt(np.maximum(filtered, 0) * scale).astype("float32")
        found = root @ root.T
        # The vector of eigenvalue 1 of each component is known, and so is its part: 1 / volume inside.
        _, component = connected_components(matrix, directed=False)
        constant = (scale * inverse_power(np.bincount(component, weights=sums), 1)).astype("float32")
        for row, own in zip(found, component, strict=True):
            row += constant[own] * (component == own)
        return found
