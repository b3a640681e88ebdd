"""Importance sampling of training examples: scores, probabilities, resampling, unbiased weights, and what they gain."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training.wrapper import rows

SCORES = ("gradient_norm", "loss", "uniform")
RESAMPLING = ("multinomial", "systematic")


@contextlib.contextmanager
def without_activation(model: keras.Model) -> Iterator[Callable[[Any], Any]]:
    """Within it, the model gives its last layer's pre-activations; yields the activation that was taken off."""
    layer = model.layers[-1] if model.layers else None
    while isinstance(layer, keras.Model):
        layer = layer.layers[-1]
    activation = getattr(layer, "activation", None)
    if layer is None or activation is None:
        yield keras.activations.linear
        return
    layer.activation = keras.activations.linear
    try:
        yield activation
    finally:
        layer.activation = activation


def per_example_loss(loss: Any, y: Any, predicted: Any) -> Any:
    """Returns the loss of each example, (batch,): of a name, a function or a `keras.losses.Loss`, unreduced."""
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        values = loss(y, predicted)
    else:
        y, predicted = tf.convert_to_tensor(y), tf.convert_to_tensor(predicted)
        if y.shape.rank == predicted.shape.rank - 1 and "Sparse" not in type(loss).__name__:
            y = tf.expand_dims(y, -1)
        values = loss.call(y, predicted)
    values = tf.convert_to_tensor(values)
    return tf.reduce_mean(tf.reshape(values, (tf.shape(values)[0], -1)), axis=1)


def scores_of(model: keras.Model, loss: Any, x: Any, y: Any, kind: str = "gradient_norm") -> tuple[Any, Any]:
    """Scores examples with one forward pass.

    "gradient_norm" is the norm of the loss's gradient with respect to the last layer's pre-activations, which bounds
    the norm of the gradient with respect to all weights up to a factor that is common to all examples. For softmax and
    cross-entropy that is |p - one_hot(y)|. The pass runs in inference mode.

    Args:
        model: the model; a last activation is taken off and applied afterwards.
        loss: the loss of a single-output model.
        x, y: the examples, batch first.
        kind: "gradient_norm", "loss" or "uniform".

    Returns:
        Scores (batch,), and the gradient by pre-activations, (batch, outputs), or None for other kinds.
    """
    if kind == "uniform":
        return tf.ones(tf.shape(tf.nest.flatten(x)[0])[:1]), None
    with without_activation(model) as activation:
        z = model(x, training=False)
    with tf.GradientTape() as tape:
        tape.watch(z)
        losses = per_example_loss(loss, y, activation(z))
    if kind == "loss":
        return tf.stop_gradient(losses), None
    # In inference mode one example's loss depends on its own pre-activations only, so the sum's gradient is each one's.
    gradient = tape.gradient(losses, z)
    flat = tf.reshape(gradient, (tf.shape(gradient)[0], -1))
    return tf.norm(flat, axis=1), flat


def probabilities(scores: Any, smoothing: float = 0.0) -> Any:
    """Returns sampling probabilities proportional to scores, mixed with a share `smoothing` of the uniform ones.

    Equal ones if all scores are zero.

    >>> probabilities(tf.constant([1.0, 3.0]), 0.2).numpy().round(2)
    array([0.3, 0.7], dtype=float32)
    """
    count = tf.cast(tf.shape(scores)[0], scores.dtype)
    total = tf.reduce_sum(scores)
    share = tf.where(total > 0, scores / tf.where(total > 0, total, 1.0), 1.0 / count)
    return (1 - smoothing) * share + smoothing / count


def variance_reduction(p: Any) -> Any:
    """Returns tau of Katharopoulos and Fleuret: by how much the batch would have to grow for the same gain.

    1 / tau = sqrt(1 - |p - u|^2 / |p|^2) with u uniform, which is tau = sqrt(B |p|^2) for B probabilities.

    >>> float(variance_reduction(tf.constant([0.25, 0.25, 0.25, 0.25])))
    1.0
    """
    return tf.sqrt(tf.cast(tf.shape(p)[0], p.dtype) * tf.reduce_sum(tf.square(p)))


def resample(p: Any, count: Any, seed: Any, how: str = "multinomial") -> Any:
    """Draws indices with replacement.

    "multinomial" draws each on its own. "systematic" takes `count` points at equal distances from one random start on
    the cumulated probabilities: each index i still comes count * p_i times on average, so means stay unbiased, and the
    number of its copies differs from that by less than one, so the variance is smaller.

    Args:
        p: probabilities, (B,).
        count: how many to draw.
        seed: two integers.
        how: "multinomial" or "systematic".

    Returns:
        Indices (count,), int32.
    """
    shape = (count,) if how == "multinomial" else ()
    uniform = tf.random.stateless_uniform(shape, seed, dtype=p.dtype)
    if how == "systematic":
        uniform = (tf.range(tf.cast(count, p.dtype)) + uniform) / tf.cast(count, p.dtype)
    edges = tf.cumsum(p)
    found = tf.searchsorted(edges, uniform * edges[-1], side="right")
    return tf.minimum(tf.cast(found, tf.int32), tf.shape(p)[0] - 1)


class Sample(NamedTuple):
    """Examples that were drawn.

    Attributes:
        indices: positions in the batch that was given, (count,).
        weights: 1 / (B p) of each: the mean of weighted losses estimates the mean loss of the batch without bias.
        probabilities: of all the given examples, (B,).
        scores: of all the given examples, (B,).
    """

    indices: np.ndarray
    weights: np.ndarray
    probabilities: np.ndarray
    scores: np.ndarray


class ImportanceSampler:
    """Draws from given examples those that matter for the gradient, for training loops of one's own.

    Args:
        model: the model that is trained.
        loss: its loss.
        score: "gradient_norm" (the bound of Katharopoulos and Fleuret), "loss" or "uniform".
        smoothing: share of uniform probability, in [0, 1]; keeps weights at most 1 / smoothing.
        resampling: "multinomial", or "systematic" with less variance.
        seed: of the draws.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> sampler = ImportanceSampler(model, loss, seed=0)
    >>> sampler.sample(np.eye(8, 2), np.arange(8) % 3, 4).indices.shape
    (4,)
    """

    def __init__(
        self,
        model: keras.Model,
        loss: Any,
        score: Literal["gradient_norm", "loss", "uniform"] = "gradient_norm",
        *,
        smoothing: float = 0.0,
        resampling: Literal["multinomial", "systematic"] = "multinomial",
        seed: int = 0,
    ) -> None:
        self.model = model
        self.loss = loss
        self.score = checks.choice("score", score, SCORES)
        self.smoothing = checks.number("smoothing", smoothing, 0, 1)
        self.resampling = checks.choice("resampling", resampling, RESAMPLING)
        self.seed = checks.integer("seed", seed, 0)
        self.drawn = 0
        self._draw = tf.function(self._draw_in_graph, reduce_retracing=True)

    def sample(self, x: Any, y: Any, count: int) -> Sample:
        """Scores the examples (x, y) and draws `count` of them, with replacement."""
        self.drawn += 1
        count = checks.integer("count", count, 1)
        drawn = self._draw(x, y, tf.constant(count), tf.constant([self.seed, self.drawn]))
        return Sample(*(each.numpy() for each in drawn))

    def _draw_in_graph(self, x: Any, y: Any, count: Any, seed: Any) -> Any:
        scores, _ = scores_of(self.model, self.loss, x, y, self.score)
        p = probabilities(scores, self.smoothing)
        indices = resample(p, count, seed, self.resampling)
        return indices, importance_weights(p, indices), p, scores


def importance_weights(p: Any, indices: Any) -> Any:
    """Returns 1 / (B p_i) of the drawn indices, (count,)."""
    return 1 / (tf.cast(tf.shape(p)[0], p.dtype) * tf.gather(p, indices))


def gradient_variance(model: keras.Model, loss: Any, x: Any, y: Any, p: np.ndarray) -> tuple[float, float]:
    """Returns the exact variances of the gradient of one uniformly drawn example and of one drawn by p and weighted.

    The variance is the trace of the covariance, from the gradient of each example over all weights: as many backward
    passes as examples.

    Args:
        model: the model, run in inference mode.
        loss: its loss.
        x, y: the examples, batch first.
        p: their probabilities, (examples,).
    """
    weights = model.trainable_weights

    @tf.function(reduce_retracing=True)
    def gradient(index: Any) -> Any:
        with tf.GradientTape() as tape:
            predicted = model(rows(x, tf.expand_dims(index, 0)), training=False)
            value = per_example_loss(loss, rows(y, tf.expand_dims(index, 0)), predicted)
        found = tape.gradient(value, weights, unconnected_gradients="zero")
        return tf.concat([tf.reshape(each, (-1,)) for each in found], axis=0)

    x, y = (tf.nest.map_structure(tf.convert_to_tensor, each) for each in (x, y))
    each = np.stack([gradient(tf.constant(index)).numpy() for index in range(len(p))]).astype(np.float64)
    squares, mean = np.square(each).sum(axis=1), np.square(each.mean(axis=0)).sum()
    by_importance = float((squares[p > 0] / p[p > 0]).sum() / len(p) ** 2 - mean)
    return float(squares.mean() - mean), by_importance
