"""HOPE: source and target vectors whose products give the Katz proximity, direction kept.

Paper: Ou, Cui, Pei, Zhang, Zhu. Asymmetric transitivity preserving graph embedding. KDD 2016,
https://doi.org/10.1145/2939672.2939751

Differs: the truncated decomposition of (I - beta A)^-1 beta A is by products with a factorised sparse matrix and not by
a generalised decomposition; it is of the same matrix.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import LinearOperator, eigs, splu, svds

from tfkit.graphs.embeddings.base import Embedding
from tfkit.internal import checks


class HOPE(Embedding):
    """U sqrt(S) and V sqrt(S), half of the dimensions each, of the Katz matrix.

    Args:
        dimension: even, of both together.
        decay: beta as a share of 1 / (spectral radius), below 1.
        seed: of the solver's start.
    """

    def __init__(self, dimension: int = 128, *, decay: float = 0.8, seed: int = 0) -> None:
        super().__init__(dimension, seed=seed)
        if dimension % 2:
            raise checks.error("dimension", "even", dimension, "Half of it is for sources, half for targets.")
        self.decay = checks.number("decay", decay, 1e-6, 1, open_high=True)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        matrix = sp.csc_array(adjacency, dtype=np.float64)
        nodes, rank = matrix.shape[0], self.dimension // 2
        beta = self.decay / max(spectral_radius(matrix, self.seed), 1e-12)
        solver = splu(sp.csc_matrix(sp.eye_array(nodes) - beta * matrix))
        if rank >= nodes - 1:
            u, s, v = np.linalg.svd(solver.solve(beta * matrix.toarray()))
            u, s, v = u[:, :rank], s[:rank], v[:rank]
        else:
            katz = LinearOperator(
                (nodes, nodes),
                matvec=lambda x: solver.solve(beta * (matrix @ x)),
                rmatvec=lambda x: beta * (matrix.T @ solver.solve(x, trans="T")),
                dtype=np.float64,
            )
            u, s, v = svds(katz, k=rank, v0=np.random.default_rng(self.seed).standard_normal(nodes))
        order = np.argsort(-s)
        root = np.sqrt(s[order])
        found = np.concatenate([u[:, order] * root, v[order].T * root], axis=1)
        return np.pad(found, ((0, 0), (0, self.dimension - found.shape[1])))


def spectral_radius(matrix: sp.csc_array, seed: int = 0) -> float:
    """Returns the largest absolute eigenvalue; that of a graph without cycles is 0."""
    nodes = matrix.shape[0]
    if nodes < 4:
        return float(np.abs(np.linalg.eigvals(matrix.toarray())).max())
    start = np.random.default_rng(seed).random(nodes)
    return float(np.abs(eigs(matrix, k=1, v0=start, return_eigenvectors=False)[0]))
