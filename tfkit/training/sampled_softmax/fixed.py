"""Samplers that look at neither query nor weights: uniform, log-uniform and by frequency.

Paper: Bengio, Senécal. Adaptive importance sampling to accelerate training of a neural probabilistic language model.
IEEE Transactions on Neural Networks 19(4), 2008, https://doi.org/10.1109/TNN.2007.912312
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.training.sampled_softmax.base import ATTEMPTS, Sampler, Samples


class FixedSampler(Sampler):
    """Draws by one distribution for all queries, (classes,), which a subclass gives."""

    def _distribution(self, classes: int) -> np.ndarray:
        raise NotImplementedError

    def _build(self) -> None:
        self.distribution = self._distribution(len(self.weights))
        self.cumulative = np.cumsum(self.distribution)

    def _sample(self, queries: np.ndarray, count: int, positives: np.ndarray, seed: int) -> Samples:
        generator = np.random.default_rng(seed)
        return draw_without(
            lambda rows: np.minimum(
                np.searchsorted(self.cumulative, generator.random(len(rows)) * self.cumulative[-1], side="right"),
                len(self.weights) - 1,
            ),
            lambda rows, ids: self.distribution[ids],
            positives,
            count,
        )

    def probabilities(self, queries: np.ndarray) -> np.ndarray:
        return np.tile(self.distribution, (len(queries), 1))


class UniformSampler(FixedSampler):
    """Draws every class as often as any other. Weakness: the bias falls slowly with the number of samples."""

    def __init__(self) -> None:
        pass

    def _distribution(self, classes: int) -> np.ndarray:
        return np.full(classes, 1 / classes)


class LogUniformSampler(FixedSampler):
    """Draws class i with probability log((i + 2)/(i + 1)) / log(n + 1): for classes in the order of frequency."""

    def __init__(self) -> None:
        pass

    def _distribution(self, classes: int) -> np.ndarray:
        return np.diff(np.log(np.arange(1, classes + 2))) / np.log(classes + 1)


class UnigramSampler(FixedSampler):
    """Draws by the number of events to a power. Weakness: never a hard class that is rare.

    Args:
        counts: events of each class, at least 0; one is added.
        power: 1 is the frequency itself, 0.75 that of word2vec.
    """

    def __init__(self, counts: Any, power: float = 1.0) -> None:
        self.counts = np.asarray(counts, np.float64)
        if self.counts.ndim != 1 or not np.isfinite(self.counts).all() or (self.counts < 0).any():
            raise checks.error("counts", "a vector of numbers of at least 0", counts)
        self.power = checks.number("power", power, 0)

    def _distribution(self, classes: int) -> np.ndarray:
        if len(self.counts) != classes:
            raise checks.error("counts", f"one for each of {classes} classes", self.counts)
        weights = (self.counts + 1) ** self.power
        return np.asarray(weights / weights.sum())


def draw_without(draw: Any, probability: Any, positives: np.ndarray, count: int) -> Samples:
    """Draws again where a positive came, and gives the probabilities without the positives.

    Args:
        draw: gives a class for each of the given rows of queries.
        probability: of (rows, classes).
        positives: (queries, most), -1 for none.
        count: draws a query.
    """
    queries = len(positives)
    rows = np.repeat(np.arange(queries), count)
    ids = draw(rows)
    for _ in range(ATTEMPTS):
        again = np.flatnonzero((positives[rows] == ids[:, None]).any(1))
        if not len(again):
            break
        ids[again] = draw(rows[again])
    taken = np.zeros(queries)
    ordered = np.sort(positives, 1)
    for column in range(ordered.shape[1]):
        item = ordered[:, column]
        fresh = (item >= 0) & ((column == 0) | (item != ordered[:, max(column - 1, 0)]))
        taken += np.where(fresh, probability(np.arange(queries), np.maximum(item, 0)), 0)
    logs = np.log(probability(rows, ids)) - np.log(np.maximum(1 - taken, 1e-12))[rows]
    return Samples(ids.reshape(queries, count), logs.reshape(queries, count).astype(np.float32))
