"""Carlini-Wagner L0: the L2 attack on a set of coordinates from which those that matter least leave.

Paper: Carlini, Wagner. Towards Evaluating the Robustness of Neural Networks. IEEE S&P 2017,
https://arxiv.org/abs/1608.04644, section VI.B.

Differs: a share of the coordinates leaves at once, half as many where that fails, down to a single one; each value of a
colour counts as a coordinate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import slope
from tfkit.robustness.attacks.tanh_space import Problems, TanhSpaceAttack, from_box, to_box


class CarliniWagnerL0(TanhSpaceAttack):
    """The attack in L0, with or without a radius, which is a number of coordinates.

    Args:
        initial_c: the first weight of the gap.
        largest_c: above it a set counts as too small.
        share: of the coordinates that leave at once, at first.
        **settings: of `TanhSpaceAttack`, `GradientAttack` and `Attack`; the norm is L0.
    """

    norms = ("l0",)

    def __init__(self, initial_c: float = 0.1, largest_c: float = 1000.0, share: float = 0.3, **settings: Any) -> None:
        super().__init__(**{"norm": "l0", **settings})
        self.initial_c = checks.number("initial_c", initial_c, 1e-30)
        self.largest_c = checks.number("largest_c", largest_c, initial_c)
        self.share = checks.number("share", share, 0, 1, open_high=True)

    @property
    def chunk(self) -> int:
        # The first success ends a problem.
        return max(1, self.iterations // 50)

    def points(self, x: Any, w: Any, limit: Any) -> Any:
        return tf.where(limit, to_box(w, self.bounds), x)

    def penalty(self, delta: Any, limit: Any) -> tuple[Any, Any]:
        axes = list(range(1, len(delta.shape)))
        changed = tf.math.count_nonzero(delta, axis=axes, dtype=tf.float32)
        return tf.reduce_sum(delta**2, axis=axes), changed

    def schedule(
        self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray
    ) -> tuple[Problems, Callable[[Problems], np.ndarray]]:
        """Begins with all coordinates; a set that succeeds becomes a smaller one, which goes on from there."""

        def importance(x: Any, y: Any, points: Any) -> Any:
            _, gradient = slope(lambda points: self.gap(model(points), y), points)
            return tf.abs(gradient * (points - x))

        matter = self.graph("importance", x.shape[1:], lambda: tf.function(importance, reduce_retracing=True))
        count, features = len(x), int(np.prod(x.shape[1:]))
        state = Problems(x, from_box(x, self.bounds), self.initial_c, np.ones(x.shape, bool))
        share, removed = np.full(count, self.share), np.full(count, features)
        finished, before = np.zeros(count, bool), np.full(count, np.inf, np.float32)

        def advance(state: Problems) -> np.ndarray:
            index = state.index
            won = state.reached.copy()
            over = self.ended(state, before[index]) & ~won
            before[index] = state.lowest
            raised = over & (state.c < self.largest_c)
            state.c[raised] *= 10
            failed = over & ~raised
            finished[index[failed & ((removed[index] <= 1) | np.isinf(state.nearest))]] = True
            share[index[failed]] /= 2
            posed = np.flatnonzero((won | failed) & ~finished[index])
            if len(posed):
                rows = index[posed]
                # What is best so far tells which coordinates count: they are the ones that it changes.
                scores = matter(x[rows], y[rows], state.best[posed]).numpy().reshape(len(posed), -1)
                changed = (state.best[posed] != x[rows]).reshape(len(posed), -1)
                order = np.argsort(np.where(changed, scores, np.inf), axis=1, kind="stable")
                sizes = changed.sum(axis=1)
                leave = np.maximum(1, (share[rows] * sizes).astype(int))
                removed[rows] = leave
                mask = changed.copy()
                np.put_along_axis(
                    mask, order, np.take_along_axis(mask, order, 1) & (np.arange(features) >= leave[:, None]), 1
                )
                state.limit[posed] = mask.reshape(state.limit[posed].shape)
                state.c[posed] = self.initial_c
                finished[rows[~mask.any(axis=1)]] = True
            state.renew(won | over, np.where(np.isfinite(state.w), state.w, 0))
            before[index[won | over]] = np.inf
            return ~finished[index]

        return state, advance
