"""Small models that between them hold every kind of layer and graph the toolkit promises to handle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

L = keras.layers


def mlp() -> tuple[keras.Model, Any]:
    model = keras.Sequential([keras.Input((12,)), L.Dense(16, activation="relu"), L.Dropout(0.3), L.Dense(4)])
    return model, _normal(6, 12)


def convolutions() -> tuple[keras.Model, Any]:
    """Every 2-D convolution, a shared layer, a residual add, an operation and a batch normalization."""
    inputs = keras.Input((8, 8, 3))
    shared = L.Conv2D(3, 3, padding="same", name="shared")
    once = shared(inputs)
    x = L.Add()([once, shared(once)]) * 2.0
    x = L.BatchNormalization()(x)
    x = L.SeparableConv2D(4, 3, depth_multiplier=2)(x)
    x = L.DepthwiseConv2D(3, depth_multiplier=2)(x)
    x = L.Conv2DTranspose(2, 3)(x)
    return keras.Model(inputs, L.Flatten()(x)), _normal(6, 8, 8, 3)


def one_dimensional() -> tuple[keras.Model, Any]:
    inputs = keras.Input((12, 6))
    x = L.Conv1D(8, 3, padding="same")(inputs)
    x = L.SeparableConv1D(6, 3, padding="same")(x)
    x = L.Conv1DTranspose(4, 3)(x)
    x = L.TimeDistributed(L.Dense(5))(x)
    return keras.Model(inputs, x), _normal(6, 12, 6)


def three_dimensional() -> tuple[keras.Model, Any]:
    inputs = keras.Input((4, 4, 4, 2))
    return keras.Model(inputs, L.Conv3DTranspose(2, 2)(L.Conv3D(3, 2)(inputs))), _normal(6, 4, 4, 4, 2)


def recurrent() -> tuple[keras.Model, Any]:
    """Embedding with a mask, LSTM and a bidirectional GRU."""
    inputs = keras.Input((7,), dtype="int32")
    x = L.Embedding(20, 6, mask_zero=True)(inputs)
    x = L.LSTM(5, return_sequences=True)(x)
    x = L.Bidirectional(L.GRU(4))(x)
    return keras.Model(inputs, x), np.random.default_rng(0).integers(0, 20, (6, 7))


def transformer() -> tuple[keras.Model, Any]:
    """Attention called with keywords, layer normalization, GELU, EinsumDense and residual adds."""
    inputs = keras.Input((7, 8))
    attended = L.MultiHeadAttention(2, 4, dropout=0.1)(query=inputs, value=inputs)
    x = L.LayerNormalization()(L.Add()([inputs, attended]))
    hidden = L.Dense(16, activation="gelu")(x)
    x = L.Add()([x, L.EinsumDense("abc,cd->abd", output_shape=(None, 8), bias_axes="d")(hidden)])
    x = L.GlobalAveragePooling1D()(L.LayerNormalization()(x))
    return keras.Model(inputs, L.Dense(3, activation="softmax")(x)), _normal(6, 7, 8)


def nested() -> tuple[keras.Model, Any]:
    """A sequential model called twice inside a functional one with dictionaries for inputs and outputs."""
    inner = keras.Sequential([keras.Input((8,)), L.Dense(8, activation="relu"), L.Dense(8)], name="tower")
    inputs = {"left": keras.Input((8,), name="left"), "right": keras.Input((8,), name="right")}
    joined = inner(inputs["left"]) + inner(inputs["right"])
    return keras.Model(inputs, {"score": L.Dense(1, name="score")(joined)}), {
        "left": _normal(6, 8),
        "right": _normal(6, 8),
    }


def residual() -> tuple[keras.Model, Any]:
    """What quantization meets in practice: Conv-BN-ReLU, depthwise with ReLU6, a residual add, a concatenation."""
    inputs = keras.Input((10, 10, 3))
    x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, padding="same", use_bias=False)(inputs)))
    y = L.ReLU(6.0)(L.BatchNormalization()(L.DepthwiseConv2D(3, padding="same", use_bias=False)(x)))
    y = L.BatchNormalization()(L.Conv2D(8, 1)(y))
    x = L.ReLU()(L.Add()([x, y]))
    left = L.Conv2D(4, 3, activation="relu")(x)
    right = L.BatchNormalization()(L.SeparableConv2D(4, 3)(x))
    x = L.MaxPooling2D(2)(L.Concatenate()([left, right]))
    return keras.Model(inputs, L.Dense(5)(L.GlobalAveragePooling2D()(x))), _normal(6, 10, 10, 3)


MODELS: dict[str, Callable[[], tuple[keras.Model, Any]]] = {
    function.__name__: function
    for function in (
        mlp, convolutions, one_dimensional, three_dimensional, recurrent, transformer, nested, residual,
    )
}  # fmt: skip


def largest_difference(a: Any, b: Any) -> float:
    """Returns max |a - b| over two equal structures of arrays or tensors."""
    pairs = zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


def train(model: keras.Model, inputs: Any, steps: int = 2, callbacks: Any = None, learning_rate: float = 1e-2) -> None:
    """Moves the weights: a few steps towards random targets."""
    outputs = model(inputs)
    rng = np.random.default_rng(1)
    targets = keras.tree.map_structure(lambda t: rng.normal(size=t.shape).astype("float32"), outputs)
    model.compile(keras.optimizers.Adam(learning_rate), loss=keras.tree.map_structure(lambda _: "mse", outputs))
    model.fit(inputs, targets, batch_size=3, epochs=steps, verbose=0, callbacks=callbacks)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")
