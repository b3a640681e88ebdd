"""Popularity: everybody is shown what most have taken. The baseline that a personal model must beat."""

from __future__ import annotations

import numpy as np

from tfkit.recommenders.base import Recommender
from tfkit.recommenders.interactions import Interactions


class Popularity(Recommender):
    """Scores an item by the number of users who have taken it.

    >>> log = Interactions.from_arrays([0, 0, 1], [0, 1, 1])
    >>> Popularity().fit(log).recommend([1], k=1).ids.tolist()
    [[0]]
    """

    _saved = {"counts": "items"}

    def __init__(self) -> None:
        pass

    def _fit(self, interactions: Interactions) -> None:
        self.counts = np.asarray(interactions.seen.sum(axis=0), np.float32)[0]

    def _scores(self, users: np.ndarray) -> np.ndarray:
        return np.broadcast_to(self.counts, (len(users), len(self.counts)))

    def _history_scores(self, histories) -> np.ndarray:  # type: ignore[no-untyped-def]
        return np.broadcast_to(self.counts, (histories.shape[0], len(self.counts)))
