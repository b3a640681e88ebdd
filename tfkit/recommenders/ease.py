"""EASE^R: a linear autoencoder in closed form, hard to beat on implicit events.

Paper: Steck. Embarrassingly shallow autoencoders for sparse data. WWW 2019, https://arxiv.org/abs/1905.03375

Differs: nothing but float64 in the inverse.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender
from tfkit.recommenders.interactions import Interactions


class EASE(Recommender):
    """Predicts X by X B, where B minimises |X - X B|² + λ|B|² under a zero diagonal.

    Args:
        penalty: λ > 0.
    """

    _saved = {"weights": "items"}

    def __init__(self, penalty: float = 500.0) -> None:
        self.penalty = checks.number("penalty", penalty, 1e-12)

    def _fit(self, interactions: Interactions) -> None:
        self.weights = ease_weights(interactions.seen, self.penalty).astype(np.float32)

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return self._history_scores(self.seen[users])

    def _history_scores(self, histories: sp.csr_matrix) -> np.ndarray:
        return np.asarray(histories @ self.weights)


def ease_weights(seen: sp.csr_matrix, penalty: float) -> np.ndarray:
    """Returns B = I - P diag(1/P_jj) with P = (XᵀX + λI)^-1, float64, (items, items).

    With fewer users than items, P is (I - Xᵀ (XXᵀ + λI)^-1 X) / λ, the inverse of a smaller matrix.

    Args:
        seen: X, (users, items).
        penalty: λ.
    """
    x = seen.astype(np.float64)
    users, items = x.shape
    if users < items:
        smaller = np.linalg.solve((x @ x.T).toarray() + penalty * np.eye(users), x.toarray())
        inverse = np.asarray(x.T @ smaller)
        np.negative(inverse, out=inverse)
        inverse[np.diag_indices(items)] += 1
        inverse /= penalty
    else:
        inverse = np.linalg.inv((x.T @ x).toarray() + penalty * np.eye(items))
    inverse /= -np.diag(inverse).copy()
    np.fill_diagonal(inverse, 0)
    return inverse
