"""Laplacian eigenmaps: the smoothest functions on the graph.

Paper: Belkin, Niyogi. Laplacian eigenmaps for dimensionality reduction and data representation. Neural Computation
15(6), 2003, https://doi.org/10.1162/089976603321780317

Differs: eigenvectors of the normalised Laplacian may be scaled by a power of 1 - eigenvalue, which damps the rough
ones. The paper takes the graph to be connected: here every component's constant vector is left out.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.graphs.embeddings.base import Embedding, smooth_eigenpairs, symmetric
from tfkit.graphs.normalization import inverse_power, row_sums
from tfkit.internal import checks


class LaplacianEigenmaps(Embedding):
    """Eigenvectors of the smallest eigenvalues of the normalised Laplacian, each component's trivial one left out.

    Args:
        dimension: eigenvectors; columns beyond the graph's size are zeros.
        random_walk: eigenvectors of I - D^-1 A, as in the paper (those of the symmetric one divided by the root of the
            degree); False: of the symmetric one.
        damping: each is multiplied by (1 - eigenvalue) to this power, clipped at 0; 0 leaves them at unit length.
        self_loops: adds I to the adjacency before.
        seed: of the eigensolver's start.
    """

    def __init__(
        self,
        dimension: int = 128,
        *,
        random_walk: bool = True,
        damping: float = 0.0,
        self_loops: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(dimension, seed=seed)
        self.random_walk, self.self_loops = bool(random_walk), bool(self_loops)
        self.damping = checks.number("damping", damping, 0)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        matrix = symmetric(adjacency)
        values, vectors = smooth_eigenpairs(matrix, self.dimension, self.seed, self_loops=self.self_loops)
        if self.random_walk:
            sums = row_sums(matrix) + float(self.self_loops)
            vectors = vectors * inverse_power(sums, 0.5)[:, None]
            vectors /= np.maximum(np.linalg.norm(vectors, axis=0), 1e-300)
        if self.damping:
            vectors = vectors * np.maximum(values, 0) ** self.damping
        return np.pad(vectors, ((0, 0), (0, self.dimension - vectors.shape[1])))
