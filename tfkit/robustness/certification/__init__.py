"""Certification: how far an example can move before a network's prediction can change, proven.

>>> import keras, numpy as np
>>> from tfkit.robustness.certification import certified_radius
>>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, kernel_initializer="identity")])
>>> radii = certified_radius(model, np.array([[1.0, 0.25]]), norm="linf")
>>> bool(0.374 < radii.radius[0] < 0.375)
True
"""

from tfkit.robustness.certification.alpha_crown import AlphaCrown
from tfkit.robustness.certification.base import Method, method_names
from tfkit.robustness.certification.builder import UnsupportedLayerError
from tfkit.robustness.certification.crown import Crown, CrownIBP
from tfkit.robustness.certification.crown_ibp_training import CrownIBPTraining
from tfkit.robustness.certification.dual import Dual
from tfkit.robustness.certification.exact import ExactDistance, exact_distance, exact_margin
from tfkit.robustness.certification.fast_lin import FastLin
from tfkit.robustness.certification.fast_lip import FastLip
from tfkit.robustness.certification.interval import IntervalBounds
from tfkit.robustness.certification.interval_training import IntervalBoundTraining
from tfkit.robustness.certification.network import Network
from tfkit.robustness.certification.output_bounds import OutputBounds, bounds
from tfkit.robustness.certification.quantized import read_tflite
from tfkit.robustness.certification.radius import CertifiedRadii, certified_radius
from tfkit.robustness.certification.report import CertificationReport, certify

__all__ = [
    "AlphaCrown",
    "CertificationReport",
    "CertifiedRadii",
    "Crown",
    "CrownIBP",
    "CrownIBPTraining",
    "Dual",
    "ExactDistance",
    "FastLin",
    "FastLip",
    "IntervalBoundTraining",
    "IntervalBounds",
    "Method",
    "Network",
    "OutputBounds",
    "UnsupportedLayerError",
    "bounds",
    "certified_radius",
    "certify",
    "exact_distance",
    "exact_margin",
    "method_names",
    "read_tflite",
]
