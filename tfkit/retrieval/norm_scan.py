"""Norm scan: items in the order of their norms, and a stop that is proven.

By Cauchy and Schwarz <q, x> <= |q| |x|: once the k-th best score so far is at least |q| times the next norm, no item
behind it is better. On skewed norms, as matrix factorisation gives them, that comes early.

Paper: Teflioudi, Gemulla. Exact and approximate maximum inner product search with LEMP. ACM TODS 42(1), 2016,
https://doi.org/10.1145/2996452, of which this is the scan by length.

Differs: no buckets with algorithms of their own; blocks grow along the scan, and a bound on rounding errors is part of
the proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, SearchResult, expect_permutation
from tfkit.retrieval.blas import FEW
from tfkit.retrieval.candidates import score_range
from tfkit.retrieval.vectors import norms_of

#: Items of the first block, and of the largest; each is twice the one before.
FIRST_BLOCK, LARGEST_BLOCK = 128, 4096
BLOCK_QUERIES = 256


class NormScan(Index):
    """Scans the items from the largest norm to the smallest, until no other can be better.

    Search takes `budget`, the most items that are looked at (the norm prefix; at least k); None: as many as the proof
    needs. The result's `exact` says for which queries it was reached.

    Memory: the items twice, in the order given and by norm, and a norm each.
    """

    _multiplies = True

    def __init__(self) -> None:
        pass

    def _build(self, threads: int) -> None:
        norms = norms_of(self.items)
        self.order = np.argsort(-norms, kind="stable").astype(np.int64, copy=False)
        self._sort(norms[self.order])

    def _sort(self, norms: np.ndarray) -> None:
        self.norms = norms
        self.sorted_items = self.items[self.order]
        #: Of computed scores beyond the true ones, for unit norms: a sum of d float32 products is off by less. All
        #: norms that come here are moderate, so what products lose by underflow is far below it.
        self.slack = self.dimension * 2.0**-23

    def _search(self, queries: np.ndarray, k: int, *, budget: int | None = None) -> SearchResult:
        count = len(self.items)
        most = count if budget is None else min(max(checks.integer("budget", budget, 1), k), count)
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        exact = np.zeros(len(queries), bool)
        lengths = norms_of(queries)
        if len(queries) <= FEW:
            for row, query in enumerate(queries):
                counts[row], exact[row] = _scan(
                    query,
                    lengths[row],
                    self.sorted_items,
                    self.norms,
                    self.order,
                    most,
                    self.slack,
                    scores[row],
                    ids[row],
                )
            kernels.sort_heaps(scores, ids, counts)
            return SearchResult(scores, ids, exact)
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = np.arange(start, min(start + BLOCK_QUERIES, len(queries)))
            first, size = 0, FIRST_BLOCK
            while len(part) and first < most:
                last = min(first + size, most)
                block = queries[part] @ self.sorted_items[first:last].T
                kernels.offer_block(block, self.order[first:last], part, scores, ids, counts)
                full = counts[part] == k
                # The heap's worst is on top. Both scores may be off by the slack.
                following = self.norms[last] if last < count else 0.0
                bound = lengths[part] * (following + self.slack * (following + self.norms[0]))
                done = (full & (scores[part, 0] >= bound)) | (last == count)
                exact[part[done]] = True
                part = part[~done]
                first, size = last, min(2 * size, LARGEST_BLOCK)
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids, exact)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        budgets = [int(share * len(self)) for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
        return [*({"budget": budget} for budget in budgets if budget >= k), {}]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"order": self.order}

    def _kept(self) -> list[np.ndarray]:
        return [self.order, self.norms, self.sorted_items]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.order = expect_permutation(arrays, "order", len(self.items))
        self._sort(norms_of(self.items)[self.order])


@kernels.kernel
def _scan(query, length, items, norms, order, most, slack, heap, held):  # type: ignore[no-untyped-def]
    """Scans for one query; returns how many items the heap holds, and whether they are proven to be the best."""
    count = 0
    for first in range(0, most, FIRST_BLOCK):
        last = min(first + FIRST_BLOCK, most)
        count = score_range(query, items, order, first, last, heap, held, count)
        if last == items.shape[0]:
            return count, True
        if count == heap.shape[0] and heap[0] >= length * (norms[last] + slack * (norms[last] + norms[0])):
            return count, True
    return count, False
