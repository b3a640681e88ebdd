"""Defenses: training and prediction that resist adversarial examples, and one kind that only seems to."""

from tfkit.robustness.defenses.adversarial_training import AdversarialTraining
from tfkit.robustness.defenses.fast_adversarial_training import CatastrophicOverfitting, FastAdversarialTraining
from tfkit.robustness.defenses.free_adversarial_training import FreeAdversarialTraining
from tfkit.robustness.defenses.input_transformations import BitDepthReduction, FalseSecurityWarning, MedianFilter
from tfkit.robustness.defenses.random_self_ensemble import RandomNoise, RandomSelfEnsemble
from tfkit.robustness.defenses.randomized_smoothing import Certificate, RandomizedSmoothing
from tfkit.robustness.defenses.trades import TRADES

__all__ = [
    "TRADES",
    "AdversarialTraining",
    "BitDepthReduction",
    "CatastrophicOverfitting",
    "Certificate",
    "FalseSecurityWarning",
    "FastAdversarialTraining",
    "FreeAdversarialTraining",
    "MedianFilter",
    "RandomNoise",
    "RandomSelfEnsemble",
    "RandomizedSmoothing",
]
