"""Softmax regression: its minimum, gradient, and the exact solution of systems with its Hessian."""

from __future__ import annotations

import numpy as np
from scipy import optimize, special
from scipy.sparse import linalg


def with_one(inputs: np.ndarray) -> np.ndarray:
    """Returns the inputs with a last feature of 1, (examples, features + 1)."""
    return np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)


def probabilities(weights: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Returns (examples, classes); weights: (features + 1, classes)."""
    return special.softmax(with_one(inputs) @ weights, axis=1)


def gradient(weights: np.ndarray, inputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the gradient of the mean cross-entropy, (features + 1, classes)."""
    wrong = probabilities(weights, inputs)
    wrong[np.arange(len(labels)), labels] -= 1
    return with_one(inputs).T @ wrong / len(labels)


def hessian_product(extended: np.ndarray, probability: np.ndarray, vector: np.ndarray, decay: float) -> np.ndarray:
    """Returns the Hessian of mean cross-entropy + decay |weights|^2 / 2, times a vector shaped as the weights."""
    along = extended @ vector  # (examples, classes)
    curved = probability * (along - (probability * along).sum(axis=1, keepdims=True))
    return extended.T @ curved / len(extended) + decay * vector


def fit(inputs: np.ndarray, labels: np.ndarray, classes: int, decay: float) -> np.ndarray:
    """Returns the minimum of mean cross-entropy + decay |weights|^2 / 2, (features + 1, classes)."""
    extended = with_one(inputs)
    shape = (extended.shape[1], classes)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = extended @ weights
        value = np.mean(special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels])
        slope = gradient(weights, inputs, labels) + decay * weights
        return value + decay * (flat @ flat) / 2, slope.ravel()

    found = optimize.minimize(
        loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B",
        options={"maxiter": 2000, "maxfun": 4000, "gtol": 1e-7, "ftol": 0.0, "maxcor": 30},
    )  # fmt: skip
    return found.x.reshape(shape)


def solve_hessian(
    weights: np.ndarray, inputs: np.ndarray, right: np.ndarray, decay: float, tolerance: float = 1e-8
) -> np.ndarray:
    """Returns H^-1 right by conjugate gradients, shaped as the weights.

    Args:
        weights: (features + 1, classes).
        inputs: (examples, features) that H is the mean over.
        right: (features + 1, classes).
        decay: of the squared weights; positive, so that H is positive definite.
        tolerance: of the residual, relative to `right`.

    Raises:
        ArithmeticError: it does not converge.
    """
    extended, probability = with_one(inputs), probabilities(weights, inputs)

    def product(flat: np.ndarray) -> np.ndarray:
        return hessian_product(extended, probability, flat.reshape(right.shape), decay).ravel()

    operator = linalg.LinearOperator((right.size, right.size), matvec=product, dtype=np.float64)
    solved, failed = linalg.cg(operator, right.ravel(), rtol=tolerance, maxiter=20 * right.size)
    if failed:
        raise ArithmeticError("Conjugate gradients did not converge. Raise `decay`.")
    return solved.reshape(right.shape)
