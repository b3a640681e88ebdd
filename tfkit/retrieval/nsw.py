"""NSW: a walk over a graph of neighbours, begun at the items of the largest norms.

Paper: Malkov, Ponomarenko, Logvinov, Krylov. Approximate nearest neighbor algorithm based on navigable small world
graphs. Information Systems 45, 2014, https://doi.org/10.1016/j.is.2013.10.006 (`hierarchy=False`); Malkov, Yashunin.
Efficient and robust approximate nearest neighbor search using hierarchical navigable small world graphs. IEEE TPAMI
42(4), 2020, https://arxiv.org/abs/1603.09320 (`hierarchy=True`).

Differs: both papers seek near neighbours. For inner products a plain graph fails where norms are skewed: all items
name the same few large ones as neighbours, and those name each other. Three things mend that.

- Which items are the best for a query does not change when all items are shifted. Neighbours are found by the inner
  product of what is left when their mean is taken away; a popularity that all items share ties none of them.
- Links are spread by angle: none goes to an item whose direction is nearer to that of a link before it. Large items
  are linked first, but in all directions.
- Items of the largest norms, as many as have a fair chance to be among the best, are scanned at the start by a
  matrix product, and the walk begins at the best of them. Where all norms are equal there are none.

New items are linked in batches, whose items do not see each other; so threads share the work, and however many there
are, the graph is the same. Without a hierarchy a list holds `4 * degree` links; a full one takes no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from statistics import NormalDist
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import graph, kernels
from tfkit.retrieval.base import Index, IndexFileError, SearchResult, expect
from tfkit.retrieval.blas import FEW
from tfkit.retrieval.exact import BLOCK_ITEMS, BLOCK_QUERIES
from tfkit.retrieval.vectors import BLOCK_ROWS, norms_of

SPACES = ("centred", "inner_product", "euclidean", "angle")
#: New items of a batch: at most so many, and at most this share of those that are linked.
LARGEST_BATCH, BATCH_SHARE = 2048, 1 / 16
#: The share of the items that is kept a second time, by norm, to be scanned.
PREFIX_SHARE, LEAST_PREFIX = 0.1, 256
#: An item is scanned if its chance to be among the best is at least 1 / (this * ef): the longer the walk, the more.
SCAN_CHANCE = 10
#: Items that are scanned for each node whose links are followed, at most.
SCAN_PER_NODE = 25
#: Items whose norm is a smaller part of the largest have no direction: float32 has no digits left for it.
LEAST_NORM = 2.0**-50
_HIGHEST_LEVEL = 12
_QUANTILES = 256


class NSW(Index):
    """Walks from item to neighbouring item towards larger inner products.

    Search takes `ef`, of how many of the best items found so far the links are followed: more finds more and takes
    longer. From the number of items on, all of them are scanned and the result is exact. `scan` is how many items of
    the largest norms are scanned first (None: as the norms suggest), and `starts` from how many random items walks
    begin after that (None: from 1 without a hierarchy, else from none).

    Memory: the items, a tenth of them once more, and `8 * degree` bytes a link list (twice that without a hierarchy).

    Args:
        degree: links that a new item gets; the lists of the ground hold twice as many.
        construction: length of the list of candidates when links are sought.
        space: which items are neighbours. "centred": see above; "inner_product": of large inner product; "euclidean":
            near in the transformation that gives each item one more coordinate, sqrt(M^2 - |x|^2), after which inner
            product and distance agree (Bachrach et al., https://doi.org/10.1145/2645710.2645741); "angle": of large
            cosine. The walk of a search always compares inner products of the items as they are.
        hierarchy: have levels above the ground and spread links, as in the second paper; else none, and links to the
            nearest, as in the first.
        seed: of the order in which items are linked, of their levels, and of random starts.

    >>> index = NSW().build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=2).ids.tolist()
    [2, 0]
    """

    _multiplies = True

    def __init__(
        self,
        degree: int = 16,
        construction: int = 100,
        *,
        space: str = "centred",
        hierarchy: bool = True,
        seed: int = 0,
    ) -> None:
        self.degree = checks.integer("degree", degree, 2, 256)
        self.construction = checks.integer("construction", construction, 1, 1 << 16)
        self.space = checks.choice("space", space, SPACES)
        if not isinstance(hierarchy, bool):
            raise checks.error("hierarchy", "True or False", hierarchy)
        self.hierarchy = hierarchy
        self.seed = checks.integer("seed", seed, 0)

    def _build(self, threads: int) -> None:
        self.levels = np.empty(0, np.uint8)
        self.links = np.empty((0, self._width), np.int32)
        self.upper = np.empty((0, self.degree), np.int32)
        self.entry = -1
        self._extend(0, threads)

    @property
    def _width(self) -> int:
        return self.degree * (2 if self.hierarchy else 4)

    def _extend(self, first: int, threads: int) -> None:
        count = len(self.items) - first
        rng = np.random.default_rng([self.seed, first])
        new = first + rng.permutation(count)
        levels = np.zeros(count, np.uint8)
        if self.hierarchy:
            drawn = -np.log1p(-rng.random(count)) / math.log(self.degree)
            levels[:] = np.minimum(drawn, _HIGHEST_LEVEL)
        linked, entry = (first, int(self.entry)) if first else (1, int(new[0]))
        self.levels = np.concatenate([self.levels, levels])
        self.links = _lengthened(self.links, count)
        self.upper = _lengthened(self.upper, int(levels.sum()))
        self.first_row = np.cumsum(self.levels, dtype=np.int64) - self.levels
        known = _known(self.items, self.space)
        earlier = np.concatenate([np.arange(first), new])  # In the order in which they were linked, or will be.
        new = new[linked - first :]
        with ThreadPoolExecutor(threads) as pool:
            while len(new):
                batch = new[: min(LARGEST_BATCH, max(1, int(BATCH_SHARE * linked)))]
                higher = np.flatnonzero(self.levels[batch] > self.levels[entry])
                batch = batch[: higher[0] + 1] if len(higher) else batch
                # The first paper begins at random, the second at the top.
                entries = np.full(len(batch), entry)
                if not self.hierarchy:
                    entries = earlier[rng.integers(0, linked, len(batch))]
                self._link(batch, known, entries, pool, threads)
                entry = int(batch[-1]) if len(higher) else entry
                linked, new = linked + len(batch), new[len(batch) :]
        self._derive()

    def _link(
        self, batch: np.ndarray, known: np.ndarray, entries: np.ndarray, pool: ThreadPoolExecutor, threads: int
    ) -> None:
        """Links new items with those that are linked; of the batch, none sees another."""
        top = int(self.levels[entries[0]])
        shared = (self.items, known, self.levels, self.links, self.upper, self.first_row)
        shares = min(threads, 1 + len(batch) // 32)
        sought = (top, self.construction, self.degree, self.hierarchy)
        parts = np.array_split(batch, shares), np.array_split(entries, shares)

        def propose(part: np.ndarray, starts: np.ndarray) -> None:
            graph.propose(part, *shared, starts, *sought)

        def connect(share: int) -> None:
            graph.connect(batch, *shared, top, self.hierarchy, share, shares)

        list(pool.map(propose, *parts))
        list(pool.map(connect, range(shares)))

    def _derive(self) -> None:
        """Sets what follows from the items and the levels."""
        self.first_row = np.cumsum(self.levels, dtype=np.int64) - self.levels
        self.entry = int(np.argmax(self.levels))
        norms = norms_of(self.items)
        self.order = np.argsort(-norms, kind="stable").astype(np.int64, copy=False)
        self.norms = norms[self.order]
        self.prefix_items = self.items[self.order[: max(LEAST_PREFIX, int(PREFIX_SHARE * len(norms)))]]
        self._thresholds: dict[int, float] = {}
        self._lengths: dict[tuple[int, int], int] = {}
        self._spare: list[np.ndarray] = []

    def _search(
        self, queries: np.ndarray, k: int, *, ef: int = 64, scan: int | None = None, starts: int | None = None
    ) -> SearchResult:
        return self._find(queries, k, ef, scan, starts)[0]

    def evaluations(
        self, queries: Any, k: int = 10, *, ef: int = 64, scan: int | None = None, starts: int | None = None
    ) -> np.ndarray:
        """Returns how many inner products a search computes for each query; arguments as there.

        Returns:
            int64, (queries,), or () for a query that came as a vector.
        """
        held = self._held()
        rows, _, single = held._asked("queries", queries)
        computed = held._find(rows, checks.integer("k", k, 1, len(held.items)), ef, scan, starts)[1]
        return computed.reshape(()) if single else computed

    def _find(
        self, queries: np.ndarray, k: int, ef: int, scan: int | None, starts: int | None
    ) -> tuple[SearchResult, np.ndarray]:
        """Searches; returns the result and the inner products computed for each query."""
        count = len(self.items)
        ef = min(checks.integer("ef", ef, 0), count)
        first = self._scan_length(k, ef) if scan is None else min(checks.integer("scan", scan, 0), count)
        walks = (0 if self.hierarchy else 1) if starts is None else min(checks.integer("starts", starts, 0), count)
        if ef == count:
            scores, ids, counts = kernels.empty_heaps(len(queries), k)
            self._scan(queries, count, scores, ids, counts)
            return SearchResult(scores, ids, np.ones(len(queries), bool)), np.full(len(queries), count, np.int64)
        top = int(self.levels[self.entry]) if self.hierarchy else -1
        known = (self.items, self.links, self.upper, self.first_row, self.entry, top, walks)
        bits, seed = queries.view(np.uint32), self.seed % 2**63
        marks = self._marks() if ef else None
        if ef and 0 < len(queries) <= FEW and first <= len(self.prefix_items):
            scores, ids, counts, fewest, computed = graph.find_few(
                queries, bits, seed, *known, self.prefix_items, self.order, first, ef, k, marks
            )
        else:
            scores, ids, counts = kernels.empty_heaps(len(queries), max(k, ef))
            self._scan(queries, first, scores, ids, counts)
            computed = np.zeros(len(queries), np.int64)
            if ef:
                graph.explore(queries, bits, seed, *known, self.order[:first], ef, scores, ids, counts, marks, computed)
            scores, ids = np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(ids[:, :k])
            fewest = counts.min(initial=k)
            computed += first
        if marks is not None:
            self._spare.append(marks)
        if fewest < k:  # Items of which no walk came to know, as if there were no links.
            short = np.flatnonzero(counts < k)
            found = self._find(queries[short], k, count, None, None)[0]
            scores[short], ids[short] = found.scores, found.ids
            computed[short] += count
        return SearchResult(scores, ids), computed

    def _scan(self, queries: np.ndarray, length: int, scores: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> None:
        """Fills the heaps from the items of the largest norms, and sorts them."""
        whole = length == len(self.items)  # Then those as they are given need no gathering.
        for start in range(0, len(queries), BLOCK_QUERIES):
            part = np.arange(start, min(start + BLOCK_QUERIES, len(queries)))
            for first in range(0, length, BLOCK_ITEMS):
                last = min(first + BLOCK_ITEMS, length)
                names = np.arange(first, last) if whole else self.order[first:last]
                if whole:
                    some = self.items[first:last]
                elif last <= len(self.prefix_items):
                    some = self.prefix_items[first:last]
                else:
                    some = self.items[names]
                kernels.offer_block(queries[part] @ some.T, names, part, scores, ids, counts)
        kernels.sort_heaps(scores, ids, counts)

    def _scan_length(self, k: int, ef: int) -> int:
        """Returns how many items have a fair chance, by their norms, to be among the k best.

        The score of an item is taken as normally distributed, its norm being the deviation. The k-th best score is
        where k items are to be expected above.
        """
        if k not in self._thresholds:
            ends = np.unique(np.geomspace(1, len(self.norms), _QUANTILES).astype(int))
            weights, norms = np.diff(ends, prepend=0), np.maximum(self.norms[ends - 1], LEAST_NORM * self.norms[0])
            low, high = 0.0, 10.0 * float(norms[0])
            norms = np.where(norms > 0, norms, 1.0)  # Where all are 0 the threshold is too.
            for _ in range(40):
                middle = (low + high) / 2
                above = sum(w * math.erfc(middle / (n * math.sqrt(2))) / 2 for w, n in zip(weights, norms, strict=True))
                low, high = (middle, high) if above > k else (low, middle)
            self._thresholds[k] = low
        if (k, ef) not in self._lengths:
            deviations = NormalDist().inv_cdf(1 - 1 / (SCAN_CHANCE * max(ef, 1)))
            length = int(np.searchsorted(-self.norms, -self._thresholds[k] / deviations, side="right"))
            self._lengths[k, ef] = min(length, SCAN_PER_NODE * ef)
        return self._lengths[k, ef]

    def _marks(self) -> np.ndarray:
        """Returns marks of visited nodes for one search: those of an earlier one, or new ones."""
        try:
            return self._spare.pop()
        except IndexError:
            return np.zeros(len(self.items) + 1, np.uint8)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        if self.hierarchy:
            return [{"ef": max(1, int(k * times))} for times in (0.5, 1, 2, 4, 8, 16, 32, 64)]
        return [
            {"ef": k * width, "starts": starts}
            for width, starts in ((1, 1), (1, 2), (2, 2), (4, 4), (8, 8), (16, 16), (32, 32))
        ]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"levels": self.levels, "links": self.links, "upper": self.upper}

    def _kept(self) -> list[np.ndarray]:
        return [*self._arrays().values(), self.first_row, self.order, self.norms, self.prefix_items]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        count = len(self.items)
        self.levels = expect(arrays, "levels", np.uint8, (count,), 0, _HIGHEST_LEVEL if self.hierarchy else 0)
        self.links = expect(arrays, "links", np.int32, (count, self._width), -1, count - 1)
        rows = int(self.levels.sum(dtype=np.int64))
        self.upper = expect(arrays, "upper", np.int32, (rows, self.degree), -1, count - 1)
        # A link leads only to nodes that have a row on its level.
        first_row = np.cumsum(self.levels, dtype=np.int64) - self.levels
        level = np.arange(rows) - np.repeat(first_row, self.levels) + 1
        if ((self.upper >= 0) & (self.levels[self.upper] < level[:, None])).any():
            raise IndexFileError("damaged: a link leads above the levels of its item")
        self._derive()


def _known(items: np.ndarray, space: str) -> np.ndarray:
    """Returns what `graph.similarity` needs to know of each item, float32, (items, 4)."""
    known = np.zeros((len(items), 4), np.float32)
    squares = norms_of(items) ** 2
    largest = squares.max()
    known[:, [graph.SCALE, graph.SPREAD]] = 1
    if space == "centred":
        centre = items.mean(axis=0, dtype=np.float64)
        offset = np.empty(len(items))
        for start in range(0, len(items), BLOCK_ROWS):  # The product takes a copy in float64.
            offset[start : start + BLOCK_ROWS] = centre @ centre / 2 - items[start : start + BLOCK_ROWS] @ centre
        known[:, graph.OFFSET] = offset  # <a - c, b - c> = <a, b> + offset of a + offset of b
        squares = np.maximum(squares + 2 * offset, 0)
    if space in ("centred", "angle"):
        least = max(float(largest) * LEAST_NORM**2, np.finfo(np.float64).tiny)
        inverse = np.where(squares > least, 1 / np.sqrt(np.maximum(squares, least)), 0)
        known[:, graph.SPREAD] = inverse
        if space == "angle":
            known[:, graph.SCALE] = inverse
    if space == "euclidean":
        known[:, graph.ADDED] = np.sqrt(squares.max() - squares)
    return known


def _lengthened(links: np.ndarray, rows: int) -> np.ndarray:
    """Returns link lists with so many more, empty."""
    longer = np.full((len(links) + rows, links.shape[1]), -1, np.int32)
    longer[: len(links)] = links
    return longer
