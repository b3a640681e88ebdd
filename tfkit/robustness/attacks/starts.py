"""Starts: first adversarial points for attacks on labels, and the walk from them to the boundary.

What all label attacks need before they can begin, and what each of them repeats: a point beyond the boundary, and the
bisection between it and the example.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import Search


def check_pool(pool: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns a pool of start images as float32, flattened, and their classes.

    Raises:
        ValueError: `pool` is no pair (images, classes) of one length.
    """
    if pool is None:
        return None
    if not isinstance(pool, tuple) or len(pool) != 2 or not len(pool[0]) or len(pool[0]) != len(pool[1]):
        raise checks.error("pool", "a pair (images, classes) of one length", pool)
    return np.asarray(pool[0], np.float32).reshape(len(pool[0]), -1), np.asarray(pool[1])


def blend(x: np.ndarray, far: np.ndarray, share: np.ndarray, norm: str) -> np.ndarray:
    """Returns points between `x` and `far`: `share`, (batch,), of the way, or of the greatest difference for linf.

    >>> blend(np.zeros((1, 2)), np.array([[1.0, 4.0]]), np.array([0.5]), "linf")
    array([[1., 2.]])
    """
    delta = far - x
    if norm == "linf":
        limit = (share * np.abs(delta).max(axis=1))[:, None]
        return np.asarray(x + np.clip(delta, -limit, limit))
    return np.asarray(x + share.astype(np.float32)[:, None] * delta)


def to_boundary(
    search: Search, rows: np.ndarray, far: np.ndarray, norm: str = "l2", tolerance: float = 1e-3
) -> np.ndarray:
    """Bisects between the examples and adversarial points until the shares of the way differ by `tolerance`.

    Args:
        search: whose examples.
        rows: int, (n,): which.
        far: (n, features): adversarial.
        norm: of the path, see `blend`.
        tolerance: of the shares.

    Returns:
        (n, features): adversarial, and near the boundary.
    """
    x = search.x[rows]
    low, high = np.zeros(len(rows)), np.ones(len(rows))
    for _ in range(int(np.ceil(np.log2(1 / tolerance)))):
        middle = (low + high) / 2
        found = search.adversarial(blend(x, far, middle, norm), rows)
        high, low = np.where(found, middle, high), np.where(found, low, middle)
    return blend(x, far, high, norm)


def noise(x: np.ndarray, bounds: tuple[float, float], attempt: int, rng: np.random.Generator) -> np.ndarray:
    """Returns far points, like `x`, of another kind at each attempt: uniform noise, pure black and white, negatives."""
    low, high = bounds
    uniform = rng.random(x.shape, dtype=np.float32)
    kind = attempt % 4
    if kind == 1:
        uniform = np.round(uniform)
    elif kind == 2:
        # Sparse: each attempt with another share of bright values.
        uniform = (uniform < rng.random((len(x), 1))).astype(np.float32)
    elif kind == 3:
        return np.asarray(low + high - x + 0.2 * (high - low) * (uniform - 0.5), np.float32)
    return np.asarray(low + (high - low) * uniform, np.float32)


def first_points(
    search: Search,
    rng: np.random.Generator,
    pool: tuple[np.ndarray, np.ndarray] | None = None,
    attempts: int = 1000,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds an adversarial point for each active row: from the pool, nearest first, or else noise.

    Returns:
        The rows for which one was found, and the points, (rows, features).
    """
    rows = search.active()
    points, found = np.zeros_like(search.x), np.zeros(len(search.x), bool)
    for attempt in range(attempts):
        left = search.active(rows[~found[rows]])
        if not len(left):
            break
        tried, candidates = left, np.zeros((0, search.x.shape[1]), np.float32)
        if pool is not None and attempt < min(5, len(pool[0])):
            candidates = nearest_in_pool(search, left, pool, attempt)[0]
        else:
            candidates = noise(search.x[left], search.attack.bounds, attempt, rng)
        success = search.adversarial(candidates, tried)
        points[tried[success]], found[tried[success]] = candidates[success], True
    rows = rows[found[rows]]
    return rows, points[rows]


def nearest_in_pool(
    search: Search, rows: np.ndarray, pool: tuple[np.ndarray, np.ndarray], place: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each row the pool's image that is the `place`-th nearest of a class the attack wants, and its class.

    Raises:
        ValueError: the images have another number of values than the examples.
    """
    images, classes = pool
    if images.shape[1] != search.x.shape[1]:
        raise checks.error("pool", f"images of {search.x.shape[1]} values", images)
    x = search.x[rows]
    squares = (x**2).sum(axis=1)[:, None] + (images**2).sum(axis=1) - 2 * x @ images.T
    wanted = (classes == search.y[rows][:, None]) == search.attack.targeted
    nearest = np.argsort(np.where(wanted, squares, np.inf), axis=1)[:, place]
    return images[nearest], classes[nearest]
