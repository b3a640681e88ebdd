"""Vectors: what is taken as items and queries, and powers of two that bring them to norms float32 can multiply.

The product of two float32 vectors overflows beyond 3e38 and loses its digits below 1e-38. Indexes therefore hold items
of extreme norms, and look up queries of extreme norms, times a power of two, which rounds nothing of what counts; the
scores are scaled back.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval.kernels import dot

#: The largest norm of the items, and the norm of each query, are left alone from 2^-this to 2^this.
ITEMS_RANGE, QUERY_RANGE = 16, 32
#: Rows looked at together, so that a pass over vectors takes little memory.
BLOCK_ROWS = 1024


def as_matrix(name: str, value: Any, dimension: int | None = None, least: int = 1, *, copy: bool = False) -> np.ndarray:
    """Returns vectors as a C-contiguous float32 matrix; as `as_vectors`, but they need not be finite."""
    if np.ma.isMaskedArray(value) and np.ma.getmaskarray(value).any():
        raise checks.error(name, "without masked elements", value, "Fill them: `array.filled(0)`.")
    try:
        array = np.asarray(value)
    except ValueError:  # NumPy's own message speaks of sequences and elements.
        raise checks.error(name, "rows of one length", value) from None
    if array.dtype.kind not in "fiu":
        raise checks.error(name, "an array of real numbers", value, "Convert it to float32.")
    if array.ndim != 2 or not array.shape[1] or len(array) < least:
        raise checks.error(name, f"of shape ({'at least 1' if least else 'any number'}, dimension)", value)
    if dimension is not None and array.shape[1] != dimension:
        raise checks.error(name, f"of dimension {dimension}, which the index has", value)
    with np.errstate(over="ignore"):
        if copy:
            return np.array(array, dtype=np.float32, order="C", copy=True)
        return np.ascontiguousarray(array, dtype=np.float32)


def as_vectors(
    name: str, value: Any, dimension: int | None = None, least: int = 1, *, copy: bool = False
) -> np.ndarray:
    """Returns finite vectors as a C-contiguous float32 matrix, without a copy where that is what they are.

    Args:
        name: of the argument, for the error.
        value: (vectors, dimension).
        dimension: that they must have; None: any.
        least: how many there must be.
        copy: whether the matrix must share no memory with `value`.

    Raises:
        ValueError: they break one of these rules.
    """
    vectors = as_matrix(name, value, dimension, least, copy=copy)
    check_finite(name, vectors)
    return vectors


def check_finite(name: str, vectors: np.ndarray) -> None:
    """Checks that all numbers are finite.

    Raises:
        ValueError: they are not; the message names the first row.
    """
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = np.isfinite(vectors[start : start + BLOCK_ROWS])
        if not block.all():
            row = start + int(np.argmin(block.all(axis=1)))
            raise checks.error(name, "finite numbers in float32", vectors[row], f"Row {row} is the first that is not.")


def norms_of(vectors: np.ndarray) -> np.ndarray:
    """Returns the Euclidean norms, float64, (vectors,)."""
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64))


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Returns the vectors at norm 1, float32; those of norm 0 stay."""
    units, norms = np.empty(vectors.shape, np.float32), norms_of(vectors)
    for start in range(0, len(vectors), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        units[part] = vectors[part] / np.where(norms[part] > 0, norms[part], 1.0)[:, None]
    return units


def exponent_of(norm: float, reach: int) -> int:
    """Returns e such that norm / 2^e is in [1, 2); 0 where the norm is 0, or from 2^-reach to 2^reach as it is.

    >>> exponent_of(3.0, 16), exponent_of(2.0**20, 16), exponent_of(1e-30, 16)
    (0, 20, -100)
    """
    return 0 if norm == 0 or 2.0**-reach <= norm <= 2.0**reach else math.frexp(norm)[1] - 1


def scaled(vectors: np.ndarray, exponents: int | np.ndarray) -> np.ndarray:
    """Returns vectors times 2^exponents, float32; infinite beyond the range, and 0 below it."""
    with np.errstate(over="ignore", under="ignore"):
        result: np.ndarray = np.ldexp(vectors, exponents)
    return result


def plain_query(query: Any, dimension: int) -> bool:
    """Whether this is a query that needs neither conversion nor scaling: the usual case of a server.

    NumPy's functions take a microsecond and more each, as long as a search among few items.
    """
    if type(query) is not np.ndarray or query.dtype != np.float32 or query.shape != (dimension,):
        return False
    # Whatever is not finite is not between the two.
    return bool(query.flags.c_contiguous and 4.0**-QUERY_RANGE < dot(query, query) < 4.0**QUERY_RANGE)


def moderate(name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns float32 queries at moderate norms.

    Args:
        name: of the argument, for the error.
        rows: (queries, dimension).

    Returns:
        The queries over 2^e, and each e, int32, (queries,); None: all are 0.

    Raises:
        ValueError: the queries are not finite.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
    low, high = 4.0**-QUERY_RANGE, 4.0**QUERY_RANGE
    if ((squares > low) & (squares < high)).all():  # Whatever is not finite fails this too.
        return rows, None
    check_finite(name, rows)
    exponents = np.array([exponent_of(float(norm), QUERY_RANGE) for norm in norms_of(rows)], np.int32)
    return (scaled(rows, -exponents[:, None]), exponents) if exponents.any() else (rows, None)
