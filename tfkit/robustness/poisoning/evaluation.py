"""What poison did to a trained network: accuracy on clean examples, and how often the attacker gets his class."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.poisoning.backdoor import Trigger, changed_labels


class PoisonEvaluation(NamedTuple):
    """How a network fares.

    Attributes:
        clean_accuracy: share of clean examples that it gets right.
        attack_success: share of attacked examples, of another class, that it gives the attacker's class.
        attacked: how many those are.
    """

    clean_accuracy: float
    attack_success: float
    attacked: int

    def __str__(self) -> str:
        return (
            f"clean accuracy {100 * self.clean_accuracy:.2f} %, attack success {100 * self.attack_success:.2f} % of "
            f"{self.attacked} examples"
        )


def evaluate_backdoor(
    model: Any, x: np.ndarray, y: np.ndarray, trigger: Trigger, target: int | str, *, batch_size: int = 256
) -> PoisonEvaluation:
    """Measures a backdoor on test examples.

    Args:
        model: a Keras model to logits or probabilities, or any function of that kind.
        x: clean inputs, (examples, ...).
        y: their classes, (examples,).
        trigger: as it was trained.
        target: class of the attacker, or "all-to-all". Examples of the target class do not count for the success.
        batch_size: examples at a time.
    """
    y = np.asarray(y)
    scores = predicted_scores(model, x, batch_size)
    wanted = changed_labels(y, target, scores.shape[1])
    others = wanted != y
    if not others.any():
        raise checks.error("y", "labels with another class than the target", y)
    attacked = predicted_scores(model, trigger(np.asarray(x)[others]), batch_size).argmax(axis=1)
    clean = float(np.mean(scores.argmax(axis=1) == y))
    return PoisonEvaluation(clean, float(np.mean(attacked == wanted[others])), int(others.sum()))


def evaluate_targets(
    model: Any, x: np.ndarray, y: np.ndarray, targets: np.ndarray, classes: Any, *, batch_size: int = 256
) -> PoisonEvaluation:
    """Measures clean-label poison, which is aimed at certain inputs.

    Args:
        model: a Keras model to logits or probabilities, or any function of that kind.
        x, y: clean examples and their classes.
        targets: the inputs the poison is aimed at, (targets, ...).
        classes: class or classes, (targets,), that the attacker wants for them.
        batch_size: examples at a time.
    """
    clean = float(np.mean(predicted_scores(model, x, batch_size).argmax(axis=1) == np.asarray(y)))
    found = predicted_scores(model, targets, batch_size).argmax(axis=1)
    return PoisonEvaluation(clean, float(np.mean(found == np.asarray(classes))), len(found))


def predicted_scores(model: Any, x: Any, batch_size: int = 256) -> np.ndarray:
    """Returns what the model gives, (examples, classes)."""
    x = np.asarray(x)
    if hasattr(model, "predict"):
        return np.asarray(model.predict(x, batch_size=batch_size, verbose=0))
    return np.concatenate([np.asarray(model(x[at : at + batch_size])) for at in range(0, len(x), batch_size)])
