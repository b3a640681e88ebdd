"""Normalisations of adjacency and feature matrices: plain functions from SciPy CSR to SciPy CSR.

A node without neighbours gets a row of zeros, never NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks


def add_self_loops(adjacency: sp.csr_array, weight: float = 1.0) -> sp.csr_array:
    """Returns A + weight I; a loop that is there keeps its weight besides."""
    nodes = adjacency.shape[0]
    return sp.csr_array(adjacency + sp.diags_array(np.full(nodes, weight, "float32"), dtype="float32"))


def gcn_normalize(adjacency: sp.csr_array, *, self_loops: bool = True) -> sp.csr_array:
    """Returns D^-1/2 (A + I) D^-1/2 with D the row sums of A + I: the renormalisation trick of Kipf and Welling.

    Args:
        adjacency: (nodes, nodes), weights not negative.
        self_loops: False leaves the I out.

    >>> gcn_normalize(sp.csr_array(np.array([[0, 1], [1, 0]]))).toarray()
    array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32)
    """
    matrix = add_self_loops(_nonnegative(adjacency)) if self_loops else _nonnegative(adjacency)
    scale = inverse_power(row_sums(matrix), 0.5)
    return _scaled(matrix, scale, scale)


def row_normalize(matrix: sp.csr_array | np.ndarray, *, self_loops: bool = False) -> Any:
    """Returns D^-1 A, whose rows sum to 1: the mean over neighbours. Features as bags of words are scaled by it too.

    Args:
        matrix: sparse or dense, of numbers that are not negative.
        self_loops: adds I first; for an adjacency.
    """
    if not sp.issparse(matrix):
        array = np.asarray(matrix, "float32")
        return array * inverse_power(array.sum(axis=1, dtype=np.float64), 1).astype("float32")[:, None]
    source = add_self_loops(matrix) if self_loops else sp.csr_array(matrix)
    return _scaled(source, inverse_power(row_sums(source), 1), None)


def laplacian(adjacency: sp.csr_array, *, normalized: bool = True) -> sp.csr_array:
    """Returns I - D^-1/2 A D^-1/2, or D - A. An isolated node has a row of zeros in both."""
    matrix = _nonnegative(adjacency)
    sums = row_sums(matrix)
    if not normalized:
        return sp.csr_array(sp.diags_array(sums) - matrix)
    return sp.csr_array(sp.diags_array((sums > 0).astype("float32")) - gcn_normalize(matrix, self_loops=False))


def row_sums(matrix: sp.csr_array) -> np.ndarray:
    """Returns the sums of the rows in float64."""
    return np.asarray(matrix.sum(axis=1, dtype=np.float64)).ravel()


def inverse_power(values: np.ndarray, power: float) -> np.ndarray:
    """Returns values ** -power, and 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        return np.where(values > 0, np.asarray(values, np.float64) ** -power, 0.0)


def _scaled(matrix: sp.csr_array, left: np.ndarray, right: np.ndarray | None) -> sp.csr_array:
    factors = np.repeat(left, np.diff(matrix.indptr))
    if right is not None:
        factors *= right[matrix.indices]
    data = (matrix.data * factors).astype("float32")
    return sp.csr_array((data, matrix.indices, matrix.indptr), shape=matrix.shape)


def _nonnegative(adjacency: sp.csr_array) -> sp.csr_array:
    matrix = sp.csr_array(adjacency, dtype="float32")
    if matrix.nnz and matrix.data.min() < 0:
        raise checks.error("adjacency", "without negative weights", float(matrix.data.min()), "Their roots are not.")
    return matrix
