"""Compression of Keras models: `prepare`, train, `finalize`."""

from tfkit.compression.base import Chain, Compressor, NoEffectWarning
from tfkit.compression.clustering import WeightClustering
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.reparameterized import Reparameterized, WeightTransform

__all__ = [
    "Chain",
    "Compressor",
    "MagnitudePruning",
    "NoEffectWarning",
    "Reparameterized",
    "WeightClustering",
    "WeightTransform",
]
