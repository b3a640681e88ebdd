"""VR-GCN: unbiased, exact where it must be, of smaller variance than sampling, and out of core."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit import graphs


@pytest.fixture(scope="module")
def graph():
    return graphs.stochastic_block_model(150, 3, 10, homophily=0.8, features=5, noise=1.0, seed=4)


def trainer(graph, estimator, *, dropout=0.0, layers=2, **more):
    model = graphs.GCN(3, 6, layers, dropout=dropout, l2=0.0, seed=1)
    return graphs.VRGCN(model, graph, estimator=estimator, batch_size=25, seed=2, **more)


def flat(found):
    return np.concatenate([np.ravel(part) for part in found])


def test_all_neighbours_give_the_gradient_of_the_whole_graph(graph):
    exact = trainer(graph, "exact", layers=3)
    targets = graph.splits["train"][:25]
    loss, found, _ = exact.gradients(*exact.batch(targets, 0))
    inputs = graphs.inputs_of(graph)
    with tf.GradientTape() as tape:
        logits = tf.gather(exact.model(inputs), targets)
        expected = tf.reduce_mean(
            tf.nn.sparse_softmax_cross_entropy_with_logits(tf.constant(graph.labels[targets]), logits)
        )
    variables = exact.model.trainable_variables
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for a, b in zip(found, tape.gradient(expected, [v.value for v in variables]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("estimator", ["cv", "cvd"])
def test_fresh_histories_leave_no_variance(graph, estimator):
    controlled, exact = trainer(graph, estimator), trainer(graph, "exact")
    controlled.fit(2)
    exact.model.set_weights(controlled.model.get_weights())
    controlled.refresh()
    targets = graph.splits["train"][:25]
    logits, _ = controlled.logits(*[controlled.batch(targets, 9)[i] for i in (0, 2)], training=False)
    np.testing.assert_allclose(logits, controlled.predict(targets), atol=1e-5)


@pytest.mark.parametrize("estimator", ["cv", "cvd", "sampling"])
def test_a_linear_loss_has_an_unbiased_gradient_whatever_the_histories(graph, estimator):
    sampled, exact = trainer(graph, estimator), trainer(graph, "exact")
    for history in sampled.histories:
        history.assign(tf.random.stateless_normal(history.shape, [1, 2]))
    targets = graph.splits["train"][:6]
    direction = tf.random.stateless_normal((6, 3), [3, 4])

    def gradient(source, draw):
        inputs, _, hops = source.batch(targets, draw)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(source.logits(inputs, hops, training=True)[0] * direction)
        return flat(tape.gradient(loss, [v.value for v in source.model.trainable_variables]))

    found = np.array([gradient(sampled, draw) for draw in range(300)])
    truth = gradient(exact, 0)
    deviation = found.std(axis=0, ddof=1)
    moving = deviation > 1e-7
    z = (found.mean(axis=0) - truth)[moving] / (deviation[moving] / np.sqrt(len(found)))
    assert np.sqrt((z**2).mean()) < 1.6 and np.abs(z).max() < 5
    np.testing.assert_allclose(found.mean(axis=0)[~moving], truth[~moving], atol=1e-5)


def test_histories_take_variance_away(graph):
    targets = graph.splits["train"][:25]
    spread = {}
    for estimator in ("cv", "sampling"):
        source = trainer(graph, estimator)
        source.fit(20)
        found = [flat(source.gradients(*source.batch(targets, 1, draw))[1]) for draw in range(40)]
        spread[estimator] = np.var(found, axis=0).sum()
    assert spread["cv"] < 0.5 * spread["sampling"]


def test_training_learns_repeats_and_predicts_as_the_model(graph):
    first, second = trainer(graph, "cvd", dropout=0.3), trainer(graph, "cvd", dropout=0.3)
    keras.utils.set_random_seed(0)
    losses = first.fit(12)
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(losses, second.fit(12))
    assert losses[-1] < 0.7 * losses[0]
    np.testing.assert_allclose(first.predict(), first.model(graphs.inputs_of(graph)), atol=1e-4)
    assert first.accuracy("test") > 0.85


def test_features_in_a_file_give_the_same_training(graph, tmp_path):
    np.save(tmp_path / "features.npy", graph.features)
    mapped = graph.with_(features=np.load(tmp_path / "features.npy", mmap_mode="r"))
    propagated = graphs.propagate_features(mapped, tmp_path / "propagated.npy", rows=40)
    np.testing.assert_allclose(propagated, graphs.propagate_features(graph), atol=1e-5)
    inside, outside = trainer(graph, "cv"), trainer(mapped, "cv", propagated=propagated)
    np.testing.assert_allclose(inside.fit(2), outside.fit(2), rtol=1e-4)
    with pytest.raises(FileExistsError, match="already"):
        graphs.propagate_features(mapped, tmp_path / "propagated.npy")


def test_features_that_are_not_finite_are_named(graph, tmp_path):
    broken = np.array(graph.features)
    broken[7, 1] = np.inf
    np.save(tmp_path / "features.npy", broken)
    mapped = graph.with_(features=np.load(tmp_path / "features.npy", mmap_mode="r"))
    with pytest.raises(ValueError, match="Row 7 holds NaN or infinity"):
        graphs.propagate_features(mapped, tmp_path / "propagated.npy", rows=40)
    assert [path.name for path in tmp_path.iterdir()] == ["features.npy"]
    for propagated in (None, broken):
        with pytest.raises(ValueError, match="Row 7 holds NaN"):
            graphs.VRGCN(graphs.GCN(3), mapped, propagated=propagated)
    with pytest.raises(ValueError, match="Row 7 holds NaN"):
        trainer(graph, "cv", propagated=mapped.features).fit(3)
    with pytest.raises(ValueError, match="propagated"):
        graphs.VRGCN(graphs.GCN(3), graph, propagated=broken[:5])


def test_bad_input(graph):
    with pytest.raises(ValueError, match="two layers"):
        graphs.VRGCN(graphs.GCN(3, layers=1), graph)
    with pytest.raises(ValueError, match="split"):
        graphs.VRGCN(graphs.GCN(3), graph, split="none")
    with pytest.raises(ValueError, match="classes 0 to 2"):
        graphs.VRGCN(graphs.GCN(2), graph)
    with pytest.raises(ValueError, match="estimator"):
        graphs.VRGCN(graphs.GCN(3), graph, estimator="exactly")
    with pytest.raises(ValueError, match="features"):
        graphs.VRGCN(graphs.GCN(3), graph.with_(features=None))


def test_a_model_of_fixed_size_reaches_tflite(graph, tmp_path):
    from tfkit.export import convert, verify

    matrix = graphs.gcn_normalize(graph.adjacency)
    plain = graph.adjacency
    for model, adjacency in (
        (graphs.GCN(3, 6, use_bias=True, seed=0), matrix),
        (graphs.GraphSAGE(3, 6, seed=0), plain),
    ):
        model((tf.constant(graph.features), graphs.to_tensor(adjacency)))
        batch = graphs.k_hop_batch(adjacency, [7, 3], 2)
        size = len(batch.inputs) + 5
        inputs = graphs.padded(batch, graph.features, size)
        fixed = graphs.fixed_size(model, size, 5)
        expected = model((tf.constant(graph.features), graphs.to_tensor(adjacency))).numpy()[[7, 3]]
        np.testing.assert_allclose(fixed(list(inputs))[0, :2], expected, atol=1e-5)
        path = convert(fixed, tmp_path / f"{model.name}.tflite")
        verify(fixed, path, list(inputs)).raise_if_different()
        with pytest.raises(ValueError, match="at least the batch"):
            graphs.padded(batch, graph.features, 3)
