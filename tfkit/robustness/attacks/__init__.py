"""Attacks: examples that a model gets wrong, near ones that it gets right."""

from __future__ import annotations

from tfkit.robustness.attacks.base import AdversarialResult, Attack
from tfkit.robustness.attacks.black_box import BlackBoxAttack
from tfkit.robustness.attacks.boundary import Boundary
from tfkit.robustness.attacks.fgsm import FGSM
from tfkit.robustness.attacks.hop_skip_jump import HopSkipJump
from tfkit.robustness.attacks.momentum_iterative import MomentumIterative
from tfkit.robustness.attacks.nes import NES
from tfkit.robustness.attacks.opt_attack import OPTAttack
from tfkit.robustness.attacks.oracle import BudgetExhaustedError, Oracle, TopK
from tfkit.robustness.attacks.pgd import PGD
from tfkit.robustness.attacks.sign_opt import SignOPT
from tfkit.robustness.attacks.square import Square
from tfkit.robustness.attacks.zoo import ZOO

__all__ = [
    "FGSM",
    "NES",
    "PGD",
    "ZOO",
    "AdversarialResult",
    "Attack",
    "BlackBoxAttack",
    "Boundary",
    "BudgetExhaustedError",
    "HopSkipJump",
    "MomentumIterative",
    "OPTAttack",
    "Oracle",
    "SignOPT",
    "Square",
    "TopK",
]
