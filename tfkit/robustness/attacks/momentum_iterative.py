"""Momentum iterative: gradients of past steps, each of L1 norm 1, add up with a decay.

Paper: Dong, Liao, Pang, Su, Zhu, Hu, Li. Boosting Adversarial Attacks with Momentum. CVPR 2018,
https://arxiv.org/abs/1710.06081, algorithm 1 (MI-FGSM).

Differs: L2 and L1 as well; the point with the highest loss is kept, not the last.
"""

from __future__ import annotations

from typing import Any

from tfkit.robustness.attacks.pgd import PGD


class MomentumIterative(PGD):
    """The momentum iterative method: steps of epsilon / steps from the example along the decaying sum.

    Args:
        steps: gradients.
        decay: of the sum at each step, the paper's mu.
        **settings: of `GradientAttack` and `Attack`.
    """

    def __init__(self, steps: int = 10, decay: float = 1.0, **settings: Any) -> None:
        super().__init__(steps, relative_step=1 / max(steps, 1), random_start=False, momentum=decay, **settings)
