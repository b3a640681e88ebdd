"""FGSM: one step of length epsilon up the loss.

Paper: Goodfellow, Shlens, Szegedy. Explaining and Harnessing Adversarial Examples. ICLR 2015,
https://arxiv.org/abs/1412.6572

Differs: the steepest step in L2 and L1 as well as the sign.
"""

from __future__ import annotations

from typing import Any

from tfkit.robustness.attacks.pgd import PGD


class FGSM(PGD):
    """The fast gradient sign method: PGD of a single full step from the example.

    Args:
        **settings: of `Attack`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(steps=1, relative_step=1.0, restarts=1, random_start=False, **settings)
