"""Gradients: what white-box attacks share: losses, one climb within a ball, and graphs kept for the next call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.models import as_logits
from tfkit.robustness.attacks.norms import project, steepest


def cross_entropy(logits: Any, y: Any) -> Any:
    """Returns the cross-entropy of each row, (batch,)."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits)


def margin(logits: Any, y: Any) -> Any:
    """Returns the best other logit less that of class `y`, (batch,): above 0 where another class wins."""
    chosen = tf.one_hot(y, tf.shape(logits)[1], on_value=True, off_value=False, dtype=tf.bool)
    others = tf.reduce_max(tf.where(chosen, tf.fill(tf.shape(logits), -np.inf), logits), axis=1)
    return others - tf.gather(logits, y, axis=1, batch_dims=1)


def dlr(logits: Any, y: Any) -> Any:
    """Returns the difference of logits ratio, (batch,): the margin over the gap from the first to the third logit."""
    top = tf.math.top_k(logits, 3).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(logits: Any, y: Any, target: Any) -> Any:
    """Returns the ratio towards a class, (batch,): that of `target` less that of `y`, over a gap of the top four."""
    top = tf.math.top_k(logits, 4).values
    towards = tf.gather(logits, target, axis=1, batch_dims=1) - tf.gather(logits, y, axis=1, batch_dims=1)
    return towards / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def slope(loss: Callable[[Any], Any], points: Any) -> tuple[Any, Any]:
    """Returns a loss, and its gradient by `points`. A row's gradient does not depend on how many others there are.

    Args:
        loss: from points, (batch, ...), to a value for each row, (batch,), or a scalar; or to a pair of them and
            anything else.
        points: (batch, ...).
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(points)
        values = loss(points)
        total = tf.reduce_sum(values[0] if isinstance(values, tuple) else values)
    gradient = tape.gradient(total, points)
    if gradient is None:
        raise checks.error("model", "differentiable in TensorFlow", loss, "Use an attack on scores or labels.")
    return values, gradient


def rows(condition: Any, like: Any) -> Any:
    """Returns `condition`, (batch,), with as many axes as `like`, to choose its rows."""
    return tf.reshape(condition, (-1,) + (1,) * (len(like.shape) - 1))


def accumulated(past: Any, gradient: Any, momentum: float) -> Any:
    """Returns the decaying sum of past gradients, each divided by its L1 norm, with one more."""
    size = tf.reduce_sum(tf.abs(gradient), axis=list(range(1, len(gradient.shape))), keepdims=True)
    return momentum * past + tf.math.divide_no_nan(gradient, size)


def climb(
    loss: Callable[[Any], Any],
    x: Any,
    start: Any,
    epsilon: Any,
    step_size: Any,
    steps: Any,
    norm: str,
    bounds: tuple[float, float],
    *,
    keep_best: bool = False,
    momentum: float | None = None,
) -> Any:
    """Climbs a loss within a ball around each row, and within the bounds of an input.

    Args:
        loss: from points, (batch, ...), to a value for each row, (batch,), or a scalar that is a sum or mean over rows;
            with `keep_best`, a pair: the values and the rank by which points are kept, float64, both (batch,).
        x: (batch, ...), centres of the balls.
        start: (batch, ...), where the climb begins; projected first.
        epsilon, norm: of the balls.
        step_size: length of a step in the norm.
        steps: how many.
        bounds: least and greatest value of an input.
        keep_best: return the point of the highest rank, not the last one, for one more forward evaluation.
        momentum: decay of the sum of past gradients, each divided by its L1 norm; None to follow each one alone.

    Returns:
        (batch, ...), constant for gradients; with `keep_best`, the highest rank too, (batch,).
    """

    def inside(points: Any) -> Any:
        return tf.clip_by_value(x + project(points - x, epsilon, norm), *bounds)

    def better(points: Any, rank: Any, best: Any, highest: Any) -> tuple[Any, Any]:
        # Not "greater": a loss that is not a number must not keep the first point for ever.
        gain = ~(rank <= highest)
        return tf.where(rows(gain, points), points, best), tf.where(gain, rank, highest)

    def body(step: Any, points: Any, past: Any, best: Any, highest: Any) -> tuple[Any, ...]:
        values, gradient = slope(loss, points)
        if keep_best:
            best, highest = better(points, values[1], best, highest)
        if momentum is not None:
            gradient = past = accumulated(past, gradient, momentum)
        return step + 1, inside(points + step_size * steepest(gradient, norm)), past, best, highest

    start = inside(start)
    # What is not asked for is a scalar that passes through.
    past = tf.zeros_like(start) if momentum is not None else tf.constant(0.0)
    best = start if keep_best else tf.constant(0.0)
    highest = tf.fill(tf.shape(start)[:1], np.float64(-np.inf)) if keep_best else tf.constant(0.0)
    state = (0, start, past, best, highest)
    shapes = tuple(x.shape if at == 1 else tf.TensorShape(getattr(s, "shape", ())) for at, s in enumerate(state))
    _, points, _, best, highest = tf.while_loop(lambda step, *_: step < steps, body, state, shape_invariants=shapes)
    if keep_best:
        best, highest = better(points, loss(points)[1], best, highest)
        return tf.stop_gradient(best), tf.stop_gradient(highest)
    return tf.stop_gradient(points)


def climb_until_broken(
    loss: Callable[[Any, Any], Any],
    x: Any,
    start: Any,
    epsilon: Any,
    step_size: Any,
    steps: Any,
    norm: str,
    bounds: tuple[float, float],
    *,
    momentum: float | None = None,
) -> tuple[Any, Any, Any]:
    """Climbs as `climb` with `keep_best`, but a row leaves the batch at the first point that breaks it.

    Args:
        loss: from points of the rows still there, (rows, ...), and their numbers, (rows,), to values and to which rows
            are broken, both (rows,).
        x, start, epsilon, step_size, steps, norm, bounds, momentum: as for `climb`.

    Returns:
        Points, like `x`, constant for gradients; which rows are broken, (batch,); and how often the loss of each was
        taken, (batch,).
    """

    def inside(points: Any, centre: Any) -> Any:
        return tf.clip_by_value(centre + project(points - centre, epsilon, norm), *bounds)

    def noted(kept: tuple[Any, ...], which: Any, points: Any) -> tuple[Any, ...]:
        """Returns `kept` with these points where they are better, which rows they break, and the slope there."""
        (values, hit), gradient = slope(lambda points: loss(points, which), points)
        found, highest, broken, taken = kept
        better = hit | ~(values <= tf.gather(highest, which))
        places = tf.boolean_mask(which, better)[:, tf.newaxis]
        kept = (
            tf.tensor_scatter_nd_update(found, places, tf.boolean_mask(points, better)),
            tf.tensor_scatter_nd_update(highest, places, tf.boolean_mask(values, better)),
            tf.tensor_scatter_nd_update(broken, which[:, tf.newaxis], hit),
            tf.tensor_scatter_nd_add(taken, which[:, tf.newaxis], tf.ones_like(which)),
        )
        return kept, hit, gradient

    def body(step: Any, which: Any, centre: Any, points: Any, past: Any, kept: tuple[Any, ...]) -> tuple[Any, ...]:
        kept, hit, gradient = noted(kept, which, points)
        stay = tf.where(~hit)[:, 0]
        which, centre, points, gradient = (tf.gather(array, stay) for array in (which, centre, points, gradient))
        if momentum is not None:
            gradient = past = accumulated(tf.gather(past, stay), gradient, momentum)
        return step + 1, which, centre, inside(points + step_size * steepest(gradient, norm), centre), past, kept

    start = inside(start, x)
    batch = tf.shape(x)[:1]
    kept = (start, tf.fill(batch, -np.inf), tf.fill(batch, False), tf.zeros(batch, tf.int32))
    past = tf.zeros_like(start) if momentum is not None else tf.constant(0.0)
    many, few = tf.TensorShape((None, *x.shape[1:])), tf.TensorShape((None,))
    _, which, _, points, _, kept = tf.while_loop(
        lambda step, which, *_: (step < steps) & (tf.size(which) > 0), body,
        (0, tf.range(batch[0]), x, start, past, kept),
        shape_invariants=(tf.TensorShape(()), few, many, many, many if momentum is not None else tf.TensorShape(()),
                          (many, few, few, few)),
    )  # fmt: skip
    found, _, broken, taken = tf.cond(tf.size(which) > 0, lambda: noted(kept, which, points)[0], lambda: kept)
    return tf.stop_gradient(found), broken, taken


class GradientAttack(Attack):
    """Base of attacks that follow gradients.

    The graphs for the last model attacked are kept, so that the next call on it, at whatever radius, traces nothing.
    Weights may change in between; a callable that holds its numbers in Python may not.

    Args:
        samples: draws of a randomized model in each gradient, which is their mean (expectation over transformation).
        **settings: of `Attack`.
    """

    def __init__(self, *, samples: int = 1, **settings: Any) -> None:
        super().__init__(**settings)
        self.samples = checks.integer("samples", samples, 1)
        self._kept: tuple[Any, Any] | None = None
        self._graphs: dict[Any, Any] = {}

    def _open(self, model: Any) -> Callable[[Any], Any]:
        if self._kept is None or self._kept[0] is not model:
            self._kept, self._graphs = (model, as_logits(model)), {}
        return self._kept[1]

    def graph(self, name: str, row: tuple[int, ...], make: Callable[[], Any]) -> Any:
        """Returns what `make` gives, made once for each name, shape of an example and model."""
        key = (name, row)
        if key not in self._graphs:
            self._graphs[key] = make()
        return self._graphs[key]

    def mean_over_draws(self, loss: Callable[[Any, Any], Any], model: Callable[[Any], Any], points: Any, y: Any) -> Any:
        """Returns the mean of `loss(logits, y)` over the model's draws, (batch,), and the mean logits."""
        if self.samples == 1:
            logits = model(points)
            return loss(logits, y), logits
        logits = model(tf.repeat(points, self.samples, axis=0))
        values = tf.reshape(loss(logits, tf.repeat(y, self.samples, axis=0)), (-1, self.samples))
        folded = tf.reshape(logits, (-1, self.samples, tf.shape(logits)[1]))
        return tf.reduce_mean(values, axis=1), tf.reduce_mean(folded, axis=1)

    def tell(self, done: int, total: int) -> None:
        """Reports progress to who asked for it."""
        if self.progress is not None:
            self.progress(done, total)
