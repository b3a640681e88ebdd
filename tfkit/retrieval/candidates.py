"""Candidates: what the methods share that pick some items, score them, and keep the best."""

from __future__ import annotations

import numpy as np

from tfkit.retrieval.kernels import dot, kernel, offer

#: A candidate that is picked costs as much as so many in a scan, so beyond that share of the items all are scored.
SCAN_SHARE = 4


def default_budget(items: int, k: int) -> int:
    """Returns how many candidates are scored if nothing is said: a sixteenth of the items, and ten for each wanted."""
    return max(items // 16, 10 * k)


def budgets(items: int, k: int) -> list[int]:
    """Returns numbers of candidates to choose from, from a few to all items."""
    shares = (1 / 1024, 1 / 512, 1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8)
    return [*sorted({int(share * items) for share in shares if share * items >= k}), items]


@kernel
def score_chosen(query, items, chosen, heap, held, count):  # type: ignore[no-untyped-def]
    """Offers the chosen items to a heap that holds `count`, and returns how many it holds then."""
    for place in range(chosen.shape[0]):
        item = chosen[place]
        score = dot(query, items[item])
        if count < heap.shape[0] or score >= heap[0]:
            count = offer(heap, held, count, score, item)
    return count


@kernel
def score_range(query, items, order, first, last, heap, held, count):  # type: ignore[no-untyped-def]
    """Offers the rows `first` to `last` - 1 of `items` to a heap, under their ids in `order`; returns what it holds."""
    for place in range(first, last):
        score = dot(query, items[place])
        if count < heap.shape[0] or score >= heap[0]:
            count = offer(heap, held, count, score, order[place])
    return count


@kernel
def score_all(query, items, heap, held):  # type: ignore[no-untyped-def]
    """Offers all items to an empty heap, and returns how many it holds then."""
    count = 0
    for item in range(items.shape[0]):
        score = dot(query, items[item])
        if count < heap.shape[0] or score >= heap[0]:
            count = offer(heap, held, count, score, item)
    return count


def places(items: int, wanted: int) -> np.ndarray:
    """Returns room for the ids of so many candidates: of all items, where a scan is faster than to pick them."""
    return np.empty(items if SCAN_SHARE * wanted >= items else wanted, np.int64)
