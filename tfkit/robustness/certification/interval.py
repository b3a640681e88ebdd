"""Interval bounds: a range for each number, layer by layer, the last one merged with the margins.

Paper: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018, https://arxiv.org/abs/1810.12715

Differs: over balls of L1 and L2 the layers before the first activation are bounded exactly, not over a box.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.robustness.certification.base import Method, without_nan
from tfkit.robustness.certification.network import Network, Problem, finite


class IntervalBounds(Method):
    """The cheapest bounds, and the loosest: useful for networks trained for them."""

    name = "interval"

    def lower(self, network: Network, problem: Problem, rows: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        region, bounds = network.intermediate(problem, refine=False)
        return without_nan(network.lower(region, bounds, rows, problem.setting, stop=True), finite(bounds))
