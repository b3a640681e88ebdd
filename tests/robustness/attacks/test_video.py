"""Attacks on clips: what they can gain of a linear model has a closed form for each kind of perturbation."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfkit.robustness.attacks import VideoPGD
from tfkit.robustness.attacks.video import frame_mask

RNG = np.random.default_rng(0)
FRAMES, FEATURES = 4, 6
WEIGHTS = RNG.normal(size=(FRAMES, FEATURES)).astype(np.float32)
WEIGHTS *= np.array([2.0, 0.3, 1.0, 0.5], np.float32)[:, None]
X = RNG.uniform(0.3, 0.7, (40, FRAMES, FEATURES)).astype(np.float32)
OFFSET = np.float32(np.median((X * WEIGHTS).sum(axis=(1, 2))))
EPSILON = 0.05


def model(clips):
    value = tf.reduce_sum(clips * WEIGHTS, axis=(1, 2)) - OFFSET
    return tf.stack([value, -value], 1)


VALUE = (X.astype(np.float64) * WEIGHTS).sum(axis=(1, 2)) - OFFSET
Y = (VALUE < 0).astype(int)
LENGTHS = {
    "linf": lambda w: np.abs(w).sum(-1),
    "l2": lambda w: np.linalg.norm(w, axis=-1),
    "l1": lambda w: np.abs(w).max(-1),
}


def gain(norm, perturbation, frames):
    """The greatest change of the linear model's value within radius 1, from the dual norm."""
    by_frame = LENGTHS[norm](WEIGHTS.astype(np.float64))
    chosen = np.sort(np.argsort(-by_frame)[:frames])
    return LENGTHS[norm](WEIGHTS[chosen].sum(axis=0)) if perturbation == "shared" else by_frame[chosen].sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("perturbation", ["per-frame", "shared"])
@pytest.mark.parametrize("frames", [None, 2])
def test_breaks_exactly_what_the_closed_form_says(norm, perturbation, frames):
    attack = VideoPGD(perturbation, frames, steps=40, relative_step=0.1, norm=norm)
    found = attack(model, X, Y, epsilon=EPSILON)
    reach = EPSILON * gain(norm, perturbation, FRAMES if frames is None else frames)
    assert not found.success[np.abs(VALUE) > reach * 1.001].any()
    assert found.success[np.abs(VALUE) < reach * 0.97].all()
    assert 3 < found.success.sum() < len(X)
    delta = found.x_adv.astype(np.float64) - X
    assert found.distance.max() <= EPSILON
    assert ((delta != 0).any(axis=2).sum(axis=1) <= (frames or FRAMES)).all()
    assert (found.queries == 41 + (frames is not None)).all()
    if perturbation == "shared":
        # float32 adds to other numbers in each frame.
        changed = (delta != 0).any(axis=2)
        for row, moved in zip(delta, changed, strict=True):
            assert not moved.any() or np.ptp(row[moved], axis=0).max() < 2e-7


def test_shared_perturbation_is_cut_at_the_bounds():
    x = np.zeros((1, 2, 3), np.float32)
    x[0, 1] = 0.5

    def above(clips):
        value = tf.reduce_sum(clips, axis=(1, 2)) - 1.2
        return tf.stack([value, -value], 1)

    found = VideoPGD("shared", steps=30)(above, x, np.array([0]), epsilon=0.2)
    delta = found.x_adv - x
    assert found.success.all() and found.x_adv.min() >= 0
    # The value falls: the black frame cannot follow, the grey one can.
    np.testing.assert_allclose(delta[0, 0], 0, atol=1e-7)
    assert delta[0, 1].sum() < -0.3


def test_targeted_repeats_by_seed_and_mask():
    attack = VideoPGD(frames=1, targeted=True, steps=5, seed=3)
    one, two = (attack(model, X, 1 - Y, epsilon=EPSILON) for _ in range(2))
    np.testing.assert_array_equal(one.x_adv, two.x_adv)
    assert one.success.any()
    np.testing.assert_array_equal(frame_mask(tf.constant([[3.0, 1.0, 2.0]]), 2), [[1, 0, 1]])


def test_bad_settings():
    for make in (
        lambda: VideoPGD("universal"),
        lambda: VideoPGD(frames=0),
        lambda: VideoPGD(frames=9)(model, X, Y, epsilon=0.1),
        lambda: VideoPGD()(model, X[:, 0], Y, epsilon=0.1),
    ):
        with pytest.raises(ValueError, match="Argument"):
            make()
