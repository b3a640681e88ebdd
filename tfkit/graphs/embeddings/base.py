"""What the embeddings share: the interface, and checks of the graph."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh
from scipy.sparse.linalg import eigsh

from tfkit.graphs.graph import Graph
from tfkit.internal import checks

#: Nodes up to which eigenpairs come from the whole matrix: many components have many eigenvalues of 1, over which an
#: iteration takes longer.
DENSE = 4000
#: Rows or columns up to which a decomposition is the whole one.
EXACT = 500


class Embedding(abc.ABC):
    """A method that gives each node a vector. `embed(graph)` is the whole interface.

    Args:
        dimension: of the vectors.
        seed: of everything random.
    """

    def __init__(self, dimension: int = 128, *, seed: int = 0) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.seed = checks.integer("seed", seed, 0)

    def embed(self, graph: Graph) -> np.ndarray:
        """Returns (nodes, dimension) float32. A node without edges gets zeros.

        Raises:
            ValueError: the graph has no edge, or weights that are negative.
        """
        matrix = graph.adjacency
        if not matrix.nnz:
            raise checks.error("graph", "with an edge or more", graph)
        if matrix.data.min() < 0:
            raise checks.error("graph", "without negative weights", float(matrix.data.min()))
        found = self._embed(matrix)
        alone = (matrix.indptr[1:] == matrix.indptr[:-1]) & (np.bincount(matrix.indices, minlength=len(found)) == 0)
        found[alone] = 0
        return np.ascontiguousarray(found, np.float32)

    @abc.abstractmethod
    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        """Returns (nodes, dimension) of a graph with edges."""


def symmetric(adjacency: sp.csr_array) -> sp.csr_array:
    """Returns the larger of each entry and its mirror image, for methods that know no direction."""
    made = sp.csr_array(adjacency.maximum(adjacency.T))
    made.sort_indices()
    return made


def singular_factors(
    matrix: sp.sparray | np.ndarray, rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns U, the singular values from the largest, and V of the best approximation; zeros beyond the matrix's size.

    Args:
        matrix: sparse or dense.
        rank: vectors.
        seed: of the start.
    """
    smallest = min(matrix.shape)
    held: Any = matrix
    if rank >= smallest or smallest <= EXACT:
        u, s, v = np.linalg.svd(held.toarray() if sp.issparse(held) else held, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], v[:rank].T
    else:
        u, s, v = subspace_factors(matrix, rank, seed)
    missing = ((0, 0), (0, rank - len(s)))
    signs = np.where(u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])] < 0, -1.0, 1.0)
    return np.pad(u * signs, missing), np.pad(s, missing[1]), np.pad(v * signs, missing)


def subspace_factors(
    matrix: sp.sparray | np.ndarray, rank: int, seed: int, *, spare: int = 32, rounds: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns U, the singular values and V by subspace iteration from a random start.

    Args:
        matrix: sparse or dense.
        rank: vectors.
        seed: of the start.
        spare: vectors more than `rank` that are carried along.
        rounds: products with the matrix and its transpose.
    """
    width = min(rank + spare, min(matrix.shape))
    basis = np.random.default_rng(seed).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    for _ in range(rounds):
        basis = np.linalg.qr(matrix.T @ np.linalg.qr(matrix @ basis)[0])[0]
    left, triangle = np.linalg.qr(matrix @ basis)
    u, s, v = np.linalg.svd(triangle)
    return (left @ u)[:, :rank], s[:rank], (basis @ v.T)[:, :rank]


def largest_eigenpairs(matrix: sp.csr_array, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the algebraically largest eigenvalues of a symmetric matrix, and their vectors in columns.

    Args:
        matrix: symmetric.
        rank: pairs; fewer where the matrix is smaller.
        seed: of the start vector.
    """
    size = matrix.shape[0]
    if rank >= size - 1 or size <= DENSE:
        first = max(0, size - rank)
        values, vectors = eigh(matrix.toarray(), subset_by_index=(first, size - 1))
    else:
        values, vectors = eigsh(matrix, k=rank, which="LA", v0=np.random.default_rng(seed).standard_normal(size))
    order = np.argsort(-values)[:rank]
    vectors = vectors[:, order]
    signs = np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return values[order], vectors * signs
