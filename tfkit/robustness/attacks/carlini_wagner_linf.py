"""Carlini-Wagner L-infinity: what exceeds a threshold is penalised, and the threshold falls as long as that succeeds.

Paper: Carlini, Wagner. Towards Evaluating the Robustness of Neural Networks. IEEE S&P 2017,
https://arxiv.org/abs/1608.04644, section VI.C.

Differs: where nine tenths of the best distance fail, 97 hundredths are tried; c grows by four, not two; what is found
is shortened along the straight way from the example by bisection.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.tanh_space import Problems, TanhSpaceAttack, from_box, to_box

#: The next threshold over the best distance, the second where the first fails.
_SHARES = np.array([0.9, 0.97], np.float32)


class CarliniWagnerLinf(TanhSpaceAttack):
    """The attack in L-infinity, with or without a radius.

    Args:
        initial_c: the first weight of the gap.
        largest_c: above it a threshold counts as too low.
        **settings: of `TanhSpaceAttack`, `GradientAttack` and `Attack`; the norm is L-infinity.
    """

    norms = ("linf",)
    halvings = 12

    def __init__(self, initial_c: float = 0.01, largest_c: float = 20.0, **settings: Any) -> None:
        super().__init__(**settings)
        self.initial_c = checks.number("initial_c", initial_c, 1e-30)
        self.largest_c = checks.number("largest_c", largest_c, initial_c)

    def points(self, x: Any, w: Any, limit: Any) -> Any:
        return to_box(w, self.bounds)

    def penalty(self, delta: Any, limit: Any) -> tuple[Any, Any]:
        size = tf.reshape(tf.abs(delta), (tf.shape(delta)[0], -1))
        return tf.reduce_sum(tf.maximum(size - limit[:, None], 0.0), axis=1), tf.reduce_max(size, axis=1)

    def schedule(
        self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray
    ) -> tuple[Problems, Callable[[Problems], np.ndarray]]:
        """Begins without a threshold; each next problem goes on from where the last one ended."""
        count = len(x)
        whole = np.full(count, self.bounds[1] - self.bounds[0], np.float32)
        state = Problems(x, from_box(x, self.bounds), self.initial_c, whole)
        attempt, before = np.zeros(count, int), np.full(count, np.inf, np.float32)

        def advance(state: Problems) -> np.ndarray:
            index = state.index
            won = state.nearest <= state.limit
            over = self.ended(state, before[index]) & ~won
            before[index] = state.lowest
            raised = over & (state.c < self.largest_c)
            state.c[raised] *= 4
            # Too low even so: a threshold nearer to what is known, or the end.
            failed = over & ~raised
            attempt[index[failed]] += 1
            attempt[index[failed & np.isinf(state.nearest)]] = len(_SHARES)
            posed = won | failed
            share = _SHARES[np.minimum(attempt[index], len(_SHARES) - 1)]
            state.limit[posed] = (share * state.nearest)[posed]
            state.renew(won | over, state.w)
            before[index[won | over]] = np.inf
            return attempt[index] < len(_SHARES)

        return state, advance
