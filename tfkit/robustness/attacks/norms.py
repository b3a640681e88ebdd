"""Norms: distances, projections onto balls, steepest steps and random starts, as pure functions over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks

NORMS = ("linf", "l2", "l1")
_TINY = 1e-12


def checked_bounds(bounds: Sequence[float]) -> tuple[float, float]:
    """Returns the least and the greatest value of an input.

    Raises:
        ValueError: they are not two numbers in ascending order.
    """
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise checks.error("bounds", "a pair (least, greatest)", bounds)
    low, high = checks.number("bounds", bounds[0]), checks.number("bounds", bounds[1])
    if not low < high:
        raise checks.error("bounds", "a pair (least, greatest)", bounds)
    return low, high


def distances(delta: np.ndarray, norm: str) -> np.ndarray:
    """Returns the norm of each row of `delta`, (batch, ...), as float64, (batch,); "l0" counts what is not zero."""
    flat = np.abs(np.asarray(delta, np.float64).reshape(len(delta), -1))
    if norm == "linf":
        return flat.max(axis=1)
    if norm == "l0":
        return (flat > 0).sum(axis=1).astype(np.float64)
    return flat.sum(axis=1) if norm == "l1" else np.sqrt((flat**2).sum(axis=1))


def project(delta: Any, epsilon: Any, norm: str) -> Any:
    """Returns the nearest point, in Euclidean distance, of the ball of radius `epsilon` to each row of `delta`."""
    if norm == "linf":
        return tf.clip_by_value(delta, -epsilon, epsilon)
    flat = tf.reshape(delta, (tf.shape(delta)[0], -1))  # (batch, features)
    if norm == "l2":
        length = tf.norm(flat, axis=1, keepdims=True)
        flat = flat * tf.minimum(1.0, epsilon / tf.maximum(length, _TINY))
    else:
        flat = _project_l1(flat, epsilon)
    return tf.reshape(flat, tf.shape(delta))


def _project_l1(flat: Any, epsilon: Any) -> Any:
    """Soft thresholding by the threshold at which the row's sum of magnitudes is `epsilon`."""
    magnitude = tf.abs(flat)
    ordered = tf.sort(magnitude, axis=1, direction="DESCENDING")
    count = tf.cast(tf.range(1, tf.shape(flat)[1] + 1), flat.dtype)
    thresholds = (tf.cumsum(ordered, axis=1) - epsilon) / count
    # The threshold is the one of the largest count whose smallest kept magnitude exceeds it.
    kept = tf.maximum(tf.reduce_sum(tf.cast(ordered > thresholds, tf.int32), axis=1, keepdims=True), 1)
    threshold = tf.gather(thresholds, kept - 1, axis=1, batch_dims=1)
    return tf.sign(flat) * tf.maximum(magnitude - tf.maximum(threshold, 0.0), 0.0)


def steepest(gradient: Any, norm: str) -> Any:
    """Returns, for each row, the step of length 1 along which a linear function of this gradient grows most.

    In L1 that is the single coordinate of the largest magnitude. Where the gradient is zero, so is the step.
    """
    if norm == "linf":
        return tf.sign(gradient)
    flat = tf.reshape(gradient, (tf.shape(gradient)[0], -1))
    if norm == "l2":
        # Scaled first: the squares of small gradients underflow in float32.
        flat = tf.math.divide_no_nan(flat, tf.reduce_max(tf.abs(flat), axis=1, keepdims=True))
        step = tf.math.divide_no_nan(flat, tf.norm(flat, axis=1, keepdims=True))
    else:
        step = tf.sign(flat) * tf.one_hot(tf.argmax(tf.abs(flat), axis=1), tf.shape(flat)[1], dtype=flat.dtype)
    return tf.reshape(step, tf.shape(gradient))


def random_start(shape: Any, epsilon: Any, norm: str, seed: Any) -> Any:
    """Returns a uniform point of the ball of radius `epsilon` for each row of `shape`; `seed` is two int32."""
    if norm == "linf":
        return epsilon * tf.random.stateless_uniform(shape, seed, -1.0, 1.0)
    features = tf.reduce_prod(shape[1:])
    first, second, third = tf.unstack(tf.random.split(seed, 3))
    if norm == "l2":
        direction = tf.random.stateless_normal((shape[0], features), first)
        length = tf.norm(direction, axis=1, keepdims=True)
    else:
        # Laplace coordinates: their direction is uniform on the sphere of L1.
        size = -tf.math.log(tf.random.stateless_uniform((shape[0], features), first, 1e-7, 1.0))
        direction = size * tf.sign(tf.random.stateless_uniform((shape[0], features), second, -1.0, 1.0))
        length = tf.reduce_sum(tf.abs(direction), axis=1, keepdims=True)
    # The radius has density r^(features - 1), or the points would crowd the centre.
    radius = tf.random.stateless_uniform((shape[0], 1), third) ** (1.0 / tf.cast(features, tf.float32))
    return tf.reshape(epsilon * radius * direction / tf.maximum(length, _TINY), shape)
