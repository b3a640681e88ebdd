"""A tiny network whose outputs NumPy can compute, and files of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest


class Small(NamedTuple):
    model: object
    x: np.ndarray  # (40, 6)
    y: np.ndarray  # (40,) the model's own decisions
    expected: np.ndarray  # (40, 3) by NumPy, not by Keras
    files: dict[str, Path]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Dense(32, relu) -> Dense(3) with drawn weights, written as float32 and as int8 with float and integer ends."""
    import keras

    from tfkit.export import convert

    rng = np.random.default_rng(0)
    w1, b1, w2, b2 = (rng.normal(size=s).astype(np.float32) for s in ((6, 32), (32,), (32, 3), (3,)))
    x = rng.normal(size=(40, 6)).astype(np.float32)
    expected = np.maximum(x @ w1 + b1, 0) @ w2 + b2
    inputs = keras.Input((6,), name="features")
    hidden = keras.layers.Dense(32, activation="relu")
    head = keras.layers.Dense(3, name="scores")
    model = keras.Model(inputs, head(hidden(inputs)))
    hidden.set_weights([w1, b1])
    head.set_weights([w2, b2])
    folder = tmp_path_factory.mktemp("small")
    files = {
        "float32": convert(model, folder / "float32.tflite"),
        "float32_batch8": convert(model, folder / "float32_batch8.tflite", batch_size=8),
        "int8": convert(model, folder / "int8.tflite", quantization="int8", calibration=x),
        "int8_io": convert(model, folder / "int8_io.tflite", quantization="int8", calibration=x, io="int8"),
        "uint8_io": convert(model, folder / "uint8_io.tflite", quantization="int8", calibration=x, io="uint8"),
    }
    return Small(model, x, expected.argmax(axis=1), expected, files)
