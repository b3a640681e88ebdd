"""The optimiser of Carlini and Wagner: Adam in tanh space, each row with a problem and a step count of its own.

Rows finish at different times. So one compiled chunk of iterations works on whatever rows it is given, and between
chunks a schedule gives those that are done their next problem, or takes them out.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import rows, slope
from tfkit.robustness.attacks.minimal import MinimalAttack

#: Inputs this close to the bounds, of half their range, become finite in tanh space.
_EDGE = 1 - 1e-6
_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8


def to_box(w: Any, bounds: tuple[float, float]) -> Any:
    """Returns the points of the box that belong to `w`."""
    low, high = bounds
    return (low + high) / 2 + (high - low) / 2 * tf.tanh(w)


def from_box(points: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Returns `w`, float32, with `to_box(w)` near `points`."""
    low, high = bounds
    return np.arctanh((points - (low + high) / 2) / ((high - low) / 2) * _EDGE).astype(np.float32)


class Problems:
    """The state of the rows at work, arrays with a row each.

    Attributes:
        index: which example.
        w, m, v: the variable and Adam's means, (rows, ...).
        steps: since the problem was posed, (rows,).
        c: weight of the gap, (rows,).
        limit: the distance's parameter: a threshold, (rows,), or a mask of coordinates, (rows, ...).
        lowest: least objective of the problem so far, (rows,).
        reached: whether the problem was solved, (rows,).
        best, nearest: adversarial point of the least distance over all problems, and that distance, infinite if none.
        solution: the last adversarial point of this problem.
    """

    def __init__(self, x: np.ndarray, w: np.ndarray, c: float, limit: np.ndarray) -> None:
        count = len(x)
        self.index = np.arange(count)
        self.w, self.m, self.v = w, np.zeros_like(x), np.zeros_like(x)
        self.steps = np.zeros(count, np.float32)
        self.c, self.limit = np.full(count, c, np.float32), limit
        self.lowest, self.reached = np.full(count, np.inf, np.float32), np.zeros(count, bool)
        self.best, self.nearest = x.copy(), np.full(count, np.inf, np.float32)
        self.solution = x.copy()

    def renew(self, which: np.ndarray, w: np.ndarray) -> None:
        """Begins the problem of some rows from `w`, (rows, ...)."""
        self.w[which], self.m[which], self.v[which] = w[which], 0, 0
        self.steps[which], self.lowest[which], self.reached[which] = 0, np.inf, False

    def keep(self, which: np.ndarray) -> None:
        """Leaves only some rows at work."""
        for name, values in vars(self).items():
            setattr(self, name, values[which])


class TanhSpaceAttack(MinimalAttack):
    """Base of the three attacks of Carlini and Wagner.

    Args:
        iterations: of Adam for each problem, at most.
        learning_rate: of Adam, in tanh space.
        confidence: kappa: by how much the wrong logit must win.
        abort_early: leave a problem whose objective has not fallen by 1e-4 of itself in a tenth of the iterations.
        **settings: of `GradientAttack` and `Attack`.
    """

    #: Forward evaluations that bisect the way to what was found.
    halvings = 0

    def __init__(
        self,
        iterations: int = 1000,
        learning_rate: float = 0.01,
        confidence: float = 0.0,
        abort_early: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.iterations = checks.integer("iterations", iterations, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)
        self.confidence = checks.number("confidence", confidence, 0)
        self.abort_early = bool(abort_early)

    @abc.abstractmethod
    def points(self, x: Any, w: Any, limit: Any) -> Any:
        """Returns the points that belong to `w`, in TensorFlow operations."""

    @abc.abstractmethod
    def penalty(self, delta: Any, limit: Any) -> tuple[Any, Any]:
        """Returns the distance that is minimised, and the one by which the best is kept, both (batch,)."""

    @abc.abstractmethod
    def schedule(
        self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray
    ) -> tuple[Problems, Callable[[Problems], np.ndarray]]:
        """Returns the first problems of a batch, and what poses the next ones.

        The function is called with all rows after each chunk of iterations, and returns which go on.
        """

    @property
    def chunk(self) -> int:
        """Iterations between two looks at what is done."""
        return max(1, self.iterations // 10)

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Works on the rows of a batch until each has had its last problem."""
        row = x.shape[1:]
        work = self.graph("iterate", row, lambda: self._compile(model))

        def shorten(x: Any, y: Any, found: Any) -> Any:
            return self.shorten(model, x, y, found, self.halvings, self.confidence)

        cut = self.graph("shorten", row, lambda: tf.function(shorten, reduce_retracing=True))
        found, queries = x.copy(), np.zeros(len(x), np.int64)
        for at in range(0, len(x), self.batch_size):
            part = slice(at, at + self.batch_size)
            batch, classes = x[part], y[part]
            state, advance = self.schedule(model, batch, classes)
            finished = np.zeros(len(batch), bool)
            while len(state.index):
                self._iterate(work, batch[state.index], classes[state.index], state, queries[part])
                goes_on = advance(state)
                done = state.index[~goes_on]
                finished[done] = True
                found[part][done] = state.best[~goes_on]
                state.keep(goes_on)
                self.tell(at + int(finished.sum()), len(x))
            if self.halvings:
                broken = np.flatnonzero((found[part] != batch).reshape(len(batch), -1).any(axis=1))
                if len(broken):
                    found[part][broken] = cut(batch[broken], classes[broken], found[part][broken])
                    queries[part][broken] += self.halvings
        return found, queries

    def _iterate(self, work: Any, x: np.ndarray, y: np.ndarray, state: Problems, queries: np.ndarray) -> None:
        names = ("w", "m", "v", "steps", "lowest", "reached", "best", "nearest", "solution")
        given = (getattr(state, name) for name in names)
        for name, value in zip(names, work(x, y, state.c, state.limit, *given), strict=True):
            setattr(state, name, value.numpy())
        queries[state.index] += self.chunk * self.samples

    def _compile(self, model: Callable[[Any], Any]) -> Any:
        @tf.function(reduce_retracing=True)
        def work(x: Any, y: Any, c: Any, limit: Any, *state: Any) -> tuple[Any, ...]:
            def body(step: Any, *state: Any) -> tuple[Any, ...]:
                w, m, v, steps, lowest, reached, best, nearest, solution = state

                def objective(w: Any) -> tuple[Any, ...]:
                    points = self.points(x, w, limit)
                    gap, _ = self.mean_over_draws(lambda z, y: self.gap(z, y, self.confidence), model, points, y)
                    distance, measure = self.penalty(points - x, limit)
                    return distance + c * tf.maximum(gap, 0.0), gap, measure, points

                (value, gap, measure, points), gradient = slope(objective, w)
                broken = gap <= 0
                nearer = broken & (measure < nearest)
                best = tf.where(rows(nearer, x), points, best)
                nearest = tf.where(nearer, measure, nearest)
                solution = tf.where(rows(broken, x), points, solution)
                steps += 1.0
                m = _BETA1 * m + (1 - _BETA1) * gradient
                v = _BETA2 * v + (1 - _BETA2) * gradient**2
                m_hat, v_hat = m / rows(1 - _BETA1**steps, x), v / rows(1 - _BETA2**steps, x)
                w -= self.learning_rate * m_hat / (tf.sqrt(v_hat) + _TINY)
                return step + 1, w, m, v, steps, tf.minimum(lowest, value), reached | broken, best, nearest, solution

            return tf.while_loop(lambda step, *_: step < self.chunk, body, (0, *state))[1:]

        return work

    def ended(self, state: Problems, before: np.ndarray) -> np.ndarray:
        """Returns which rows are done with their problem: out of iterations, or no longer falling."""
        out = state.steps >= self.iterations
        return out | (state.lowest > 0.9999 * before) if self.abort_early else out
