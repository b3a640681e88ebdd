"""What the embeddings share: the interface, and checks of the graph."""

from __future__ import annotations

import abc
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.linalg import eigh
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh

from tfkit.graphs.graph import Graph
from tfkit.graphs.normalization import gcn_normalize, row_sums
from tfkit.internal import checks

#: Nodes up to which eigenpairs come from the whole matrix.
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


def largest_eigenpairs(
    matrix: sp.csr_array, rank: int, seed: int, apart: sp.csr_array | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the algebraically largest eigenvalues of a symmetric matrix, and their vectors in columns.

    Args:
        matrix: symmetric, with eigenvalues of -1 at least if `apart` is given.
        rank: pairs; fewer where the matrix has no more.
        seed: of the start vector.
        apart: orthonormal eigenvectors of eigenvalue 1 or 0, in columns, that are left out.
    """
    size = matrix.shape[0]
    left = 0 if apart is None else apart.shape[1]
    rank = min(rank, size - left)
    if rank < 1:
        return np.zeros(0), np.zeros((size, 0))
    if rank >= size - 1 or size <= DENSE:
        dense = matrix.toarray()
        if apart is not None:
            dense -= 3 * (apart @ apart.T).toarray()  # Below all others.
        first = max(0, size - rank)
        values, vectors = eigh(dense, subset_by_index=(first, size - 1))
    else:
        operator: Any = matrix
        if apart is not None:
            operator = LinearOperator(
                matrix.shape, matvec=lambda x: matrix @ x - 3 * (apart @ (apart.T @ x)), dtype=matrix.dtype
            )
        values, vectors = eigsh(operator, k=rank, which="LA", v0=np.random.default_rng(seed).standard_normal(size))
    order = np.argsort(-values)[:rank]
    vectors = vectors[:, order]
    signs = np.where(vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
    return values[order], vectors * signs


def smooth_eigenpairs(
    adjacency: sp.csr_array, rank: int, seed: int, *, self_loops: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the largest eigenvalues of D^-1/2 A D^-1/2 but one of each component, and their vectors in columns.

    Each component has a vector of eigenvalue 1, the roots of its degrees, that says no more than which component it
    is; a graph with hundreds of small ones would have no others among its first.

    Args:
        adjacency: symmetric.
        rank: pairs; fewer where there are no more.
        seed: of the eigensolver's start.
        self_loops: adds I to the adjacency before.
    """
    smooth = sp.csr_array(gcn_normalize(adjacency, self_loops=self_loops), dtype=np.float64)
    count, component = connected_components(adjacency, directed=False)
    sums = np.asarray(row_sums(adjacency), np.float64) + float(self_loops)
    roots = np.where(sums > 0, np.sqrt(np.maximum(sums, 0)), 1.0)
    roots /= np.sqrt(np.bincount(component, weights=roots**2))[component]
    nodes = np.arange(len(roots))
    return largest_eigenpairs(smooth, rank, seed, sp.csr_array((roots, (nodes, component)), (len(nodes), count)))
