"""Compression of Keras models: `prepare`, train, `finalize`."""

from tfkit.compression.base import Chain, Compressor, NoEffectWarning
from tfkit.compression.clustering import WeightClustering
from tfkit.compression.deep_compression import DeepCompression
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.quantization_aware import QuantizationAware
from tfkit.compression.reparameterized import Reparameterized, WeightTransform

__all__ = [
    "Chain",
    "Compressor",
    "DeepCompression",
    "MagnitudePruning",
    "NoEffectWarning",
    "QuantizationAware",
    "Reparameterized",
    "WeightClustering",
    "WeightTransform",
]
