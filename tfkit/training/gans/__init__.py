"""Generative adversarial networks: training, evaluation and pictures."""

from tfkit.training.gans import networks, plots
from tfkit.training.gans.evaluation import (
    PrecisionRecall,
    classifier_fid,
    classifier_kid,
    duplicates,
    features,
    precision_recall,
)
from tfkit.training.gans.gan import GAN
from tfkit.training.gans.mixtures import Coverage, GaussianMixture, grid, ring, stacked_coverage, stacked_digits
from tfkit.training.gans.objectives import OBJECTIVES, Objective

__all__ = [
    "GAN",
    "OBJECTIVES",
    "Coverage",
    "GaussianMixture",
    "Objective",
    "PrecisionRecall",
    "classifier_fid",
    "classifier_kid",
    "duplicates",
    "features",
    "grid",
    "networks",
    "plots",
    "precision_recall",
    "ring",
    "stacked_coverage",
    "stacked_digits",
]
