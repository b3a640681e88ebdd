"""Wedge and diamond sampling: items drawn as often as their inner products ask, and those drawn most often scored.

Paper: Cohen, Lewis. Approximating matrix multiplication for pattern recognition tasks. Journal of Algorithms 30(2),
1999, https://doi.org/10.1006/jagm.1998.0989 (wedge). Ballard, Kolda, Pinar, Seshadhri. Diamond sampling for approximate
maximum all-pairs dot-product (MAD) search. ICDM 2015, https://arxiv.org/abs/1506.03872 (diamond; and signs).

Differs: one query is searched at a time, so that diamonds are drawn for one column. How many samples a coordinate gets
is its share rounded up or down at random, instead of drawn, which has the same mean and less variance. The counts of
diamonds stand for squares of inner products, so that items of large negative ones are candidates too; scoring drops
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, SearchResult
from tfkit.retrieval.candidates import budgets, default_budget, places, score_all, score_chosen
from tfkit.retrieval.kernels import kernel, next_random, started

#: Samples for each candidate, if nothing is said; and the most that an estimate is made of.
SAMPLES, MOST_SAMPLES = 2, 2**40


class WedgeSampling(Index):
    """Draws a coordinate t by |q_t| sum_j |x_jt|, an item j by |x_jt|, and counts the sign of q_t x_jt for it.

    The mean of an item's count is its inner product, times the samples over sum_jt |q_t x_jt|: what the method costs is
    in how much of that sum cancels. The items of the largest counts are scored.

    Search takes `candidates`, the items that are scored (at least k; None: a sixteenth of the items, and at least ten
    for each item wanted; from a quarter on all are scored, as that is faster), and `samples`, how many are drawn (None:
    2 for each candidate; from as many as the items have numbers on, all items are scored). The draws depend on the seed
    and the query alone.

    Args:
        seed: of the draws.

    Memory: the items, and for each of their numbers a position and a probability, three times the items in all.

    >>> index = WedgeSampling().build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=1, candidates=3).ids.tolist()
    [2]
    """

    _diamond = False

    def __init__(self, seed: int = 0) -> None:
        self.seed = checks.integer("seed", seed, 0, 2**63 - 1)

    def _build(self, threads: int) -> None:
        self.sums = np.abs(self.items).sum(axis=0, dtype=np.float64)
        self.keep = np.empty((self.dimension, len(self.items)), np.float32)
        self.alias = np.empty((self.dimension, len(self.items)), np.int32)
        for coordinate in range(self.dimension):
            _tabulate(self.items[:, coordinate].copy(), self.keep[coordinate], self.alias[coordinate])

    def estimate(self, query: Any, samples: int) -> np.ndarray:
        """Returns what the samples make of the inner products <q, x>, or, of diamonds, of their squares.

        Args:
            query: (dimension,).
            samples: how many are drawn, but for the rounding of each coordinate's share.

        Returns:
            float64, (items,). The mean over all seeds is the true value.

        Raises:
            ValueError: the index is not built, or an argument breaks its rule.
        """
        held = self._held()
        row, exponent = held._one("query", query)
        samples, count = checks.integer("samples", samples, 1, MOST_SAMPLES), len(held.items)
        counts, seen = np.zeros(count, np.float32), np.zeros(count, bool)
        first = np.empty(min(samples + held.dimension, count), np.int64)
        _draw(
            row, row.view(np.uint32), held.seed, held.items, held.sums, held.keep, held.alias, samples, held._diamond,
            counts, seen, first,
        )  # fmt: skip
        size = np.abs(row.astype(np.float64))
        mean = float(size @ held.sums) / samples * (size.sum() if held._diamond else 1.0)
        return counts * mean * 2.0 ** ((exponent + held._exponent) * (2 if held._diamond else 1))

    def _search(
        self, queries: np.ndarray, k: int, *, candidates: int | None = None, samples: int | None = None
    ) -> SearchResult:
        count = len(self.items)
        most = default_budget(count, k) if candidates is None else checks.integer("candidates", candidates, 1)
        chosen = places(count, max(most, k))
        drawn = SAMPLES * len(chosen) if samples is None else checks.integer("samples", samples, 1)
        if drawn >= self.items.size:  # A sample costs more than a product, so that a scan is better and faster.
            drawn, chosen = 0, places(count, count)
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        _look(
            queries, queries.view(np.uint32), self.seed, self.items, self.sums, self.keep, self.alias, drawn,
            self._diamond, np.empty(min(drawn + self.dimension, count), np.int64), chosen, scores, ids, counts,
        )  # fmt: skip
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        return [{"candidates": budget} for budget in budgets(len(self.items), k)]

    def _kept(self) -> list[np.ndarray]:
        return [self.sums, self.keep, self.alias]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._build(1)  # The tables follow from the items, in a second a gigabyte.


class DiamondSampling(WedgeSampling):
    """Draws a wedge and one more coordinate s by |q_s|, and counts x_js, with the signs of all three.

    The mean of an item's count is the square of its inner product, so that large ones stand out more than those of
    wedges do, and a count has as many values as there are numbers in the item. Each draw reads one number more.

    Search takes `candidates` and `samples`, and the constructor a `seed`, as those of `WedgeSampling`.
    """

    _diamond = True


@kernel
def _tabulate(values, keep, alias):  # type: ignore[no-untyped-def]
    """Makes the alias table of a coordinate, to draw an item by the size of its value in constant time.

    A place is drawn evenly, and then either its own item, with the probability `keep`, or that in `alias`. Where the
    value of the former is negative `keep` is too, and of the latter there stands -1 - its position.
    """
    count, total = values.shape[0], 0.0
    for item in range(count):
        total += abs(values[item])
    share = np.empty(count, np.float64)
    waiting = np.empty(count, np.int64)  # Those of less than an even share from the front, the others from the back.
    small, large = 0, count
    for item in range(count):
        share[item] = abs(np.float64(values[item])) / total * count if total > 0 else 1.0
        keep[item] = -1.0 if values[item] < 0 else 1.0
        alias[item] = item
        if share[item] < 1.0:
            waiting[small] = item
            small += 1
        else:
            large -= 1
            waiting[large] = item
    while small > 0 and large < count:
        small -= 1
        item, other = waiting[small], waiting[large]
        keep[item] *= share[item]
        alias[item] = -1 - other if values[other] < 0 else other
        share[other] -= 1.0 - share[item]
        if share[other] < 1.0:  # It joins those of less; its place in the back is free.
            large += 1
            waiting[small] = other
            small += 1


@kernel
def _draw(  # type: ignore[no-untyped-def]
    query, bits, seed, items, sums, keep, alias, samples, diamond, counts, seen, first
):
    """Draws samples.

    Args:
        query, bits: (dimension,), and the same as uint32: with the seed they are where the generator starts.
        items, sums, keep, alias: of the index.
        samples: how many; each coordinate's share is rounded up or down.
        diamond: whether they are diamonds.
        counts: float32, (items,), zeros that are added to.
        seen: bool, (items,): of what was drawn, set to True.
        first: is filled with the items drawn, in the order of their first draws.

    Returns:
        How many different items were drawn.
    """
    dimension, count = keep.shape
    state = started(seed, bits)
    total = 0.0
    ends = np.empty(dimension, np.float64)  # Of the stretches of |q_s| on a line.
    along = 0.0
    for t in range(dimension):
        total += abs(query[t]) * sums[t]
        along += abs(query[t])
        ends[t] = along
    found = 0
    if not total > 0:
        return found
    for t in range(dimension):
        state, word = next_random(state)
        share = samples * (abs(query[t]) * sums[t] / total)
        draws = np.int64(share + np.float64(word >> np.uint64(11)) * 2.0**-53)
        for _ in range(draws):
            state, word = next_random(state)
            place = np.int64(((word >> np.uint64(32)) * np.uint64(count)) >> np.uint64(32))
            own = keep[t, place]
            if np.float32(word & np.uint64(0xFFFFFF)) * np.float32(2.0**-24) < abs(own):
                item, negative = place, own < 0
            else:
                other = np.int64(alias[t, place])
                item, negative = (-1 - other, True) if other < 0 else (other, False)
            value = np.float32(-1.0) if negative != (query[t] < 0) else np.float32(1.0)
            if diamond:
                state, word = next_random(state)
                point = np.float64(word >> np.uint64(11)) * 2.0**-53 * along
                low, high = 0, dimension - 1
                while low < high:
                    middle = (low + high) >> 1
                    if ends[middle] > point:
                        high = middle
                    else:
                        low = middle + 1
                value *= -items[item, low] if query[low] < 0 else items[item, low]
            counts[item] += value
            if not seen[item]:
                seen[item] = True
                first[found] = item
                found += 1
    return found


@kernel
def _select(counts, first, wanted):  # type: ignore[no-untyped-def]
    """Returns the count that is in place `wanted` from the largest on, of the items in `first` (Hoare's selection)."""
    values = np.empty(first.shape[0], np.float32)
    for place in range(first.shape[0]):
        values[place] = counts[first[place]]
    low, high = 0, first.shape[0] - 1
    while low < high:
        pivot = values[(low + high) >> 1]
        left, right = low, high
        while left <= right:
            while values[left] > pivot:
                left += 1
            while values[right] < pivot:
                right -= 1
            if left <= right:
                values[left], values[right] = values[right], values[left]
                left += 1
                right -= 1
        if wanted - 1 <= right:
            high = right
        elif wanted - 1 >= left:
            low = left
        else:
            break
    return values[wanted - 1]


@kernel
def _choose(counts, first, seen, chosen, k):  # type: ignore[no-untyped-def]
    """Fills `chosen` with the items of the largest counts, and of equal ones with those drawn first.

    Where fewer than k were drawn the first items that were not drawn fill up. Returns how many are chosen.
    """
    most, found = chosen.shape[0], first.shape[0]
    if found <= most:
        chosen[:found] = first
        item = 0
        while found < k:
            if not seen[item]:
                chosen[found] = item
                found += 1
            item += 1
        return found
    least = _select(counts, first, most)
    number = 0
    for place in range(found):
        if counts[first[place]] > least:
            chosen[number] = first[place]
            number += 1
    for place in range(found):
        if counts[first[place]] == least and number < most:
            chosen[number] = first[place]
            number += 1
    return number


@kernel
def _look(  # type: ignore[no-untyped-def]
    queries, bits, seed, items, sums, keep, alias, samples, diamond, first, chosen, scores, ids, counts
):
    """Draws, chooses and scores for each query."""
    drawn, seen = np.zeros(items.shape[0], np.float32), np.zeros(items.shape[0], np.bool_)
    for row in range(queries.shape[0]):
        if chosen.shape[0] >= items.shape[0]:
            counts[row] = score_all(queries[row], items, scores[row], ids[row])
            continue
        found = _draw(
            queries[row], bits[row], seed, items, sums, keep, alias, samples, diamond, drawn, seen, first
        )  # fmt: skip
        number = _choose(drawn, first[:found], seen, chosen, scores.shape[1])
        for place in range(found):
            drawn[first[place]] = 0
            seen[first[place]] = False
        counts[row] = score_chosen(queries[row], items, chosen[:number], scores[row], ids[row], 0)
