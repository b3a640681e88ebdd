"""Randomized smoothing against what is known of linear classifiers, and against exact binomial tails."""

import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from tfkit.robustness.defenses import RandomizedSmoothing
from tfkit.robustness.defenses.randomized_smoothing import ABSTAIN, certified_radius, lower_confidence_bound

W = np.array([3.0, 4.0], "float32")


def half_plane(x):
    """Class 1 where 3 a + 4 b > 0: the distance of x to the border is w x / 5."""
    score = tf.linalg.matvec(x, W)
    return tf.stack([-score, score], axis=1)


@pytest.mark.parametrize(("hits", "draws"), [(60, 100), (99, 100), (1, 7), (7, 7)])
def test_bound_is_where_the_tail_is_alpha(hits, draws):
    bound = float(lower_confidence_bound(hits, draws, 0.01))
    assert stats.binom.sf(hits - 1, draws, bound) == pytest.approx(0.01, rel=1e-6)


def test_bound_of_no_hits_is_zero():
    assert lower_confidence_bound(0, 10, 0.01) == 0


def test_radius():
    assert certified_radius(stats.norm.cdf(2.0), 0.5) == pytest.approx(1.0)
    assert certified_radius(0.5, 0.5) == 0
    assert certified_radius(0.2, 0.5) == 0


def test_counts_sum_to_the_draws_and_repeat():
    x = np.array([[1.0, 0.0], [0.0, 0.0], [-2.0, 0.0]], "float32")
    first = RandomizedSmoothing(half_plane, 1.0, batch_size=16, seed=4).counts(x, 103)
    np.testing.assert_array_equal(first.sum(axis=1), 103)
    np.testing.assert_array_equal(first, RandomizedSmoothing(half_plane, 1.0, batch_size=16, seed=4).counts(x, 103))
    smooth = RandomizedSmoothing(half_plane, 1.0, batch_size=2, seed=4)
    assert (smooth.counts(x, 103) != smooth.counts(x, 103)).any(), "two calls drew the same noise"


def test_counts_have_the_share_of_the_normal_distribution():
    x = np.array([[0.6, 0.8], [-0.3, -0.4], [0.0, 0.0]], "float32")
    counts = RandomizedSmoothing(half_plane, 1.0, batch_size=512, seed=1).counts(x, 20_000)
    wanted = stats.norm.cdf([1.0, -0.5, 0.0])
    np.testing.assert_allclose(counts[:, 1] / 20_000, wanted, atol=5 * 0.5 / np.sqrt(20_000))


def test_certificate_of_a_half_plane_is_just_below_the_distance():
    distance = np.array([0.2, 0.5, 1.0, -0.7])
    x = (distance[:, None] * W / 5).astype("float32")
    found = RandomizedSmoothing(half_plane, 0.5, batch_size=4096).certify(x, draws=20_000, alpha=0.001)
    np.testing.assert_array_equal(found.classes, [1, 1, 1, 0])
    assert (found.radius <= np.abs(distance)).all()
    np.testing.assert_allclose(found.radius, np.abs(distance), atol=0.06)
    assert found.certified_accuracy([1, 1, 1, 1]) == 0.75
    assert found.certified_accuracy([1, 1, 1, 1], radius=0.6) == 0.25


def test_abstains_at_the_border():
    smooth = RandomizedSmoothing(half_plane, 0.5)
    x = np.zeros((2, 2), "float32")
    assert (smooth.predict(x, draws=200) == ABSTAIN).all()
    found = smooth.certify(x, draws=200)
    assert found.abstained.all()
    assert (found.radius == 0).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="sigma"):
        RandomizedSmoothing(half_plane, 0)
    with pytest.raises(ValueError, match="alpha"):
        RandomizedSmoothing(half_plane, 1).certify(np.zeros((1, 2)), alpha=1)
