"""Max pooling as a node: the maximum over the places of each window.

A linear node lays each window's places along an axis first; here the maximum over that axis is bounded. Where one
place's lower bound reaches all other upper bounds, the maximum is that place. Elsewhere the lower line is the place of
the largest middle: any place is a lower bound, and this one is the closest on average. (The largest lower bound would
be no choice behind ReLUs, where many are 0, and rounding would decide.) The upper plane is, over the places that can
win,

    gamma + sum_i (u_i - gamma) / (u_i - l_i) (p_i - l_i),  max_i l_i <= gamma <= min_i u_i.

The maximum is convex, so it is enough to see this at the corners of the box: where the places in S are at u and the
others at l, the plane is gamma + sum over S of (u_i - gamma), at least gamma, and at least u_i for each i in S.
(Boopathy et al., CNN-Cert, https://arxiv.org/abs/1811.12395, choose gamma so that the slopes add up to 1.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.robustness.certification.activations import Lines
from tfkit.robustness.certification.nodes import Node
from tfkit.robustness.certification.rounding import SAFETY, UNIT64, gamma

Tensor = Any
#: Stands for a place outside the image, which never wins; finite, so that no product with it is NaN.
NEVER = 1e30


class Maximum(Node):
    """The maximum over the second-last axis of the input, (..., places, channels).

    Args:
        valid: of the input's shape without the channels: False where a window reaches outside of the image.
    """

    def __init__(self, name: str, source: int, shape: Sequence[int], valid: np.ndarray) -> None:
        super().__init__(name, (source,), shape)
        self.valid = valid[..., None]

    def value(self, x: Tensor) -> Tensor:
        return tf.reduce_max(tf.where(self.valid, x, -NEVER * tf.ones_like(x)), -2)

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value over the box."""
        return self.value(low), self.value(high)

    def winners(self, low: Tensor, high: Tensor) -> Tensor:
        """One-hot: the valid place with the largest middle; the earliest of several."""
        places = low.shape[-2]
        masked = tf.where(self.valid, low + high, -NEVER * tf.ones_like(low))
        return tf.one_hot(tf.argmax(masked, -2), places, axis=low.shape.rank - 2, dtype=low.dtype)

    def possible(self, low: Tensor, high: Tensor) -> Tensor:
        """Where a place can be the maximum."""
        return self.valid & (
            high >= tf.reduce_max(tf.where(self.valid, low, -NEVER * tf.ones_like(low)), -2)[..., None, :]
        )

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """Slopes of the input's shape, constants and error of the output's."""
        best = self.winners(low, high)
        can_win = self.possible(low, high)
        alone = tf.reduce_sum(tf.cast(can_win, low.dtype), -2, keepdims=True) < 1.5
        width = tf.where(can_win, high - low, tf.ones_like(low))
        width = tf.where(width > 0, width, tf.ones_like(low))
        inverse = tf.where(can_win, 1 / width, tf.zeros_like(low))
        top = tf.reduce_min(tf.where(can_win, high, NEVER * tf.ones_like(low)), -2, keepdims=True)
        bottom = tf.reduce_max(tf.where(can_win, low, -NEVER * tf.ones_like(low)), -2, keepdims=True)
        level = (tf.reduce_sum(inverse * high, -2, keepdims=True) - 1) / tf.reduce_sum(inverse, -2, keepdims=True)
        level = tf.minimum(tf.maximum(level, bottom), top)
        slope = tf.where(alone, best, tf.where(can_win, (high - level) * inverse, tf.zeros_like(low)))
        # A place of width 0 has slope 0: its own value is a lower bound, so that the level is at least that.
        slope = tf.where(can_win & (high <= low) & ~alone, tf.zeros_like(low), slope)
        safe_low = tf.where(can_win, low, tf.zeros_like(low))
        constant = tf.where(alone, tf.zeros_like(level), level - tf.reduce_sum(slope * safe_low, -2, keepdims=True))
        reach = tf.where(self.valid, tf.maximum(tf.abs(low), tf.abs(high)), tf.zeros_like(low))
        error = (
            SAFETY
            * gamma(self.size + 64, UNIT64)
            * (tf.abs(constant) + tf.reduce_sum((slope + best) * reach, -2, keepdims=True) + tf.abs(level))
        )
        squeeze = lambda value: tf.squeeze(value, -2)  # noqa: E731
        return Lines(best, tf.zeros_like(squeeze(constant)), slope, squeeze(constant), squeeze(error))

    def undecided(self, low: Tensor, high: Tensor) -> Tensor:
        """Places whose tighter bounds could tighten the lines: those of windows that several can win."""
        can_win = self.possible(low, high)
        several = tf.reduce_sum(tf.cast(can_win, tf.int32), -2, keepdims=True) > 1
        return can_win & several
