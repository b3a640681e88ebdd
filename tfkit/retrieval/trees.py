"""Trees: items halved at medians over and over, and the search that opens the leaf of the nearest box next.

Points are those of the Euclidean transformation of the items over their largest norm M: all lie on the unit sphere. A
query is scaled to lie on it too, which leaves the order of its distances as it is. A tree is complete: its root is node
0, the children of node i are 2 i + 1 and 2 i + 2, and the leaves are ranges of a list of the items, of equal length but
for one item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tfkit.retrieval import kernels
from tfkit.retrieval.base import SearchResult
from tfkit.retrieval.candidates import score_range
from tfkit.retrieval.euclidean import EuclideanTransform
from tfkit.retrieval.kernels import kernel
from tfkit.retrieval.vectors import BLOCK_ROWS, normalized, norms_of

#: Items in a leaf, about, where nothing else is said; and levels of the deepest tree.
LEAF_ITEMS, DEEPEST = 32, 24
#: Leaves whose boxes are measured at a time.
_LEAVES_TOGETHER = 256


def leaf_bounds(count: int, levels: int) -> np.ndarray:
    """Returns where each leaf begins if a range is halved so many times, and the end, int64, (leaves + 1,)."""
    bounds = np.array([0, count])
    for _ in range(levels):
        finer = np.empty(2 * len(bounds) - 1, np.int64)
        finer[::2], finer[1::2] = bounds, (bounds[:-1] + bounds[1:]) // 2
        bounds = finer
    return bounds


class Tree(NamedTuple):
    """A tree over points, (points, axes).

    Attributes:
        order: int64, (points,): the points' positions, leaf by leaf.
        axes: int32, (inner nodes,): along which axis each is split.
        thresholds: float32, (inner nodes,): between the points of its two halves.
        low, high: float32, (nodes, axes): the box around the points of each node, leaves after the inner nodes.
        bounds: int64, (leaves + 1,): where each leaf begins in `order`, and the end.
    """

    order: np.ndarray
    axes: np.ndarray
    thresholds: np.ndarray
    low: np.ndarray
    high: np.ndarray
    bounds: np.ndarray


def leaf_counts(levels: int) -> list[int]:
    """Returns up to ten numbers of leaves to choose from, in equal ratios from one to all."""
    return sorted({round(2 ** (levels * step / 9)) for step in range(10)})


def grow(points: np.ndarray, levels: int, choose: Callable[[int, np.ndarray], int]) -> Tree:
    """Halves points at their medians, level by level.

    Args:
        points: (points, axes).
        levels: of the tree; each leaf must get a point.
        choose: gives the axis to split along, from the level and the positions of a node's points.
    """
    order, axes = np.arange(len(points)), np.empty((1 << levels) - 1, np.int32)
    for level in range(levels):
        bounds = leaf_bounds(len(points), level)
        for place, node in enumerate(range((1 << level) - 1, (2 << level) - 1)):
            part = slice(bounds[place], bounds[place + 1])
            axes[node] = choose(level, order[part])
            # Of equal values the first stay first, so that the tree repeats.
            order[part] = order[part][np.argsort(points[order[part], axes[node]], kind="stable")]
    return measured(points, order, axes)


def measured(points: np.ndarray, order: np.ndarray, axes: np.ndarray) -> Tree:
    """Returns the tree of that order and those axes, whatever they are."""
    inner = len(axes)
    bounds = leaf_bounds(len(order), inner.bit_length())
    low, high = np.empty((2, 2 * inner + 1, points.shape[1]), np.float32)
    for first in range(0, inner + 1, _LEAVES_TOGETHER):
        some = bounds[first : first + _LEAVES_TOGETHER + 1]
        block, starts = points[order[some[0] : some[-1]]], some[:-1] - some[0]
        low[inner + first : inner + first + len(starts)] = np.minimum.reduceat(block, starts)
        high[inner + first : inner + first + len(starts)] = np.maximum.reduceat(block, starts)
    for node in range(inner - 1, -1, -1):
        low[node] = np.minimum(low[2 * node + 1], low[2 * node + 2])
        high[node] = np.maximum(high[2 * node + 1], high[2 * node + 2])
    nodes = np.arange(inner)
    thresholds = 0.5 * high[2 * nodes + 1, axes] + 0.5 * low[2 * nodes + 2, axes]
    return Tree(order, axes, thresholds, low, high, bounds)


def item_points(items: np.ndarray) -> np.ndarray:
    """Returns the items' points, float32, (items, dimension + 1)."""
    largest, points = norms_of(items).max() or 1.0, np.empty((len(items), items.shape[1] + 1), np.float32)
    for start in range(0, len(items), BLOCK_ROWS):
        part = slice(start, start + BLOCK_ROWS)
        points[part] = EuclideanTransform(1.0).items((items[part] / largest).astype(np.float32))
    return points


def query_points(queries: np.ndarray) -> np.ndarray:
    """Returns the queries' points, float32, (queries, dimension): but for a first coordinate, which is 0."""
    return normalized(queries)


def nearest_first(
    queries: np.ndarray, k: int, along: np.ndarray, tree: Tree, items: np.ndarray, largest: float, most: int
) -> SearchResult:
    """Searches a tree leaf by leaf, the nearest box first, until no other can hold a better item.

    A box at the distance r of the query holds no inner product above |q| M (1 - r^2 / 2).

    Args:
        queries: (queries, dimension).
        k: items wanted.
        along: (queries, axes): the queries' coordinates.
        tree: over the items' points.
        items: leaf by leaf.
        largest: M.
        most: leaves to open; more, if they hold fewer than k items.
    """
    most = min(most, len(tree.bounds) - 1)
    scores, ids, counts = kernels.empty_heaps(len(queries), k)
    exact = np.zeros(len(queries), bool)
    # Coordinates and scores are rounded; no sum of so many products and squares is off by more, for unit norms.
    slack = tree.low.shape[1] * (queries.shape[1] + 1) * 2.0**-22
    _open(queries, along, norms_of(queries) * largest, tree, items, slack, most, scores, ids, counts, exact)
    kernels.sort_heaps(scores, ids, counts)
    return SearchResult(scores, ids, exact)


@kernel
def _distance(point, low, high):  # type: ignore[no-untyped-def]
    """Returns the squared distance of a point to a box."""
    total = np.float32(0.0)
    for axis in range(point.shape[0]):
        outside = max(np.float32(0.0), max(low[axis] - point[axis], point[axis] - high[axis]))
        total += outside * outside
    return total


@kernel
def _sink(far, nodes, size, distance, node):  # type: ignore[no-untyped-def]
    """Puts a node in the place of a heap's top."""
    at = 0
    while 2 * at + 1 < size:
        child = 2 * at + 1
        if child + 1 < size and far[child + 1] < far[child]:
            child += 1
        if distance <= far[child]:
            break
        far[at], nodes[at] = far[child], nodes[child]
        at = child
    far[at], nodes[at] = distance, node


@kernel
def _open(queries, along, scales, tree, items, slack, most, scores, ids, counts, exact):  # type: ignore[no-untyped-def]
    inner = tree.axes.shape[0]
    far = np.empty(inner + 1, np.float32)  # A heap of squared distances, the smallest on top, and the nodes.
    nodes = np.empty(inner + 1, np.int64)
    for row in range(queries.shape[0]):
        query, point, heap, held = queries[row], along[row], scores[row], ids[row]
        node, count, opened, size = 0, 0, 0, 0
        while True:
            distance = np.float32(0.0)
            while node < inner:
                near, other = 2 * node + 1, 2 * node + 2
                distance = _distance(point, tree.low[near], tree.high[near])
                beyond = _distance(point, tree.low[other], tree.high[other])
                if beyond < distance or (beyond == distance and point[tree.axes[node]] >= tree.thresholds[node]):
                    near, other, distance, beyond = other, near, beyond, distance
                at = size
                size += 1
                while at > 0 and far[(at - 1) >> 1] > beyond:
                    far[at], nodes[at] = far[(at - 1) >> 1], nodes[(at - 1) >> 1]
                    at = (at - 1) >> 1
                far[at], nodes[at] = beyond, other
                node = near
                if far[0] < distance:  # What was passed by before is nearer than both halves.
                    waiting, node = node, nodes[0]
                    _sink(far, nodes, size, distance, waiting)
            first, end = tree.bounds[node - inner], tree.bounds[node - inner + 1]
            count = score_range(query, items, tree.order, first, end, heap, held, count)
            opened += 1
            if size == 0:
                exact[row] = True
                break
            if count == heap.shape[0]:
                if heap[0] > scales[row] * (1.0 - 0.5 * far[0] + slack):
                    exact[row] = True
                    break
                if opened >= most:
                    break
            node = nodes[0]
            size -= 1
            _sink(far, nodes, size, far[size], nodes[size])
        counts[row] = count
