"""Importance sampling: scores in closed form, exact unbiasedness, the variance it saves, and the wrapper in `fit`."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tfkit.training import ImportanceSampler, ImportanceSampling, sampling

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(activation=None, outputs=3, seed=0):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(6, activation="tanh")(inputs)
    return keras.Model(inputs, keras.layers.Dense(outputs, activation=activation)(hidden))


def examples(count=24, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, 4)).astype("float32"), rng.integers(0, 3, count)


@pytest.mark.parametrize("softmax", [False, True])
def test_score_of_softmax_and_cross_entropy(softmax):
    """|p - one_hot|, whether the softmax is in the loss or in the model."""
    x, y = examples()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax)
    model = network("softmax" if softmax else None)
    scores, _ = sampling.scores_of(model, loss, x, y)
    p = keras.ops.softmax(network()(x)).numpy()
    np.testing.assert_allclose(scores, np.linalg.norm(p - np.eye(3)[y], axis=1), rtol=1e-4)
    if softmax:
        assert model.layers[-1].activation is keras.activations.softmax, "the activation is put back"


def test_score_of_squared_error_through_a_sigmoid():
    x, _ = examples()
    y = np.linspace(0, 1, len(x))[:, None]
    model = network("sigmoid", 1)
    scores, _ = sampling.scores_of(model, "mse", x, y)
    p = model(x).numpy()
    np.testing.assert_allclose(scores, np.abs(2 * (p - y) * p * (1 - p))[:, 0], rtol=1e-4)


@given(st.lists(st.floats(0.01, 10.0), min_size=2, max_size=20))
@settings(max_examples=20, deadline=None)
def test_tau_is_that_of_the_paper(scores):
    g = np.array(scores) / np.sum(scores)
    u = 1 / len(g)
    paper = 1 / np.sqrt(1 - np.square(g - u).sum() / np.square(g).sum())
    tau = sampling.variance_reduction(sampling.probabilities(tf.constant(scores, tf.float64)))
    np.testing.assert_allclose(tau, paper, rtol=1e-6)
    assert tau >= 1 - 1e-9


def test_probabilities_without_a_score_are_uniform():
    np.testing.assert_array_equal(sampling.probabilities(tf.zeros(4)), [0.25] * 4)


@pytest.mark.parametrize("how", sampling.RESAMPLING)
def test_draws_come_as_often_as_their_probability_says(how):
    p = tf.constant([0.05, 0.15, 0.35, 0.45])
    drawn = np.concatenate([sampling.resample(p, 10, (0, step), how) for step in range(2000)])
    share = np.bincount(drawn, minlength=4) / len(drawn)
    np.testing.assert_allclose(share, p, atol=4 * 0.5 / np.sqrt(len(drawn)))


def test_systematic_counts_differ_by_less_than_one_from_their_mean():
    p = sampling.probabilities(tf.constant(np.random.default_rng(0).random(30)))
    for step in range(50):
        counts = np.bincount(sampling.resample(p, 12, (1, step), "systematic"), minlength=30)
        assert np.abs(counts - 12 * p).max() < 1


def test_the_weighted_gradient_is_exactly_unbiased():
    """The expectation over all 6^2 draws of two from six is the full gradient."""
    x, y = examples(6)
    model = network()
    scores, _ = sampling.scores_of(model, CROSS_ENTROPY, x, y)
    p = sampling.probabilities(scores)

    def gradient(indices, weights):
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(y[indices], model(x[indices]), weights)
        return np.concatenate([each.numpy().ravel() for each in tape.gradient(loss, model.trainable_weights)])

    expected = 0.0
    for pair in itertools.product(range(6), repeat=2):
        indices = np.array(pair)
        weights = sampling.importance_weights(p, indices)
        expected = expected + float(tf.reduce_prod(tf.gather(p, indices))) * gradient(indices, weights)
    np.testing.assert_allclose(expected, gradient(np.arange(6), None), atol=1e-6)


def test_true_gradient_norms_minimise_the_variance():
    """No other distribution beats p proportional to the norm, and the bound lies between it and uniform."""
    x, y = examples(30)
    model = network()
    uniform, _ = sampling.gradient_variance(model, CROSS_ENTROPY, x, y, np.full(30, 1 / 30))
    norms = []
    for index in range(30):
        with tf.GradientTape() as tape:
            loss = CROSS_ENTROPY(y[index : index + 1], model(x[index : index + 1]))
        gradients = tape.gradient(loss, model.trainable_weights)
        norms.append(float(tf.linalg.global_norm(gradients)))
    best = np.array(norms) / np.sum(norms)
    bound = sampling.probabilities(sampling.scores_of(model, CROSS_ENTROPY, x, y)[0]).numpy()
    least = sampling.gradient_variance(model, CROSS_ENTROPY, x, y, best)[1]
    assert least <= sampling.gradient_variance(model, CROSS_ENTROPY, x, y, bound)[1] + 1e-9
    rng = np.random.default_rng(0)
    for _ in range(5):
        other = best * np.exp(0.3 * rng.normal(size=30))
        assert least < sampling.gradient_variance(model, CROSS_ENTROPY, x, y, other / other.sum())[1]
    assert least < uniform
    same = sampling.gradient_variance(model, CROSS_ENTROPY, x, y, np.full(30, 1 / 30))
    np.testing.assert_allclose(same[0], same[1], rtol=1e-6)


@pytest.mark.parametrize("score", sampling.SCORES)
def test_plain_sampler(score):
    x, y = examples(40)
    draws = [ImportanceSampler(network(), CROSS_ENTROPY, score, seed=3).sample(x, y, 16) for _ in range(2)]
    np.testing.assert_array_equal(draws[0].indices, draws[1].indices)
    np.testing.assert_allclose(draws[0].weights * draws[0].probabilities[draws[0].indices], 1 / 40, rtol=1e-5)
    if score == "loss":
        losses = keras.losses.sparse_categorical_crossentropy(y, network()(x), from_logits=True)
        np.testing.assert_allclose(draws[0].scores, losses, rtol=1e-5)
    if score == "uniform":
        np.testing.assert_allclose(draws[0].weights, 1, rtol=1e-5)


def fitted(**settings):
    model = ImportanceSampling(network(), batch_size=8, presample=3, **settings)
    model.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY, metrics=["accuracy"])
    x, y = examples(96)
    history = model.fit(x, y, batch_size=24, epochs=2, shuffle=False, verbose=0, validation_data=(x, y))
    return model, history.history


def test_the_wrapper_never_samples_below_the_threshold():
    model, history = fitted(threshold=100.0)
    plain = network()
    plain.compile(keras.optimizers.SGD(0.1), CROSS_ENTROPY)
    x, y = examples(96)
    kept = np.concatenate([np.arange(start, start + 8) for start in range(0, 96, 24)])
    plain.fit(x[kept], y[kept], batch_size=8, epochs=2, shuffle=False, verbose=0)
    for expected, actual in zip(plain.get_weights(), model.model.get_weights(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-7)
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= set(history)
    assert float(model._sampled) == 0 and float(model._steps) == 8


def test_the_wrapper_samples_above_the_threshold_and_repeats_with_its_seed():
    (model, _), (again, _), (other, _) = fitted(threshold=0.0), fitted(threshold=0.0), fitted(threshold=0.0, seed=1)
    assert float(model._sampled) == 8 and model.tau > 1
    for one, two in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert any((one != two).any() for one, two in zip(model.get_weights(), other.get_weights(), strict=True))


def test_default_threshold_and_smoothing():
    assert ImportanceSampling(network(), 8, 3).threshold == pytest.approx((24 + 3 * 8) / (3 * 8))
    model = ImportanceSampling(network(), 8, 1, threshold=100.0, smoothing_factor=0.9)
    model.compile(keras.optimizers.SGD(0.0), CROSS_ENTROPY)
    x, y = examples(16)
    taus = [float(sampling.variance_reduction(sampling.probabilities(model.scores(x[i : i + 8], y[i : i + 8]))))
            for i in (0, 8)]  # fmt: skip
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    assert model.tau == pytest.approx(0.9 * taus[0] + 0.1 * taus[1], rel=1e-5)


def test_report_says_what_it_measured():
    x, y = examples(96)
    report = fitted()[0].report(x, y, repeats=1)
    assert report.time_ratio > 1 and 0 < report.variance_ratio < 2 and report.steps == 8
    assert report.pays == (report.variance_ratio * report.time_ratio < 1)
    assert ("does not pay" in str(report)) != report.pays


def test_saving(tmp_path):
    model, _ = fitted()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    x, _ = examples()
    np.testing.assert_array_equal(again(x), model(x))
    assert again.get_config()["threshold"] == model.threshold and again.tau == model.tau


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="presample"):
        ImportanceSampling(network(), 8, 0.5)
    with pytest.raises(ValueError, match="score"):
        ImportanceSampler(network(), CROSS_ENTROPY, "norm")
    with pytest.raises(TypeError, match="keras.Model"):
        ImportanceSampling(keras.layers.Dense(3))
    with pytest.raises(ValueError, match="reduction"):
        ImportanceSampling(network()).compile("sgd", keras.losses.MeanSquaredError(reduction="sum"))
