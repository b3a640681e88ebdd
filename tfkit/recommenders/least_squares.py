"""Regularised least squares for many rows at once: what alternating least squares does in each half step.

Row r solves (G + Σ_e a_e y_e y_eᵀ + λ_r I) x = Σ_e t_e y_e over its entries e, with factors y of the other side.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tfkit.retrieval import kernels


def solve_rows(
    indptr: np.ndarray,
    indices: np.ndarray,
    weights: np.ndarray,
    targets: np.ndarray,
    gram: np.ndarray,
    penalties: np.ndarray,
    others: np.ndarray,
    rows: np.ndarray,
    steps: int | None,
    threads: int = 1,
) -> None:
    """Improves `rows`, in place.

    Args:
        indptr, indices: entries of each row, as in a CSR matrix.
        weights: float32, (entries,): a.
        targets: float32, (entries,): t.
        gram: float32, (dimension, dimension): G.
        penalties: float32, (rows,): λ, positive.
        others: float32, (columns, dimension): y.
        rows: float32, (rows, dimension): where conjugate gradients start, and what is changed.
        steps: of conjugate gradients; None: solve exactly, by Cholesky factorisation in float64.
        threads: rows are shared by so many.
    """
    cuts = np.searchsorted(indptr, np.linspace(0, indptr[-1], threads + 1)[1:-1])
    ends = [0, *cuts.tolist(), len(rows)]

    def part(first: int, last: int) -> None:
        if steps is None:
            _exact(indptr, indices, weights, targets, gram, penalties, others, rows, first, last)
        else:
            _conjugate_gradients(indptr, indices, weights, targets, gram, penalties, others, rows, steps, first, last)

    if threads == 1:
        part(0, len(rows))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, ends[:-1], ends[1:]))


@kernels.kernel
def _apply(low, high, indices, weights, gram, penalty, others, x, out):  # type: ignore[no-untyped-def]
    """Writes (G + Σ a y yᵀ + λI) x to `out`."""
    size = x.shape[0]
    for i in range(size):
        out[i] = penalty * x[i]
    for j in range(size):  # Along rows of the symmetric G, so that memory is read in order.
        value = x[j]
        for i in range(size):
            out[i] += gram[j, i] * value
    for e in range(low, high):
        y = others[indices[e]]
        scale = weights[e] * kernels.dot(y, x)
        for i in range(size):
            out[i] += scale * y[i]


@kernels.kernel
def _conjugate_gradients(  # type: ignore[no-untyped-def]
    indptr, indices, weights, targets, gram, penalties, others, rows, steps, first, last
):
    size = rows.shape[1]
    residual, direction, product = np.empty((3, size), np.float32)
    for row in range(first, last):
        x, low, high = rows[row], indptr[row], indptr[row + 1]
        if low == high:
            x[:] = 0
            continue
        _apply(low, high, indices, weights, gram, penalties[row], others, x, product)
        for i in range(size):
            residual[i] = -product[i]
        for e in range(low, high):
            y, target = others[indices[e]], targets[e]
            for i in range(size):
                residual[i] += target * y[i]
        direction[:] = residual
        squared = kernels.dot(residual, residual)
        for _ in range(steps):
            if squared < 1e-20:
                break
            _apply(low, high, indices, weights, gram, penalties[row], others, direction, product)
            step = squared / kernels.dot(direction, product)
            for i in range(size):
                x[i] += step * direction[i]
                residual[i] -= step * product[i]
            following = kernels.dot(residual, residual)
            ratio = following / squared
            for i in range(size):
                direction[i] = residual[i] + ratio * direction[i]
            squared = following


@kernels.kernel
def _exact(indptr, indices, weights, targets, gram, penalties, others, rows, first, last):  # type: ignore[no-untyped-def]
    size = rows.shape[1]
    matrix, right = np.empty((size, size)), np.empty(size)
    for row in range(first, last):
        low, high = indptr[row], indptr[row + 1]
        if low == high:
            rows[row] = 0
            continue
        right[:] = 0
        for i in range(size):
            for j in range(size):
                matrix[i, j] = gram[i, j]
            matrix[i, i] += penalties[row]
        for e in range(low, high):
            y, weight, target = others[indices[e]], weights[e], targets[e]
            for i in range(size):
                right[i] += target * y[i]
                for j in range(i + 1):
                    matrix[i, j] += np.float64(weight * y[i]) * y[j]
        # Cholesky factor in the lower half, then both substitutions.
        for i in range(size):
            for j in range(i + 1):
                value = matrix[i, j]
                for m in range(j):
                    value -= matrix[i, m] * matrix[j, m]
                matrix[i, j] = np.sqrt(value) if i == j else value / matrix[j, j]
        for i in range(size):
            value = right[i]
            for m in range(i):
                value -= matrix[i, m] * right[m]
            right[i] = value / matrix[i, i]
        for i in range(size - 1, -1, -1):
            value = right[i]
            for m in range(i + 1, size):
                value -= matrix[m, i] * right[m]
            right[i] = value / matrix[i, i]
        for i in range(size):
            rows[row, i] = right[i]
