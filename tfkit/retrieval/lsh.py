"""Simple-LSH and norm-ranging LSH: signs of random projections, and the buckets that agree with the query first.

Paper: Neyshabur, Srebro. On symmetric and asymmetric LSHs for inner product search. ICML 2015,
https://arxiv.org/abs/1410.5518. Yan, Li, Dai, Chen, Cheng. Norm-ranging LSH for maximum inner product search. NeurIPS
2018, https://arxiv.org/abs/1809.08782, for `NormRangingLSH`.

Differs: simple-LSH has one table, whose buckets are all ranked by the query, instead of several that are looked up. The
bits of a code are all signs; those that the number of a range takes come on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, IndexFileError, SearchResult, expect
from tfkit.retrieval.candidates import budgets, default_budget, places, score_all, score_chosen
from tfkit.retrieval.euclidean import SimpleLSHTransform
from tfkit.retrieval.kernels import kernel
from tfkit.retrieval.vectors import BLOCK_ROWS, norms_of

#: The paper's epsilon of norm-ranging: how much an angle is taken to be smaller than what the signs say.
CAUTION = 0.2
WORD = 64
#: No normal deviate is beyond this; with what a file holds beyond it a product could overflow.
MOST_DRAWN = 100.0


class SimpleLSH(Index):
    """Ranks buckets of equal codes by how many signs they share with the query, and scores the items of the first.

    A sign of a random projection is shared with probability 1 - angle / pi, and over `SimpleLSHTransform` the cosine of
    the angle is <q, x> / (M |q|), with M the largest norm. Where few items have long vectors, all cosines are small and
    the signs say little: see `NormRangingLSH`.

    Search takes `candidates`, the items that are scored (at least k); None: a sixteenth of the items, and at least ten
    for each item wanted. From a quarter of the items on all are scored, as that is faster.

    Args:
        bits: signs of a code, 1 to 256. Many tell items apart, few make large buckets that are ranked at once.
        seed: of the projections.

    Memory: the items, a code and a position each, and for each bucket its code.

    >>> index = SimpleLSH(bits=16, seed=1).build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=1, candidates=3).ids.tolist()
    [2]
    """

    #: Parts by norm, of equally many items, each with an M of its own.
    ranges = 1

    _multiplies = True

    def __init__(self, bits: int = 64, seed: int = 0) -> None:
        self.bits = checks.integer("bits", bits, 1, 256)
        self.seed = checks.integer("seed", seed, 0)

    def _build(self, threads: int) -> None:
        rng = np.random.default_rng(self.seed)
        projections = rng.normal(size=(self.bits, self.dimension + 1)).astype(np.float32)
        parts, bounds = self._parts()
        codes = np.empty((len(self.items), -(-self.bits // WORD)), np.uint64)
        for rows, bound in zip(parts, bounds, strict=True):
            transform = SimpleLSHTransform(bound)
            for start in range(0, len(rows), BLOCK_ROWS):
                some = rows[start : start + BLOCK_ROWS]
                codes[some] = packed(transform.items(self.items[some]) @ projections.T)
        self._take(codes, projections)

    def _parts(self) -> tuple[list[np.ndarray], list[float]]:
        """Returns the items of each range, and the largest norm among them."""
        norms = norms_of(self.items)
        parts = np.array_split(np.argsort(norms, kind="stable"), min(self.ranges, len(norms)))
        return parts, [float(norms[rows].max()) for rows in parts]

    def _take(self, codes: np.ndarray, projections: np.ndarray) -> None:
        """Keeps the codes of the items, (items, words), and makes the buckets from them."""
        self.codes, self.projections = codes, projections
        parts, bounds = self._parts()
        part = np.empty(len(codes), np.int64)
        for number, rows in enumerate(parts):
            part[rows] = number
        self.order = np.lexsort([np.arange(len(codes)), *codes.T, part])
        sorted_codes, sorted_part = codes[self.order], part[self.order]
        new = np.ones(len(codes), bool)
        new[1:] = (np.diff(sorted_part) != 0) | (sorted_codes[1:] != sorted_codes[:-1]).any(axis=1)
        starts = np.flatnonzero(new)
        self.starts = np.append(starts, len(codes))
        self.bucket_codes = np.ascontiguousarray(sorted_codes[starts].T)  # (words, buckets)
        #: Where the buckets of each range begin, and the end.
        self.part_starts = np.searchsorted(sorted_part[starts], np.arange(len(parts) + 1))
        # The inner product, in norms of the query, that so many signs apart speak for: M cos(angle).
        apart = np.arange(self.bits + 1) / self.bits
        caution = CAUTION if self.ranges > 1 else 0.0
        promised = np.multiply.outer(bounds, np.cos(np.pi * (1 - caution) * apart))  # (ranges, bits + 1)
        longest_first = np.repeat(-np.arange(len(bounds)), self.bits + 1)
        ranks = np.empty(promised.size, np.int32)
        ranks[np.lexsort([longest_first, -promised.ravel()])] = np.arange(promised.size)
        self.ranks = ranks.reshape(promised.shape)

    def _search(self, queries: np.ndarray, k: int, *, candidates: int | None = None) -> SearchResult:
        count = len(self.items)
        most = default_budget(count, k) if candidates is None else checks.integer("candidates", candidates, 1)
        asked = packed(queries @ self.projections[:, :-1].T)
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        _look(
            queries, asked, self.items, self.order, self.starts, self.bucket_codes, self.part_starts, self.ranks,
            places(count, max(most, k)), scores, ids, counts,
        )  # fmt: skip
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        return [{"candidates": count} for count in budgets(len(self.items), k)]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"codes": self.codes, "projections": self.projections}

    def _kept(self) -> list[np.ndarray]:
        return [*self._arrays().values(), self.order, self.starts, self.bucket_codes, self.part_starts, self.ranks]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        codes = expect(arrays, "codes", np.uint64, (len(self.items), -(-self.bits // WORD)))
        if self.bits % WORD and (codes[:, -1] >> np.uint64(self.bits % WORD)).any():
            raise IndexFileError(f"damaged: its array 'codes' holds more than {self.bits} bits")
        shape = (self.bits, self.dimension + 1)
        self._take(codes, expect(arrays, "projections", np.float32, shape, -MOST_DRAWN, MOST_DRAWN))


class NormRangingLSH(SimpleLSH):
    """Simple-LSH in parts of similar norm, each with an M of its own, so that the cosines in each are large.

    Buckets of all parts are ranked by the inner product that the shared signs speak for. Parts of short items are not
    even looked at once enough candidates come before their best.

    Search takes `candidates`, as `SimpleLSH` does.

    Args:
        bits: signs of a code, 1 to 256.
        ranges: parts, of equally many items, 1 to 256.
        seed: of the projections.
    """

    def __init__(self, bits: int = 64, ranges: int = 32, seed: int = 0) -> None:
        super().__init__(bits, seed)
        self.ranges = checks.integer("ranges", ranges, 1, 256)


def packed(values: np.ndarray) -> np.ndarray:
    """Returns the signs as bits, 1 where a value is not negative: (rows, bits) to uint64, (rows, words)."""
    bits = np.zeros((len(values), -(-values.shape[1] // WORD) * WORD), bool)
    bits[:, : values.shape[1]] = values >= 0
    return np.packbits(bits, axis=1, bitorder="little").view("<u8").astype(np.uint64)


@kernel
def _ones(word):  # type: ignore[no-untyped-def]
    """Returns how many bits of a word are set."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((word * np.uint64(0x0101010101010101)) >> np.uint64(56))


@kernel
def _measure(codes, asked, starts, apart, held):  # type: ignore[no-untyped-def]
    """Writes by how many bits each bucket's code differs from the query's, and counts the items by that.

    Args:
        codes: (words, buckets).
        asked: (words,), the query's.
        starts: (buckets + 1,): where the items of each bucket begin.
        apart: (buckets,), is filled.
        held: (4, bits + 1), is filled: four histograms to be summed, so that no sum waits for the one before.
    """
    for bucket in range(apart.shape[0]):
        apart[bucket] = _ones(codes[0, bucket] ^ asked[0])
    for word in range(1, asked.shape[0]):
        for bucket in range(apart.shape[0]):
            apart[bucket] += _ones(codes[word, bucket] ^ asked[word])
    held[:] = 0
    for bucket in range(apart.shape[0]):
        held[bucket & 3, apart[bucket]] += starts[bucket + 1] - starts[bucket]


@kernel
def _choose(codes, asked, order, starts, parts, ranks, apart, held, by_rank, chosen):  # type: ignore[no-untyped-def]
    """Fills `chosen` with the items of the first buckets: all before a rank, and as many of that as there is room for.

    Args:
        order: the items, bucket by bucket.
        parts: where the buckets of each range begin.
        ranks: of the ranges and distances, each once; they rise with the distance, and those of
            distance 0 fall with the range.
        apart, held, by_rank: room for distances and counts.
    """
    most = chosen.shape[0]
    by_rank[:] = 0
    lowest = parts.shape[0] - 1  # Of the ranges that are looked at.
    while lowest > 0:
        # Ranges of shorter items are left alone once enough items come before the best of theirs.
        if by_rank[: ranks[lowest - 1, 0]].sum() >= most:
            break
        lowest -= 1
        first, end = parts[lowest], parts[lowest + 1]
        _measure(codes[:, first:end], asked, starts[first : end + 1], apart[first:end], held)
        for distance in range(ranks.shape[1]):
            by_rank[ranks[lowest, distance]] = held[:, distance].sum()
    last, before = 0, 0
    while before + by_rank[last] < most:
        before += by_rank[last]
        last += 1
    found, room = 0, most - before
    for part in range(lowest, parts.shape[0] - 1):
        reach = 0
        while reach < ranks.shape[1] and ranks[part, reach] <= last:
            reach += 1
        for bucket in range(parts[part], parts[part + 1]):
            if apart[bucket] >= reach:
                continue
            first, end = starts[bucket], starts[bucket + 1]
            if ranks[part, apart[bucket]] == last:
                end = min(end, first + room)
                room -= end - first
            for place in range(first, end):
                chosen[found] = order[place]
                found += 1


@kernel
def _look(  # type: ignore[no-untyped-def]
    queries, asked, items, order, starts, codes, parts, ranks, chosen, scores, ids, counts
):
    """Ranks the buckets, chooses items from the first of them, and scores what is chosen."""
    apart = np.empty(codes.shape[1], np.int16)
    held, by_rank = np.empty((4, ranks.shape[1]), np.int64), np.empty(ranks.size, np.int64)
    for row in range(queries.shape[0]):
        if chosen.shape[0] >= items.shape[0]:
            counts[row] = score_all(queries[row], items, scores[row], ids[row])
        else:
            _choose(codes, asked[row], order, starts, parts, ranks, apart, held, by_rank, chosen)
            counts[row] = score_chosen(queries[row], items, chosen, scores[row], ids[row], 0)
