"""WARP: draws unseen items until one scores too high, and steps the more, the sooner that was.

Paper: Weston, Bengio, Usunier. WSABIE: scaling up to large vocabulary image annotation. IJCAI 2011,
https://doi.org/10.5591/978-1-57735-516-8/IJCAI11-460

Differs: factors of users in place of images' features; a penalty in place of a bound on the norms; L is divided by its
largest value, so that a learning rate and a penalty mean the same for few items as for many.
"""

from __future__ import annotations

import numpy as np

from tfkit.internal import checks
from tfkit.recommenders.bpr import PairwiseFactors, is_seen
from tfkit.recommenders.random_numbers import below
from tfkit.retrieval import kernels


class WARP(PairwiseFactors):
    """Minimises L(rank) |margin - s_ui + s_uj|₊ with L(r) ~ 1 + 1/2 + … + 1/r, the rank from the draws it took.

    Args:
        dimension: of the factors, beside a bias of each item.
        learning_rate: of SGD.
        penalty: of the squared factors.
        margin: by which a seen item should lead.
        epochs: as many steps each as there are events.
        most_draws: of unseen items for one step.
        seed: of the start and of the draws.
    """

    _start_power = 0.5  # Small factors would leave the bias alone to learn for long: steps are not scaled.

    def __init__(
        self,
        dimension: int = 64,
        learning_rate: float = 0.01,
        penalty: float = 0.1,
        margin: float = 1.0,
        epochs: int = 60,
        most_draws: int = 50,
        seed: int = 0,
    ) -> None:
        self.dimension = checks.integer("dimension", dimension, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.penalty = checks.number("penalty", penalty, 0)
        self.margin = checks.number("margin", margin, 0)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.most_draws = checks.integer("most_draws", most_draws, 1)
        self.seed = checks.integer("seed", seed, 0)

    def epoch(self) -> None:
        ranks = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, self.num_items + 1))])
        ranks = (ranks / ranks[-1]).astype(np.float32)
        _warp_epoch(
            self._rows, self.seen.indptr, self.seen.indices, self.user_factors, self.item_factors, ranks,
            np.float32(self.learning_rate), np.float32(self.penalty), np.float32(self.margin), self.most_draws,
            self._state,
        )  # fmt: skip


@kernels.kernel
def _warp_epoch(rows, indptr, indices, users, items, ranks, rate, penalty, margin, most, state):  # type: ignore[no-untyped-def]
    size, count = users.shape[1], items.shape[0]
    for _ in range(rows.shape[0]):
        event = below(state, rows.shape[0])
        user, positive = rows[event], indices[event]
        low, high = indptr[user], indptr[user + 1]
        w, p = users[user], items[positive]
        score = kernels.dot(w, p)
        for draw in range(1, most + 1):
            negative = below(state, count)
            if is_seen(indices, low, high, negative):
                continue
            q = items[negative]
            if kernels.dot(w, q) <= score - margin:
                continue
            step = rate * ranks[max((count - 1) // draw, 1)]
            for f in range(size - 1):
                a, b, c = w[f], p[f], q[f]
                w[f] += step * (b - c) - rate * penalty * a
                p[f] += step * a - rate * penalty * b
                q[f] += -step * a - rate * penalty * c
            p[size - 1] += step - rate * penalty * p[size - 1]
            q[size - 1] += -step - rate * penalty * q[size - 1]
            break
