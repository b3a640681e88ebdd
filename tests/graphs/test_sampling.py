"""Samplers: unbiased products, exact limits, repeatable draws, and the pipeline."""

import time

import numpy as np
import pytest
import scipy.sparse as sp

from tfkit import graphs
from tfkit.graphs.sampling import kernels

MAKERS = {
    "neighbour": lambda matrix, **more: graphs.NeighbourSampler(matrix, [2, 3], 16, **more),
    "layer-wise": lambda matrix, **more: graphs.LayerWiseSampler(matrix, [20, 30], 16, **more),
    "cluster": lambda matrix, **more: graphs.ClusterSampler(matrix, 6, 2, **more),
    "saint, walks": lambda matrix, **more: graphs.SaintSampler(matrix, "walk", 10, **more),
    "saint, edges": lambda matrix, **more: graphs.SaintSampler(matrix, "edge", 10, **more),
    "saint, nodes": lambda matrix, **more: graphs.SaintSampler(matrix, "node", 20, **more),
}
each = pytest.mark.parametrize("name", MAKERS)


@pytest.fixture(scope="module")
def matrix():
    return graphs.gcn_normalize(graphs.stochastic_block_model(120, 3, 8, seed=1).adjacency)


def product(batch, x):
    y = x[batch.inputs]
    for block in batch.blocks:
        y = sp.coo_array((block.values, tuple(block.indices.T)), shape=block.shape).tocsr() @ y
    return y


@each
def test_the_same_seed_and_epoch_give_the_same_batches(name, matrix):
    first, second = MAKERS[name](matrix, seed=3), MAKERS[name](matrix, seed=3)
    list(first.batches(0))  # What was asked before must not matter.
    other = list(first.batches(2))
    for a, b in zip(other, second.batches(2), strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        for left, right in zip(a.blocks, b.blocks, strict=True):
            np.testing.assert_array_equal(left.indices, right.indices)
            np.testing.assert_array_equal(left.values, right.values)
    assert len(other) == len(first)
    changed = next(MAKERS[name](matrix, seed=4).batches(2))
    assert len(changed.inputs) != len(other[0].inputs) or (changed.inputs != other[0].inputs).any()


@each
def test_blocks_fit_and_rows_are_sorted(name, matrix):
    for batch in MAKERS[name](matrix).batches():
        width = len(batch.inputs)
        for block in batch.blocks:
            assert block.shape[1] == width
            assert (np.diff(block.indices[:, 0]) >= 0).all()
            assert block.indices.min(initial=0) >= 0 and (block.indices < block.shape).all()
            width = block.shape[0]
        assert width == len(batch.targets) == len(batch.weights)


def test_neighbour_samples_are_neighbours_and_all_of_them_where_few(matrix):
    sampler = graphs.NeighbourSampler(matrix, [3], 50)
    batch = sampler.sample(np.arange(50), 0)
    block = batch.blocks[0]
    np.testing.assert_array_equal(batch.inputs[:50], np.arange(50))
    counts = np.bincount(block.indices[:, 0], minlength=50)
    np.testing.assert_array_equal(counts, np.minimum(3, np.diff(matrix.indptr)[:50]))
    found = matrix[block.indices[:, 0], batch.inputs[block.indices[:, 1]]]
    assert (np.asarray(found) > 0).all()
    assert len({tuple(pair) for pair in block.indices}) == len(block.indices), "drawn with replacement"


def test_all_neighbours_give_the_exact_product(matrix):
    x = np.random.default_rng(0).normal(size=(120, 3))
    batch = graphs.NeighbourSampler(matrix, [None, 200], 30).sample(np.arange(30), 0)
    np.testing.assert_allclose(product(batch, x), (matrix @ (matrix @ x))[:30], atol=1e-6)


@pytest.mark.parametrize("make", ["neighbour", "layer-wise"])
def test_sampled_products_are_unbiased(make, matrix):
    x = np.random.default_rng(0).normal(size=(120, 3))
    sampler = MAKERS[make](matrix)
    found = np.array([product(sampler.sample(np.arange(40), 7, draw), x) for draw in range(700)])
    error = found.mean(axis=0) - (matrix @ (matrix @ x))[:40]
    z = error / (found.std(axis=0, ddof=1) / np.sqrt(len(found)))
    assert np.sqrt((z**2).mean()) < 1.35 and np.abs(z).max() < 5


def test_a_uniform_draw_is_uniform(matrix):
    degree = 7
    indptr = np.array([0, degree])
    hits = np.zeros(degree)
    chosen, counts = np.empty((1, 3), np.int64), np.empty(1, np.int64)
    for seed in range(7000):
        kernels.sample_rows(indptr, np.array([0]), 3, np.uint64(seed * 2654435761), chosen, counts)
        assert len(set(chosen[0])) == 3
        hits[chosen[0]] += 1
    # Draws of one batch are without replacement, which makes the statistic smaller, never larger.
    assert ((hits - 3000) ** 2 / 3000).sum() < 22.5  # chi-square of 6 degrees of freedom, p = 0.001


@pytest.mark.parametrize("kind", ["node", "edge", "walk"])
def test_saint_weights_undo_the_draws(kind, matrix):
    sampler = graphs.SaintSampler(matrix, kind, 25, trials=1500, batches_per_epoch=4, seed=2)
    x = np.random.default_rng(0).normal(size=120)
    total, loss, draws = np.zeros(120), 0.0, 1500
    for draw in range(draws):
        batch = sampler.sample(5, draw)
        loss += batch.weights @ x[batch.targets]
        total[batch.targets] += batch.weights * product(batch, x)
    # An epoch's weights sum to one a node; in the mean over draws each node counts 1 / batches of an epoch.
    np.testing.assert_allclose(loss / draws * 4 / 120, x.mean(), atol=0.06)
    exact = matrix @ x
    assert np.corrcoef(total, exact)[0, 1] > 0.97
    assert abs((total / draws * 4) @ exact / (exact @ exact) - 1) < 0.08


def test_clusters_hold_every_node_once_and_cut_few_edges():
    # Eight cliques in a ring: the cut is known.
    pairs = [(8 * c + i, 8 * c + j) for c in range(8) for i in range(8) for j in range(i)]
    pairs += [(8 * c, 8 * ((c + 1) % 8) + 1) for c in range(8)]
    shuffled = np.random.default_rng(0).permutation(64)
    graph = graphs.Graph.from_edges(shuffled[np.array(pairs)], 64)
    sampler = graphs.ClusterSampler(graphs.gcn_normalize(graph.adjacency), 8, 2, nodes=[0, 1])
    seen = np.concatenate([batch.targets for batch in sampler.batches()])
    np.testing.assert_array_equal(np.sort(seen), np.arange(64))
    assert np.bincount(sampler.owner).max() <= 9
    ends = sampler.owner[graph.edges()]
    assert (ends[:, 0] != ends[:, 1]).mean() < 0.25
    weights = sum(batch.weights.sum() for batch in sampler.batches())
    assert weights == 2


def test_one_cluster_is_the_whole_graph(matrix):
    batch = next(graphs.ClusterSampler(matrix, 1).batches())
    x = np.random.default_rng(0).normal(size=(120, 3))
    np.testing.assert_allclose(product(batch, x), (matrix @ x)[batch.targets], atol=1e-5)


def test_bad_settings(matrix):
    with pytest.raises(ValueError, match="fanouts"):
        graphs.NeighbourSampler(matrix, [])
    with pytest.raises(ValueError, match="from 0 to 119"):
        graphs.NeighbourSampler(matrix, [2], nodes=[120])
    with pytest.raises(ValueError, match="one id or more"):
        graphs.NeighbourSampler(matrix, [2], nodes=[])
    with pytest.raises(ValueError, match="kind"):
        graphs.SaintSampler(matrix, "star")
    empty = graphs.Graph.from_edges([], 4)
    with pytest.raises(ValueError, match="without entries"):
        graphs.SaintSampler(empty, "edge")
    assert set(next(graphs.SaintSampler(empty, "walk").batches()).inputs) <= set(range(4))


def test_the_pipeline_keeps_order_hands_on_errors_and_stops():
    assert list(graphs.ahead(iter(range(50)), 3)) == list(range(50))

    def failing():
        yield 1
        raise RuntimeError("lost")

    items = graphs.ahead(failing())
    assert next(items) == 1
    with pytest.raises(RuntimeError, match="lost"):
        next(items)

    made = []

    def endless():
        while True:
            made.append(1)
            yield 1

    reader = graphs.ahead(endless(), 2)
    next(reader)
    reader.close()
    count = len(made)
    time.sleep(0.05)
    assert len(made) == count
