"""Attacks: examples that a model gets wrong, near ones that it gets right."""

from __future__ import annotations

from tfkit.robustness.attacks.base import AdversarialResult, Attack
from tfkit.robustness.attacks.fgsm import FGSM
from tfkit.robustness.attacks.momentum_iterative import MomentumIterative
from tfkit.robustness.attacks.pgd import PGD

__all__ = ["FGSM", "PGD", "AdversarialResult", "Attack", "MomentumIterative"]
