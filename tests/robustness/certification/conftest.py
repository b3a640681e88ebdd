"""Small networks of every kind, and points inside of balls."""

from __future__ import annotations

import keras
import numpy as np
import pytest

L = keras.layers


def scattered(model: keras.Model, seed: int = 0) -> keras.Model:
    """Gives a model random weights of which many units are undecided."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "variance" in variable.path:
            variable.assign(rng.uniform(0.5, 2.0, variable.shape))
        elif len(variable.shape) > 1:
            variable.assign(rng.normal(0, 1.5 / np.sqrt(np.prod(variable.shape[:-1])), variable.shape))
        else:
            variable.assign(rng.normal(0, 0.2, variable.shape) + ("gamma" in variable.path))
    return model


def inside(x: np.ndarray, epsilon: float, order: float, clip, count: int, seed: int = 0) -> np.ndarray:
    """Points of each ball, half of them on its surface, (count, examples, *shape)."""
    rng = np.random.default_rng(seed)
    move = rng.normal(size=(count, *x.shape))
    axes = tuple(range(2, move.ndim))
    if np.isinf(order):
        move = np.sign(move) * epsilon
    elif order == 2:
        move *= epsilon / np.sqrt((move**2).sum(axes, keepdims=True))
    else:
        move = np.sign(move) * np.abs(move) ** 7
        move *= epsilon / np.abs(move).sum(axes, keepdims=True)
    move[::2] *= rng.uniform(size=(len(move[::2]), *[1] * x.ndim))
    return x + move if clip is None else np.clip(x + move, *clip)


@pytest.fixture(scope="package")
def mlp() -> keras.Model:
    """5 inputs, two hidden layers, 3 classes."""
    body = [L.Dense(9, activation="relu"), L.Dense(7), L.LeakyReLU(0.1), L.Dense(3)]
    return scattered(keras.Sequential([keras.Input((5,)), *body]))


@pytest.fixture(scope="package")
def zoo() -> dict[str, keras.Model]:
    """Networks that hold every supported layer between them."""
    image = keras.Input((6, 6, 2))
    x = L.Conv2D(4, 3, padding="same", strides=2, use_bias=False)(image)
    x = L.BatchNormalization()(x)
    x = L.Activation("relu")(x)
    y = L.Dropout(0.5)(L.Conv2D(4, 3, padding="same", activation="tanh", groups=2)(x))
    x = L.Add()([x, y]) - L.Conv2D(4, 1)(x)
    x = L.Concatenate()([x, L.AveragePooling2D(2, 1, padding="same")(x)])
    x = L.ZeroPadding2D(((1, 0), (0, 1)))(L.MaxPooling2D(2, 1, padding="same")(x))
    residual = keras.Model(image, L.Dense(3, activation="softmax")(L.Flatten()(x)))
    depthwise = keras.Sequential(
        [keras.Input((7, 7, 2)), L.Rescaling(2.0, -1.0), L.DepthwiseConv2D(3, depth_multiplier=2, dilation_rate=2),
         L.ReLU(max_value=1.0), L.SeparableConv2D(3, 2, activation="gelu"), L.Cropping2D(((0, 1), (0, 0))),
         L.Permute((2, 1, 3)), L.GlobalAveragePooling2D(), L.Dense(4, activation="silu"), L.Dense(3)]
    )  # fmt: skip
    signal = keras.Sequential(
        [keras.Input((8, 2)), L.Conv1D(3, 3, padding="causal", dilation_rate=2, activation="sigmoid"),
         L.Reshape((4, 2, 3)), L.GlobalMaxPooling2D(), L.Dense(4, activation="softplus"), L.Dense(4, activation="elu"),
         keras.Sequential([keras.Input((4,)), L.Dense(3)])]
    )  # fmt: skip
    return {name: scattered(model) for name, model in
            {"residual": residual, "depthwise": depthwise, "signal": signal}.items()}  # fmt: skip
