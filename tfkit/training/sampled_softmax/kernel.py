"""Kernel sampling: negatives by a quadratic kernel of the query and the class, drawn down a tree.

Paper: Blanc, Rendle. Adaptive sampled softmax with kernel based sampling. ICML 2018, https://arxiv.org/abs/1712.00527

Differs: leaves hold blocks of classes, and sums only the upper half of w wᵀ, so that with blocks as long as the
dimension the tree takes as much memory as the weights; a sum that changes is made anew from its children, so that
errors do not grow; positives are left out by drawing again, and the probabilities are those given that.
"""

from __future__ import annotations

import numpy as np

from tfkit.internal import checks
from tfkit.training.sampled_softmax import tree
from tfkit.training.sampled_softmax.base import ATTEMPTS, Sampler, Samples


class KernelSampler(Sampler):
    """Draws class i for a query h with probability (α<h, w_i>² + 1) / Σ_j (α<h, w_j>² + 1).

    With dimension d and n classes, a draw takes O(d² log(n/d)) operations, and an update of one class as many. Memory
    with blocks of d: the weights twice, about.

    Args:
        alpha: α ≥ 0; 0 is uniform, large is quadratic.
        block: classes of a leaf; None: as many as the dimension.
    """

    def __init__(self, alpha: float = 100.0, block: int | None = None) -> None:
        self.alpha = checks.number("alpha", alpha, 0)
        self.block = None if block is None else checks.integer("block", block, 1)

    def _build(self) -> None:
        classes, dimension = self.weights.shape
        self._size = self.block or dimension
        blocks = -(-classes // self._size)
        self.sums = np.zeros((2 * blocks, dimension * (dimension + 1) // 2), np.float32)
        self.counts = np.zeros(2 * blocks, np.int64)
        tree.refresh(self.sums, self.counts, self.weights, self._size, np.arange(blocks))

    def _update(self, ids: np.ndarray) -> None:
        tree.refresh(self.sums, self.counts, self.weights, self._size, np.unique(ids // self._size))

    def _sample(self, queries: np.ndarray, count: int, positives: np.ndarray, seed: int) -> Samples:
        packed = np.empty((len(queries), self.sums.shape[1]), np.float32)
        for query, out in zip(queries, packed, strict=True):
            tree.quadratic_query(query, np.float32(self.alpha), out)
        ids, logs = np.empty((len(queries), count), np.int64), np.empty((len(queries), count), np.float32)
        scaled = queries * np.float32(np.sqrt(self.alpha))
        tree.draw(
            self.sums, self.counts, self.weights, self._size, scaled, packed, 1.0, True, positives, count, ATTEMPTS,
            np.uint64(seed), ids, logs,
        )  # fmt: skip
        return Samples(ids, logs)

    def probabilities(self, queries: np.ndarray) -> np.ndarray:
        values = self.alpha * (np.asarray(queries, np.float64) @ self.weights.T.astype(np.float64)) ** 2 + 1
        return np.asarray(values / values.sum(1, keepdims=True))
