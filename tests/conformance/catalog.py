"""A row for each public class. A class without one fails the tests, and so does a row without a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit import compression
from tfkit.compression import fake_quantize, pruning


class Row(NamedTuple):
    """How to make an object for the tests, and which promises it gives.

    Attributes:
        make: makes an object.
        exports: for a compressor, the `quantization` with which its result is exported.
    """

    make: Callable[[], Any]
    exports: str = "float32"


#: Public modules, whose `__all__` is the public interface.
MODULES = ("tfkit.compression", "tfkit.data", "tfkit.export", "tfkit.models")

COMPRESSORS: dict[str, Row] = {
    "tfkit.compression.MagnitudePruning": Row(lambda: compression.MagnitudePruning(0.5, frequency=1)),
    "tfkit.compression.WeightClustering": Row(lambda: compression.WeightClustering(3, initialization="random", seed=3)),
    "tfkit.compression.QuantizationAware": Row(compression.QuantizationAware, exports="int8-qat"),
    "tfkit.compression.DeepCompression": Row(lambda: compression.DeepCompression(0.5, 3)),
    "tfkit.compression.Chain": Row(
        lambda: compression.Chain([compression.DeepCompression(0.6, 4), compression.QuantizationAware()]),
        exports="int8-qat",
    ),
}

#: Keras objects: configuration and weights make a round trip.
LAYERS: dict[str, Row] = {
    "tfkit.compression.Reparameterized": Row(
        lambda: compression.Reparameterized(_built(keras.layers.Dense(3)), {"kernel": [pruning.PruningMask(0.5)]})
    ),
    "tfkit.compression.fake_quantize.FakeQuantize": Row(lambda: fake_quantize.FakeQuantize(minimum=-1.0, maximum=2.0)),
}

#: Results, errors, base classes and what reads a file: tested where they are made.
OTHERS: set[str] = {
    "tfkit.compression.Compressor",
    "tfkit.compression.NoEffectWarning",
    "tfkit.compression.Report",
    "tfkit.compression.SearchResult",
    "tfkit.compression.Settings",
    "tfkit.compression.WeightTransform",
    "tfkit.data.DataError",
    "tfkit.data.Dataset",
    "tfkit.data.Location",
    "tfkit.export.ConversionError",
    "tfkit.export.LatencyRatio",
    "tfkit.export.MeasureError",
    "tfkit.export.Measurement",
    "tfkit.export.OutputParity",
    "tfkit.export.PackError",
    "tfkit.export.PackResult",
    "tfkit.export.ParityError",
    "tfkit.export.ParityReport",
    "tfkit.export.Runner",
    "tfkit.export.RunnerError",
}


def _built(layer: keras.Layer) -> keras.Layer:
    layer.build((None, 4))
    return layer


def example(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype("float32")
