"""DeepFool: steps to the nearest boundary of the model made linear at each point.

Paper: Moosavi-Dezfooli, Fawzi, Frossard. DeepFool: a simple and accurate method to fool deep neural networks. CVPR
2016, https://arxiv.org/abs/1511.04599, algorithm 2 and, for other norms, equation 11.

Differs: only the best `candidates` classes of the example are looked at; what is found is shortened along the straight
way from the example by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import rows, slope
from tfkit.robustness.attacks.minimal import MinimalAttack


def nearest_step(gaps: Any, slopes: Any, norm: str) -> Any:
    """Returns the shortest step to one of several boundaries of a linear function, (batch, features).

    Args:
        gaps: logit of each other class less that of the example's own, (batch, classes).
        slopes: their gradients, (batch, classes, features).
        norm: in which the step is short.
    """
    dual = tf.reduce_sum(tf.abs(slopes), axis=2) if norm == "linf" else tf.norm(slopes, axis=2)  # (batch, classes)
    distance = tf.where(dual > 0, (tf.abs(gaps) + 1e-6) / tf.maximum(dual, 1e-30), np.inf)
    chosen = tf.argmin(distance, axis=1)
    slope = tf.gather(slopes, chosen, axis=1, batch_dims=1)  # (batch, features)
    length = tf.gather(distance, chosen, axis=1, batch_dims=1)[:, None]
    length = tf.where(tf.math.is_finite(length), length, 0.0)
    if norm == "linf":
        return length * tf.sign(slope)
    return length * tf.math.divide_no_nan(slope, tf.norm(slope, axis=1, keepdims=True))


class DeepFool(MinimalAttack):
    """DeepFool in L2 and L-infinity, with or without a radius. Untargeted.

    Args:
        steps: at most.
        candidates: classes looked at, the best other ones of the example.
        overshoot: by which share of the way the steps go beyond the boundary.
        **settings: of `GradientAttack` and `Attack`.
    """

    norms = ("linf", "l2")
    halvings = 10

    def __init__(self, steps: int = 50, candidates: int = 9, overshoot: float = 0.02, **settings: Any) -> None:
        super().__init__(**{"norm": "l2", **settings})
        self.steps = checks.integer("steps", steps, 1)
        self.candidates = checks.integer("candidates", candidates, 1)
        self.overshoot = checks.number("overshoot", overshoot, 0)
        if self.targeted:
            raise checks.error("targeted", "False for DeepFool", True, "Use CarliniWagnerL2.")

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Steps with a batch until each of its rows is beyond a boundary."""
        attack = self.graph("attack", x.shape[1:], lambda: tf.function(self._batch(model), reduce_retracing=True))
        found, queries = x.copy(), np.zeros(len(x), np.int64)
        for at in range(0, len(x), self.batch_size):
            part = slice(at, at + self.batch_size)
            points, steps, classes = attack(x[part], y[part])
            found[part] = points
            queries[part] = 1 + self.halvings + steps.numpy() * (classes.numpy() * self.samples + 1)
            self.tell(min(at + self.batch_size, len(x)), len(x))
        return found, queries

    def _batch(self, model: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        def attack(x: Any, y: Any) -> tuple[Any, Any, Any]:
            logits = model(x)
            count = tf.minimum(self.candidates, tf.shape(logits)[1] - 1)
            own = tf.one_hot(y, tf.shape(logits)[1], on_value=True, off_value=False, dtype=tf.bool)
            others = tf.math.top_k(tf.where(own, -np.inf, logits), count).indices  # (batch, count)
            shape, batch = tf.shape(x), tf.shape(x)[0]

            def gaps(points: Any) -> Any:
                flat_y, flat_others = tf.repeat(y, count), tf.reshape(others, (-1,))

                def gap(logits: Any, pair: Any) -> Any:
                    pick = lambda at: tf.gather(logits, at, axis=1, batch_dims=1)  # noqa: E731
                    return pick(tf.cast(pair[:, 0], tf.int32)) - pick(tf.cast(pair[:, 1], tf.int32))

                pairs = tf.stack([tf.cast(flat_others, tf.int64), flat_y], axis=1)
                return self.mean_over_draws(gap, model, points, pairs)[0]

            def body(step: Any, total: Any, standing: Any, taken: Any) -> tuple[Any, ...]:
                points = tf.clip_by_value(x + (1 + self.overshoot) * total, *self.bounds)
                values, slopes = slope(gaps, tf.repeat(points, count, axis=0))
                move = nearest_step(
                    tf.reshape(values, (batch, count)), tf.reshape(slopes, (batch, count, -1)), self.norm
                )
                total = tf.where(rows(standing, x), total + tf.reshape(move, shape), total)
                taken += tf.cast(standing, tf.int64)
                moved = tf.clip_by_value(x + (1 + self.overshoot) * total, *self.bounds)
                return step + 1, total, standing & (self.gap(model(moved), y) > 0), taken

            state = (0, tf.zeros_like(x), self.gap(logits, y) > 0, tf.zeros(batch, tf.int64))
            _, total, standing, taken = tf.while_loop(
                lambda step, total, standing, taken: (step < self.steps) & tf.reduce_any(standing),
                body,
                state,
                shape_invariants=(tf.TensorShape([]), x.shape, tf.TensorShape([None]), tf.TensorShape([None])),
            )
            found = tf.clip_by_value(x + (1 + self.overshoot) * total, *self.bounds)
            short = self.shorten(model, x, y, found, self.halvings, 0.0)
            return tf.where(rows(standing, x), found, short), taken, count

        return attack
