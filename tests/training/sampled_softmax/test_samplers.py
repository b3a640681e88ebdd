"""Samplers draw what they say, and their corrections make the loss's sums right."""

import keras
import numpy as np
import pytest
from scipy import stats

from tfkit.training.sampled_softmax import (
    FourierSampler,
    KernelSampler,
    LogUniformSampler,
    SampledSoftmax,
    SoftmaxSampler,
    UniformSampler,
    UnigramSampler,
    sampled_softmax_loss,
)

CLASSES, DIMENSION = 53, 4
SAMPLERS = {
    "kernel": lambda: KernelSampler(20.0),
    "kernel, single classes": lambda: KernelSampler(20.0, block=1),
    "kernel, one leaf": lambda: KernelSampler(20.0, block=99),
    "fourier": lambda: FourierSampler(300, block=8),
    "uniform": UniformSampler,
    "log-uniform": LogUniformSampler,
    "unigram": lambda: UnigramSampler(np.arange(CLASSES), 0.75),
    "softmax": SoftmaxSampler,
}


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(1).normal(size=(CLASSES, DIMENSION)).astype(np.float32)


@pytest.fixture(scope="module")
def query():
    return np.random.default_rng(2).normal(size=(1, DIMENSION)).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "fourier"])
def test_chi_square_and_probabilities(name, weights, query):
    sampler = SAMPLERS[name]().build(weights)
    expected = sampler.probabilities(query)[0]
    drawn = sampler.sample(query, 20_000, seed=3)
    counts = np.bincount(drawn.ids[0], minlength=CLASSES)
    assert stats.chisquare(counts, expected * 20_000).pvalue > 1e-3
    np.testing.assert_allclose(np.exp(drawn.log_probability[0]), expected[drawn.ids[0]], rtol=2e-5)


def test_kernel_distribution_is_that_of_the_formula(weights, query):
    values = 20 * (weights.astype(float) @ query[0]) ** 2 + 1
    np.testing.assert_allclose(KernelSampler(20.0).build(weights).probabilities(query)[0], values / values.sum())


@pytest.mark.parametrize("name", SAMPLERS)
def test_positives_are_never_drawn_and_the_rest_is_renormalised(name, weights, query):
    sampler = SAMPLERS[name]().build(weights)
    positives = np.array([[int(np.argmax(sampler.probabilities(query))), 5, 5, -1]])
    drawn = sampler.sample(query, 4000, positives=positives, seed=1)
    assert not np.isin(drawn.ids, positives).any()
    # Each draw weighed by one over its probability counts the classes that may be drawn.
    if name != "fourier":
        free = CLASSES - len(set(positives[0]) - {-1})
        weighed = np.exp(-drawn.log_probability.astype(float))
        assert abs(weighed.mean() - free) < 5 * weighed.std() / np.sqrt(4000) + 1e-3


def test_sparse_updates_give_the_tree_of_a_new_build(weights):
    sampler = KernelSampler(2.0).build(weights)
    new = weights.copy()
    ids = np.array([0, 7, 8, 52])
    new[ids] *= -3
    sampler.update(ids, new[ids])
    again = KernelSampler(2.0).build(new)
    np.testing.assert_array_equal(sampler.sums, again.sums)
    full = np.zeros((DIMENSION, DIMENSION))
    full[np.triu_indices(DIMENSION)] = again.sums[1]
    np.testing.assert_allclose(full, np.triu(new.T.astype(float) @ new), rtol=1e-5)


def test_fourier_update_is_a_new_build(weights):
    sampler = FourierSampler(16, block=8).build(weights)
    sampler.update(np.array([9]), -weights[9:10])
    new = weights.copy()
    new[9] *= -1
    np.testing.assert_allclose(sampler.sums, FourierSampler(16, block=8).build(new).sums, atol=1e-5)


def test_memory_is_at_most_two_and_a_half_tables():
    table = np.random.default_rng(0).normal(size=(4000, 32)).astype(np.float32)
    assert KernelSampler().build(table).memory_bytes() <= 2.5 * table.nbytes


def test_draws_repeat_by_seed(weights, query):
    sampler = KernelSampler().build(weights)
    first = sampler.sample(query, 50, seed=4).ids
    assert (first == sampler.sample(query, 50, seed=4).ids).all()
    assert (first != sampler.sample(query, 50, seed=5).ids).any()


def test_softmax_sampling_is_unbiased(weights, query):
    """Every draw has the same corrected logit, so that the loss is the full one, whatever is drawn."""
    logits = weights.astype(float) @ query[0]
    drawn = SoftmaxSampler().build(weights).sample(query, 3, positives=[2], seed=0)
    loss = sampled_softmax_loss(
        logits[None, 2].astype(np.float32), logits[drawn.ids].astype(np.float32), drawn.log_probability
    )
    full = np.log(np.exp(logits).sum()) - logits[2]
    np.testing.assert_allclose(np.asarray(loss), [full], rtol=1e-5)


@pytest.mark.parametrize("prediction", ["signed", "absolute"])
@pytest.mark.parametrize("labels", [np.array([1, 4, 0]), np.array([[1, 2], [4, -1], [0, 7]])])
def test_layer_with_many_samples_nears_the_full_loss(weights, prediction, labels):
    hidden = np.random.default_rng(5).normal(size=(3, DIMENSION)).astype(np.float32)
    losses = []
    for sampler in (None, KernelSampler(10.0)):
        layer = SampledSoftmax(CLASSES, sampler, 20_000, prediction)
        layer.build((None, DIMENSION))
        layer.kernel.assign(weights)
        losses.append(np.asarray(layer.example_loss(hidden, labels)))
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)


def test_fit_learns_and_configuration_returns():
    x = np.eye(6, dtype=np.float32).repeat(20, 0)
    y = np.arange(6).repeat(20)
    hidden, labels = keras.Input((6,)), keras.Input((), dtype="int64")
    layer = SampledSoftmax(6, KernelSampler(10.0), 3, refresh=5)
    model = keras.Model([hidden, labels], layer([keras.layers.Dense(8)(hidden), labels]))
    model.compile(keras.optimizers.Adam(0.05))
    model.fit([x, y], epochs=8, batch_size=30, verbose=0)
    scores = np.asarray(layer.logits(model.predict([x, y], verbose=0)))
    assert (scores.argmax(1) == y).mean() == 1
    again = SampledSoftmax.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@pytest.mark.parametrize(
    "call, word",
    [
        (lambda s, w: s.sample(np.zeros((1, 3)), 2), "queries"),
        (lambda s, w: s.sample(np.full((1, DIMENSION), np.nan), 2), "queries"),
        (lambda s, w: s.sample(np.zeros((1, DIMENSION)), 0), "count"),
        (lambda s, w: s.sample(np.zeros((1, DIMENSION)), 2, positives=[CLASSES]), "positives"),
        (lambda s, w: s.update(np.array([1, 1]), w[:2]), "ids"),
        (lambda s, w: KernelSampler().sample(w, 1), "build"),
        (lambda s, w: KernelSampler(-1.0), "alpha"),
    ],
)
def test_bad_input(call, word, weights):
    with pytest.raises(ValueError, match=word):
        call(KernelSampler().build(weights), weights)
