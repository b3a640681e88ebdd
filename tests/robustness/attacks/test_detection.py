"""Attacks on detectors: a grid of linear candidates, whose margins have closed forms."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfkit.robustness.attacks import PGD, DetectorTask, Square
from tfkit.robustness.attacks.detection import soft_maximum

CLASSES = 3


@pytest.fixture(scope="module")
def detector():
    """Each cell of an 8 x 8 image's 2 x 2 grid is a candidate: three kernels of its own 4 x 4 patch."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    outputs = keras.layers.Conv2D(CLASSES, 4, 4, bias_initializer=keras.initializers.Constant(-0.2))(inputs)
    return keras.Model(inputs, outputs)


def read(outputs):
    return tf.reshape(outputs, (-1, 4, CLASSES))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).uniform(0.2, 0.8, (60, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def kernels(detector):
    """L1 length of each class's kernel: the greatest change of its score within radius 1 in L-infinity."""
    return np.abs(np.asarray(detector.layers[1].kernel)).sum(axis=(0, 1, 2))


def test_vanish_and_appear_reach_what_the_closed_form_says(detector, images, kernels):
    greatest = read(detector(images)).numpy()[:, :, 1].max(axis=1)
    threshold = float(np.median(greatest))
    for goal, sign in (("vanish", 1), ("appear", -1)):
        task = DetectorTask(detector, goal, read=read, classes=[1], threshold=threshold)
        x = images[task.attackable(images)]
        margin = sign * (greatest - threshold)[task.attackable(images)]
        assert len(x) == 30
        np.testing.assert_allclose(task.margin(x), margin, atol=1e-6)
        epsilon = float(np.median(margin)) / kernels[1]
        found = PGD(40)(task, x, np.zeros(len(x), int), epsilon=epsilon)
        # Candidates share no pixel, so the greatest score decides.
        assert not found.success[margin > epsilon * kernels[1] * 1.001].any()
        assert found.success[margin < epsilon * kernels[1] * 0.95].all()
        assert found.success.any() and not found.success.all()
        assert ((task.boxes(found.x_adv)[:, 1] > 0) == (found.success if goal == "appear" else ~found.success)).all()


def test_change_of_class(detector, images):
    task = DetectorTask(detector, "change", read=read, classes=[0], target=[2])
    x = images[DetectorTask(detector, read=read, classes=[0]).attackable(images)]
    found = PGD(60)(task, x, np.zeros(len(x), int), epsilon=0.3)
    assert found.success.mean() > 0.5
    boxes = task.boxes(found.x_adv)[found.success]
    assert (boxes[:, 0] == 0).all() and (boxes[:, 2] > 0).all()
    # A box of any other class is more than one of this class.
    loose = DetectorTask(detector, "change", read=read, classes=[0])
    assert (np.asarray(loose.margin(x)) <= np.asarray(task.margin(x)) + 1e-6).all()


def test_scores_alone_suffice_and_success_grows_with_epsilon(detector, images):
    task = DetectorTask(detector, read=read)
    x = images[task.attackable(images)][:12]
    goal = np.zeros(len(x), int)
    attack = PGD(20)
    shares = [attack(task, x, goal, epsilon=epsilon).success.mean() for epsilon in (0.02, 0.1, 0.5)]
    assert shares == sorted(shares) and shares[0] < shares[-1] == 1
    asked = Square(max_queries=300)(task, x, goal, epsilon=0.5)
    assert 0.2 < asked.success.mean() <= 1


def test_soft_maximum_is_exact_and_follows_all_candidates():
    values = tf.constant([[1.0, 3.0, 2.5]])
    with tf.GradientTape() as tape:
        tape.watch(values)
        greatest = soft_maximum(values, 0.5)
    np.testing.assert_array_equal(greatest, [3])
    np.testing.assert_allclose(tape.gradient(greatest, values), tf.nn.softmax(values / 0.5), rtol=1e-6)


def test_bad_settings(detector, images):
    for make in (
        lambda: DetectorTask(3),
        lambda: DetectorTask(detector, "hide"),
        lambda: DetectorTask(detector, "change"),
        lambda: DetectorTask(detector, target=[1]),
        lambda: DetectorTask(detector, "change", classes=[1], target=[1]),
        lambda: DetectorTask(detector, classes=[]),
        lambda: DetectorTask(detector)(images),
        lambda: DetectorTask(detector, read=read, classes=[3])(images),
        lambda: DetectorTask(detector, "change", read=read, classes=[0, 1, 2])(images),
    ):
        with pytest.raises(ValueError, match="Argument"):
            make()
