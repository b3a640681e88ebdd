"""Exact search: every inner product, in blocks, and the best of them.

The oracle of all other indexes. The products are matrix products of the BLAS library that NumPy has; a block of them
stays in the cache while a compiled pass keeps those that beat the worst of the k best so far.
"""

from __future__ import annotations

import numpy as np

from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, SearchResult
from tfkit.retrieval.blas import FEW
from tfkit.retrieval.candidates import score_all

#: Queries and items of a block: its products fit in a core's cache.
BLOCK_QUERIES, BLOCK_ITEMS = 512, 256


class Exact(Index):
    """Computes all inner products. Always right, and on a few thousand items hard to beat.

    Search takes no effort. Memory: the items alone.

    >>> index = Exact().build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=2).ids.tolist()
    [2, 0]
    """

    _multiplies = True

    def __init__(self) -> None:
        pass

    def _build(self, threads: int) -> None:
        pass

    def _search(self, queries: np.ndarray, k: int) -> SearchResult:
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        if len(queries) <= FEW:
            for row, query in enumerate(queries):
                counts[row] = score_all(query, self.items, scores[row], ids[row])
            kernels.sort_heaps(scores, ids, counts)
            return SearchResult(scores, ids, np.ones(len(queries), bool))
        rows, numbers = np.arange(len(queries)), np.arange(len(self.items))
        room = np.empty(min(BLOCK_QUERIES, len(queries)) * min(BLOCK_ITEMS, len(self.items)), np.float32)
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            asked = queries[part]
            for first in range(0, len(self.items), BLOCK_ITEMS):
                some = slice(first, first + BLOCK_ITEMS)
                items = self.items[some]
                block = room[: len(asked) * len(items)].reshape(len(asked), len(items))
                np.matmul(asked, items.T, out=block)
                kernels.offer_block(block, numbers[some], rows[part], scores, ids, counts)
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids, np.ones(len(queries), bool))
