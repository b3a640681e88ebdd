"""k-d tree: the items halved at medians along the axes of their largest spread, and the nearest boxes opened first.

Paper: Beis, Lowe. Shape indexing using approximate nearest-neighbour search in high-dimensional spaces. CVPR 1997,
https://doi.org/10.1109/CVPR.1997.609451 (best bin first). Friedman, Bentley, Finkel. An algorithm for finding best
matches in logarithmic expected time. ACM TOMS 3(3), 1977, https://doi.org/10.1145/355744.355745 (the tree). Bachrach et
al. RecSys 2014, https://doi.org/10.1145/2645710.2645741 (the transformation, and this tree over it).

Differs: the spread of a large node is estimated on some of its points. A node is ranked by its distance to the box
around its points, along all axes, not to the cell between thresholds: what was not split is bounded too, above all the
coordinate that the transformation adds, which is what short items are far away by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import trees
from tfkit.retrieval.base import Index, SearchResult, expect, expect_permutation
from tfkit.retrieval.trees import Tree, item_points, leaf_counts, measured, query_points
from tfkit.retrieval.vectors import norms_of

#: Points that the spread of a node is estimated on, at most.
SAMPLE = 512


class KDTree(Index):
    """A k-d tree over the Euclidean transformation of the items.

    The proof comes early where few items have long vectors, or where dimensions are few; otherwise most leaves are
    opened.

    Search takes `leaves`, how many are opened at most, the nearest first (more, if they hold fewer than k items); None:
    as many as the proof needs that no other can hold a better item. The result's `exact` says for which queries it was
    reached.

    Args:
        leaf_items: how many items a leaf holds at most.

    Memory: the items twice, in the order given and by leaf, and two boxes for each leaf.

    >>> index = KDTree(leaf_items=1).build([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    >>> index.search([1.0, 0.5], k=1).ids.tolist()
    [2]
    """

    def __init__(self, leaf_items: int = trees.LEAF_ITEMS) -> None:
        self.leaf_items = checks.integer("leaf_items", leaf_items, 1)

    def _build(self, threads: int) -> None:
        self._take(self._grown())

    def _grown(self) -> Tree:
        points = item_points(self.items)

        def widest(level: int, rows: np.ndarray) -> int:
            return int(points[rows[:: -(-len(rows) // SAMPLE)]].var(axis=0, dtype=np.float64).argmax())

        return trees.grow(points, self._levels(), widest)

    def _levels(self) -> int:
        return min((len(self.items) // self.leaf_items).bit_length(), len(self.items).bit_length() - 1, trees.DEEPEST)

    def _take(self, tree: Tree) -> None:
        """Keeps the tree, and makes what follows from it."""
        self.tree, self.sorted_items = tree, self.items[tree.order]
        self.largest = float(norms_of(self.items).max())

    def _search(self, queries: np.ndarray, k: int, *, leaves: int | None = None) -> SearchResult:
        most = len(self.tree.bounds) if leaves is None else checks.integer("leaves", leaves, 1)
        along = np.zeros((len(queries), self.dimension + 1), np.float32)
        along[:, 1:] = query_points(queries)
        return trees.nearest_first(queries, k, along, self.tree, self.sorted_items, self.largest, most)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        return [*({"leaves": count} for count in leaf_counts(self._levels())[:-1]), {}]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"order": self.tree.order, "axes": self.tree.axes}

    def _kept(self) -> list[np.ndarray]:
        return [*self.tree, self.sorted_items]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        order = expect_permutation(arrays, "order", len(self.items))
        axes = expect(arrays, "axes", np.int32, ((1 << self._levels()) - 1,), 0, self.dimension)
        self._take(measured(item_points(self.items), order, axes))
