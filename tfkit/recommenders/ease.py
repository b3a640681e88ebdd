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
        seen = interactions.seen.astype(np.float64)
        self.weights = ease_weights((seen.T @ seen).toarray(), self.penalty).astype(np.float32)

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return self._history_scores(self.seen[users])

    def _history_scores(self, histories: sp.csr_matrix) -> np.ndarray:
        return np.asarray(histories @ self.weights)


def ease_weights(gram: np.ndarray, penalty: float) -> np.ndarray:
    """Returns B = I - P diag(1/P_jj) with P = (G + λI)^-1.

    Args:
        gram: XᵀX, (items, items).
        penalty: λ.
    """
    inverse = np.linalg.inv(gram + penalty * np.eye(len(gram)))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    return weights
