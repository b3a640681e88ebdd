"""Ensemble: several attacks, each on what the ones before left standing; of each example, the worst counts.

Paper: Croce, Hein. Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-Free Attacks.
ICML 2020, https://arxiv.org/abs/2003.01690

Differs: any attacks; without a radius, all of them on all examples, and the nearest point counts. `evaluate` says when
its results are not to be relied on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.auto_pgd import AutoPGD
from tfkit.robustness.attacks.base import Attack


class Ensemble(Attack):
    """Attacks in turn.

    Args:
        attacks: of the same norm, bounds and kind of classes; None for Auto-PGD with the cross-entropy and with the
            targeted DLR loss. Put an attack that sees no gradients last: it finds what hides from those that do.
        steps: of the two, if `attacks` is None.
        **settings: of `Attack`.
    """

    def __init__(self, attacks: Sequence[Attack] | None = None, steps: int = 100, **settings: Any) -> None:
        if attacks:
            first = attacks[0]
            settings = {"norm": first.norm, "bounds": first.bounds, "targeted": first.targeted, **settings}
        super().__init__(**settings)
        if attacks is None:
            shared = {**settings, "norm": self.norm, "seed": self.seed}
            kinds = ("cross_entropy",) if self.targeted else ("cross_entropy", "targeted_dlr")
            attacks = [AutoPGD(steps, kind, **shared) for kind in kinds]
        self.attacks = list(attacks)
        same = {(attack.norm, attack.bounds, attack.targeted) for attack in self.attacks}
        if same != {(self.norm, self.bounds, self.targeted)}:
            raise checks.error("attacks", "attacks of one norm, bounds and kind of classes", same)

    def _open(self, model: Any) -> Callable[[Any], Any]:
        # Each attack opens the model itself: one may keep it to what an oracle answers.
        return _Opened(model, super()._open(model))

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Runs each attack on the rows that stand; on all of them without a radius."""
        given = getattr(model, "given", model)
        x_adv, queries = x.copy(), np.zeros(len(x), np.int64)
        nearest, left = np.full(len(x), np.inf), np.arange(len(x))
        for attack in self.attacks:
            result = attack(given, x[left], y[left], epsilon=epsilon)
            queries[left] += result.queries
            better = result.success & (result.distance < nearest[left])
            x_adv[left[better]], nearest[left[better]] = result.x_adv[better], result.distance[better]
            if epsilon is not None:
                left = left[~result.success]
            if not len(left):
                break
        return x_adv, queries


class _Opened:
    """A model as a function to logits, beside the model as it was given."""

    def __init__(self, given: Any, logits: Callable[[Any], Any]) -> None:
        self.given, self.logits = given, logits

    def __call__(self, x: Any) -> Any:
        return self.logits(x)
