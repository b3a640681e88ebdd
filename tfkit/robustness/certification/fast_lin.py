"""Fast-Lin: each undecided ReLU between two parallel lines, from the output back to the input.

Paper: Weng, Zhang, Chen, Song, Hsieh, Boning, Dhillon, Daniel. Towards fast computation of certified robustness for
ReLU networks. ICML 2018, https://arxiv.org/abs/1804.09699

With l < 0 < u the bounds of its input, a ReLU lies between s p and s (p - l), s = u / (u - l). The lines are parallel,
so one pass of coefficients gives lower and upper bounds.

Differs: also for convolutions, pooling, residual connections and leaky ReLUs, and for smooth activations with both
lines along the chord; numbers whose sign intervals decide are not bounded again; with `intersect`, no bound is worse
than that of intervals.
"""

from __future__ import annotations

from tfkit.robustness.certification.base import LinearRelaxation


class FastLin(LinearRelaxation):
    """Fast-Lin.

    Args:
        intersect: see `LinearRelaxation`.
    """

    name = "fast_lin"
    slopes = "parallel"
