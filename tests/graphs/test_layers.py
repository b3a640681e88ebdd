"""Layers against NumPy, sparse against dense, gradients, files, and `fit`."""

import keras
import numpy as np
import pytest
import scipy.sparse as sp
import tensorflow as tf

from tfkit import graphs
from tfkit.graphs.layers.deep import edges_kept
from tfkit.graphs.propagation import propagate_weighted


@pytest.fixture(scope="module")
def small():
    rng = np.random.default_rng(0)
    dense = (rng.random((9, 9)) < 0.35).astype("float32")
    dense[4] = 0  # Hears nobody.
    np.fill_diagonal(dense, 0)
    weights = dense * rng.random((9, 9)).astype("float32")
    return weights, rng.normal(size=(9, 5)).astype("float32")


LAYERS = {
    "gcn": lambda: graphs.GCNConv(3),
    "gcn, widening": lambda: graphs.GCNConv(8, activation="relu"),
    "sage mean": lambda: graphs.SAGEConv(3),
    "sage pool": lambda: graphs.SAGEConv(3, "max_pool", normalize=True),
    "sage lstm": lambda: graphs.SAGEConv(3, "lstm"),
    "gat": lambda: graphs.GATConv(3, 2),
    "gat, mean": lambda: graphs.GATConv(3, 2, concat=False),
    "gin": lambda: graphs.GINConv(3, epsilon=0.3),
    "sgc": lambda: graphs.SGCConv(3, 3),
    "appnp": lambda: graphs.PageRankPropagation(4, 0.2),
}
each = pytest.mark.parametrize("name", LAYERS)


@pytest.mark.parametrize("width", [1, 7, 31, 32, 47, 48, 70])
def test_propagation_and_its_gradient_are_those_of_dense_matrices(width):
    rng = np.random.default_rng(width)
    dense = np.where(rng.random((11, 8)) < 0.3, rng.normal(size=(11, 8)), 0).astype("float32")
    x, weights = (
        tf.constant(rng.normal(size=(8, width)), "float32"),
        tf.constant(rng.normal(size=(11, width)), "float32"),
    )
    found = []
    for matrix in (tf.constant(dense), graphs.to_tensor(sp.csr_array(dense))):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = graphs.propagate(matrix, x)
            loss = tf.reduce_sum(y * weights)
        found.append((y.numpy(), tape.gradient(loss, x).numpy()))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-5)


@pytest.mark.parametrize("width", [3, 60])
def test_propagation_over_no_edges_is_zero(width):
    matrix = graphs.to_tensor(sp.csr_array((4, 6), dtype="float32"))
    np.testing.assert_array_equal(graphs.propagate(matrix, tf.ones((6, width))), np.zeros((4, width)))


def test_weighted_propagation_has_the_gradients_of_both(small):
    dense, x = small
    matrix = graphs.to_tensor(sp.csr_array(dense))
    rows, columns = matrix.indices[:, 0], matrix.indices[:, 1]
    held = tf.Variable(x)
    weights = tf.Variable(matrix.values)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.sin(propagate_weighted(matrix.indices, weights, matrix.dense_shape, held)))
    found = tape.gradient(loss, [weights, held])
    with tf.GradientTape() as tape:
        full = tf.scatter_nd(matrix.indices, weights, (9, 9))
        loss = tf.reduce_sum(tf.sin(full @ held))
    for a, b in zip(found, tape.gradient(loss, [weights, held]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(rows) == len(columns)


@each
def test_sparse_agrees_with_dense_and_so_do_gradients(name, small):
    dense, x = small
    keras.utils.set_random_seed(1)
    layer = LAYERS[name]()
    results = []
    for features in (x, graphs.to_tensor(sp.csr_array(x))):
        if name == "appnp" and features is not x:
            continue
        for adjacency in (tf.constant(dense), graphs.to_tensor(sp.csr_array(dense))):
            with tf.GradientTape() as tape:
                y = layer((features if features is not x else tf.constant(x), adjacency))
                loss = tf.reduce_sum(tf.sin(y))
            gradients = tape.gradient(loss, [v.value for v in layer.trainable_variables])
            assert all(gradient is not None for gradient in gradients)
            results.append([y, *gradients])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)


@each
def test_a_layer_makes_the_round_trip_through_a_file(name, small, tmp_path):
    dense, x = small
    features = keras.Input(batch_shape=(None, 5))
    adjacency = keras.Input(batch_shape=(None, None), sparse=True)
    model = keras.Model([features, adjacency], LAYERS[name]()((features, adjacency)))
    inputs = [tf.constant(x), graphs.to_tensor(sp.csr_array(dense))]
    expected = model(inputs)
    assert model.output_shape[-1] == expected.shape[-1]
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.saving.load_model(tmp_path / "model.keras")(inputs), expected)


def weights_of(layer):
    return {variable.name: variable.numpy() for variable in layer.weights}


def test_convolution_by_numpy(small):
    dense, x = small
    layer = graphs.GCNConv(3, activation="relu", use_bias=True)
    y = layer((x, tf.constant(dense)))
    layer.bias.assign([0.5, -0.5, 0.1])
    y = layer((x, tf.constant(dense)))
    w = weights_of(layer)
    np.testing.assert_allclose(y, np.maximum(dense @ x @ w["kernel"] + w["bias"], 0), atol=1e-5)


def test_sage_by_numpy(small):
    dense, x = small
    present = (dense > 0).astype("float32")
    mean = present @ x / np.maximum(present.sum(1, keepdims=True), 1)
    layer = graphs.SAGEConv(3)
    y = layer((x, tf.constant(dense)))
    w = weights_of(layer)
    np.testing.assert_allclose(y, x @ w["self_kernel"] + mean @ w["neighbour_kernel"], atol=1e-5)
    assert not np.allclose(w["self_kernel"], w["neighbour_kernel"]), "both kernels start with the same numbers"

    layer = graphs.SAGEConv(3, "max_pool")
    y = layer((x, tf.constant(dense)))
    w = weights_of(layer)
    pooled = np.maximum(x @ w["pool_kernel"] + w["pool_bias"], 0)
    best = np.stack([pooled[row > 0].max(0) if row.any() else np.zeros(3) for row in dense])
    np.testing.assert_allclose(y, x @ w["self_kernel"] + best @ w["neighbour_kernel"], atol=1e-5)


def test_lstm_reads_neighbours_in_any_order_when_training_only(small):
    dense, x = small
    layer = graphs.SAGEConv(3, "lstm", seed=4)
    inputs = (tf.constant(x), tf.constant(dense))
    np.testing.assert_array_equal(layer(inputs), layer(inputs))
    assert not np.allclose(layer(inputs, training=True), layer(inputs, training=True))
    w = weights_of(layer)
    alone = layer(inputs)[4]  # Hears nobody, so that its aggregate is 0.
    np.testing.assert_allclose(alone, x[4] @ w["self_kernel"], atol=1e-5)


def test_attention_by_numpy(small):
    dense, x = small
    layer = graphs.GATConv(3, 2)
    y = layer((x, graphs.to_tensor(sp.csr_array(dense))))
    w = weights_of(layer)
    h = (x @ w["kernel"]).reshape(9, 2, 3)
    expected = np.zeros((9, 2, 3))
    for head in range(2):
        own, other = h[:, head] @ w["own_attention"][head], h[:, head] @ w["other_attention"][head]
        for i in range(9):
            near = np.flatnonzero(dense[i])
            if len(near):
                logits = own[i] + other[near]
                logits = np.where(logits > 0, logits, 0.2 * logits)
                powers = np.exp(logits - logits.max())
                expected[i, head] = powers / powers.sum() @ h[near, head]
    np.testing.assert_allclose(y, expected.reshape(9, 6), atol=1e-5)


def test_isomorphism_layer_by_numpy(small):
    dense, x = small
    layer = graphs.GINConv(3, epsilon=0.3)
    y = layer((x, tf.constant(dense)))
    w = weights_of(layer)
    hidden = np.maximum((1.3 * x + dense @ x) @ w["hidden_kernel"] + w["hidden_bias"], 0)
    np.testing.assert_allclose(y, hidden @ w["kernel"] + w["bias"], atol=1e-5)


def test_page_rank_tends_to_the_inverse(small):
    dense, x = small
    step = graphs.row_normalize(dense)
    found = graphs.PageRankPropagation(200, 0.2)((x, tf.constant(step)))
    np.testing.assert_allclose(found, 0.2 * np.linalg.solve(np.eye(9) - 0.8 * step, x), atol=1e-5)


def test_simplified_convolution_is_a_power(small):
    dense, x = small
    layer = graphs.SGCConv(3, 3)
    y = layer((x, tf.constant(dense)))
    expected = np.linalg.matrix_power(dense, 3) @ x @ weights_of(layer)["kernel"]
    np.testing.assert_allclose(y, expected, atol=1e-4)


def test_initial_residual_and_identity_mapping_by_numpy(small):
    dense, x = small
    layer = graphs.GCNIIConv(5, 3, alpha=0.2, theta=0.7)
    initial = x[::-1].copy()
    y = layer((x, tf.constant(dense), initial))
    beta = np.log(0.7 / 3 + 1)
    h = 0.8 * dense @ x + 0.2 * initial
    np.testing.assert_allclose(y, (1 - beta) * h + beta * h @ weights_of(layer)["kernel"], atol=1e-5)


def test_pair_norm_keeps_the_total_distance(small):
    _, x = small
    y = graphs.PairNorm(1.5)(x * 3 + 2).numpy()
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose((y**2).sum(1).mean(), 1.5**2, rtol=1e-4)
    rows = graphs.PairNorm(2.0, individually=True)(x).numpy()
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 2, rtol=1e-4)


def test_drop_edge_drops_pairs_and_normalises():
    graph = graphs.stochastic_block_model(300, 2, 10)
    plain = graphs.to_tensor(graph.adjacency)
    layer = graphs.DropEdge(0.3, seed=1)
    np.testing.assert_allclose(
        tf.sparse.to_dense(layer(plain)), graphs.gcn_normalize(graph.adjacency).toarray(), atol=1e-6
    )
    dropped = tf.sparse.to_dense(layer(plain, training=True)).numpy()
    np.testing.assert_allclose(dropped, dropped.T, atol=1e-7)
    left = (np.count_nonzero(dropped) - 300) / graph.adjacency.nnz
    assert abs(left - 0.7) < 0.05
    again = graphs.DropEdge(0.3, seed=1)
    again(plain)
    np.testing.assert_array_equal(tf.sparse.to_dense(again(plain, training=True)), dropped)
    assert bool(tf.reduce_all(edges_kept(plain.indices, tf.constant([1, 2]), 0.0)))


@pytest.mark.parametrize("mode", ["concat", "max", "lstm"])
def test_jumping_knowledge(mode, small):
    _, x = small
    found = graphs.JumpingKnowledge(mode)([x, 2 * x, x - 1]).numpy()
    if mode == "concat":
        np.testing.assert_array_equal(found, np.concatenate([x, 2 * x, x - 1], axis=1))
    elif mode == "max":
        np.testing.assert_array_equal(found, np.maximum(np.maximum(x, 2 * x), x - 1))
    else:
        low, high = np.minimum(np.minimum(x, 2 * x), x - 1), np.maximum(np.maximum(x, 2 * x), x - 1)
        assert (found >= low - 1e-5).all() and (found <= high + 1e-5).all()


def test_sparse_dropout_keeps_the_mean():
    x = graphs.to_tensor(sp.csr_array(np.ones((100, 100), "float32")))
    layer = graphs.FeatureDropout(0.4, seed=3)
    y = layer(x, training=True).values.numpy()
    assert set(np.unique(y).tolist()) == {0.0, np.float32(1 / 0.6)}
    assert abs(y.mean() - 1) < 0.03
    assert layer(x) is x


def test_unsupervised_loss_by_numpy():
    z = np.random.default_rng(0).normal(size=(4, 3)).astype("float32")
    found = graphs.unsupervised_loss(tf.constant(z), tf.constant([[0, 1], [2, 3]]), tf.constant([[2, 3], [0, 0]]))

    def log_sigmoid(v):
        return -np.log1p(np.exp(-v))

    first = -log_sigmoid(z[0] @ z[1]) - log_sigmoid(-z[0] @ z[2]) - log_sigmoid(-z[0] @ z[3])
    second = -log_sigmoid(z[2] @ z[3]) - 2 * log_sigmoid(-z[2] @ z[0])
    np.testing.assert_allclose(found, (first + second) / 2, rtol=1e-5)


def test_a_layer_says_what_it_takes(small):
    with pytest.raises(ValueError, match="features, adjacency"):
        graphs.GCNConv(3)(tf.constant(small[1]))
    with pytest.raises(ValueError, match="units"):
        graphs.GCNConv(0)
    with pytest.raises(ValueError, match="max_pool"):
        graphs.SAGEConv(3, "median")
