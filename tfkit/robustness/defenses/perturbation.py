"""Projected gradient ascent as pure functions of tensors, for use inside a compiled training step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from tfkit.internal import checks

NORMS = ("linf", "l2")


def checked_bounds(bounds: Sequence[float]) -> tuple[float, float]:
    """Returns the least and the greatest value of an input.

    Raises:
        ValueError: they are not two numbers in ascending order.
    """
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not bounds[0] < bounds[1]:
        raise checks.error("bounds", "a pair (least, greatest)", bounds)
    return checks.number("bounds", bounds[0]), checks.number("bounds", bounds[1])


def row_norms(delta: Any) -> Any:
    """Returns the Euclidean norm of each row, (batch, 1, ...), of as many axes as `delta`."""
    return tf.sqrt(tf.reduce_sum(delta**2, axis=list(range(1, len(delta.shape))), keepdims=True))


def project(delta: Any, epsilon: Any, norm: str) -> Any:
    """Returns the nearest point of the ball of radius epsilon to each row of `delta`."""
    if norm == "linf":
        return tf.clip_by_value(delta, -epsilon, epsilon)
    return delta * tf.minimum(1.0, epsilon / tf.maximum(row_norms(delta), 1e-12))


def steepest(gradient: Any, norm: str) -> Any:
    """Returns the step of length 1 along which a linear function of this gradient grows most, for each row."""
    if norm == "linf":
        return tf.sign(gradient)
    return gradient / tf.maximum(row_norms(gradient), 1e-12)


def random_start(shape: Any, epsilon: Any, norm: str, seed: Any) -> Any:
    """Returns a uniform point of the ball for each row.

    Args:
        shape: (batch, ...), a tensor.
        epsilon: radius.
        norm: of the ball.
        seed: two int32.
    """
    if norm == "linf":
        return epsilon * tf.random.stateless_uniform(shape, seed, -1.0, 1.0)
    direction = tf.random.stateless_normal(shape, seed)
    flat = tf.reshape(direction, (shape[0], -1))
    dimension = tf.cast(tf.shape(flat)[1], tf.float32)
    # The radius has density r^(d - 1), or the points would crowd the centre.
    radius = tf.random.stateless_uniform((shape[0], 1), seed + 1) ** (1 / dimension)
    unit = flat / tf.maximum(tf.norm(flat, axis=1, keepdims=True), 1e-12)
    return epsilon * tf.reshape(radius * unit, shape)


def ascend(
    loss: Callable[[Any], Any],
    x: Any,
    start: Any,
    epsilon: Any,
    step_size: Any,
    steps: int,
    norm: str,
    bounds: tuple[float, float],
) -> Any:
    """Climbs a loss within a ball around each row, and within the bounds of an input.

    Args:
        loss: from points, (batch, ...), to a scalar that is a sum or mean over rows.
        x: (batch, ...), centres of the balls.
        start: (batch, ...), where the climb begins; projected first.
        epsilon, norm: of the balls.
        step_size: length of a step in the norm.
        steps: how many.
        bounds: least and greatest value of an input.

    Returns:
        (batch, ...), constant for gradients.
    """

    def inside(points: Any) -> Any:
        return tf.clip_by_value(x + project(points - x, epsilon, norm), *bounds)

    def body(step: Any, points: Any) -> tuple[Any, Any]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(points)
            value = loss(points)
        return step + 1, inside(points + step_size * steepest(tape.gradient(value, points), norm))

    start = inside(start)
    found = tf.while_loop(
        lambda step, _: step < steps, body, (0, start), shape_invariants=(tf.TensorShape([]), x.shape)
    )
    return tf.stop_gradient(found[1])
