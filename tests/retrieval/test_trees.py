"""PCA tree and k-d tree against a search of their cells by NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit import retrieval
from tfkit.retrieval import KDTree, PCATree, trees


def vectors(count, dimension=6, seed=0, skew=0.5):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimension)) * np.exp(skew * rng.normal(size=(count, 1)))).astype("float32")


def points_of(index):
    """Coordinates of the items along the tree's axes."""
    points = trees.item_points(index.items)
    return points @ index.directions.T if isinstance(index, PCATree) else points


def asked_of(index, queries):
    """Coordinates of the queries along the tree's axes."""
    asked = np.column_stack([np.zeros(len(queries), np.float32), trees.query_points(queries)])
    return asked @ index.directions.T if isinstance(index, PCATree) else asked


def leaves_of(index):
    bounds = index.tree.bounds
    return [index.tree.order[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def best(items, query, rows, k):
    rows = np.sort(rows)
    return rows[np.argsort(-(items[rows] @ query), kind="stable")][:k]


MADE = [
    lambda: PCATree(depth=5), lambda: PCATree(), lambda: KDTree(leaf_items=20), lambda: KDTree(leaf_items=1),
]  # fmt: skip
each = pytest.mark.parametrize("make", MADE, ids=["pca 5", "pca", "kd 20", "kd 1"])


@pytest.mark.parametrize(("count", "levels"), [(1, 0), (8, 3), (9, 3), (100, 5)])
def test_leaves_are_of_equal_size(count, levels):
    bounds = trees.leaf_bounds(count, levels)
    assert bounds[0] == 0 and bounds[-1] == count and len(bounds) == 2**levels + 1
    assert np.diff(bounds).max() - np.diff(bounds).min() <= 1


@each
def test_a_node_is_split_at_its_median(make):
    index = make().build(vectors(500))
    points, nodes = points_of(index), [index.tree.order]
    for node, (axis, threshold) in enumerate(zip(index.tree.axes, index.tree.thresholds, strict=True)):
        rows = nodes[node]
        half = len(rows) // 2
        nodes += [rows[:half], rows[half:]]
        assert points[rows[:half], axis].max() <= threshold <= points[rows[half:], axis].min()


def test_the_axes_of_a_pca_tree_are_the_principal_directions():
    index = PCATree(depth=5).build(vectors(500))
    points = trees.item_points(index.items).astype(np.float64)
    _, spread, directions = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)
    signs = np.sign((directions[:5] * index.directions).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(index.directions, signs * directions[:5], atol=1e-3)
    assert (np.diff(spread) < 0).all()
    np.testing.assert_array_equal(index.tree.axes, [0] + 2 * [1] + 4 * [2] + 8 * [3] + 16 * [4])


def test_the_axis_of_a_k_d_tree_is_that_of_the_largest_spread():
    index = KDTree(leaf_items=50).build(vectors(400))
    points, rows = points_of(index), np.arange(400)
    assert index.tree.axes[0] == points.var(axis=0).argmax()
    left = rows[points[:, index.tree.axes[0]] < index.tree.thresholds[0]]
    assert index.tree.axes[1] == points[left].var(axis=0).argmax()


@each
@pytest.mark.parametrize("leaves", [2, 3, 10])
def test_the_nearest_boxes_are_opened(make, leaves):
    items, queries = vectors(500), vectors(20, seed=1)
    index = make().build(items)
    points = points_of(index).astype(np.float64)
    result = index.search(queries, 2, leaves=leaves)
    for query, place, ids in zip(queries, asked_of(index, queries).astype(np.float64), result.ids, strict=True):
        ends = [(points[rows].min(axis=0), points[rows].max(axis=0)) for rows in leaves_of(index)]
        outside = [np.sum(np.maximum(0, np.maximum(low - place, place - high)) ** 2) for low, high in ends]
        nearest = np.argsort(outside, kind="stable")[:leaves]
        rows = np.concatenate([leaves_of(index)[leaf] for leaf in nearest])
        np.testing.assert_array_equal(ids, best(items, query, rows, 2))


@each
@pytest.mark.parametrize("items", [vectors(600), vectors(600, 2), np.round(vectors(600, 3)), np.zeros((600, 2), "f4")])
def test_a_proof_is_right(make, items):
    queries = np.concatenate([vectors(20, items.shape[1], seed=1), np.zeros((1, items.shape[1]), np.float32)])
    index, expected = make().build(items), retrieval.Exact().build(items).search(queries, 7)
    for leaves in (1, 4, 16, 1000):
        result = index.search(queries, 7, leaves=leaves)
        proven = result.exact
        np.testing.assert_array_equal(result.ids[proven], expected.ids[proven])
    assert proven.all()


def test_where_norms_are_alike_a_few_leaves_are_enough_for_a_proof():
    items = vectors(5000, 3)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    assert KDTree().build(items).search(vectors(50, 3, seed=1), 5, leaves=12).exact.mean() > 0.8


@pytest.mark.parametrize("distance", [0, 1, 2, 9])
def test_the_hamming_ball(distance):
    items, queries = vectors(700), vectors(20, seed=1)
    index = PCATree(depth=5).build(items)
    asked = asked_of(index, queries)
    found = index.search(queries, 4, hamming=distance).ids
    for query, place, ids in zip(queries, asked, found, strict=True):
        node = 0
        for level in range(5):
            node = 2 * node + (1 if place[level] < index.tree.thresholds[node] else 2)
        ball = [leaf for leaf in range(32) if bin(leaf ^ (node - 31)).count("1") <= distance]
        rows = np.concatenate([leaves_of(index)[leaf] for leaf in ball])
        np.testing.assert_array_equal(ids, best(items, query, rows, 4))


def test_more_leaves_are_opened_until_there_are_k_items():
    items = vectors(64)
    for index, efforts in (
        (PCATree(depth=6), [{"hamming": 0}, {"leaves": 1}]), (KDTree(leaf_items=1), [{"leaves": 1}]),
    ):  # fmt: skip
        for effort in efforts:
            assert index.build(items).search(items[:5], 30, **effort).ids.min() >= 0


def test_depth_is_bounded_by_items_and_dimensions():
    assert len(PCATree(depth=9).build(vectors(10)).directions) == 3
    assert len(PCATree(depth=9).build(vectors(1000, 2)).directions) == 3
    assert len(PCATree(depth=0).build(vectors(10)).directions) == 0


def test_a_huge_or_tiny_scale_changes_nothing():
    items, queries = vectors(300), vectors(10, seed=1)
    for make in MADE:
        plain = make().build(items).search(queries, 5, leaves=4)
        for scale in (1e-30, 1e18):
            scaled = make().build(items * np.float32(scale)).search(queries, 5, leaves=4)
            assert np.mean(plain.ids == scaled.ids) > 0.95


def test_what_breaks_a_rule():
    for make, argument in ((PCATree, {"depth": -1}), (PCATree, {"depth": 99}), (KDTree, {"leaf_items": 0})):
        with pytest.raises(ValueError, match="must be"):
            make(**argument)
    index = PCATree().build(vectors(50))
    for effort in ({"hamming": -1}, {"leaves": 0}, {"hamming": 1, "leaves": 1}):
        with pytest.raises(ValueError, match="must be"):
            index.search(np.ones(6), 1, **effort)
    with pytest.raises(ValueError, match="leaves"):
        KDTree().build(vectors(50)).search(np.ones(6), 1, leaves=0)


def test_directions_that_would_prove_what_is_wrong_are_refused():
    index = PCATree(depth=3).build(vectors(50))
    arrays = {"order": index.tree.order, "directions": 0.9 * index.directions}
    with pytest.raises(retrieval.IndexFileError, match="orthonormal"):
        index._restore(arrays)


def test_efforts_go_from_one_leaf_to_all():
    for index in (PCATree(depth=6), KDTree()):
        efforts = index.build(vectors(20_000)).efforts()
        assert 5 <= len(efforts) <= 10 and efforts[0] == {"leaves": 1}
