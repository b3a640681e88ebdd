"""The set that a certificate speaks of: a ball around an example, cut off where inputs end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.certification.rounding import ARITHMETIC, SAFETY, UNIT64, gamma

Tensor = Any
#: Names of the norms, and their orders.
NORMS = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
Clip = tuple[float, float] | None


class Ball(NamedTuple):
    """Balls of one norm around a batch of examples.

    Attributes:
        x: centres, (examples, *shape).
        epsilon: radii, (examples,).
        low, high: the smallest box around what is left of each ball after clipping.
        error: by how much rounding may move each coordinate beyond.
    """

    x: Tensor
    epsilon: Tensor
    low: Tensor
    high: Tensor
    error: Tensor


def norm_order(norm: str) -> float:
    """Returns the order of a norm: inf, 2.0 or 1.0.

    Raises:
        ValueError: the name is unknown.

    >>> norm_order("linf")
    inf
    """
    return NORMS[checks.choice("norm", norm, NORMS)]


def check_clip(clip: Sequence[float] | None) -> Clip:
    """Returns the range as two floats, or None.

    Raises:
        ValueError: it is not a range.
    """
    if clip is None:
        return None
    if isinstance(clip, str) or np.shape(clip) != (2,):
        raise checks.error("clip", "None or a pair (lowest, highest) of input values", clip)
    low, high = checks.number("clip[0]", clip[0]), checks.number("clip[1]", clip[1])
    if low >= high:
        raise checks.error("clip", "a pair whose first number is smaller than the second", clip)
    return low, high


def ball(x: Tensor, epsilon: Tensor, clip: Clip, arithmetic: str) -> Ball:
    """Returns the balls; inputs outside `clip` are for the caller to refuse."""
    radius = tf.reshape(epsilon, (-1, *[1] * (len(x.shape) - 1)))
    low, high = x - radius, x + radius
    if clip is not None:
        low, high = tf.maximum(low, clip[0]), tf.minimum(high, clip[1])
    unit = ARITHMETIC[arithmetic] + SAFETY * gamma(int(np.prod(x.shape[1:])) + 16, UNIT64)
    return Ball(x, epsilon, low, high, unit * (tf.abs(x) + radius))


def smallest(coefficients: Tensor, region: Ball, order: float, clipped: bool) -> Tensor:
    """The minimum of linear functions over each ball, or a bound below it: clipped balls of L2 are met from two sides.

    Args:
        coefficients: (examples, rows, *shape).
        order: of the norm.
        clipped: whether the box is smaller than that around the ball.

    Returns:
        (examples, rows); rounding errors are accounted for elsewhere.
    """
    count = int(np.prod(region.x.shape[1:]))
    a = tf.reshape(coefficients, (tf.shape(coefficients)[0], -1, count))
    if math.isinf(order):
        return box_minimum(a, _flat(region.low), _flat(region.high))
    x = _flat(region.x)
    within_ball = _product(a, x) - region.epsilon[:, None] * dual_norm(a, order)
    if not clipped:
        return within_ball
    down, up = x - _flat(region.low), _flat(region.high) - x
    if order == 1.0:
        return _product(a, x) - _knapsack(a, down, up, region.epsilon)
    return tf.maximum(within_ball, box_minimum(a, _flat(region.low), _flat(region.high)))


def _knapsack(a: Tensor, down: Tensor, up: Tensor, epsilon: Tensor) -> Tensor:
    """How far a x can fall by moves of total length epsilon, each coordinate within its room: the steepest go first."""
    room = tf.where(a > 0, down[:, None], up[:, None])
    steep = tf.abs(a)
    order = tf.argsort(steep, direction="DESCENDING")
    room, steep = tf.gather(room, order, batch_dims=2), tf.gather(steep, order, batch_dims=2)
    before = tf.cumsum(room, -1, exclusive=True)
    moved = tf.clip_by_value(epsilon[:, None, None] - before, tf.zeros_like(room), room)
    return tf.reduce_sum(moved * steep, -1)


def box_minimum(a: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The minimum of linear functions over boxes; a: (examples, rows, n), low and high: (examples, n)."""
    return _product(a, (low + high) / 2) - _product(tf.abs(a), (high - low) / 2)


def dual_norm(a: Tensor, order: float) -> Tensor:
    """max over ||d||_order <= 1 of a d, along the last axis."""
    if math.isinf(order):
        return tf.reduce_sum(tf.abs(a), -1)
    return tf.reduce_max(tf.abs(a), -1) if order == 1.0 else tf.norm(a, axis=-1)


def rows_dot(a: Tensor, values: Tensor) -> Tensor:
    """Sums a * values over all but the first two axes; a: (examples, rows, *shape), values: (examples, *shape)."""
    count = int(np.prod(values.shape[1:])) if values.shape.rank > 1 else 1
    return _product(tf.reshape(a, (tf.shape(a)[0], -1, count)), tf.reshape(values, (-1, count)))


def _product(a: Tensor, values: Tensor) -> Tensor:
    return tf.squeeze(tf.matmul(a, tf.expand_dims(values, -1)), -1)


def _flat(values: Tensor) -> Tensor:
    return tf.reshape(values, (-1, int(np.prod(values.shape[1:]))))
