"""Models: learning with `fit` and with the compiled loop, files, and batches of graphs."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit import graphs
from tfkit.graphs.training import compiled_step

MODELS = {
    "GCN": lambda: graphs.GCN(3, seed=1),
    "GraphSAGE": lambda: graphs.GraphSAGE(3, 8, seed=1),
    "GAT": lambda: graphs.GAT(3, 4, 2, seed=1, dropout=0.2),
    "SGC": lambda: graphs.SGC(3, seed=1),
    "APPNP": lambda: graphs.APPNP(3, 8, 3, seed=1, l2=0.0),
    "GCNII": lambda: graphs.GCNII(3, 8, 4, seed=1, dropout=0.2),
    "DeepGCN, batch norm": lambda: graphs.DeepGCN(3, 8, 4, residual=True, batch_norm=True, seed=1),
    "DeepGCN": lambda: graphs.DeepGCN(3, 8, 4, residual=True, pair_norm=1.0, jump="max", seed=1),
}


@pytest.fixture(scope="module")
def blocks():
    return graphs.stochastic_block_model(240, 3, 8, homophily=0.9, features=6, noise=1.5, seed=2)


@pytest.fixture(scope="module")
def inputs(blocks):
    return graphs.inputs_of(blocks)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_learns_repeats_and_is_saved(name, blocks, inputs, tmp_path):
    model = MODELS[name]()
    history = graphs.train_nodes(model, blocks, epochs=15, learning_rate=0.1, inputs=inputs)
    assert graphs.accuracy(model, blocks, "test", inputs) > 0.85
    assert history.loss[-1] < history.loss[0] and len(history.val_loss) == 15
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(inputs), model(inputs))
    if name == "GCN":
        again = MODELS[name]()
        graphs.train_nodes(again, blocks, epochs=15, learning_rate=0.1, inputs=inputs)
        np.testing.assert_array_equal(again(inputs), model(inputs))


def test_32_layers_need_a_norm(blocks, inputs):
    """The sums of residual connections grow with every layer, and batch normalisation holds them."""
    plain = graphs.DeepGCN(3, 32, 32, residual=True, seed=0)
    normed = graphs.DeepGCN(3, 32, 32, residual=True, batch_norm=True, seed=0)
    spread = [float(tf.reduce_mean(tf.abs(model(inputs, training=True)))) for model in (plain, normed)]
    assert spread[1] < 15 and spread[0] > 10 * spread[1]
    graphs.train_nodes(normed, blocks, epochs=30, restore="last", inputs=inputs)
    assert graphs.accuracy(normed, blocks, "train", inputs) > 0.9
    rows = graphs.DeepGCN(3, 8, 3, pair_norm=1.5, individually=True, seed=0)
    rows(inputs)
    hidden = rows.norms[1](tf.random.normal((5, 8), seed=0))
    np.testing.assert_allclose(tf.norm(hidden, axis=1), 1.5, rtol=1e-4)
    with pytest.raises(ValueError, match="beside a PairNorm"):
        graphs.DeepGCN(3, pair_norm=1.0, batch_norm=True)


def test_fit_does_what_the_compiled_loop_does(blocks, inputs):
    def make():
        return graphs.GCN(3, dropout=0.0, seed=3)

    loop, fitted = make(), make()
    history = graphs.train_nodes(loop, blocks, epochs=3, restore="last", inputs=inputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    fitted.compile(keras.optimizers.Adam(0.01), loss, weighted_metrics=["accuracy"])
    found = fitted.fit(graphs.full_batch(blocks), epochs=3, verbose=0, validation_data=graphs.full_batch(blocks, "val"))
    np.testing.assert_allclose(found.history["loss"], history.loss, rtol=1e-4)
    np.testing.assert_allclose(found.history["val_accuracy"], history.val_accuracy, atol=1e-5)
    np.testing.assert_allclose(fitted(inputs), loop(inputs), atol=1e-5)


def test_best_weights_come_back_and_stopping_stops(blocks, inputs):
    model = graphs.GCN(3, seed=0)
    history = graphs.train_nodes(model, blocks, epochs=60, learning_rate=0.3, patience=5, inputs=inputs)
    assert history.best_epoch == int(np.argmin(history.val_loss))
    assert len(history.loss) == min(60, history.best_epoch + 6)
    right = graphs.accuracy(model, blocks, "val", inputs)
    np.testing.assert_allclose(right, history.val_accuracy[history.best_epoch], atol=1e-6)


def test_training_says_what_is_missing(blocks, inputs):
    model = graphs.GCN(3)
    with pytest.raises(ValueError, match="split"):
        graphs.train_nodes(model, blocks.with_(splits={}), restore="last", inputs=inputs)
    with pytest.raises(ValueError, match="val"):
        graphs.train_nodes(model, blocks.with_(splits={"train": [0]}), inputs=inputs)
    with pytest.raises(ValueError, match="no label"):
        graphs.train_nodes(model, blocks.with_(labels=np.full(240, -1)), inputs=inputs)
    with pytest.raises(ValueError, match=r"classes 0 to 2.*num_classes"):
        graphs.train_nodes(graphs.GCN(2), blocks, inputs=inputs)
    with pytest.raises(ValueError, match="features"):
        graphs.inputs_of(blocks.with_(features=None))
    with pytest.raises(ValueError, match="adjacencies"):
        model((inputs[0], inputs[1], inputs[1], inputs[1]))


def test_the_first_layer_alone_decays(blocks, inputs):
    model = graphs.GCN(3, l2=0.5, seed=0)
    model(inputs)
    np.testing.assert_allclose(model.losses[0], 0.25 * (model.stack[0].kernel.numpy() ** 2).sum(), rtol=1e-5)
    assert len(model.losses) == 1


def test_a_step_goes_down_the_gradient(blocks, inputs):
    model = graphs.GCN(3, dropout=0.0, seed=0)
    step = compiled_step(model, blocks, inputs, keras.optimizers.SGD(0.1))
    losses = [float(step()[0]) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)


def ring(size, chords, seed):
    pairs = [(i, (i + 1) % size) for i in range(size)] + ([(i, (i + 2) % size) for i in range(size)] if chords else [])
    x = np.random.default_rng(seed).normal(1, 0.1, (size, 2)).astype("float32")
    return graphs.Graph.from_edges(pairs, features=x)


def test_a_batch_of_graphs_is_block_diagonal_and_sums_by_graph():
    parts = [ring(4, False, 0), ring(6, True, 1)]
    batch = graphs.batch_graphs(parts, [0, 1])
    dense = tf.sparse.to_dense(batch.adjacency).numpy()
    np.testing.assert_array_equal(dense[:4, :4], parts[0].adjacency.toarray())
    assert not dense[:4, 4:].any()
    sums = tf.sparse.sparse_dense_matmul(batch.membership, batch.features)
    np.testing.assert_allclose(sums, [part.features.sum(0) for part in parts], rtol=1e-5)
    model = graphs.GIN(2, 4, 2, dropout=0.0, seed=0)
    together = model(batch[:3])
    alone = [model(graphs.batch_graphs([part])[:3])[0] for part in parts]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    with pytest.raises(ValueError, match="one graph or more"):
        graphs.batch_graphs([])


def test_a_batch_takes_the_labels_of_its_graphs():
    parts = [ring(4, False, 0), ring(6, True, 1)]
    labelled = [part.with_(label=i) for i, part in enumerate(parts)]
    batch = graphs.batch_graphs(labelled)
    np.testing.assert_array_equal(batch.labels, [0, 1])
    assert batch.labels.dtype == np.int32
    np.testing.assert_array_equal(graphs.batch_graphs(labelled, [1, 1]).labels, [1, 1])
    assert graphs.batch_graphs(parts).labels is None
    rows = graphs.batch_graphs([part.with_(label=np.array([i, 0.5])) for i, part in enumerate(parts)])
    np.testing.assert_array_equal(rows.labels, [[0, 0.5], [1, 0.5]])
    floats = graphs.batch_graphs([parts[0].with_(label=1), parts[1].with_(label=0.5)])
    np.testing.assert_array_equal(floats.labels, [1, 0.5])
    for odd in (parts[1], parts[1].with_(label=np.ones(2))):
        with pytest.raises(ValueError, match=r'graphs\[1\].label.*level="graph"'):
            graphs.batch_graphs([labelled[0], odd])
    with pytest.raises(ValueError, match="each of 2 graphs"):
        graphs.batch_graphs(parts, [0])


def test_features_that_are_not_finite_are_named_and_no_learning_rate(blocks, tmp_path):
    broken = np.array(blocks.features)
    broken[17, 2] = np.nan
    np.save(tmp_path / "features.npy", broken)
    mapped = blocks.with_(features=np.load(tmp_path / "features.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="Row 17 holds NaN"):
        graphs.train_nodes(graphs.GCN(3), mapped, epochs=1)
    with pytest.raises(ValueError, match="Row 17 holds NaN"):
        graphs.NodeModel(graphs.GCN(3), mapped)
    sampler = graphs.NeighbourSampler(mapped, [2, 2], 40)
    whole = [batch for batch in sampler.batches(0) if 17 in batch.inputs]
    with pytest.raises(ValueError, match="Row 17 holds NaN"):
        whole[0].tensors(mapped.features)
    model = graphs.GraphSAGE(3, 8)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(Exception, match="Row 17 holds NaN"):
        model.fit(graphs.sampled_dataset(sampler, mapped), verbose=0)
    inputs = (tf.constant(broken), graphs.to_tensor(graphs.gcn_normalize(blocks.adjacency)))
    with pytest.raises(ValueError, match=r"inputs \(features\)"):
        graphs.train_nodes(graphs.GCN(3), blocks, epochs=1, inputs=inputs)


def test_graph_classification_through_fit(tmp_path):
    parts = [ring(5 + i % 4, bool(i % 2), i) for i in range(24)]
    batch = graphs.batch_graphs(parts, np.arange(24) % 2)
    data = tf.data.Dataset.from_tensors((batch[:3], batch.labels))
    model = graphs.GIN(2, 8, 2, seed=0)
    model.compile(
        keras.optimizers.Adam(0.03), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
    )
    model.fit(data.repeat(60), verbose=0)
    assert model.evaluate(data, verbose=0)[1] > 0.95
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(batch[:3]), model(batch[:3]), atol=1e-6)


def test_an_edge_task_learns(blocks, inputs):
    encoder = graphs.GCN(8, 8, dropout=0.0, l2=0.0, seed=0)
    split = graphs.embeddings.split_links(blocks, 0.3)
    x, adjacency = graphs.inputs_of(split.graph)
    pairs = tf.constant(np.concatenate([split.edges, split.others]))
    labels = tf.constant(np.repeat([1.0, 0.0], [len(split.edges), len(split.others)]), "float32")
    optimizer = keras.optimizers.Adam(0.03)
    encoder((x, adjacency))
    losses = []
    for _ in range(12):
        with tf.GradientTape() as tape:
            scores = graphs.edge_scores(encoder((x, adjacency)), pairs)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, scores))
        variables = encoder.trainable_variables
        optimizer.apply(tape.gradient(loss, [v.value for v in variables]), variables)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kind", ["neighbour", "cluster"])
def test_sampled_batches_train_through_fit(kind, blocks):
    nodes = blocks.splits["train"]
    if kind == "neighbour":
        model = graphs.GraphSAGE(3, 8, seed=0)
        sampler = graphs.NeighbourSampler(blocks, [3, 3], 40, nodes)
        inputs = graphs.inputs_of(blocks, None)
    else:
        model = graphs.GCN(3, 8, dropout=0.0, seed=0)
        sampler = graphs.ClusterSampler(graphs.gcn_normalize(blocks.adjacency), 6, 2, nodes)
        inputs = graphs.inputs_of(blocks)
    data = graphs.sampled_dataset(sampler, blocks)
    model.compile(keras.optimizers.Adam(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(data, epochs=6, verbose=0)
    assert graphs.accuracy(model, blocks, "test", inputs) > 0.8
