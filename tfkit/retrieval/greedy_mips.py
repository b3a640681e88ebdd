"""Greedy-MIPS: candidates by the largest single product of coordinates, as many as the budget allows.

Paper: Yu, Hsieh, Lei, Dhillon. A greedy approach for budgeted maximum inner product search. NIPS 2017,
https://arxiv.org/abs/1610.03317.

Differs: the sorted lists hold the values beside the positions, which doubles their memory and saves a cache miss a
step. Where a product appears in several lists at once the paper leaves the order open; here the list that had the last
candidate goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, IndexFileError, SearchResult, expect
from tfkit.retrieval.candidates import budgets, default_budget, places, score_all, score_chosen
from tfkit.retrieval.kernels import kernel


class GreedyMIPS(Index):
    """Screens the items by max_t q_t x_t, and scores those that come first.

    Each coordinate has a list of the items sorted by it. A query reads a list from its large end, or from its small
    end where its own coordinate is negative, and a tournament between the lists gives the item of the next largest
    product: O(budget log dimension) steps, however many items there are. That is little work where a few coordinates
    carry the inner product, and useless where none does.

    Search takes `budget`, the candidates that are scored (at least k); None: a sixteenth of the items, and at least ten
    for each item wanted. From a quarter of the items on all are scored, as that is faster.

    Memory: the items, and for each of their numbers a position and a value, three times the items in all.

    >>> index = GreedyMIPS().build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=1, budget=1).ids.tolist()
    [2]
    """

    def __init__(self) -> None:
        pass

    def _build(self, threads: int) -> None:
        self.order = np.empty((self.dimension, len(self.items)), np.int32)

        def sort(coordinate: int) -> None:
            self.order[coordinate] = np.argsort(-self.items[:, coordinate], kind="stable")

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(sort, range(self.dimension)))
        self._read()

    def _read(self) -> None:
        self.values = np.empty(self.order.shape, np.float32)
        for coordinate, order in enumerate(self.order):
            self.values[coordinate] = self.items[order, coordinate]

    def candidates(self, query: Any, budget: int) -> np.ndarray:
        """Returns the first items in the joint ranking by max_t q_t x_t, the largest first.

        Args:
            query: (dimension,).
            budget: how many items.

        Returns:
            int64, (budget,), or all items if that is fewer.

        Raises:
            ValueError: the index is not built, or an argument breaks its rule.
        """
        held = self._held()
        row, count = held._one("query", query)[0], len(held.items)
        chosen = np.empty(min(checks.integer("budget", budget, 1), count), np.int64)
        found = _screen(row, held.values, held.order, _lists(held.dimension), np.zeros(count, bool), chosen)
        return chosen[:found]

    def _search(self, queries: np.ndarray, k: int, *, budget: int | None = None) -> SearchResult:
        count = len(self.items)
        most = default_budget(count, k) if budget is None else checks.integer("budget", budget, 1)
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        chosen = places(count, max(most, k))
        visited, lists = np.zeros(count, bool), _lists(self.dimension)
        _look(queries, self.items, self.values, self.order, lists, visited, chosen, scores, ids, counts)
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        return [{"budget": budget} for budget in budgets(len(self.items), k)]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"order": self.order}

    def _kept(self) -> list[np.ndarray]:
        return [self.order, self.values]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        count = len(self.items)
        self.order = expect(arrays, "order", np.int32, (self.dimension, count), 0, count - 1)
        if any(np.bincount(row, minlength=count).max() > 1 for row in self.order):
            raise IndexFileError("damaged: its array 'order' holds a number twice in a row")
        self._read()


def _lists(dimension: int) -> tuple[np.ndarray, ...]:
    """Returns where each list stands, its step, its product, and the tournament's losers and their products."""
    leaves = 1 << (dimension - 1).bit_length()
    return (
        np.empty(dimension, np.int64), np.empty(dimension, np.int64), np.empty(leaves, np.float32),
        np.empty(leaves, np.int64), np.empty(leaves, np.float32),
    )  # fmt: skip


@kernel
def _play(products, losers, losing):  # type: ignore[no-untyped-def]
    """Plays the first tournament: each node of the tree keeps its loser, and the winner is returned."""
    leaves = products.shape[0]
    winners = np.empty(2 * leaves, np.int64)
    for leaf in range(leaves):
        winners[leaves + leaf] = leaf
    for node in range(leaves - 1, 0, -1):
        first, second = winners[2 * node], winners[2 * node + 1]
        if products[second] > products[first]:
            first, second = second, first
        winners[node] = first
        losers[node], losing[node] = second, products[second]
    return winners[1]


@kernel
def _screen(query, values, order, lists, visited, chosen):  # type: ignore[no-untyped-def]
    """Fills `chosen` with items in the order of their largest product, and leaves them marked as visited.

    Args:
        query: (dimension,).
        values, order: (dimension, items): each coordinate's values, the largest first, and the items that have them.
        lists: see `_lists`.
        visited: bool, (items,), all False.
        chosen: is filled; at most as long as there are items.

    Returns:
        How many were found.
    """
    position, step, products, losers, losing = lists
    dimension, count = values.shape
    leaves = products.shape[0]
    for t in range(leaves):
        products[t] = -np.inf
    for t in range(dimension):
        backwards = query[t] < 0
        position[t] = count - 1 if backwards else 0
        step[t] = -1 if backwards else 1
        products[t] = query[t] * values[t, position[t]]
    winner = _play(products, losers, losing)
    found = 0
    while found < chosen.shape[0]:
        at = position[winner]
        if at < 0 or at >= count:  # Every list is at its end.
            break
        item = order[winner, at]
        if not visited[item]:
            visited[item] = True
            chosen[found] = item
            found += 1
        # What other lists have brought already is passed over without a tournament.
        at += step[winner]
        while 0 <= at < count and visited[order[winner, at]]:
            at += step[winner]
        position[winner] = at
        product = query[winner] * values[winner, at] if 0 <= at < count else np.float32(-np.inf)
        node = (leaves + winner) >> 1
        while node > 0:
            other = losing[node]
            beaten = other > product
            loser = losers[node]
            losers[node] = winner if beaten else loser
            losing[node] = product if beaten else other
            winner = loser if beaten else winner
            product = other if beaten else product
            node >>= 1
    return found


@kernel
def _look(queries, items, values, order, lists, visited, chosen, scores, ids, counts):  # type: ignore[no-untyped-def]
    """Screens and scores for each query; `visited` is all False before and after."""
    everything = chosen.shape[0] >= items.shape[0]
    for row in range(queries.shape[0]):
        query, heap, held = queries[row], scores[row], ids[row]
        if everything:
            counts[row] = score_all(query, items, heap, held)
            continue
        found = _screen(query, values, order, lists, visited, chosen)
        for place in range(found):
            visited[chosen[place]] = False
        counts[row] = score_chosen(query, items, chosen[:found], heap, held, 0)
