"""FGSM, PGD and what the base promises, against closed forms on linear models."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit.robustness.attacks import FGSM, PGD, AutoPGD
from tfkit.robustness.attacks.norms import distances, project, random_start

DUAL = {"linf": 1, "l2": 2, "l1": np.inf}


@pytest.fixture(scope="module")
def linear():
    """Two classes split by a plane; the distance to it is |margin| over the dual norm of the weights."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(12, 2)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (20, 12)).astype(np.float32)
    scores = x.astype(np.float64) @ w
    return (
        lambda points: tf.matmul(points, w),
        x,
        scores.argmax(1),
        np.abs(scores[:, 0] - scores[:, 1]),
        w[:, 0] - w[:, 1],
    )


@pytest.mark.parametrize("norm", DUAL)
@pytest.mark.parametrize("method", ["fgsm", "pgd"])
def test_breaks_exactly_what_lies_within_the_ball(linear, norm, method):
    model, x, y, margin, normal = linear
    radius = margin / np.linalg.norm(normal.astype(np.float64), DUAL[norm])
    attack = FGSM(norm=norm, bounds=(-9, 9)) if method == "fgsm" else PGD(60, norm=norm, bounds=(-9, 9))
    epsilon = float(np.median(radius))
    result = attack(model, x, y, epsilon=epsilon)
    clear = np.abs(radius / epsilon - 1) > 0.02
    np.testing.assert_array_equal(result.success[clear], (radius < epsilon)[clear])


@pytest.mark.parametrize("norm", DUAL)
def test_never_leaves_ball_or_box_and_repeats(linear, norm):
    model, x, y, *_ = linear
    for epsilon in (0.0, 1e-3, 0.3, 3.0):
        attack = PGD(5, restarts=2, norm=norm, seed=3)
        result = attack(model, x, y, epsilon=epsilon)
        assert (distances(result.x_adv.astype(np.float64) - x, norm) <= epsilon).all()
        assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1
        np.testing.assert_array_equal(result.x_adv, attack(model, x, y, epsilon=epsilon).x_adv)


@pytest.mark.parametrize("norm", DUAL)
def test_quantized_points_are_levels_within_the_ball(linear, norm):
    model, x, y, *_ = linear
    x = (np.rint(x * 255) / 255).astype(np.float32)
    result = PGD(5, norm=norm, quantize_levels=256)(model, x, y, epsilon=8 / 255)
    np.testing.assert_allclose(result.x_adv * 255, np.rint(result.x_adv * 255), atol=1e-4)
    assert (result.distance <= 8 / 255 + 1e-12).all()


def test_targeted_and_restarts(linear):
    model, x, y, *_ = linear
    assert PGD(20, targeted=True)(model, x, 1 - y, epsilon=0.4).success.mean() == 1
    one, many = (PGD(2, restarts=n)(model, x, y, epsilon=0.02) for n in (1, 5))
    assert (many.success >= one.success).all()
    assert (one.queries == 3).all() and many.queries.max() <= 15


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_projection_is_the_nearest_point(norm):
    delta = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    nearest = project(tf.constant(delta), 0.7, norm).numpy()
    np.testing.assert_allclose(distances(nearest, norm), 0.7, atol=1e-6)
    others = random_start(tf.constant([3, 6]), 0.7, norm, tf.constant([1, 2])).numpy()
    assert (distances(others, norm) <= 0.7 + 1e-6).all()
    # The nearest point of a convex set makes an obtuse angle with all of its points.
    assert (np.einsum("bi,bi->b", delta - nearest, others - nearest) <= 1e-6).all()


def test_softmax_is_taken_off_a_keras_model_and_refused_of_a_callable(linear):
    _, x, y, *_ = linear
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(2, activation="softmax")])
    plain = lambda points: tf.matmul(points, model.layers[0].kernel)  # noqa: E731
    y = np.argmax(plain(x), 1)
    np.testing.assert_array_equal(FGSM()(model, x, y, epsilon=0.1).x_adv, FGSM()(plain, x, y, epsilon=0.1).x_adv)
    with pytest.raises(ValueError, match="probabilities"):
        FGSM()(lambda points: tf.nn.softmax(plain(points)), x, y, epsilon=0.1)


def test_bad_input(linear):
    model, x, y, *_ = linear
    for arguments, name in (((x + 1, y), "x"), ((x, y[:3]), "y"), ((x, y + 5), "y")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            FGSM()(model, *arguments, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon"):
        FGSM()(model, x, y, epsilon=-1.0)
    with pytest.raises(ValueError, match="differentiable"):
        FGSM()(lambda points: tf.stop_gradient(model(points)), x, y, epsilon=0.1)


@pytest.mark.parametrize("momentum", [None, 1.0])
@pytest.mark.parametrize("targeted", [False, True])
def test_early_stop_breaks_the_same_examples_with_fewer_evaluations(linear, momentum, targeted):
    model, x, y, margin, normal = linear
    y = 1 - y if targeted else y
    epsilon = float(np.median(margin / np.abs(normal).sum()))
    settings = {"momentum": momentum, "targeted": targeted, "bounds": (-9, 9), "batch_size": 7}
    whole = PGD(20, random_start=False, **settings)(model, x, y, epsilon=epsilon)
    early = PGD(20, random_start=False, early_stop=True, **settings)(model, x, y, epsilon=epsilon)
    np.testing.assert_array_equal(early.success, whole.success)
    assert 0 < early.success.sum() < len(x)
    # What resists took all steps and ends where it ends without; what breaks does it sooner, and nearer.
    np.testing.assert_allclose(early.x_adv[~early.success], whole.x_adv[~early.success], atol=1e-6)
    assert (early.queries[~early.success] == 21).all() and (early.queries[early.success] < 21).all()
    assert (early.distance[early.success] <= whole.distance[early.success] + 1e-6).all()


def test_early_stop_ends_when_nobody_is_left(linear):
    model, x, y, *_ = linear
    result = PGD(10, early_stop=True, bounds=(-9, 9))(model, x, y, epsilon=5.0)
    assert result.success.all() and (result.queries < 10).all()
    with pytest.raises(ValueError, match="early_stop"):
        AutoPGD(10, early_stop=True)


def test_of_broken_points_the_one_with_the_highest_loss_is_kept():
    """Losses that differ by less than float32 tells apart beside a million."""
    weights = tf.constant([[0.01, -0.01]])
    model = lambda points: tf.matmul(points, weights)  # noqa: E731
    x, y = np.full((1, 1), 0.1, np.float32), np.array([0])
    result = PGD(10, random_start=False, bounds=(-1, 1))(model, x, y, epsilon=0.5)
    np.testing.assert_allclose(result.x_adv, [[-0.4]], atol=1e-6)
