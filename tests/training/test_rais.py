"""RAIS: the robust distribution is minimax, the ellipsoid is the smallest, and training comes as far in fewer steps."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import optimize

from tfkit.training import RAIS
from tfkit.training.rais import GainSchedule, robust_probabilities, smallest_ellipsoid

CROSS_ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def worst_case(p, middle, spread):
    """max sum v^2 / p over the ellipsoid mean (v - middle)^2 / spread <= 1, from many starts."""
    rng = np.random.default_rng(0)
    n = len(p)
    best = 0.0
    for _ in range(20):
        direction = rng.normal(size=n)
        for _ in range(400):  # v = middle + sqrt(n spread) u with |u| = 1; a convex maximum, by its gradient
            u = direction / np.linalg.norm(direction)
            v = middle + np.sqrt(n * spread) * u
            direction = 2 * v / p * np.sqrt(n * spread)
        best = max(best, float(np.sum(v**2 / p)))
    return best


def test_the_distribution_is_minimax():
    rng = np.random.default_rng(1)
    s = rng.random((5, 2)) + 0.1
    c, d = np.array([1.0, 0.5]), np.array([0.02, 0.05])
    p = robust_probabilities(tf.constant(s), tf.constant(c), tf.constant(d)).numpy()
    middle, spread = s @ c, s @ d
    ours = worst_case(p, middle, spread)
    np.testing.assert_allclose(ours, np.sum(middle + np.sqrt(5 / spread.sum()) * spread) ** 2, rtol=1e-6)
    for _ in range(10):
        other = p * np.exp(0.2 * rng.normal(size=5))
        assert worst_case(other / other.sum(), middle, spread) > ours
    point = middle / middle.sum()
    assert worst_case(point, middle, spread) > ours, "the point estimate is worse"


def test_without_an_ellipsoid_sampling_is_uniform():
    p = robust_probabilities(tf.ones((4, 2)), tf.zeros(2), tf.zeros(2))
    np.testing.assert_allclose(p, [0.25] * 4)


def test_the_ellipsoid_is_the_smallest():
    """Against a general solver of the constrained problem."""
    rng = np.random.default_rng(2)
    s = rng.random((200, 3)) + 0.05
    v = np.maximum(s @ [1.0, 0.0, 2.0] + 0.3 * s[:, 1] * rng.normal(size=200), 0)
    w = rng.random(200) + 0.5
    w /= w.mean()
    c, d = smallest_ellipsoid(s, v, w)
    assert (c >= 0).all() and (d >= 0).all()
    assert np.mean(w * (v - s @ c) ** 2 / (s @ d)) == pytest.approx(1, rel=1e-3)
    mean = np.average(s, axis=0, weights=w)
    found = optimize.minimize(
        lambda z: mean @ z[3:],
        np.concatenate([[1, 1, 1], [1, 1, 1]]),
        bounds=[(0, None)] * 3 + [(1e-6, None)] * 3,
        constraints={"type": "ineq", "fun": lambda z: 1 - np.mean(w * (v - s @ z[:3]) ** 2 / (s @ z[3:]))},
        method="SLSQP",
        options={"maxiter": 500},
    )
    assert mean @ d <= (mean @ found.x[3:]) * 1.01
    np.testing.assert_allclose(c, [1, 0, 2], atol=0.15)


def imbalanced(seed=0):
    """Two easy classes, and a few hard examples that carry most of the gradient."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, 512)
    x = rng.normal(size=(512, 4)) + 3 * (2 * y[:, None] - 1)
    x[:24] = -x[:24] / 3
    return x.astype("float32"), y


def wrapped(oracle=False, rate=0.05, seed=0):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(8, activation="relu")(inputs)))
    rais = RAIS(model, oracle=oracle, seed=seed)
    rais.compile(keras.optimizers.SGD(rais.schedule(rate)), CROSS_ENTROPY, metrics=["accuracy"])
    return rais


@pytest.mark.parametrize("oracle", [False, True])
def test_training_ends_early_by_its_gain(oracle):
    x, y = imbalanced()
    rais = wrapped(oracle)
    history = rais.fit(x, y, batch_size=16, epochs=6, verbose=0).history
    steps = int(rais.optimizer.iterations)
    assert rais.effective_steps >= 6 * 32 > rais.effective_steps - 20
    assert steps < 6 * 32 * 0.97
    assert rais.gain > 1.02
    assert history["loss"][-1] < history["loss"][0]


def test_the_gain_ratio_estimates_the_true_one():
    """At fixed weights, of last-layer gradients: E |g_U|^2 / E |g_R|^2, worked out exactly."""
    x, y = imbalanced()
    rais = wrapped(oracle=True, rate=0.0)
    rais.forget = 0.01
    rais.fit(x, y, batch_size=16, epochs=30, verbose=0)
    z = rais.model(x).numpy()
    gradients = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True) - np.eye(2)[y]
    norms = np.linalg.norm(gradients, axis=1)
    p = 0.99 * norms / norms.sum() + 0.01 / len(x)
    mean = np.square(gradients.mean(axis=0)).sum()
    uniform = np.mean(norms**2) / 16 + mean * 15 / 16
    sampled = np.mean(norms**2 / (len(x) * p)) / 16 + mean * 15 / 16
    assert rais.gain == pytest.approx(uniform / sampled, rel=0.1)


def test_schedule_is_read_at_the_effective_step_and_multiplied():
    base = keras.optimizers.schedules.PiecewiseConstantDecay([10.0], [1.0, 0.1])
    schedule = GainSchedule(base, tf.Variable(2.0), tf.Variable(11.0))
    assert float(schedule(0)) == pytest.approx(0.2)
    assert float(GainSchedule.from_config(schedule.get_config())(11.0)) == pytest.approx(0.1)


def test_seeds_repeat():
    x, y = imbalanced()
    weights = []
    for seed in (0, 0, 1):
        rais = wrapped(seed=seed)
        rais.fit(x, y, batch_size=32, epochs=2, verbose=0)
        weights.append(rais.model.get_weights()[0])
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="forget"):
        RAIS(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), forget=2.0)
    with pytest.raises(ValueError, match="batch_size"):
        wrapped().fit(np.zeros((4, 4)), np.zeros(4), batch_size=5)
