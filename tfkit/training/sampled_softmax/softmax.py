"""Softmax sampling: the oracle whose gradient is unbiased, at the full cost."""

from __future__ import annotations

import numpy as np

from tfkit.internal import checks
from tfkit.training.sampled_softmax.base import Sampler, Samples
from tfkit.training.sampled_softmax.fixed import draw_without


class SoftmaxSampler(Sampler):
    """Draws by the model's own distribution. Weakness: O(n) a query, which sampling is to avoid.

    Args:
        absolute: exp|<h, w>| in place of exp<h, w>.
    """

    def __init__(self, absolute: bool = False) -> None:
        if not isinstance(absolute, bool):
            raise checks.error("absolute", "True or False", absolute)
        self.absolute = absolute

    def _build(self) -> None:
        pass

    def probabilities(self, queries: np.ndarray) -> np.ndarray:
        logits = np.asarray(queries, np.float64) @ self.weights.T.astype(np.float64)
        logits = np.abs(logits) if self.absolute else logits
        values = np.exp(logits - logits.max(1, keepdims=True))
        return np.asarray(values / values.sum(1, keepdims=True))

    def _sample(self, queries: np.ndarray, count: int, positives: np.ndarray, seed: int) -> Samples:
        generator, table = np.random.default_rng(seed), self.probabilities(queries)
        cumulative = np.cumsum(table, 1)

        def draw(rows: np.ndarray) -> np.ndarray:
            points = generator.random(len(rows))
            return np.array(
                [
                    min(np.searchsorted(cumulative[r], p * cumulative[r, -1], side="right"), table.shape[1] - 1)
                    for r, p in zip(rows, points, strict=True)
                ],
                np.int64,
            )

        return draw_without(draw, lambda rows, ids: table[rows, ids], positives, count)
