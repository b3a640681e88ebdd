"""A model's loss as a function of its weights, for what looks around a solution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks


class WeightSpace:
    """The mean loss over fixed data at any vector of trainable weights, in inference mode.

    Args:
        model: the model; its weights are put back by `kept`.
        data: (x, y).
        loss: a mean over examples; the compiled one if None.
        batch_size: examples that go through the model at a time.

    Raises:
        ValueError: there is no loss.
    """

    def __init__(self, model: keras.Model, data: tuple[Any, Any], loss: Any = None, batch_size: int = 1024) -> None:
        loss = getattr(model, "loss", None) if loss is None else loss
        if loss is None:
            raise checks.error("loss", "a loss when the model is not compiled", None)
        self.model = model
        self.x, self.y = (tf.convert_to_tensor(part) for part in data)
        found = keras.losses.get(loss)
        self.loss = found if isinstance(found, keras.losses.Loss) else lambda y, p: tf.reduce_mean(found(y, p))
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.shapes = [tuple(weight.shape) for weight in model.trainable_weights]
        self._value = tf.function(self._value_in_graph)
        self._gradient = tf.function(self._gradient_in_graph)

    @contextlib.contextmanager
    def kept(self) -> Iterator[np.ndarray]:
        """Yields the weights as one vector, float64, and puts them back at the end."""
        before = [np.asarray(weight) for weight in self.model.trainable_weights]
        try:
            yield np.concatenate([weight.ravel() for weight in before]).astype(np.float64)
        finally:
            self.assign(before)

    def assign(self, weights: Any) -> None:
        """Sets the weights: a vector, or a list of arrays."""
        if isinstance(weights, np.ndarray):
            ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
            parts = np.split(weights, ends[:-1])
            weights = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        for variable, weight in zip(self.model.trainable_weights, weights, strict=True):
            variable.assign(weight)

    def value(self, vector: np.ndarray) -> float:
        """The mean loss at these weights."""
        self.assign(vector)
        parts = [(float(self._value(x, y)), len(x)) for x, y in self._batches()]
        return float(np.average([part[0] for part in parts], weights=[part[1] for part in parts]))

    def value_and_gradient(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        """The mean loss at these weights and its gradient, a vector."""
        self.assign(vector)
        value, gradient = 0.0, np.zeros(len(vector))
        for x, y in self._batches():
            loss, parts = self._gradient(x, y)
            share = len(x) / len(self.x)
            value += share * float(loss)
            gradient += share * np.concatenate([part.numpy().ravel() for part in parts])
        return value, gradient

    def _batches(self) -> Iterator[tuple[Any, Any]]:
        for start in range(0, len(self.x), self.batch_size):
            yield self.x[start : start + self.batch_size], self.y[start : start + self.batch_size]

    def _value_in_graph(self, x: Any, y: Any) -> Any:
        return self.loss(y, self.model(x, training=False))

    def _gradient_in_graph(self, x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self._value_in_graph(x, y)
        return loss, tape.gradient(loss, self.model.trainable_weights, unconnected_gradients="zero")
