"""Compression of Keras models: `prepare`, train, `finalize`."""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from tfkit.compression.adaptive_quantization import AdaptiveQuantization
from tfkit.compression.base import Chain, Compressor, NoEffectWarning
from tfkit.compression.binary_connect import BinaryConnect
from tfkit.compression.block_pruning import BlockPruning, NMPruning
from tfkit.compression.clustering import WeightClustering
from tfkit.compression.deep_compression import DeepCompression
from tfkit.compression.distillation import DistillationLoss, Distiller, distill
from tfkit.compression.equalization import EqualizedPair, equalize
from tfkit.compression.lottery_ticket import LotteryTicket
from tfkit.compression.low_rank import LowRank, LowRankRow
from tfkit.compression.movement_pruning import MovementPruning
from tfkit.compression.post_training import PostTrainingQuantization
from tfkit.compression.proxquant import ProxQuant
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.qnn import QuantizedNeuralNetwork
from tfkit.compression.quantization_aware import QuantizationAware
from tfkit.compression.relaxed_quantization import RelaxedQuantization
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.compression.rigl import RigL
from tfkit.compression.saliency_pruning import SaliencyPruning
from tfkit.compression.sensitivity import Sensitivity, SensitivityRow, layer_sensitivity
from tfkit.compression.shift_based import ShiftBasedAdaMax, ShiftBatchNormalization
from tfkit.compression.sparse_speed import LayerSpeed, SparsitySpeed, sparsity_speed
from tfkit.compression.structured_pruning import StructuredPruning, StructuredReport
from tfkit.internal.channels import macs

if TYPE_CHECKING:
    from tfkit.compression.report import Report, compare
    from tfkit.compression.search import SearchResult, Settings, compress, search

# These need the exporter and a plotting library, which the methods alone do not.
_LAZY = {
    "Report": "report",
    "SearchResult": "search",
    "Settings": "search",
    "compare": "report",
    "compress": "search",
    "search": "search",
}

__all__ = [
    "AdaptiveQuantization",
    "BinaryConnect",
    "BlockPruning",
    "Chain",
    "Compressor",
    "DeepCompression",
    "DistillationLoss",
    "Distiller",
    "EqualizedPair",
    "LayerSpeed",
    "LotteryTicket",
    "LowRank",
    "LowRankRow",
    "MagnitudePruning",
    "MovementPruning",
    "NMPruning",
    "NoEffectWarning",
    "PostTrainingQuantization",
    "ProxQuant",
    "QuantizationAware",
    "QuantizedNeuralNetwork",
    "RelaxedQuantization",
    "Reparameterized",
    "Report",
    "RigL",
    "SaliencyPruning",
    "SearchResult",
    "Sensitivity",
    "SensitivityRow",
    "Settings",
    "ShiftBasedAdaMax",
    "ShiftBatchNormalization",
    "SparsitySpeed",
    "StructuredPruning",
    "StructuredReport",
    "WeightClustering",
    "WeightTransform",
    "compare",
    "compress",
    "distill",
    "equalize",
    "layer_sensitivity",
    "macs",
    "search",
    "sparsity_speed",
]


class _Package(types.ModuleType):
    """Keeps `tfkit.compression.search` the function, though a submodule of that name exists (see `tfkit.export`)."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "search" and isinstance(value, types.ModuleType):
            value = value.search
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
