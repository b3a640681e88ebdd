"""Video attack (VideoPGD): projected gradient ascent on clips: frame by frame, one perturbation for all, or few frames.

Paper: Wei, Zhu, Yuan, Su. Sparse Adversarial Perturbations for Videos. AAAI 2019, https://arxiv.org/abs/1803.02536

Differs: the radius bounds each frame's change, by projection, where the paper adds an L2,1 penalty; the frames that may
change are those of which the loss promises most, not the first ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import climb, cross_entropy, margin, slope
from tfkit.robustness.attacks.norms import random_start
from tfkit.robustness.attacks.pgd import BROKEN, PGD, ranks

PERTURBATIONS = ("per-frame", "shared")
#: The order of the dual norm: what a step of length 1 gains of a linear function.
_DUAL: dict[str, Any] = {"linf": 1, "l2": "euclidean", "l1": math.inf}


def frame_gains(gradient: Any, norm: str) -> Any:
    """Returns by how much the loss grows, to first order, for a step of length 1 in each frame.

    Args:
        gradient: of the loss, (batch, frames, ...).
        norm: of the step, "linf", "l2" or "l1".

    Returns:
        (batch, frames): the dual norm of each frame's gradient.

    >>> frame_gains(tf.constant([[[3.0, -4.0], [1.0, 0.0]]]), "linf").numpy()
    array([[7., 1.]], dtype=float32)
    """
    shape = tf.shape(gradient)
    return tf.norm(tf.reshape(gradient, (shape[0], shape[1], -1)), ord=_DUAL[norm], axis=2)


def frame_mask(gains: Any, count: int) -> Any:
    """Returns 1 for the `count` frames of the greatest gains and 0 for the others, float32, (batch, frames)."""
    chosen = tf.math.top_k(gains, count).indices
    return tf.reduce_sum(tf.one_hot(chosen, tf.shape(gains)[1]), axis=1)


class VideoPGD(PGD):
    """PGD on clips, (batch, frames, ...). `epsilon` is the radius of each frame's ball.

    The distance reported is that of the frame that changed most.

    Args:
        perturbation: "per-frame": each frame has its own; "shared": one is added to all frames, and cut where a value
            would leave the bounds.
        frames: how many frames may change; None for all. They are chosen for each clip.
        **settings: of `PGD`, `GradientAttack` and `Attack`.
    """

    def __init__(self, perturbation: str = "per-frame", frames: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if self.early_stop:
            raise checks.error("early_stop", "False for clips", True, "PGD has it.")
        self.perturbation = checks.choice("perturbation", perturbation, PERTURBATIONS)
        self.frames = None if frames is None else checks.integer("frames", frames, 1)

    def search(self, model: Callable[[Any], Any], x: Any, y: Any, epsilon: Any, seed: Any, restart: Any) -> Any:
        """Returns the best clip of one start for each row, whether it breaks it, and evaluations: see `PGD.search`."""
        sign = -1.0 if self.targeted else 1.0
        shape, row = tf.shape(x), x.shape[2:]
        wide = (-1, 1, *row)  # A frame, or one perturbation, a row.
        per_clip = shape[1] if self.perturbation == "per-frame" else 1
        mask = self._mask(model, x, y, sign)
        low, high = self.bounds

        def clips(changes: Any) -> Any:
            """Clips, like `x`, with `changes`, (rows, 1, ...), in the frames that may change."""
            moved = x + mask * tf.reshape(changes, (shape[0], per_clip, *row))
            # Straight through: a value cut in one frame may still matter in another.
            return moved + tf.stop_gradient(tf.clip_by_value(moved, low, high) - moved)

        # A frame's own change is kept within the bounds by the climb; a shared one knows no single frame's values.
        own = self.perturbation == "per-frame"
        origin = tf.reshape(x, wide) if own else tf.zeros((shape[0], 1, *row))
        box = (low, high) if own else (low - high, high - low)

        def loss(points: Any) -> tuple[Any, Any]:
            values, logits = self.mean_over_draws(cross_entropy, model, clips(points - origin), y)
            values *= sign
            rank = ranks(values, sign * margin(logits, y) > 0)
            # The frames of a clip are kept or left together.
            return values, tf.repeat(rank, per_clip)

        start = origin
        if self.random_start:
            start += random_start(tf.shape(origin), epsilon, self.norm, seed)
        found, rank = climb(
            loss, origin, start, epsilon, epsilon * self.relative_step, self.steps, self.norm, box,
            keep_best=True, momentum=self.momentum,
        )  # fmt: skip
        broken = tf.reshape(rank, (shape[0], per_clip))[:, 0] > BROKEN / 2
        return clips(found - origin), broken, tf.fill(shape[:1], self.evaluations)

    def _mask(self, model: Callable[[Any], Any], x: Any, y: Any, sign: float) -> Any:
        if self.frames is None:
            return tf.ones(())
        _, gradient = slope(lambda points: sign * self.mean_over_draws(cross_entropy, model, points, y)[0], x)
        chosen = frame_mask(frame_gains(gradient, self.norm), self.frames)
        return tf.reshape(chosen, (*tf.unstack(tf.shape(chosen)), *(1 for _ in x.shape[2:])))

    @property
    def evaluations(self) -> int:
        """Forward evaluations of a clip by one start, that which chooses the frames among them."""
        return super().evaluations + (self.frames is not None) * self.samples

    def _checked(self, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        x, y = super()._checked(x, y)
        if x.ndim < 3:
            raise checks.error("x", "clips, (batch, frames, ...)", x)
        if self.frames is not None and self.frames > x.shape[1]:
            raise checks.error("frames", f"at most the {x.shape[1]} frames of a clip", self.frames)
        return x, y

    def _inside(self, x: np.ndarray, found: np.ndarray, epsilon: float) -> np.ndarray:
        """Each frame has a ball of its own."""
        alone = (-1, 1, *x.shape[2:])
        return super()._inside(x.reshape(alone), found.reshape(alone), epsilon).reshape(x.shape)

    def _distance(self, x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
        alone = (-1, *x.shape[2:])
        return super()._distance(x.reshape(alone), x_adv.reshape(alone)).reshape(x.shape[:2]).max(axis=1)
