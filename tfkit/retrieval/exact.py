"""Exact search: every inner product, in blocks, and the best of them.

The oracle of all other indexes. The products are matrix products of the BLAS library that NumPy has; a block of them
stays in the cache while a compiled pass keeps those that beat the worst of the k best so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import threadpoolctl

from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, SearchResult, joined

#: Queries and items of a block: its products fit in a core's cache.
BLOCK_QUERIES, BLOCK_ITEMS = 256, 2048


class Exact(Index):
    """Computes all inner products. Always right, and on a few thousand items hard to beat.

    Search takes no effort. Memory: the items alone.

    >>> index = Exact().build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=2).ids.tolist()
    [2, 0]
    """

    def __init__(self) -> None:
        pass

    def _build(self, threads: int) -> None:
        pass

    def _search(self, queries: np.ndarray, k: int) -> SearchResult:
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        rows, numbers = np.arange(len(queries)), np.arange(len(self.items))
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = slice(start, start + BLOCK_QUERIES)
            for first in range(0, len(self.items), BLOCK_ITEMS):
                some = slice(first, first + BLOCK_ITEMS)
                block = queries[part] @ self.items[some].T
                kernels.offer_block(block, numbers[some], rows[part], scores, ids, counts)
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids, np.ones(len(queries), bool))

    def _search_rows(self, rows: np.ndarray, k: int, threads: int, effort: Mapping[str, Any]) -> SearchResult:
        # One thread of BLAS in each of ours: theirs would wait for each other after every block.
        with blas().limit(limits=1):
            return joined(lambda part: self._search(part, k), rows, threads)


_BLAS: list[threadpoolctl.ThreadpoolController] = []


def blas() -> threadpoolctl.ThreadpoolController:
    """Returns what sets the threads of NumPy's BLAS; to look for it takes a millisecond, so that is done once."""
    if not _BLAS:
        _BLAS.append(threadpoolctl.ThreadpoolController().select(user_api="blas"))
    return _BLAS[0]
