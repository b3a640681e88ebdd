"""PGD: steps up the loss, each projected back into the ball, from random starts.

Paper: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards Deep Learning Models Resistant to Adversarial Attacks. ICLR
2018, https://arxiv.org/abs/1706.06083

Differs: L2 and L1 balls as well; examples that a start has broken leave the batch before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.norms import project, random_start, steepest


def climb(
    model: Callable[[Any], Any],
    x: Any,
    y: Any,
    start: Any,
    epsilon: Any,
    step_size: Any,
    steps: Any,
    norm: str,
    bounds: tuple[float, float],
    targeted: bool = False,
) -> Any:
    """Climbs the cross-entropy (descends, if targeted) from `start`, within the ball around `x` and the bounds.

    Args:
        model: from inputs to logits, in TensorFlow operations.
        x: (batch, ...), centres of the balls.
        y: (batch,), classes.
        start: (batch, ...), where the climb begins; projected first.
        epsilon, norm: of the balls.
        step_size: length of a step in the norm.
        steps: how many.
        bounds: least and greatest value of an input.
        targeted: whether to descend.

    Returns:
        (batch, ...), constant for gradients.
    """
    sign = -1.0 if targeted else 1.0

    def inside(points: Any) -> Any:
        return tf.clip_by_value(x + project(points - x, epsilon, norm), *bounds)

    def body(step: Any, points: Any) -> tuple[Any, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(points)
            # A sum: a row's gradient does not depend on how many others there are.
            loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=model(points)))
        gradient = tape.gradient(loss, points)
        if gradient is None:
            raise checks.error("model", "differentiable in TensorFlow", model, "Use an attack on scores or labels.")
        return step + 1, inside(points + sign * step_size * steepest(gradient, norm))

    shapes = (tf.TensorShape([]), x.shape)
    found = tf.while_loop(lambda step, _: step < steps, body, (0, inside(start)), shape_invariants=shapes)
    return tf.stop_gradient(found[1])


class PGD(Attack):
    """Projected gradient ascent on the cross-entropy.

    Args:
        steps: gradients a start.
        relative_step: length of a step over epsilon; None for 2.5 / steps.
        restarts: starts; an example keeps the first that breaks it.
        random_start: whether to start at a uniform point of the ball; else at the example.
        **settings: of `Attack`.
    """

    def __init__(
        self,
        steps: int = 40,
        relative_step: float | None = None,
        restarts: int = 1,
        random_start: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.steps = checks.integer("steps", steps, 1)
        self.relative_step = 2.5 / steps if relative_step is None else checks.number("relative_step", relative_step, 0)
        self.restarts = checks.integer("restarts", restarts, 1)
        self.random_start = bool(random_start)
        if self.restarts > 1 and not self.random_start:
            raise checks.error("restarts", "1 without random starts", restarts, "Pass random_start=True.")

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Climbs from each start in turn with the examples that no earlier one broke."""
        if epsilon is None:
            raise checks.error("epsilon", "a radius for PGD", epsilon, "Pass one.")
        row = x.shape[1:]

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, *row), tf.float32),
                tf.TensorSpec((None,), tf.int64),
                tf.TensorSpec((2,), tf.int32),
            ]
        )
        def attack(x: Any, y: Any, seed: Any) -> tuple[Any, Any]:
            radius = tf.constant(epsilon, tf.float32)
            start = x + random_start(tf.shape(x), radius, self.norm, seed) if self.random_start else x
            found = climb(
                model,
                x,
                y,
                start,
                radius,
                radius * self.relative_step,
                self.steps,
                self.norm,
                self.bounds,
                self.targeted,
            )
            reached = tf.equal(tf.argmax(model(found), axis=1), y)
            return found, reached if self.targeted else ~reached

        x_adv, queries = x.copy(), np.zeros(len(x), np.int64)
        left = np.arange(len(x))
        for restart in range(self.restarts):
            broken = np.zeros(len(left), bool)
            for at in range(0, len(left), self.batch_size):
                part = left[at : at + self.batch_size]
                found, success = attack(x[part], y[part], (self.seed, restart * len(x) + at))
                x_adv[part], broken[at : at + self.batch_size] = found.numpy(), success.numpy()
            queries[left] += self.steps + 1
            left = left[~broken]
            if not len(left):
                break
        return x_adv, queries
