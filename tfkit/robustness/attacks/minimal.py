"""Minimal distance: what attacks share that seek the nearest adversarial point, with or without a ball."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tfkit.robustness.attacks.gradients import GradientAttack, margin, rows

#: Share of the largest logit by which a point must be wrong: less may turn with the order of a sum in float32.
_CLEAR = 1e-6


class MinimalAttack(GradientAttack):
    """Base of attacks that seek the nearest adversarial point. With a radius, points beyond it are put back."""

    def gap(self, logits: Any, y: Any, confidence: float = 0.0) -> Any:
        """Returns how far each row is from adversarial, in logits, (batch,): 0 or less where it is, clearly."""
        clear = tf.stop_gradient(_CLEAR * tf.reduce_max(tf.abs(logits), axis=1))
        return (1.0 if self.targeted else -1.0) * margin(logits, y) + tf.maximum(clear, confidence)

    def shorten(self, model: Callable[[Any], Any], x: Any, y: Any, found: Any, halvings: int, confidence: float) -> Any:
        """Returns, for each row, an adversarial point on the way from `x` to `found`, by bisection; `found` is one."""

        def body(step: Any, low: Any, high: Any) -> tuple[Any, Any, Any]:
            middle = (low + high) / 2
            broken = self.gap(model(x + rows(middle, x) * (found - x)), y, confidence) <= 0
            return step + 1, tf.where(broken, low, middle), tf.where(broken, middle, high)

        state = (0, tf.zeros(tf.shape(x)[:1]), tf.ones(tf.shape(x)[:1]))
        _, _, share = tf.while_loop(lambda step, *_: step < halvings, body, state)
        # At share 1 the point is what was found, to the last place.
        return tf.where(rows(share, x) < 1, x + rows(share, x) * (found - x), found)
