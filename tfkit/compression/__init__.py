"""Compression of Keras models: `prepare`, train, `finalize`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tfkit.compression.base import Chain, Compressor, NoEffectWarning
from tfkit.compression.clustering import WeightClustering
from tfkit.compression.deep_compression import DeepCompression
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.quantization_aware import QuantizationAware
from tfkit.compression.reparameterized import Reparameterized, WeightTransform

if TYPE_CHECKING:
    from tfkit.compression.report import Report, compare
    from tfkit.compression.search import SearchResult, Settings, compress

# These need the exporter and a plotting library, which the methods alone do not.
_LAZY = {"Report": "report", "SearchResult": "search", "Settings": "search", "compare": "report", "compress": "search"}

__all__ = [
    "Chain",
    "Compressor",
    "DeepCompression",
    "MagnitudePruning",
    "NoEffectWarning",
    "QuantizationAware",
    "Report",
    "Reparameterized",
    "SearchResult",
    "Settings",
    "WeightClustering",
    "WeightTransform",
    "compare",
    "compress",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
