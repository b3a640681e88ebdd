"""Models: any callable as a function from inputs to logits, with probabilities recognised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks

_REMEDY = "Pass a model that ends before its softmax: gradients of a loss of probabilities taken for logits are wrong."


def as_logits(model: Any) -> Callable[[Any], Any]:
    """Returns `model` as a function from inputs, (batch, ...), to float32 logits, (batch, classes).

    A Keras model runs in inference mode; if it ends in a softmax the function stops before it. What another callable
    returns is looked at when it is used: see `check_logits`.

    Raises:
        ValueError: the model cannot be called, or its softmax cannot be taken off.
    """
    if not callable(model):
        raise checks.error("model", "callable, from inputs to logits", model)
    if isinstance(model, keras.Model):
        return _before_softmax(model)
    return lambda x: tf.cast(model(x), tf.float32)


def _before_softmax(model: keras.Model) -> Callable[[Any], Any]:
    last = model.layers[-1] if model.layers else None
    if isinstance(last, keras.Model):
        # What a nested model returns is seen by `check_logits`.
        last = None
    softmax_layer = isinstance(last, keras.layers.Softmax)
    if last is None or (not softmax_layer and getattr(last, "activation", None) is not keras.activations.softmax):
        return lambda x: tf.cast(model(x, training=False), tf.float32)
    if not softmax_layer and type(last) is not keras.layers.Dense:
        if not isinstance(last, keras.layers.Activation):
            raise checks.error("model", "one whose softmax can be taken off", last, _REMEDY)
    inner = keras.Model(model.inputs, last.input)
    if isinstance(last, keras.layers.Dense):

        def logits(x: Any) -> Any:
            product = tf.matmul(inner(x, training=False), last.kernel)
            return tf.cast(product if last.bias is None else product + last.bias, tf.float32)

        return logits
    return lambda x: tf.cast(inner(x, training=False), tf.float32)


def check_logits(values: np.ndarray, rows: int) -> None:
    """Refuses what cannot be logits: another shape, numbers that are not finite, rows that are probabilities.

    Raises:
        ValueError: `values` is no such array.
    """
    if values.ndim != 2 or len(values) != rows or values.shape[1] < 2:
        raise checks.error("model", f"a function to logits, ({rows}, classes) with two classes or more", values)
    if not np.isfinite(values).all():
        raise checks.error("model", "a function to finite logits", values, "Look for overflow in the model.")
    if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-4):
        raise checks.error("model", "a function to logits, and its rows are probabilities", values, _REMEDY)
