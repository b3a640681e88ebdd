"""Item neighbours: items are alike if the same users took them.

Paper: Sarwar, Karypis, Konstan, Riedl. Item-based collaborative filtering recommendation algorithms. WWW 2001,
https://doi.org/10.1145/371920.372071.

Differs: implicit events; cosine similarity with a shrinkage that distrusts few common users (Ferrari Dacrema,
Cremonesi, Jannach. Are we really making much progress? RecSys 2019, https://arxiv.org/abs/1907.06902).
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender
from tfkit.recommenders.interactions import Interactions


class ItemKNN(Recommender):
    """Scores an item by the similarities to those a user has taken.

    s(i, j) = |U_i ∩ U_j| / (sqrt(|U_i| |U_j|) + shrinkage), zero on the diagonal, and only the largest of each column
    j, the item that is scored.

    Args:
        neighbours: of each item.
        shrinkage: in users, at least 0.
    """

    _saved = {"similarity": "items"}

    def __init__(self, neighbours: int = 100, shrinkage: float = 0.0) -> None:
        self.neighbours = checks.integer("neighbours", neighbours, 1)
        self.shrinkage = checks.number("shrinkage", shrinkage, 0)

    def _fit(self, interactions: Interactions) -> None:
        seen = interactions.seen
        common = (seen.T @ seen).toarray()
        counts = np.diag(common).copy()
        similarity = common / np.maximum(np.sqrt(np.outer(counts, counts)) + self.shrinkage, 1e-12)
        np.fill_diagonal(similarity, 0)
        if self.neighbours < len(similarity):
            least = np.partition(similarity, -self.neighbours, axis=0)[-self.neighbours]
            similarity[similarity < least] = 0
        self.similarity = similarity.astype(np.float32)

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return self._history_scores(self.seen[users])

    def _history_scores(self, histories: sp.csr_matrix) -> np.ndarray:
        return np.asarray(histories @ self.similarity)
