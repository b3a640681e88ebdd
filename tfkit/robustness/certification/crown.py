"""CROWN: lower lines whose slopes adapt to each neuron, for general activations.

Paper: Zhang, Weng, Chen, Hsieh, Daniel. Efficient neural network robustness certification with general activation
functions. NeurIPS 2018, https://arxiv.org/abs/1811.00866

The lower line of an undecided ReLU is p where u > -l and 0 elsewhere, which cuts off the smaller triangle. Sigmoid and
tanh take tangents, or chords. `CrownIBP` bounds what activations read by intervals, and goes backwards once, from the
output (Zhang et al., https://arxiv.org/abs/1906.06316).

Differs: as in `fast_lin`; GELU and SiLU lie between two lines along the chord.
"""

from __future__ import annotations

from tfkit.robustness.certification.base import LinearRelaxation


class Crown(LinearRelaxation):
    """CROWN with adaptive slopes, backwards from each layer.

    Args:
        intersect: see `LinearRelaxation`.
    """

    name = "crown"


class CrownIBP(LinearRelaxation):
    """CROWN from the output only, over interval bounds: as costly as a gradient, between intervals and CROWN.

    Args:
        intersect: see `LinearRelaxation`.
    """

    name = "crown_ibp"
    refine = False
