"""Training algorithms."""

from tfkit.training.lamb import LAMB
from tfkit.training.lars import LARC, LARS
from tfkit.training.layerwise import LayerwiseOptimizer, paths_in_layers
from tfkit.training.linear_scaling import LinearScaling, MomentumCorrectedSGD, PolynomialWarmup, zero_gamma
from tfkit.training.micro_batches import MicroBatched

__all__ = [
    "LAMB",
    "LARC",
    "LARS",
    "LayerwiseOptimizer",
    "LinearScaling",
    "MicroBatched",
    "MomentumCorrectedSGD",
    "PolynomialWarmup",
    "paths_in_layers",
    "zero_gamma",
]
