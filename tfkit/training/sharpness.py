"""Sharpness: by how much the loss can rise within a small box around a solution.

Paper: Keskar, Mudigere, Nocedal, Smelyanskiy, Tang. On large-batch training for deep learning: generalization gap and
sharp minima. ICLR 2017, https://arxiv.org/abs/1609.04836, metric 2.1: for weights x, a matrix A and the box
|z_i| <= epsilon (|(A^+ x)_i| + 1), sharpness is 100 (max_z f(x + A z) - f(x)) / (1 + f(x)), the maximum sought by
L-BFGS-B. A is the identity, or n x p with random entries.

Differs: the columns of A are scaled to unit length, since the paper does not give the scale of its random entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from scipy import optimize

from tfkit.internal import checks
from tfkit.training.weight_space import WeightSpace


def sharpness(
    model: keras.Model,
    data: tuple[Any, Any],
    epsilon: float = 1e-3,
    subspace: int | None = None,
    *,
    iterations: int = 10,
    loss: Any = None,
    seed: int = 0,
    batch_size: int = 1024,
) -> float:
    """Returns the sharpness of a model's solution, in percent; about 0 for a flat one.

    Args:
        model: the trained model; its weights are the same afterwards.
        data: (x, y), the data that f is the mean loss over; the paper takes the training data.
        epsilon: half the width of the box, relative to the weights; 1e-3 and 5e-4 in the paper.
        subspace: dimensions of a random subspace, 100 in the paper; None: the full space.
        iterations: of L-BFGS-B.
        loss: a mean over examples; the compiled one if None.
        seed: of the subspace.
        batch_size: examples that go through the model at a time.

    Raises:
        ValueError: an argument is out of its range, or the loss is not finite at the solution.

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> x = np.ones((1, 1))
    >>> round(sharpness(model, (x, x), 0.1, loss="mse"), 3)  # f = (w - 1)^2 rises to (0.1 * 2)^2 at the edge
    4.0
    """
    checks.number("epsilon", epsilon, 1e-12)
    checks.integer("iterations", iterations, 1)
    space = WeightSpace(model, data, loss, batch_size)
    spread: Callable[[np.ndarray], np.ndarray]
    gather: Callable[[np.ndarray], np.ndarray]
    with space.kept() as x:
        if subspace is None:
            coordinates, spread, gather = x, _identity, _identity
        else:
            checks.integer("subspace", subspace, 1, len(x))
            matrix = np.random.default_rng(seed).normal(size=(len(x), subspace)).astype(np.float32)
            matrix /= np.linalg.norm(matrix, axis=0)
            # A^+ x by the normal equations: random columns are all but orthogonal, and A may have a million rows.
            coordinates = np.linalg.solve((matrix.T @ matrix).astype(np.float64), matrix.T @ x)
            spread, gather = functools.partial(np.matmul, matrix), functools.partial(np.matmul, matrix.T)
        box = epsilon * (np.abs(coordinates) + 1)
        at_solution = space.value(x)
        if not np.isfinite(at_solution):
            raise checks.error("model", "a model with a finite loss on the data", at_solution)
        return 100 * (_maximum(space, x, box, spread, gather, iterations) - at_solution) / (1 + at_solution)


def _maximum(space: WeightSpace, x: np.ndarray, box: np.ndarray, spread: Any, gather: Any, iterations: int) -> float:
    """The greatest loss that L-BFGS-B finds in the box; coordinates are in units of its half width."""
    best = -np.inf
    scale = 1.0  # L-BFGS-B's tolerances are absolute, and a flat loss rises by very little.

    def negative(u: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best
        value, gradient = space.value_and_gradient(x + spread(box * u))
        if not np.isfinite(value):
            return np.inf, np.zeros_like(u)
        best = max(best, value)
        return -value / scale, -box * gather(gradient) / scale

    # At a minimum the gradient all but vanishes: a small step off it, up the slope, starts the search.
    _, slope = negative(np.zeros_like(box))
    start = -0.01 * np.sign(slope)
    start[slope == 0] = 0.01
    _, slope = negative(start)
    scale = float(np.abs(slope).max()) or 1.0
    bounds = optimize.Bounds(np.full(len(box), -1.0), np.full(len(box), 1.0))
    options = {"maxiter": iterations, "ftol": 0.0, "gtol": 0.0}
    optimize.minimize(negative, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return best


def _identity(vector: np.ndarray) -> np.ndarray:
    return vector
