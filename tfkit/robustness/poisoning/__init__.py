"""Poisoning of training data, what it does to a network, and how it is found."""

from tfkit.robustness.poisoning.activation_clustering import activation_clustering
from tfkit.robustness.poisoning.backdoor import BlendedTrigger, PatchTrigger, backdoor
from tfkit.robustness.poisoning.detection import ClassFinding, Detection, DetectionScore
from tfkit.robustness.poisoning.evaluation import PoisonEvaluation, evaluate_backdoor, evaluate_targets
from tfkit.robustness.poisoning.feature_collision import feature_collision
from tfkit.robustness.poisoning.features import features
from tfkit.robustness.poisoning.gradient_matching import gradient_matching
from tfkit.robustness.poisoning.label_flipping import flip_influences, flip_labels, flip_labels_by_influence
from tfkit.robustness.poisoning.record import PoisonRecord
from tfkit.robustness.poisoning.spectral_signatures import spectral_signatures

__all__ = [
    "BlendedTrigger",
    "ClassFinding",
    "Detection",
    "DetectionScore",
    "PatchTrigger",
    "PoisonEvaluation",
    "PoisonRecord",
    "activation_clustering",
    "backdoor",
    "evaluate_backdoor",
    "evaluate_targets",
    "feature_collision",
    "features",
    "flip_influences",
    "flip_labels",
    "flip_labels_by_influence",
    "gradient_matching",
    "spectral_signatures",
]
