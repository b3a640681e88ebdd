"""Attacks: examples that a model gets wrong, near ones that it gets right."""

from __future__ import annotations

from tfkit.robustness.attacks.auto_pgd import AutoPGD
from tfkit.robustness.attacks.base import AdversarialResult, Attack
from tfkit.robustness.attacks.black_box import BlackBoxAttack
from tfkit.robustness.attacks.boundary import Boundary
from tfkit.robustness.attacks.carlini_wagner import CarliniWagnerL2
from tfkit.robustness.attacks.carlini_wagner_l0 import CarliniWagnerL0
from tfkit.robustness.attacks.carlini_wagner_linf import CarliniWagnerLinf
from tfkit.robustness.attacks.deep_fool import DeepFool
from tfkit.robustness.attacks.detection import DetectorTask
from tfkit.robustness.attacks.ensemble import Ensemble
from tfkit.robustness.attacks.evaluation import evaluate
from tfkit.robustness.attacks.fgsm import FGSM
from tfkit.robustness.attacks.file_evaluation import evaluate_file
from tfkit.robustness.attacks.hop_skip_jump import HopSkipJump
from tfkit.robustness.attacks.momentum_iterative import MomentumIterative
from tfkit.robustness.attacks.nes import NES
from tfkit.robustness.attacks.opt_attack import OPTAttack
from tfkit.robustness.attacks.oracle import BudgetExhaustedError, Oracle, TopK
from tfkit.robustness.attacks.pgd import PGD
from tfkit.robustness.attacks.report import Finding, RobustnessReport
from tfkit.robustness.attacks.sign_opt import SignOPT
from tfkit.robustness.attacks.square import Square
from tfkit.robustness.attacks.transfer import Transfer
from tfkit.robustness.attacks.video import VideoPGD
from tfkit.robustness.attacks.zoo import ZOO

__all__ = [
    "FGSM",
    "NES",
    "PGD",
    "ZOO",
    "AdversarialResult",
    "Attack",
    "AutoPGD",
    "BlackBoxAttack",
    "Boundary",
    "BudgetExhaustedError",
    "CarliniWagnerL0",
    "CarliniWagnerL2",
    "CarliniWagnerLinf",
    "DeepFool",
    "DetectorTask",
    "Ensemble",
    "Finding",
    "HopSkipJump",
    "MomentumIterative",
    "OPTAttack",
    "Oracle",
    "RobustnessReport",
    "SignOPT",
    "Square",
    "TopK",
    "Transfer",
    "VideoPGD",
    "evaluate",
    "evaluate_file",
]
