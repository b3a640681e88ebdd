"""Random Fourier features: negatives by a kernel near the exponential of the score.

Paper: Rawat, Chen, Yu, Suresh, Kumar. Sampled softmax with random Fourier features. NeurIPS 2019,
https://arxiv.org/abs/1907.10747

Differs: sums that the random features make negative are cut at a small positive number, and the probability is that of
the path taken, so that the correction stays exact.
"""

from __future__ import annotations

import numpy as np

from tfkit.internal import checks
from tfkit.training.sampled_softmax import tree
from tfkit.training.sampled_softmax.base import ATTEMPTS, Sampler, Samples


class FourierSampler(Sampler):
    """Draws by φ(h)ᵀφ(w) ≈ exp(-ν|h - w|²/2) of the normalised h and w, proportional to exp(ν cos(h, w)).

    Args:
        features: D; each class keeps 2 D numbers.
        temperature: ν > 0.
        block: classes of a leaf.
        seed: of the features.
    """

    def __init__(self, features: int = 64, temperature: float = 4.0, block: int = 64, seed: int = 0) -> None:
        self.features = checks.integer("features", features, 1)
        self.temperature = checks.number("temperature", temperature, 1e-6)
        self.block = checks.integer("block", block, 1)
        self.seed = checks.integer("seed", seed, 0)

    def _build(self) -> None:
        generator = np.random.default_rng(self.seed)
        shape = (self.weights.shape[1], self.features)
        self.frequencies = (generator.normal(size=shape) * np.sqrt(self.temperature)).astype(np.float32)
        self.mapped = self._map(self.weights)
        blocks = -(-len(self.mapped) // self.block)
        self.sums = np.zeros((2 * blocks, self.mapped.shape[1]), np.float32)
        self.counts = np.zeros(2 * blocks, np.int64)
        self._refresh(np.arange(blocks))

    def _map(self, vectors: np.ndarray) -> np.ndarray:
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        angles = unit @ self.frequencies
        made = np.concatenate([np.cos(angles), np.sin(angles)], 1) / np.sqrt(self.features)
        return np.ascontiguousarray(made, np.float32)

    def _update(self, ids: np.ndarray) -> None:
        self.mapped[ids] = self._map(self.weights[ids])
        self._refresh(np.unique(ids // self.block))

    def _refresh(self, leaves: np.ndarray) -> None:
        blocks = len(self.sums) // 2
        for leaf in leaves:
            part = self.mapped[leaf * self.block : (leaf + 1) * self.block]
            self.sums[blocks + leaf], self.counts[blocks + leaf] = part.sum(0), len(part)
        tree.ascend(self.sums, self.counts, blocks + leaves)

    def _sample(self, queries: np.ndarray, count: int, positives: np.ndarray, seed: int) -> Samples:
        mapped = self._map(queries)
        ids, logs = np.empty((len(queries), count), np.int64), np.empty((len(queries), count), np.float32)
        tree.draw(
            self.sums, self.counts, self.mapped, self.block, mapped, mapped, 0.0, False, positives, count, ATTEMPTS,
            np.uint64(seed), ids, logs,
        )  # fmt: skip
        return Samples(ids, logs)

    def probabilities(self, queries: np.ndarray) -> np.ndarray:
        """Returns the kernel's distribution; where nodes were cut, a draw's own probability differs from it."""
        values = np.maximum(self._map(np.asarray(queries, np.float32)) @ self.mapped.T.astype(np.float64), 1e-6)
        return np.asarray(values / values.sum(1, keepdims=True))
