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


# Rows of matrices are read by their numbers, since a view of each would be counted in and out.


@kernels.kernel
def _add_product(gram, x, out):  # type: ignore[no-untyped-def]
    """Adds G x to `out`, four rows of the symmetric G at a time, so that `out` is read and written less."""
    size = x.shape[0]
    j = 0
    while j + 4 <= size:
        x0, x1, x2, x3 = x[j], x[j + 1], x[j + 2], x[j + 3]
        for i in range(size):
            out[i] += x0 * gram[j, i] + x1 * gram[j + 1, i] + x2 * gram[j + 2, i] + x3 * gram[j + 3, i]
        j += 4
    while j < size:
        for i in range(size):
            out[i] += x[j] * gram[j, i]
        j += 1


@kernels.kernel
def _add_entries(low, high, indices, weights, targets, first, others, x, out):  # type: ignore[no-untyped-def]
    """Adds Σ a <y, x> y to `out`, or at first Σ (a <y, x> - t) y; four entries at a time, as above."""
    size = x.shape[0]
    e = low
    while e + 4 <= high:
        a, b, c, d = indices[e], indices[e + 1], indices[e + 2], indices[e + 3]
        s0 = s1 = s2 = s3 = np.float32(0)
        for i in range(size):
            s0 += others[a, i] * x[i]
            s1 += others[b, i] * x[i]
            s2 += others[c, i] * x[i]
            s3 += others[d, i] * x[i]
        s0, s1, s2, s3 = s0 * weights[e], s1 * weights[e + 1], s2 * weights[e + 2], s3 * weights[e + 3]
        if first:
            s0, s1, s2, s3 = s0 - targets[e], s1 - targets[e + 1], s2 - targets[e + 2], s3 - targets[e + 3]
        for i in range(size):
            out[i] += s0 * others[a, i] + s1 * others[b, i] + s2 * others[c, i] + s3 * others[d, i]
        e += 4
    while e < high:
        a = indices[e]
        s0 = np.float32(0)
        for i in range(size):
            s0 += others[a, i] * x[i]
        s0 *= weights[e]
        if first:
            s0 -= targets[e]
        for i in range(size):
            out[i] += s0 * others[a, i]
        e += 1


@kernels.kernel
def _conjugate_gradients(  # type: ignore[no-untyped-def]
    indptr, indices, weights, targets, gram, penalties, others, rows, steps, first, last
):
    size = rows.shape[1]
    # Each an array of its own: parts of one are not taken for contiguous.
    residual, direction, product = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    for row in range(first, last):
        x, low, high, penalty = rows[row], indptr[row], indptr[row + 1], penalties[row]
        if low == high:
            x[:] = 0
            continue
        for i in range(size):
            product[i] = penalty * x[i]
        _add_product(gram, x, product)
        _add_entries(low, high, indices, weights, targets, True, others, x, product)
        for i in range(size):
            residual[i] = direction[i] = -product[i]
        squared = kernels.dot(residual, residual)
        for _ in range(steps):
            if squared < 1e-20:
                break
            for i in range(size):
                product[i] = penalty * direction[i]
            _add_product(gram, direction, product)
            _add_entries(low, high, indices, weights, targets, False, others, direction, product)
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
