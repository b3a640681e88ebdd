"""The evaluation finds what broke, and its controls find models that only look robust."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tfkit.robustness.attacks import PGD, controls, evaluate
from tfkit.robustness.attacks.controls import Noise


@pytest.fixture(scope="module")
def plane():
    """Three classes on which the nearest boundary in L-infinity is known."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(8, 3)).astype(np.float32)
    x = rng.uniform(0.3, 0.7, (40, 8)).astype(np.float32)
    scores = x.astype(np.float64) @ w
    y = scores.argmax(1)
    gaps = scores[np.arange(40), y][:, None] - scores
    sizes = np.abs(w[:, y].T[:, :, None] - w[None]).sum(axis=1)
    radius = np.where(np.arange(3) == y[:, None], np.inf, gaps / np.maximum(sizes, 1e-9)).min(axis=1)
    return w, x, y, radius


def failed(report):
    return {finding.control for finding in report.failed}


def test_curve_is_that_of_the_closed_form(plane, tmp_path):
    w, x, y, radius = plane
    epsilons = [float(np.quantile(radius, q)) * 1.001 for q in (0.25, 0.6)]
    report = evaluate(lambda p: tf.matmul(p, w), x, y, epsilons[::-1], steps=20)
    assert report.reliable, report.failed
    assert report.clean_accuracy == 1
    # The nearest class may not be the one that the loss prefers: one example either way.
    np.testing.assert_allclose(report.remaining, [np.mean(radius > e) for e in epsilons], atol=1.01 / 40)
    assert all(report.remaining[i] <= min(s[i] for s in report.by_attack.values()) for i in range(2))
    assert report.robust_accuracy == report.remaining
    moved = (report.x_adv != report.x).any(axis=1)
    assert moved.mean() == pytest.approx(1 - report.remaining[-1])
    saved = json.loads(report.save(tmp_path / "report.json").read_text())
    assert saved["reliable"] and saved["robust_accuracy"] == list(report.remaining)
    report.plot(tmp_path / "report.png")
    with pytest.raises(ValueError, match="images"):
        report.plot_examples(tmp_path / "grid.png")
    with pytest.raises(FileExistsError):
        report.plot(tmp_path / "report.png")


def test_saturated_logits_are_no_robustness(plane):
    w, x, y, radius = plane
    report = evaluate(lambda p: 1e5 * tf.matmul(p, w), x, y, [float(np.median(radius))], steps=10)
    assert "gradients" in failed(report) and report.robust_accuracy is None
    assert "not robustness" in str(report) and "FAILED: gradients" in str(report)


def test_rounding_masks_gradients(plane):
    w, x, y, radius = plane

    @tf.custom_gradient
    def misleading(p):
        return tf.identity(p), lambda upstream: -upstream

    # What follows these gradients goes the wrong way; noise does not.
    report = evaluate(lambda p: tf.matmul(misleading(p), w), x, y, [2 * float(np.median(radius))], steps=10)
    assert {"masked gradients", "large radius", "loss rises"} <= failed(report)


def test_answers_that_vary_are_seen(plane):
    w, x, y, radius = plane

    def model(p):
        return tf.matmul(p + 0.01 * tf.random.normal(tf.shape(p)), w)

    for samples in (1, 5):
        pgd = PGD(samples=samples)
        finding = controls.repeatable(model, x, pgd._logits(model, x), pgd)
        assert finding.passed == (samples > 1)


def test_nothing_broken_short_steps_and_a_strong_single_step_are_seen():
    nothing = {"PGD": np.zeros((2, 40), bool)}
    assert not controls.success(nothing, np.arange(40)).passed
    assert controls.success({"PGD": ~nothing["PGD"]}, np.arange(40)).passed
    assert not controls.step_size(PGD(5, relative_step=0.1)).passed and controls.step_size(PGD(5)).passed
    assert not controls.single_step({"FGSM": ~nothing["PGD"], **nothing}, np.arange(40)).passed


def test_images_are_drawn_and_digits_are_not_robust(trained_digits_model, tiny_digits, tmp_path):
    x, y = tiny_digits.x_test[:30], tiny_digits.y_test[:30]
    report = evaluate(trained_digits_model, x, y, [0.05, 0.3], steps=10)
    assert report.remaining[1] < 0.1 < report.clean_accuracy
    report.plot_examples(tmp_path / "grid.png", count=4)
    assert (np.abs(report.x_adv - report.x).max(axis=(1, 2, 3)) <= 0.3).all()


def test_bad_input(plane):
    w, x, y, _ = plane
    model = lambda p: tf.matmul(p, w)  # noqa: E731
    for changed, name in (({"epsilons": []}, "epsilons"), ({"norm": "l7"}, "norm"), ({"epsilons": [-1]}, "epsilons")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            evaluate(model, x, y, **{"epsilons": [0.1], **changed})
    with pytest.raises(ValueError, match="attacks"):
        evaluate(model, x, y, [0.1], attacks={"wrong": PGD(norm="l2")})


def test_noise_stays_in_the_ball(plane):
    w, x, y, _ = plane
    found = Noise(3)(lambda p: tf.matmul(p, w), x, y, epsilon=0.1)
    assert (found.distance <= 0.1).all() and (found.queries <= 3).all()
