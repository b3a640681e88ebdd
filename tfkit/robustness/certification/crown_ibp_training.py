"""CROWN-IBP: certified training with tighter bounds while epsilon is small.

Paper: Zhang, Chen, Xiao, Gowal, Stanforth, Li, Boning, Hsieh. Towards stable and efficient training of verifiably
robust neural networks. ICLR 2020, https://arxiv.org/abs/1906.06316

The margins of the loss are beta m_crown + (1 - beta) m_interval: those of one backward pass over interval bounds, and
of intervals alone. Over the ramp beta falls from 1 to `beta`. The rest is interval bound training.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.certification import propagation
from tfkit.robustness.certification.interval_training import IntervalBoundTraining
from tfkit.robustness.certification.propagation import Row
from tfkit.robustness.certification.region import Ball

Tensor = Any


class CrownIBPTraining(IntervalBoundTraining):
    """Trains a classifier to be certified, by CROWN-IBP.

    Args:
        model, epsilon: see `IntervalBoundTraining`.
        beta: weight of the tighter bounds at the end; with 0 the network ends as one for interval bounds.
        **kwargs: see `IntervalBoundTraining`.
    """

    def __init__(self, model: keras.Model, epsilon: float, *, beta: float = 0.0, **kwargs: Any) -> None:
        super().__init__(model, epsilon, **kwargs)
        self.beta = checks.number("beta", beta, 0, 1)

    def margins(self, region: Ball, rows: Tensor, progress: Tensor) -> Tensor:
        bounds = self.ranges(region, need_lines=True)
        row = Row(self._network.last, coefficients=rows)
        beta = 1.0 - (1.0 - self.beta) * progress
        tight = propagation.backward(self._network.nodes, bounds, region, row, self.setting)[0]
        loose = self.by_intervals(bounds, region, rows)
        return tf.where(beta > 0, beta * tight + (1.0 - beta) * loose, loose)
