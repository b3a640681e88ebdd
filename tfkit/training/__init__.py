"""Training algorithms."""

from tfkit.training.importance_sampling import ImportanceSampling, SamplingReport
from tfkit.training.lamb import LAMB
from tfkit.training.landscape import Line, Surface, filter_normalised, line, surface
from tfkit.training.lars import LARC, LARS
from tfkit.training.layerwise import LayerwiseOptimizer, paths_in_layers
from tfkit.training.linear_scaling import LinearScaling, MomentumCorrectedSGD, PolynomialWarmup, zero_gamma
from tfkit.training.micro_batches import MicroBatched
from tfkit.training.rais import RAIS
from tfkit.training.sampling import ImportanceSampler, Sample
from tfkit.training.sharpness import sharpness

__all__ = [
    "ImportanceSampler",
    "ImportanceSampling",
    "LAMB",
    "LARC",
    "LARS",
    "LayerwiseOptimizer",
    "Line",
    "LinearScaling",
    "MicroBatched",
    "MomentumCorrectedSGD",
    "PolynomialWarmup",
    "RAIS",
    "Sample",
    "SamplingReport",
    "Surface",
    "filter_normalised",
    "line",
    "paths_in_layers",
    "sharpness",
    "surface",
    "zero_gamma",
]
