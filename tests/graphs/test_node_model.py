"""Models over node ids: exact with all neighbours, unbiased with some. tests/training has them on several workers."""

import keras
import numpy as np
import pytest
import scipy.sparse as sp
import tensorflow as tf

from tfkit import graphs
from tfkit.graphs.sampling.node_model import draw
from tfkit.training import distribute


@pytest.fixture(scope="module")
def graph():
    return graphs.stochastic_block_model(120, 3, 8, homophily=0.9, features=6, noise=1.5, seed=3)


MODELS = {
    "GCN": (lambda: graphs.GCN(3, 8, 2, dropout=0.0, seed=1), graphs.gcn_normalize),
    "GraphSAGE": (lambda: graphs.GraphSAGE(3, 8, seed=1), None),
    "GAT": (lambda: graphs.GAT(3, 4, 2, seed=1), None),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sparse", [False, True])
def test_all_neighbours_give_what_the_whole_graph_gives(name, sparse, graph):
    make, normalize = MODELS[name]
    if sparse:
        graph = graph.with_(features=sp.csr_array(np.maximum(graph.features, 0)))
    model = make()
    inputs = graphs.inputs_of(graph, normalize)
    expected = model(inputs).numpy()
    by_ids = graphs.NodeModel(model, graph, adjacency=None if normalize else graph.adjacency)
    nodes = np.array([7, 3, 50, 7])
    np.testing.assert_allclose(by_ids(nodes), expected[nodes], atol=1e-5)
    np.testing.assert_allclose(by_ids.predict(np.arange(120), batch_size=50, verbose=0), expected, atol=1e-5)


def test_draws_are_within_the_fanout_and_unbiased():
    copies = 2000
    rows = (np.array([0, 0, 0, 2, 3, 3, 3, 3, 3]) + 4 * np.arange(copies)[:, None]).ravel()
    values = np.tile(np.arange(1.0, 10.0), copies)
    noise = np.random.default_rng(0).random(len(rows), np.float32)
    kept, scale = draw(tf.constant(rows), tf.constant(noise), 2, 4 * copies)
    kept = kept.numpy()
    np.testing.assert_array_equal(np.bincount(rows[kept], minlength=4 * copies).reshape(-1, 4), [[2, 0, 1, 2]] * copies)
    sums = np.bincount(rows[kept], (values * scale.numpy())[kept], 4 * copies).reshape(-1, 4)
    np.testing.assert_allclose(sums.mean(axis=0), [6, 0, 4, 35], rtol=0.03)


def test_fit_on_ids_learns_and_is_what_one_process_does_by_distribute(graph):
    nodes, labels = graph.splits["train"], graph.labels[graph.splits["train"]]

    def train(fit, fanouts):
        model = graphs.NodeModel(graphs.GCN(3, 8, dropout=0.0, seed=1), graph, fanouts, seed=5)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.05), loss, metrics=["accuracy"])
        fit(model)
        return model

    def whole(model):
        model.fit(nodes, labels, batch_size=len(nodes), epochs=8, shuffle=False, verbose=0)

    exact = train(whole, None)
    expected = graphs.GCN(3, 8, dropout=0.0, seed=1)
    graphs.train_nodes(expected, graph, epochs=8, learning_rate=0.05, restore="last")
    inputs = graphs.inputs_of(graph)
    np.testing.assert_allclose(exact.inner(inputs), expected(inputs), atol=1e-4)

    sampled = [
        train(lambda model: distribute.fit(model, nodes, labels, batch_size=20, epochs=6, verbose=0), [3, 3])
        for _ in range(2)
    ]
    np.testing.assert_array_equal(sampled[0].inner(inputs), sampled[1].inner(inputs))
    test = graph.splits["test"]
    assert sampled[0].evaluate(test, graph.labels[test], verbose=0)[1] > 0.9


@pytest.mark.parametrize("name", MODELS)
def test_the_inner_model_is_what_is_saved(name, graph, tmp_path):
    make, normalize = MODELS[name]
    adjacency = None if normalize else graph.adjacency
    model = graphs.NodeModel(make(), graph, adjacency=adjacency)
    nodes = np.array([3, 1, 4, 1, 5])
    expected = model(nodes).numpy()
    with pytest.raises(NotImplementedError, match=r"Save what was trained, model\.inner"):
        model.save(tmp_path / "whole.keras")
    model.inner.save(tmp_path / "inner.keras")
    loaded = graphs.NodeModel(keras.saving.load_model(tmp_path / "inner.keras"), graph, adjacency=adjacency)
    np.testing.assert_array_equal(loaded(nodes), expected)
    model.save_weights(tmp_path / "model.weights.h5")
    again = graphs.NodeModel(make(), graph, adjacency=adjacency)
    again(nodes)
    again.inner.set_weights([weight + 1 for weight in again.inner.get_weights()])
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(again(nodes), expected)


def test_isolated_nodes_and_empty_batches_have_results():
    graph = graphs.Graph.from_edges([(0, 1)], 3, features=np.eye(3, dtype="float32"))
    for make, normalize in MODELS.values():
        model = graphs.NodeModel(make(), graph, adjacency=None if normalize else graph.adjacency)
        assert np.isfinite(model(np.array([2, 0]))).all()
        assert model(np.zeros(0, np.int64)).shape == (0, 3)


def test_bad_input(graph):
    with pytest.raises(ValueError, match="inner"):
        graphs.NodeModel(graphs.SGC(3), graph)
    with pytest.raises(ValueError, match="features"):
        graphs.NodeModel(graphs.GCN(3), graph.with_(features=None))
    with pytest.raises(ValueError, match="fanouts"):
        graphs.NodeModel(graphs.GCN(3), graph, [2])
    with pytest.raises(ValueError, match="adjacency"):
        graphs.NodeModel(graphs.GCN(3), graph, adjacency=np.eye(3))
    model = graphs.NodeModel(graphs.GCN(3), graph)
    for nodes in ([0, 120], [-1]):
        with pytest.raises(tf.errors.InvalidArgumentError, match="ids from 0 to 119"):
            model(np.array(nodes))
