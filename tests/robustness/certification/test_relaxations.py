"""Lines around activations, on dense grids; maxima; the rows' minimum over balls."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tensorflow as tf
from scipy.optimize import linprog, minimize

from tfkit.robustness.certification import activations
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.region import ball, smallest

KINDS = {
    "relu": activations.LeakyReLU,
    "leaky": lambda *arguments: activations.LeakyReLU(*arguments, negative_slope=0.2),
    "sigmoid": activations.Sigmoid,
    "tanh": activations.Tanh,
    "softplus": activations.Softplus,
    "elu": activations.ELU,
    "gelu": activations.GELU,
    "silu": activations.SiLU,
}
ENDS = [-30.0, -6.0, -2.5, -1.4, -0.6, -1e-3, 0.0, 1e-3, 0.5, 1.4, 2.0, 5.0, 25.0]
INTERVALS = np.array([*itertools.combinations(ENDS, 2), (0.7, 0.7), (-0.7, -0.7)])


@pytest.mark.parametrize("kind", KINDS)
def test_lines_hold_and_touch(kind):
    low, high = (tf.constant(side[None]) for side in INTERVALS.T)
    node = KINDS[kind](kind, 0, (len(INTERVALS),))
    grid = np.linspace(*INTERVALS.T, 4001)
    value = node.value(tf.constant(grid)).numpy()
    least, largest = (side.numpy()[0] for side in node.range(low, high))
    np.testing.assert_allclose(least, value.min(0), atol=1e-4)
    assert (least <= value.min(0) + 1e-12).all() and (largest >= value.max(0) - 1e-12).all()
    steepest = node.derivative_range(low, high)
    slope = node.derivative(tf.constant(grid)).numpy()
    assert (steepest[0].numpy() <= slope + 1e-9).all() and (steepest[1].numpy() >= slope - 1e-9).all()
    chord = node.chord(low, high)
    chosen = [node.slopes(low, high), (chord, chord), *((s, s) for s in (tf.ones_like(low) * 0.3, -low * 0.01))]
    for slopes in chosen:
        lines = node.lines(low, high, *slopes, "real")
        over = (lines.upper_slope * grid + lines.upper).numpy() - value
        under = value - (lines.lower_slope * grid + lines.lower).numpy()
        room = lines.error.numpy()
        assert (over >= -room).all() and (under >= -room).all()
        # No line could be moved closer: the grid comes near it somewhere.
        step = (INTERVALS[:, 1] - INTERVALS[:, 0]) / 4000
        assert (over.min(0) <= 1e-9 + 3 * step).all() and (under.min(0) <= 1e-9 + 3 * step).all()


@pytest.mark.parametrize("kind", ["relu", "leaky", "sigmoid", "softplus"])
def test_ranges_pass_whole_gradients(kind):
    """Certified training learns through them: the ends of a range are f(low) and f(high), and so are their slopes."""
    low, high = tf.constant([[-2.0, 0.5, -2.0]]), tf.constant([[-1.0, 2.0, 1.5]])
    node = KINDS[kind](kind, 0, (3,))
    with tf.GradientTape(persistent=True) as tape:
        tape.watch([low, high])
        least, largest = node.range(low, high)
    np.testing.assert_allclose(tape.gradient(least, low), node.derivative(low), rtol=1e-6)
    np.testing.assert_allclose(tape.gradient(largest, high), node.derivative(high), rtol=1e-6)


def test_crown_slopes_of_relu_are_the_papers():
    node = activations.LeakyReLU("relu", 0, (4,))
    low, high = tf.constant([[-1.0, -2.0, 1.0, -3.0]]), tf.constant([[2.0, 1.0, 2.0, -1.0]])
    lower, upper = node.slopes(low, high)
    np.testing.assert_allclose(lower, [[1, 0, 1, 0]])
    np.testing.assert_allclose(upper, [[2 / 3, 1 / 3, 1, 0]], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_conjugate_is_the_minimum(kind):
    node = KINDS[kind](kind, 0, (len(INTERVALS),))
    rng = np.random.default_rng(0)
    a, slope = rng.normal(size=(2, 6, len(INTERVALS)))
    a[0] = 0
    found = node.conjugate(*map(tf.constant, (a, slope)), *(tf.constant(side) for side in INTERVALS.T)).numpy()
    grid = np.linspace(*INTERVALS.T, 3001)[:, None]
    brute = (a * node.value(tf.constant(grid)).numpy() - slope * grid).min(0)
    assert (found <= brute + 1e-9).all()
    np.testing.assert_allclose(found, brute, atol=0.05)


def test_maximum_lines_hold_at_all_corners_and_inside():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(20, 1, 4, 2))
    high = low + rng.choice([0, 0.1, 1, 3], size=low.shape)
    valid = np.array([[True, True, True, False]])
    node = Maximum("max", 0, (1, 2), valid)
    lines = [np.asarray(part) for part in node.lines(tf.constant(low), tf.constant(high))]
    corners = np.array(list(itertools.product([0, 1], repeat=4)))[:, None, None, :, None]
    for share in (*corners, *rng.uniform(size=(200, *low.shape))):
        point = low + share * (high - low)
        value = np.where(valid[..., None], point, -np.inf).max(-2)
        under, over = ((lines[at] * point).sum(-2) + lines[at + 1] for at in (0, 2))
        assert (under <= value + lines[4]).all() and (over >= value - lines[4]).all()


@pytest.mark.parametrize("order", [1.0, 2.0, np.inf])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_minimum_over_a_ball(order, clip):
    rng = np.random.default_rng(1)
    x, a, epsilon = rng.uniform(size=6), rng.normal(size=6), 0.7
    region = ball(tf.constant(x[None]), tf.constant([epsilon], tf.float64), clip, "real")
    found = float(smallest(tf.constant(a[None, None]), region, order, clip is not None)[0, 0])
    low, high = (x - epsilon, x + epsilon) if clip is None else (np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1))
    if np.isinf(order):
        expected = np.where(a > 0, a * low, a * high).sum()
    elif order == 1:
        sides = list(zip(np.maximum(0, 0 * x), high - x, strict=True)) + list(zip(0 * x, x - low, strict=True))
        solved = linprog(np.r_[a, -a], A_ub=np.ones((1, 12)), b_ub=[epsilon], bounds=sides)
        expected = a @ x + solved.fun
    else:
        solved = minimize(
            lambda p: a @ p, x, bounds=list(zip(low, high, strict=True)), method="SLSQP",
            constraints={"type": "ineq", "fun": lambda p: epsilon**2 - ((p - x) ** 2).sum()},
        )  # fmt: skip
        expected = solved.fun
        assert found <= expected + 1e-6
        if clip is not None:
            return  # Met from two sides, not exactly.
    np.testing.assert_allclose(found, expected, atol=1e-6)
