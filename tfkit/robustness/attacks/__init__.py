"""Attacks: examples that a model gets wrong, near ones that it gets right."""

from __future__ import annotations

from tfkit.robustness.attacks.auto_pgd import AutoPGD
from tfkit.robustness.attacks.base import AdversarialResult, Attack
from tfkit.robustness.attacks.carlini_wagner import CarliniWagnerL2
from tfkit.robustness.attacks.carlini_wagner_l0 import CarliniWagnerL0
from tfkit.robustness.attacks.carlini_wagner_linf import CarliniWagnerLinf
from tfkit.robustness.attacks.deep_fool import DeepFool
from tfkit.robustness.attacks.ensemble import Ensemble
from tfkit.robustness.attacks.evaluation import evaluate
from tfkit.robustness.attacks.fgsm import FGSM
from tfkit.robustness.attacks.momentum_iterative import MomentumIterative
from tfkit.robustness.attacks.pgd import PGD
from tfkit.robustness.attacks.report import Finding, RobustnessReport

__all__ = [
    "FGSM",
    "PGD",
    "AdversarialResult",
    "Attack",
    "AutoPGD",
    "CarliniWagnerL0",
    "CarliniWagnerL2",
    "CarliniWagnerLinf",
    "DeepFool",
    "Ensemble",
    "Finding",
    "MomentumIterative",
    "RobustnessReport",
    "evaluate",
]
