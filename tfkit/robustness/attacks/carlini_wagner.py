"""Carlini-Wagner L2: Adam in tanh space on the squared distance plus c times the gap of the logits.

Paper: Carlini, Wagner. Towards Evaluating the Robustness of Neural Networks. IEEE S&P 2017,
https://arxiv.org/abs/1608.04644, sections V and VI.A.

Differs: each example goes on to its next c as soon as it is done with the last, so that none waits for the slowest;
what is found is shortened along the straight way from the example by bisection; Adam's rate is 0.05, not 0.01, which
needs fewer iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.tanh_space import Problems, TanhSpaceAttack, from_box, to_box


class CarliniWagnerL2(TanhSpaceAttack):
    """The attack in L2, with or without a radius.

    Args:
        search_steps: values of c for each example.
        initial_c: the first.
        learning_rate: of Adam, in tanh space.
        **settings: of `TanhSpaceAttack`, `GradientAttack` and `Attack`; the norm is L2.
    """

    norms = ("l2",)
    halvings = 12

    def __init__(
        self, search_steps: int = 9, initial_c: float = 1e-3, learning_rate: float = 0.05, **settings: Any
    ) -> None:
        super().__init__(learning_rate=learning_rate, **{"norm": "l2", **settings})
        self.search_steps = checks.integer("search_steps", search_steps, 1)
        self.initial_c = checks.number("initial_c", initial_c, 1e-30)

    def points(self, x: Any, w: Any, limit: Any) -> Any:
        return to_box(w, self.bounds)

    def penalty(self, delta: Any, limit: Any) -> tuple[Any, Any]:
        squared = tf.reduce_sum(delta**2, axis=list(range(1, len(delta.shape))))
        return squared, squared

    def schedule(
        self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray
    ) -> tuple[Problems, Callable[[Problems], np.ndarray]]:
        """Begins with the first c; each next one is ten times as large until one succeeds, then halves the interval."""
        start, count = from_box(x, self.bounds), len(x)
        state = Problems(x, start.copy(), self.initial_c, np.zeros(count, np.float32))
        low, high = np.zeros(count, np.float32), np.full(count, np.inf, np.float32)
        searched, before = np.zeros(count, int), np.full(count, np.inf, np.float32)

        def advance(state: Problems) -> np.ndarray:
            index = state.index
            over = self.ended(state, before[index])
            before[index] = state.lowest
            won, lost = index[over & state.reached], index[over & ~state.reached]
            high[won] = np.minimum(high[won], state.c[over & state.reached])
            low[lost] = np.maximum(low[lost], state.c[over & ~state.reached])
            moved = index[over]
            searched[moved] += 1
            before[moved] = np.inf
            with np.errstate(invalid="ignore"):
                next_c = np.where(np.isfinite(high[moved]), (low[moved] + high[moved]) / 2, 10 * state.c[over])
            state.c[over] = np.minimum(next_c, 1e10)
            state.renew(over, start[index])
            return searched[index] < self.search_steps

        return state, advance
