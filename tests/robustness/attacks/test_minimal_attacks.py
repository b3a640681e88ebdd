"""Attacks that seek the nearest adversarial point, against exact distances on linear models."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfkit.robustness.attacks import AutoPGD, CarliniWagnerL0, CarliniWagnerL2, CarliniWagnerLinf, DeepFool, Ensemble
from tfkit.robustness.attacks.auto_pgd import checkpoints
from tfkit.robustness.attacks.gradients import dlr, margin, targeted_dlr
from tfkit.robustness.attacks.tanh_space import from_box, to_box

ATTACKS = {
    "l2": lambda **more: CarliniWagnerL2(iterations=200, **more),
    "linf": lambda **more: CarliniWagnerLinf(iterations=100, learning_rate=0.02, **more),
    "l0": lambda **more: CarliniWagnerL0(iterations=100, learning_rate=0.05, **more),
    "deepfool_l2": lambda **more: DeepFool(**more),
    "deepfool_linf": lambda **more: DeepFool(norm="linf", **more),
}


@pytest.fixture(scope="module")
def linear():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(12, 2)).astype(np.float32)
    x = rng.uniform(0.4, 0.6, (12, 12)).astype(np.float32)
    scores = x.astype(np.float64) @ w
    y = scores.argmax(1)
    normal = (w[:, 0] - w[:, 1]).astype(np.float64)
    gap = np.abs(scores[:, 0] - scores[:, 1])
    # The most that each coordinate can do against the gap, within the box.
    direction = -np.where(y == 0, 1, -1)[:, None] * normal
    gains = np.sort(np.where(direction > 0, (1 - x) * direction, -x * direction), axis=1)[:, ::-1].cumsum(axis=1)
    exact = {
        "l2": gap / np.linalg.norm(normal),
        "linf": gap / np.abs(normal).sum(),
        "l0": 1 + (gains < gap[:, None]).sum(axis=1),
    }
    return (lambda points: tf.matmul(points, w)), x, y, exact


@pytest.mark.parametrize("name", ATTACKS)
def test_finds_the_exact_distance(linear, name):
    model, x, y, exact = linear
    result = ATTACKS[name]()(model, x, y, epsilon=None)
    ratio = result.distance / exact[name.removeprefix("deepfool_")]
    assert result.success.all()
    assert ratio.min() >= 1 - 1e-5
    assert np.median(ratio) < 1.06 and ratio.max() < 1.3
    assert result.x_adv.min() >= 0 and result.x_adv.max() <= 1 and (result.queries > 0).all()


@pytest.mark.parametrize("name", ["l2", "deepfool_linf"])
def test_radius_decides_success(linear, name):
    model, x, y, exact = linear
    epsilon = float(np.median(exact[name.removeprefix("deepfool_")]))
    result = ATTACKS[name]()(model, x, y, epsilon=epsilon)
    distance = exact[name.removeprefix("deepfool_")]
    assert (result.distance <= epsilon).all() and not result.success[distance > epsilon].any()
    assert result.success[distance < 0.9 * epsilon].all()


def test_confidence_and_targets(linear):
    model, x, y, exact = linear
    result = CarliniWagnerL2(iterations=100, confidence=0.5, targeted=True)(model, x, 1 - y, epsilon=None)
    assert result.success.all()
    assert (margin(model(result.x_adv), y).numpy() >= 0.5 - 1e-4).all()
    with pytest.raises(ValueError, match="targeted"):
        DeepFool(targeted=True)


def test_tanh_space_is_the_box():
    points = np.linspace(-2, 3, 11, dtype=np.float32)
    np.testing.assert_allclose(to_box(from_box(points, (-2, 3)), (-2, 3)), points, atol=1e-5)


def test_losses_by_hand():
    logits = tf.constant([[4.0, 1.0, 3.0, 2.0]])
    assert float(margin(logits, [0])[0]) == -1
    assert float(dlr(logits, [0])[0]) == pytest.approx(-1 / 2)
    assert float(dlr(logits, [1])[0]) == pytest.approx(3 / 2)
    # Towards class 3: (2 - 4) / (4 - (2 + 1) / 2).
    assert float(targeted_dlr(logits, [0], [3])[0]) == pytest.approx(-2 / 2.5)
    # No scale or shift of the logits changes it.
    assert float(dlr(100 * logits + 7, [0])[0]) == pytest.approx(-1 / 2)


def test_checkpoints_of_the_paper():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


def test_auto_pgd_needs_no_scale_with_dlr_and_says_what_it_cannot(linear):
    model, x, y, exact = linear
    rng = np.random.default_rng(1)
    w = rng.normal(size=(12, 4)).astype(np.float32)
    many = lambda points: 1e4 * tf.matmul(points, w)  # noqa: E731
    labels = np.argmax(many(x), 1)
    for loss in ("dlr", "targeted_dlr"):
        assert AutoPGD(20, loss)(many, x, labels, epsilon=0.4).success.all()
    with pytest.raises(ValueError, match="loss"):
        AutoPGD(5, "dlr")(model, x, y, epsilon=0.1)
    with pytest.raises(ValueError, match="epsilon"):
        AutoPGD(5)(model, x, y, epsilon=None)


def test_ensemble_is_the_worst_of_its_attacks(linear):
    model, x, y, exact = linear
    attacks = [DeepFool(norm="linf"), ATTACKS["linf"]()]
    both = Ensemble(attacks)(model, x, y, epsilon=None)
    alone = [attack(model, x, y, epsilon=None).distance for attack in attacks]
    np.testing.assert_allclose(both.distance, np.minimum(*alone), rtol=1e-6)
    with pytest.raises(ValueError, match="attacks"):
        Ensemble([DeepFool(norm="linf"), DeepFool(norm="l2")])
