"""Transfer attack: what breaks a surrogate model is tried on a model whose gradients nobody has.

Paper: Papernot, McDaniel, Goodfellow. Transferability in Machine Learning: from Phenomena to Black-Box Attacks using
Adversarial Samples. arXiv 1605.07277, https://arxiv.org/abs/1605.07277

Differs: the surrogate is given, such as the float model that a `.tflite` file was made from, and not trained on the
model's answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.models import as_logits
from tfkit.robustness.attacks.momentum_iterative import MomentumIterative
from tfkit.robustness.attacks.oracle import Oracle


class Transfer(Attack):
    """Attacks a surrogate; the model is asked once for each example, whether the point found breaks it too.

    Args:
        surrogate: a Keras model, or a callable to logits with gradients.
        attack: on the surrogate, and where norm, bounds, aim and seed come from; None: `MomentumIterative`, whose
            points transfer better than those of plain steps.
        **settings: of `Attack`, where `attack` is None.
    """

    def __init__(self, surrogate: Any, attack: Attack | None = None, **settings: Any) -> None:
        self.attack = MomentumIterative(**settings) if attack is None else attack
        self.norms = (self.attack.norm,)
        super().__init__(
            norm=self.attack.norm, bounds=self.attack.bounds, targeted=self.attack.targeted, seed=self.attack.seed,
            quantize_levels=self.attack.quantize_levels, batch_size=self.attack.batch_size,
        )  # fmt: skip
        self.surrogate = as_logits(surrogate)

    def _open(self, model: Any) -> Oracle:
        return model if isinstance(model, Oracle) else Oracle(model, "labels")

    def _logits(self, logits: Any, x: np.ndarray) -> np.ndarray:
        return np.asarray(logits.inspect(x))

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Returns what the surrogate's attack finds; one query each."""
        found, _ = self.attack.run(self.surrogate, x, y, epsilon)
        return found, np.ones(len(x), np.int64)
