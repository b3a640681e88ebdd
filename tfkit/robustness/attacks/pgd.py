"""PGD: steps up the loss, each projected back into the ball, from random starts.

Paper: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards Deep Learning Models Resistant to Adversarial Attacks. ICLR
2018, https://arxiv.org/abs/1706.06083

Differs: L2 and L1 balls as well; of a climb, the point with the highest loss is kept, and one that breaks the example
before any that does not, or, with `early_stop`, the first that does; examples that a start has broken leave the batch
before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import GradientAttack, climb, climb_until_broken, cross_entropy, margin
from tfkit.robustness.attacks.norms import random_start

#: The loss of a broken example ranks above every loss of one that stands.
BROKEN = 1e6


def ranks(values: Any, broken: Any) -> Any:
    """Returns by what points are kept, (batch,), in float64: in float32 a loss beside `BROKEN` loses its digits."""
    return tf.cast(values, tf.float64) + tf.where(broken, tf.constant(BROKEN, tf.float64), 0.0)


class PGD(GradientAttack):
    """Projected gradient ascent on the cross-entropy.

    Args:
        steps: gradients a start.
        relative_step: length of a step over epsilon; None for 2.5 / steps.
        restarts: starts; an example keeps the first that breaks it.
        random_start: whether to start at a uniform point of the ball; else at the example.
        momentum: decay of past gradients; None for none: see `MomentumIterative`.
        early_stop: whether an example leaves at the first point that breaks it: the same examples are broken, in a
            fraction of the time, by points just beyond the boundary.
        **settings: of `GradientAttack` and `Attack`.
    """

    def __init__(
        self,
        steps: int = 40,
        relative_step: float | None = None,
        restarts: int = 1,
        random_start: bool = True,
        momentum: float | None = None,
        early_stop: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.steps = checks.integer("steps", steps, 1)
        self.relative_step = 2.5 / steps if relative_step is None else checks.number("relative_step", relative_step, 0)
        self.restarts = checks.integer("restarts", restarts, 1)
        self.random_start = bool(random_start)
        self.momentum = None if momentum is None else checks.number("momentum", momentum, 0)
        self.early_stop = bool(early_stop)
        if self.restarts > 1 and not self.random_start:
            raise checks.error("restarts", "1 without random starts", restarts, "Pass random_start=True.")

    def search(self, model: Callable[[Any], Any], x: Any, y: Any, epsilon: Any, seed: Any, restart: Any) -> Any:
        """Returns the best point of one start for each row, whether it breaks it, and the forward evaluations it took.

        Args:
            model: to logits.
            x, y: (batch, ...) and (batch,).
            epsilon: radius, a scalar.
            seed: of the start, (2,).
            restart: which start, a scalar.
        """
        sign = -1.0 if self.targeted else 1.0

        def values_and_broken(points: Any, y: Any) -> tuple[Any, Any]:
            values, logits = self.mean_over_draws(cross_entropy, model, points, y)
            return sign * values, sign * margin(logits, y) > 0

        start = x + random_start(tf.shape(x), epsilon, self.norm, seed) if self.random_start else x
        step_size = epsilon * self.relative_step
        if self.early_stop:
            found, broken, taken = climb_until_broken(
                lambda points, which: values_and_broken(points, tf.gather(y, which)),
                x, start, epsilon, step_size, self.steps, self.norm, self.bounds, momentum=self.momentum,
            )  # fmt: skip
            return found, broken, taken * self.samples

        def loss(points: Any) -> tuple[Any, Any]:
            values, broken = values_and_broken(points, y)
            return values, ranks(values, broken)

        found, rank = climb(
            loss, x, start, epsilon, step_size, self.steps, self.norm, self.bounds,
            keep_best=True, momentum=self.momentum,
        )  # fmt: skip
        return found, rank > BROKEN / 2, tf.fill(tf.shape(y), self.evaluations)

    @property
    def evaluations(self) -> int:
        """Forward evaluations of an example by one start that takes all steps."""
        return (self.steps + 1) * self.samples

    def starts(self, classes: int) -> int:
        """Returns how often `search` is called for an example that resists, for a model of so many classes."""
        return self.restarts

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Climbs from each start in turn with the examples that no earlier one broke."""
        if epsilon is None:
            raise checks.error("epsilon", "a radius for this attack", epsilon, "DeepFool and Carlini-Wagner need none.")
        row = x.shape[1:]

        def make() -> Any:
            @tf.function(
                input_signature=[
                    tf.TensorSpec((None, *row), tf.float32),
                    tf.TensorSpec((None,), tf.int64),
                    tf.TensorSpec((), tf.float32),
                    tf.TensorSpec((2,), tf.int32),
                    tf.TensorSpec((), tf.int32),
                ]
            )
            def attack(x: Any, y: Any, epsilon: Any, seed: Any, restart: Any) -> tuple[Any, Any, Any]:
                return self.search(model, x, y, epsilon, seed, restart)

            return attack

        attack = self.graph("attack", row, make)
        x_adv, queries, left = x.copy(), np.zeros(len(x), np.int64), np.arange(len(x))
        starts = self.starts(int(model(tf.constant(x[:1])).shape[1]))
        for restart in range(starts):
            broken = np.zeros(len(left), bool)
            for at in range(0, len(left), self.batch_size):
                part = left[at : at + self.batch_size]
                found, success, taken = attack(x[part], y[part], epsilon, (self.seed, restart * len(x) + at), restart)
                x_adv[part], broken[at : at + self.batch_size] = found.numpy(), success.numpy()
                queries[part] += taken.numpy()
                self.tell(restart * len(x) + at + len(part), starts * len(x))
            left = left[~broken]
            if not len(left):
                break
        self.tell(starts * len(x), starts * len(x))
        return x_adv, queries
