"""PCA tree: the items halved at medians along their principal directions, and the leaves around the query's own.

Paper: Bachrach, Finkelstein, Gilad-Bachrach, Katzir, Koenigstein, Nice, Paquet. Speeding up the Xbox recommender system
using a Euclidean transformation for inner-product spaces. RecSys 2014, https://doi.org/10.1145/2645710.2645741.

Differs: a query is scaled to the items' largest norm before it goes down the tree, which leaves the order of distances
as it is and puts the query on the sphere where the items are. Beside all leaves within a Hamming distance, a number of
leaves can be asked for, the nearest first. Leaves that hold fewer than k items are followed by more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, IndexFileError, SearchResult, expect, expect_permutation
from tfkit.retrieval.candidates import score_range
from tfkit.retrieval.kernels import kernel
from tfkit.retrieval.trees import (
    DEEPEST,
    LEAF_ITEMS,
    Tree,
    grow,
    item_points,
    leaf_counts,
    measured,
    nearest_first,
    query_points,
)
from tfkit.retrieval.vectors import BLOCK_ROWS, norms_of


class PCATree(Index):
    """A balanced tree over the Euclidean transformation of the items; level i splits along principal direction i.

    A leaf is the path to it, a bit for each level. Search takes one of two efforts. `hamming`: all leaves whose paths
    differ from the query's own in at most so many bits; the paper's neighbourhood boosting is 1, and so is what is done
    if nothing is said. `leaves`: so many leaves, those first whose boxes along the directions are the nearest; the
    result's `exact` then says for which queries no other leaf can hold a better item.

    Args:
        depth: levels of the tree; fewer are made where items or dimensions are too few. None: leaves of about 32 items.

    Memory: the items twice, in the order given and by leaf, and a direction for each level.

    >>> index = PCATree(depth=1).build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [0.0, 1.0]])
    >>> index.search([1.0, 0.5], k=1, hamming=0).ids.tolist()
    [2]
    """

    _multiplies = True

    def __init__(self, depth: int | None = None) -> None:
        self.depth = None if depth is None else checks.integer("depth", depth, 0, DEEPEST)

    def _build(self, threads: int) -> None:
        levels = self._levels()
        points = item_points(self.items)
        mean, products = points.mean(axis=0, dtype=np.float64).astype(np.float32), 0.0
        for start in range(0, len(points), BLOCK_ROWS):
            centred = points[start : start + BLOCK_ROWS] - mean
            products = products + (centred.T @ centred).astype(np.float64)
        spread, vectors = np.linalg.eigh(products)
        self.directions = vectors[:, np.argsort(-spread, kind="stable")[:levels]].T.astype(np.float32)
        along = points @ self.directions.T
        del points  # Before the items are laid out once more.
        self._take(grow(along, levels, lambda level, rows: level))

    def _levels(self) -> int:
        count = len(self.items)
        wanted = (count // LEAF_ITEMS).bit_length() if self.depth is None else self.depth
        return min(wanted, count.bit_length() - 1, self.dimension + 1, DEEPEST)

    def _take(self, tree: Tree) -> None:
        """Keeps the tree, and makes what follows from it."""
        levels = len(self.directions)
        self.tree, self.sorted_items = tree, self.items[tree.order]
        self.largest = float(norms_of(self.items).max())
        paths = np.arange(1 << levels)
        bits = sum(((paths >> bit) & 1 for bit in range(levels)), np.zeros_like(paths))
        #: By what two paths can differ, the fewest bits first; and how many differences have at most so many bits.
        self.differences, self.balls = np.argsort(bits, kind="stable"), np.cumsum(np.bincount(bits))

    def _search(
        self, queries: np.ndarray, k: int, *, hamming: int | None = None, leaves: int | None = None
    ) -> SearchResult:
        if hamming is not None and leaves is not None:
            raise checks.error("leaves", "given without `hamming`", leaves, "Leave one of the two out.")
        # A query has 0 where the transformation adds a coordinate.
        along = query_points(queries) @ self.directions[:, 1:].T  # (queries, levels)
        if leaves is not None:
            most = checks.integer("leaves", leaves, 1)
            return nearest_first(queries, k, along, self.tree, self.sorted_items, self.largest, most)
        distance = 1 if hamming is None else checks.integer("hamming", hamming, 0)
        ball = self.balls[min(distance, len(self.directions))]
        scores, ids, counts = kernels.empty_heaps(len(queries), k)
        _look(queries, along, self.tree, self.sorted_items, self.differences, ball, scores, ids, counts)
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        return [{"leaves": count} for count in leaf_counts(len(self.directions))]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"order": self.tree.order, "directions": self.directions}

    def _kept(self) -> list[np.ndarray]:
        return [*self.tree, self.directions, self.sorted_items, self.differences]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        levels = self._levels()
        order = expect_permutation(arrays, "order", len(self.items))
        self.directions = expect(arrays, "directions", np.float32, (levels, self.dimension + 1), -1.01, 1.01)
        if not np.allclose(self.directions @ self.directions.T, np.eye(levels), atol=1e-3):
            raise IndexFileError("damaged: its array 'directions' is not orthonormal")
        axes = np.repeat(np.arange(levels, dtype=np.int32), 1 << np.arange(levels))
        self._take(measured(item_points(self.items) @ self.directions.T, order, axes))


@kernel
def _look(queries, along, tree, items, differences, ball, scores, ids, counts):  # type: ignore[no-untyped-def]
    """Scores the leaves whose paths differ from the query's by the first `ball` differences, and more up to k items."""
    order, thresholds, bounds = tree.order, tree.thresholds, tree.bounds
    inner = thresholds.shape[0]
    for row in range(queries.shape[0]):
        query, heap, held, node, count = queries[row], scores[row], ids[row], 0, 0
        for level in range(along.shape[1]):
            node = 2 * node + (1 if along[row, level] < thresholds[node] else 2)
        for place in range(differences.shape[0]):
            if place >= ball and count == heap.shape[0]:
                break
            leaf = (node - inner) ^ differences[place]
            count = score_range(query, items, order, bounds[leaf], bounds[leaf + 1], heap, held, count)
        counts[row] = count
