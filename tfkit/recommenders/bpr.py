"""BPR: a seen item should score above one unseen, pair by pair.

Paper: Rendle, Freudenthaler, Gantner, Schmidt-Thieme. BPR: Bayesian personalized ranking from implicit feedback.
UAI 2009, https://arxiv.org/abs/1205.2618; Zhang, Chen, Wang, Yu. Optimizing top-N collaborative filtering via dynamic
negative item sampling. SIGIR 2013, https://doi.org/10.1145/2484028.2484126 ("dynamic").

Differs: one thread and a seed, so that results repeat; popular negatives are drawn by their share of the events.
"""

from __future__ import annotations

import numpy as np

from tfkit.internal import checks
from tfkit.recommenders.base import Recommender
from tfkit.recommenders.interactions import Interactions
from tfkit.recommenders.random_numbers import below
from tfkit.retrieval import kernels

NEGATIVES = ("uniform", "popularity", "dynamic")


class PairwiseFactors(Recommender):
    """Factors and biases of items that are learned from pairs: what BPR and WARP share."""

    _saved = {"user_factors": "users", "item_factors": "items"}
    dimension: int
    seed: int
    epochs: int
    #: Factors start uniform in a range of this over this power of the dimension.
    _start_scale, _start_power = 1.0, 1.0

    def _fit(self, interactions: Interactions) -> None:
        self.start(interactions)
        for _ in range(self.epochs):
            self.epoch()

    def start(self, interactions: Interactions) -> None:
        """Draws the factors; the last column is the items' bias, and a one for users."""
        self.seen = interactions.seen
        generator = np.random.default_rng(self.seed)
        scale = self._start_scale / self.dimension**self._start_power
        self.user_factors, self.item_factors = (
            generator.uniform(-scale / 2, scale / 2, (count, self.dimension + 1)).astype(np.float32)
            for count in self.seen.shape
        )
        self.user_factors[:, -1], self.item_factors[:, -1] = 1, 0
        self._rows = np.repeat(np.arange(self.num_users), np.diff(self.seen.indptr)).astype(np.int32)
        self._state = generator.integers(1 << 62, size=1).astype(np.uint64)

    def epoch(self) -> None:
        """Goes over as many random events as there are."""
        raise NotImplementedError

    def user_vectors(self, users: np.ndarray) -> np.ndarray:
        return self.user_factors[users]

    def item_vectors(self) -> np.ndarray:
        return self.item_factors


class BPR(PairwiseFactors):
    """Minimises Σ -log σ(s_ui - s_uj) + λ/2 (|w_u|² + |h_i|² + |h_j|²) over events (u, i) and unseen j, by SGD.

    Args:
        dimension: of the factors, beside a bias of each item.
        learning_rate: of SGD.
        penalty: λ.
        epochs: as many steps each as there are events.
        negatives: "uniform" over items; "popularity": by their events; "dynamic": of `candidates` uniform ones the
            best scored.
        candidates: for "dynamic".
        attempts: draws until an unseen item turns up; the event is passed over after so many. With 1, who has seen
            much learns less, as the package implicit has it.
        seed: of the start and of the draws.
    """

    def __init__(
        self,
        dimension: int = 64,
        learning_rate: float = 0.05,
        penalty: float = 0.01,
        epochs: int = 50,
        negatives: str = "uniform",
        candidates: int = 5,
        attempts: int = 20,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.penalty = checks.number("penalty", penalty, 0)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.negatives = checks.choice("negatives", negatives, NEGATIVES)
        self.candidates = checks.integer("candidates", candidates, 1)
        self.attempts = checks.integer("attempts", attempts, 1)
        self.seed = checks.integer("seed", seed, 0)

    def epoch(self) -> None:
        _bpr_epoch(
            self._rows, self.seen.indptr, self.seen.indices, self.user_factors, self.item_factors,
            np.float32(self.learning_rate), np.float32(self.penalty), self.negatives == "popularity",
            self.candidates if self.negatives == "dynamic" else 1, self.attempts, self._state,
        )  # fmt: skip


@kernels.kernel
def is_seen(indices, low, high, item):  # type: ignore[no-untyped-def]
    """Returns whether a sorted part of `indices` holds the item."""
    while low < high:
        middle = (low + high) >> 1
        if indices[middle] < item:
            low = middle + 1
        elif indices[middle] > item:
            high = middle
        else:
            return True
    return False


@kernels.kernel
def _bpr_epoch(  # type: ignore[no-untyped-def]
    rows, indptr, indices, users, items, rate, penalty, popular, candidates, attempts, state
):
    size = users.shape[1]
    for _ in range(rows.shape[0]):
        event = below(state, rows.shape[0])
        user, positive = rows[event], indices[event]
        low, high = indptr[user], indptr[user + 1]
        negative, best = np.int64(-1), np.float32(0)
        for _ in range(candidates):
            for _ in range(attempts):
                drawn = np.int64(indices[below(state, indices.shape[0])]) if popular else below(state, items.shape[0])
                if not is_seen(indices, low, high, drawn):
                    score = np.float32(0)
                    if candidates > 1:
                        for f in range(size):
                            score += users[user, f] * items[drawn, f]
                    if negative < 0 or score > best:
                        negative, best = drawn, score
                    break
        if negative < 0:
            continue
        margin = np.float32(0)
        for f in range(size):
            margin += users[user, f] * (items[positive, f] - items[negative, f])
        slope = np.float32(1) / (np.float32(1) + np.exp(margin))
        for f in range(size - 1):
            a, b, c = users[user, f], items[positive, f], items[negative, f]
            users[user, f] += rate * (slope * (b - c) - penalty * a)
            items[positive, f] += rate * (slope * a - penalty * b)
            items[negative, f] += rate * (-slope * a - penalty * c)
        bias = size - 1
        items[positive, bias] += rate * (slope - penalty * items[positive, bias])
        items[negative, bias] += rate * (-slope - penalty * items[negative, bias])
