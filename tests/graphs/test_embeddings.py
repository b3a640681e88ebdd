"""Embeddings: walks by their chances, matrices by their closed forms, and the protocol of comparison."""

import numpy as np
import pytest
import scipy.sparse as sp

from tfkit import graphs
from tfkit.graphs import embeddings
from tfkit.graphs.embeddings import base, evaluation
from tfkit.graphs.embeddings.base import subspace_factors
from tfkit.graphs.embeddings.grarep import log_ratios
from tfkit.graphs.embeddings.hope import spectral_radius

METHODS = {
    "DeepWalk": lambda: embeddings.DeepWalk(16, walks=10, length=20, window=5, seed=1),
    "Node2Vec": lambda: embeddings.Node2Vec(16, p=0.5, q=2.0, walks=10, length=20, window=5, seed=1),
    "LINE": lambda: embeddings.LINE(16, samples_per_edge=60, seed=1),
    "LINE, first": lambda: embeddings.LINE(16, order="first", samples_per_edge=60, seed=1),
    "LaplacianEigenmaps": lambda: embeddings.LaplacianEigenmaps(16),
    "NetMF": lambda: embeddings.NetMF(16, rank=40),
    "NetMF, exact": lambda: embeddings.NetMF(16, rank=None),
    "HOPE": lambda: embeddings.HOPE(16),
    "GraRep": lambda: embeddings.GraRep(16),
    "VERSE": lambda: embeddings.VERSE(16, samples_per_node=300, seed=1),
}
each = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(scope="module")
def blocks():
    graph = graphs.stochastic_block_model(200, 4, 12, homophily=0.9, seed=3)
    edges = graph.edges()
    # One more node, without an edge.
    return graphs.Graph.from_edges(edges, 201, labels=np.append(graph.labels, 0))


@each
def test_a_method_finds_communities_and_repeats(name, blocks):
    vectors = METHODS[name]().embed(blocks)
    assert vectors.shape == (201, 16) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    np.testing.assert_array_equal(vectors[200], 0)
    np.testing.assert_array_equal(METHODS[name]().embed(blocks), vectors)
    scaled = vectors / vectors.std()
    assert embeddings.classify_nodes(scaled, blocks.labels, 0.5, repeats=3).micro > 0.85


@each
def test_a_method_takes_directed_and_tiny_graphs_and_refuses_none(name):
    directed = graphs.Graph.from_edges([(0, 1), (1, 2), (2, 0), (2, 3)], directed=True)
    vectors = METHODS[name]().embed(directed)
    assert vectors.shape == (4, 16) and np.isfinite(vectors).all()
    with pytest.raises(ValueError, match="with an edge"):
        METHODS[name]().embed(graphs.Graph.from_edges([], 3))


@pytest.fixture(scope="module")
def kite():
    return graphs.Graph.from_edges(
        [(0, 1), (1, 2), (0, 2), (2, 3), (3, 4), (1, 4)], weights=[1.0, 2.0, 1.0, 3.0, 1.0, 1.0]
    )


@pytest.mark.parametrize(("p", "q", "weighted"), [(1, 1, True), (0.25, 4, True), (4, 0.5, False), (0.5, 0.5, False)])
def test_steps_of_walks_have_their_chances(kite, p, q, weighted):
    matrix = kite.adjacency if weighted else sp.csr_array((kite.adjacency > 0).astype("float32"))
    walks = embeddings.random_walks(graphs.Graph(matrix), 300, 40, p=p, q=q, seed=5)
    dense = matrix.toarray().astype(np.float64)
    before, here, after = walks[:, :-2].ravel(), walks[:, 1:-1].ravel(), walks[:, 2:].ravel()
    statistic, freedom = 0.0, 0
    for a in range(5):
        for b in np.flatnonzero(dense[a]):
            weights = dense[b] * np.where(np.arange(5) == a, 1 / p, np.where(dense[a] > 0, 1.0, 1 / q))
            chosen = after[(before == a) & (here == b)]
            counts = np.bincount(chosen, minlength=5)
            expected = len(chosen) * weights / weights.sum()
            possible = weights > 0
            assert not counts[~possible].any()
            statistic += ((counts - expected)[possible] ** 2 / expected[possible]).sum()
            freedom += possible.sum() - 1
    # p = 0.0005: a normal approximation of the chi-square.
    assert statistic < freedom + 3.3 * np.sqrt(2 * freedom) + 4


def test_walks_start_everywhere_and_end_where_no_way_goes_on():
    walks = embeddings.random_walks(graphs.Graph.from_edges([(1, 0), (2, 1)], directed=True), 4, 5)
    # Row i of the adjacency is what i hears, so that walks go against the edges.
    np.testing.assert_array_equal(np.bincount(walks[:, 0]), [4, 4, 4])
    for walk in walks:
        assert list(walk[walk >= 0]) == list(range(walk[0], 3))


def test_netmf_by_its_closed_form(kite):
    dense = kite.adjacency.toarray().astype(np.float64)
    degrees = dense.sum(1)
    step = dense / degrees[:, None]
    powers = sum(np.linalg.matrix_power(step, r) for r in (1, 2, 3)) / 3
    expected = degrees.sum() / 2.0 * powers / degrees[None]
    np.testing.assert_allclose(embeddings.deepwalk_matrix(kite.adjacency, 3, 2.0), expected, rtol=1e-6)
    target = np.log(np.maximum(expected, 1))
    vectors = embeddings.NetMF(5, window=3, negatives=2.0, rank=None).embed(kite)
    u, s, _ = np.linalg.svd(target)
    np.testing.assert_allclose(vectors @ vectors.T, (u * s) @ u.T, atol=1e-4)
    # With all eigenpairs the approximation leaves out negative filtered ones only.
    values, bases = np.linalg.eigh(dense / np.sqrt(np.outer(degrees, degrees)))
    filtered = np.maximum(np.mean([values**r for r in (1, 2, 3)], axis=0), 0)
    approximate = degrees.sum() / 2 * (bases * filtered) @ bases.T / np.sqrt(np.outer(degrees, degrees))
    u, s, _ = np.linalg.svd(np.log(np.maximum(approximate, 1)))
    vectors = embeddings.NetMF(5, window=3, negatives=2.0, rank=5).embed(kite)
    np.testing.assert_allclose(vectors @ vectors.T, (u * s) @ u.T, atol=1e-3)


def test_hope_gives_the_katz_matrix():
    graph = graphs.Graph.from_edges([(0, 1), (1, 2), (2, 0), (2, 3), (3, 1)], directed=True)
    dense = graph.adjacency.toarray().astype(np.float64)
    np.testing.assert_allclose(spectral_radius(sp.csc_array(dense)), np.abs(np.linalg.eigvals(dense)).max(), rtol=1e-6)
    beta = 0.5 / spectral_radius(sp.csc_array(dense))
    katz = np.linalg.inv(np.eye(4) - beta * dense) @ (beta * dense)
    vectors = embeddings.HOPE(8, decay=0.5).embed(graph)
    np.testing.assert_allclose(vectors[:, :4] @ vectors[:, 4:].T, katz, atol=1e-5)


def test_eigenmaps_solve_their_equation(blocks):
    part = blocks.subgraph(np.arange(200))
    vectors = embeddings.LaplacianEigenmaps(3).embed(part).astype(np.float64)
    step = graphs.row_normalize(part.adjacency).toarray()
    for vector in vectors.T:
        rate = vector @ (step @ vector) / (vector @ vector)
        np.testing.assert_allclose(step @ vector, rate * vector, atol=1e-4)
    all_rates = np.sort(np.linalg.eigvals(step).real)[::-1]
    np.testing.assert_allclose(rate, all_rates[3], atol=1e-4)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("random_walk", [True, False])
def test_small_components_do_not_take_the_place_of_eigenvectors(blocks, random_walk, dense, monkeypatch):
    if not dense:
        monkeypatch.setattr(base, "DENSE", 0)
    part = blocks.subgraph(np.arange(200))
    pairs = sp.kron(sp.eye_array(30), np.array([[0.0, 1.0], [1.0, 0.0]]))
    whole = graphs.Graph(sp.csr_array(sp.block_diag([part.adjacency, pairs, sp.csr_array((3, 3))])))
    method = embeddings.LaplacianEigenmaps(3, random_walk=random_walk)
    alone, found = method.embed(part), method.embed(whole)
    np.testing.assert_allclose(np.abs(found[:200]), np.abs(alone), atol=1e-4)
    np.testing.assert_allclose(found[200:], 0, atol=1e-5)
    assert len(set(np.round(found[:200, 0], 5))) > 100


def test_netmf_knows_every_component(blocks):
    part = blocks.subgraph(np.arange(60)).adjacency
    pairs = sp.kron(sp.eye_array(20), np.array([[0.0, 1.0], [1.0, 0.0]]))
    whole = graphs.Graph(sp.csr_array(sp.block_diag([part, pairs, sp.csr_array((2, 2))])))
    exact, few, all_pairs = (
        embeddings.NetMF(102, rank=rank).embed(whole).astype(np.float64) for rank in (None, 20, 102)
    )
    exact, few, all_pairs = (each @ each.T for each in (exact, few, all_pairs))
    assert np.linalg.norm(all_pairs - exact) < 0.1 * np.linalg.norm(exact)
    assert np.linalg.norm(few - exact) < 0.2 * np.linalg.norm(exact)


def test_subspace_iteration_finds_the_decomposition():
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(300, 60)))[0] for _ in range(2))
    values = 0.8 ** np.arange(60)
    matrix = (left * values) @ right.T
    u, s, v = subspace_factors(matrix, 10, seed=1)
    np.testing.assert_allclose(s, values[:10], rtol=1e-8)
    np.testing.assert_allclose((u * s) @ v.T, (left[:, :10] * values[:10]) @ right[:, :10].T, atol=1e-8)


def test_grarep_ratios():
    power = np.array([[0.5, 0.5], [1.0, 0.0]])
    expected = np.log(np.array([[0.5 / 1.5, 1.0], [1.0 / 1.5, 1.0]]) * 2)
    expected[1, 1] = 0
    np.testing.assert_allclose(log_ratios(power, 1.0), np.maximum(expected, 0))


def test_regression_is_that_of_another_solver():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 6)) * np.logspace(-1, 1, 6)
    y = (x[:, :3] + rng.normal(size=(150, 3))) > 0.3
    weights, bias = evaluation.logistic_regression(x, y, 0.7)
    for k in range(3):
        other = linear.LogisticRegression(C=0.7, tol=1e-8, max_iter=2000).fit(x, y[:, k])
        np.testing.assert_allclose(weights[:, k], other.coef_[0], atol=5e-3)
        np.testing.assert_allclose(bias[k], other.intercept_[0], atol=5e-3)


def test_f1_is_that_of_another_library():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    truth, guess = rng.random((50, 4)) < 0.4, rng.random((50, 4)) < 0.4
    found = evaluation.f1(truth, guess)
    assert found.micro == pytest.approx(metrics.f1_score(truth, guess, average="micro"))
    assert found.macro == pytest.approx(metrics.f1_score(truth, guess, average="macro"))


def test_links_are_held_out_and_found(blocks):
    split = embeddings.split_links(blocks, 0.2)
    pairs = {tuple(edge) for edge in blocks.edges()}
    held, seen = {tuple(e) for e in split.edges}, {tuple(e) for e in split.graph.edges()}
    assert held | seen == pairs and not held & seen and len(held) == round(0.2 * len(pairs))
    assert not {tuple(e) for e in split.others} & (pairs | {(b, a) for a, b in pairs})
    assert (split.graph.degrees[:200] > 0).all()
    assert embeddings.predict_links(embeddings.LaplacianEigenmaps(8), blocks) > 0.75


def test_reconstruction_of_cliques_is_perfect():
    pairs = [(5 * c + i, 5 * c + j) for c in range(4) for i in range(5) for j in range(i)]
    vectors = np.repeat(np.eye(4), 5, axis=0)
    assert embeddings.reconstruct(vectors, graphs.Graph.from_edges(pairs)) == 1
    loops = np.concatenate([pairs, [[3, 3], [20, 20]]])
    looped = graphs.Graph.from_edges(loops, self_loops="keep")
    assert embeddings.reconstruct(np.concatenate([vectors, np.ones((1, 4))]), looped) == 1
    with pytest.raises(ValueError, match=r"vectors.*\(21, dimension\)"):
        embeddings.reconstruct(vectors, looped)
    with pytest.raises(ValueError, match="between two nodes"):
        embeddings.reconstruct(np.ones((3, 2)), graphs.Graph.from_edges([], 3))


def test_bad_settings():
    with pytest.raises(ValueError, match="even"):
        embeddings.LINE(15)
    with pytest.raises(ValueError, match="multiple"):
        embeddings.GraRep(15)
    with pytest.raises(ValueError, match="`p`"):
        embeddings.Node2Vec(p=0)
    with pytest.raises(ValueError, match="fraction"):
        embeddings.classify_nodes(np.ones((4, 2)), np.array([0, 1, 0, 1]), 0.01)
    with pytest.raises(ValueError, match=r"vectors.*\(4, dimension\)"):
        embeddings.classify_nodes(np.ones((3, 2)), np.array([0, 1, 0, 1]), 0.5)
