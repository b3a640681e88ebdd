"""Detection (DetectorTask): attacks on object detectors: boxes that vanish, appear or change class.

Paper: Xie, Wang, Zhang, Zhou, Xie, Yuille. Adversarial Examples for Semantic Segmentation and Object Detection. ICCV
2017, https://arxiv.org/abs/1703.08603

Differs: an adapter and not an attack. It tells of each image whether the detector still does what the attacker wants
to stop, as two logits, so that every attack on classifiers, with gradients or without, works on any detector. The
paper's sum over boxes becomes their soft maximum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks

GOALS = ("vanish", "appear", "change")


def soft_maximum(values: Any, temperature: float) -> Any:
    """Returns the greatest of each row, (batch,), with the gradient of its softmax-weighted mean.

    The gradient of a maximum knows one candidate only; when that is pushed down the next one takes its place.

    >>> soft_maximum(tf.constant([[1.0, 3.0, 2.0]]), 1.0).numpy()
    array([3.], dtype=float32)
    """
    smooth = temperature * tf.reduce_logsumexp(values / temperature, axis=1)
    return smooth + tf.stop_gradient(tf.reduce_max(values, axis=1) - smooth)


class DetectorTask:
    """A detector and a goal as a classifier of two classes: 0, the goal is not reached, and 1, it is.

    Attack it with `y` all 0: `PGD()(task, x, np.zeros(len(x), int), epsilon=0.03)`; examples for which the goal is
    reached already count as wrong predictions do. `evaluate` gives success against epsilon. Logits are half the margin
    and its opposite, so that the first less the second is the margin in the units of the scores.

    Args:
        detector: a Keras model, or a callable, from images to outputs.
        goal: "vanish": no candidate of `classes` reaches the threshold; "appear": one of `classes` does; "change":
            none of `classes` does, and one of `target` does.
        read: from the detector's outputs to scores, (batch, candidates, classes), higher for surer, with whatever
            background class it has left out; None where the outputs are these.
        threshold: score from which a candidate counts as a box. 0 for logits of a sigmoid is a probability of 0.5.
        classes: those the goal is about; None for all. Needed for "change".
        target: those wanted instead, for "change"; None for all that are not in `classes`.
        temperature: of the gradient's mean over candidates, in units of the scores.
    """

    def __init__(
        self,
        detector: Callable[[Any], Any],
        goal: str = "vanish",
        *,
        read: Callable[[Any], Any] | None = None,
        threshold: float = 0.0,
        classes: Sequence[int] | None = None,
        target: Sequence[int] | None = None,
        temperature: float = 1.0,
    ) -> None:
        if not callable(detector):
            raise checks.error("detector", "callable, from images to outputs", detector)
        self.detector = detector
        self.goal = checks.choice("goal", goal, GOALS)
        self.read = read
        self.threshold = checks.number("threshold", threshold)
        self.classes = _numbers("classes", classes)
        self.target = _numbers("target", target)
        self.temperature = checks.number("temperature", temperature, 1e-6)
        if goal == "change" and self.classes is None:
            raise checks.error("classes", "given for this goal", classes, "Name the classes to change.")
        if goal != "change" and target is not None:
            raise checks.error("target", "None for this goal", target, 'Pass goal="change".')
        if set(self.classes or ()) & set(self.target or ()):
            raise checks.error("target", "other classes than `classes`", target)

    def scores(self, x: Any) -> Any:
        """Returns the scores of all candidates, float32, (batch, candidates, classes).

        Raises:
            ValueError: what was read has another shape, or lacks a class that was named.
        """
        options = {"training": False} if isinstance(self.detector, keras.Model) else {}
        outputs = self.detector(x, **options)
        scores = tf.cast(outputs if self.read is None else self.read(outputs), tf.float32)
        if len(scores.shape) != 3:
            raise checks.error("read", "a function to scores, (batch, candidates, classes)", scores)
        last = max((*(self.classes or (0,)), *(self.target or (0,))))
        if last >= scores.shape[2]:
            raise checks.error("classes", f"below the {scores.shape[2]} that the scores have", last)
        return scores

    def margin(self, x: Any) -> Any:
        """Returns by how much each image is from the goal, in units of the scores, (batch,): below 0 if reached."""
        scores = self.scores(x)
        chosen = tuple(range(scores.shape[2])) if self.classes is None else self.classes
        present = self._greatest(scores, chosen) - self.threshold
        if self.goal == "vanish":
            return present
        if self.goal == "appear":
            return -present
        others = tuple(c for c in range(scores.shape[2]) if c not in chosen) if self.target is None else self.target
        if not others:
            raise checks.error("classes", "fewer than all", self.classes, "Leave a class to change to.")
        # Both must hold, so the worse counts; both are followed, or the two conditions would take turns.
        return soft_maximum(tf.stack([present, self.threshold - self._greatest(scores, others)], 1), self.temperature)

    def _greatest(self, scores: Any, chosen: Sequence[int]) -> Any:
        values = tf.gather(scores, list(chosen), axis=2)
        return soft_maximum(tf.reshape(values, (tf.shape(values)[0], -1)), self.temperature)

    def __call__(self, x: Any) -> Any:
        """Returns two logits for each image, (batch, 2)."""
        half = self.margin(tf.convert_to_tensor(x)) / 2
        return tf.stack([half, -half], axis=1)

    def attackable(self, x: Any) -> np.ndarray:
        """Returns for which images the goal is not yet reached, bool, (batch,)."""
        return np.asarray(self.margin(tf.convert_to_tensor(x))) >= 0

    def boxes(self, x: Any) -> np.ndarray:
        """Returns how many candidates reach the threshold, by class, int, (batch, classes)."""
        return (np.asarray(self.scores(tf.convert_to_tensor(x))) >= self.threshold).sum(axis=1)


def _numbers(name: str, values: Sequence[int] | None) -> tuple[int, ...] | None:
    if values is None:
        return None
    found = tuple(checks.integer(name, value, 0) for value in values)
    if not found or len(set(found)) < len(found):
        raise checks.error(name, "one class or more, each once", values)
    return found
