"""Auto-PGD: PGD with momentum whose step halves, back at the best point, where the loss stops rising.

Paper: Croce, Hein. Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-Free Attacks.
ICML 2020, https://arxiv.org/abs/2003.01690, algorithm 1, equations 3 to 6.

Differs: points that break the example rank above those that do not, whatever their loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import cross_entropy, dlr, margin, rows, slope, targeted_dlr
from tfkit.robustness.attacks.norms import project, random_start, steepest
from tfkit.robustness.attacks.pgd import BROKEN, PGD, ranks

LOSSES = ("cross_entropy", "dlr", "targeted_dlr")
#: Share of the new step, the other is that of the last move; share of rising steps below which the step halves.
_ALPHA, _RHO = 0.75, 0.75


def checkpoints(steps: int) -> list[int]:
    """Returns the steps at which the step size is looked at.

    >>> checkpoints(100)
    [0, 22, 41, 57, 70, 80, 87, 93, 99]
    """
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({math.ceil(round(share * steps, 9)) for share in shares if share <= 1})


class AutoPGD(PGD):
    """Auto-PGD in L-infinity and L2.

    Args:
        steps: gradients a start.
        loss: "cross_entropy"; "dlr", the difference of logits ratio, which no scale of the logits changes; or
            "targeted_dlr", towards each of the best other classes in turn, a start or more for each.
        restarts: starts; an example keeps the first that breaks it.
        target_classes: how many classes "targeted_dlr" tries.
        **settings: of `GradientAttack` and `Attack`.
    """

    norms = ("linf", "l2")

    def __init__(
        self,
        steps: int = 100,
        loss: str = "cross_entropy",
        restarts: int = 1,
        target_classes: int = 9,
        **settings: Any,
    ) -> None:
        super().__init__(steps, relative_step=2.0, restarts=restarts, **settings)
        if self.early_stop:
            raise checks.error("early_stop", "False for Auto-PGD", True, "PGD has it.")
        self.loss = checks.choice("loss", loss, LOSSES)
        self.target_classes = checks.integer("target_classes", target_classes, 1)
        if self.targeted and loss != "cross_entropy":
            raise checks.error("loss", '"cross_entropy" where the targets are given', loss)

    def starts(self, classes: int) -> int:
        least = {"cross_entropy": 2, "dlr": 3, "targeted_dlr": 4}[self.loss]
        if classes < least:
            raise checks.error("loss", f'"cross_entropy" for {classes} classes', self.loss)
        return self.restarts * (min(self.target_classes, classes - 1) if self.loss == "targeted_dlr" else 1)

    def search(self, model: Callable[[Any], Any], x: Any, y: Any, epsilon: Any, seed: Any, restart: Any) -> Any:
        sign = -1.0 if self.targeted else 1.0
        value = {"cross_entropy": cross_entropy, "dlr": dlr}.get(self.loss)
        labels = y
        if value is None:
            clean = model(x)
            own = tf.one_hot(y, tf.shape(clean)[1], on_value=True, off_value=False, dtype=tf.bool)
            order = tf.argsort(tf.where(own, -np.inf, clean), axis=1, direction="DESCENDING")
            target = tf.cast(order[:, restart // self.restarts], tf.int64)
            labels = tf.stack([y, target], axis=1)
            value = lambda logits, pair: targeted_dlr(logits, pair[:, 0], pair[:, 1])  # noqa: E731

        def loss(points: Any) -> tuple[Any, Any]:
            values, logits = self.mean_over_draws(value, model, points, labels)
            return sign * values, sign * margin(logits, y) > 0

        start = random_start(tf.shape(x), epsilon, self.norm, seed) if self.random_start else tf.zeros_like(x)
        found, broken = self._climb(loss, x, x + start, epsilon)
        return found, broken, tf.fill(tf.shape(y), self.evaluations)

    def _climb(self, loss: Callable[[Any], Any], x: Any, start: Any, epsilon: Any) -> tuple[Any, Any]:
        looks = checkpoints(self.steps)
        # After these steps, and how many were taken since the last look.
        look_at = tf.constant(looks[1:] or [self.steps])
        since = tf.constant(np.diff(looks).astype(np.float32) if len(looks) > 1 else [1.0], tf.float32)

        def inside(points: Any) -> Any:
            return tf.clip_by_value(x + project(points - x, epsilon, self.norm), *self.bounds)

        def body(step: Any, at: Any, last: Any, size: Any, state: Any) -> tuple[Any, ...]:
            best, best_slope, highest, kept, rank, value, gradient, rises, halved, top_before = state
            step_size = rows(size, x)
            moved = inside(at + step_size * steepest(gradient, self.norm))
            alpha = tf.where(step > 0, _ALPHA, 1.0)
            new = inside(at + alpha * (moved - at) + (1 - alpha) * (at - last))
            (new_value, broken), new_slope = slope(loss, new)
            rises += tf.cast(new_value > value, tf.float32)
            gain = ~(new_value <= highest)
            best, best_slope = tf.where(rows(gain, x), new, best), tf.where(rows(gain, x), new_slope, best_slope)
            highest = tf.where(gain, new_value, highest)
            new_rank = ranks(new_value, broken)
            better = ~(new_rank <= rank)
            kept, rank = tf.where(rows(better, x), new, kept), tf.where(better, new_rank, rank)
            # The step size, at a checkpoint only.
            look = tf.equal(look_at, step + 1)
            taken = tf.reduce_sum(tf.where(look, since, 0.0))
            stuck = (rises < _RHO * taken) | (~halved & (top_before >= highest))
            halve = stuck & tf.reduce_any(look)
            size = tf.where(halve, size / 2, size)
            last = tf.where(rows(halve, x), best, at)
            at = tf.where(rows(halve, x), best, new)
            value, gradient = tf.where(halve, highest, new_value), tf.where(rows(halve, x), best_slope, new_slope)
            looked = tf.reduce_any(look)
            rises = tf.where(looked, 0.0, rises)
            halved = tf.where(looked, halve, halved)
            top_before = tf.where(looked, highest, top_before)
            state = (best, best_slope, highest, kept, rank, value, gradient, rises, halved, top_before)
            return step + 1, at, last, size, state

        start = inside(start)
        (value, broken), gradient = slope(loss, start)
        rank = ranks(value, broken)
        batch = tf.shape(x)[:1]
        state = (start, gradient, value, start, rank, value, gradient, tf.zeros(batch), tf.fill(batch, True), value)
        size = tf.fill(batch, self.relative_step * epsilon)
        found = tf.while_loop(lambda step, *_: step < self.steps, body, (0, start, start, size, state))[-1]
        return tf.stop_gradient(found[3]), found[4] > BROKEN / 2
