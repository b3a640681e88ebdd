"""Evaluation of a model that gives no gradients: an exported `.tflite` file, or anything behind an `Oracle`.

Quantization makes a file a staircase, on which gradients are of no use; so it is asked, and attacked with what breaks
the model it was made from.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks import controls
from tfkit.robustness.attacks.auto_pgd import AutoPGD
from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.evaluation import break_all, reported
from tfkit.robustness.attacks.hop_skip_jump import HopSkipJump
from tfkit.robustness.attacks.oracle import Oracle
from tfkit.robustness.attacks.report import RobustnessReport
from tfkit.robustness.attacks.square import Square
from tfkit.robustness.attacks.transfer import Transfer


def evaluate_file(
    model: str | os.PathLike[str] | Callable[[Any], Any],
    x: Any,
    y: Any,
    epsilons: Sequence[float],
    *,
    surrogate: Any = None,
    output: str = "scores",
    max_queries: int = 1000,
    norm: str = "linf",
    bounds: Sequence[float] = (0.0, 1.0),
    attacks: Mapping[str, Attack] | None = None,
    seed: int = 0,
    batch_size: int = 512,
    progress: Callable[[int, int, str], None] | None = None,
) -> RobustnessReport:
    """Measures the accuracy that attacks leave which see no gradients.

    Run are Square (with `output="scores"`) or HopSkipJump (with `output="labels"`), uniform noise, and with a surrogate
    what breaks it: momentum steps and Auto-PGD.

    Args:
        model: the path of a `.tflite` file, or a callable to scores.
        x: (examples, ...), within the bounds.
        y: int, (examples,): true classes.
        epsilons: radii, above 0.
        surrogate: a Keras model that behaves alike, such as the one that the file was made from.
        output: what the attacker sees: "scores" or "labels".
        max_queries: an example, of each attack that asks.
        norm: "linf" or "l2".
        bounds: least and greatest value of an input.
        attacks: further black-box attacks, by name.
        seed: of all random choices.
        batch_size: rows worked on together.
        progress: called with attacks done, all of them, and the name of the next.

    Returns:
        The report. Attacks that ask a limited number of questions leave more than gradients would: the true robust
        accuracy may be far lower.

    Raises:
        ValueError: an argument is not as above.
    """
    if not len(epsilons):
        raise checks.error("epsilons", "one radius or more", epsilons)
    radii = sorted({checks.number("epsilons", float(epsilon), 1e-12) for epsilon in epsilons})
    checks.choice("output", output, ("scores", "labels"))
    checks.choice("norm", norm, ("linf", "l2"))
    settings: dict[str, Any] = {"norm": norm, "bounds": bounds, "seed": seed, "batch_size": batch_size}
    oracle = Oracle(model, output, batch_size=batch_size)
    kind = Square if output == "scores" else HopSkipJump
    asking = kind(max_queries=max_queries, **settings)
    chosen: dict[str, Attack] = {kind.__name__: asking}
    if surrogate is not None:
        chosen["transfer, momentum"] = Transfer(surrogate, **settings)
        chosen["transfer, Auto-PGD"] = Transfer(surrogate, AutoPGD(40, **settings))
    chosen |= {"noise": controls.Noise(**settings), **(attacks or {})}
    for name, attack in chosen.items():
        if (attack.norm, attack.bounds, attack.targeted) != (norm, asking.bounds, False):
            raise checks.error("attacks", f"untargeted, in {norm} and within {tuple(bounds)}", attack.norm, name)
    x, y = asking._checked(np.asarray(x, np.float32), np.asarray(y))
    answers = oracle.inspect(x)
    if y.min() < 0 or y.max() >= answers.shape[1]:
        raise checks.error("y", f"classes from 0 to {answers.shape[1] - 1}", y)
    right = answers.argmax(axis=1) == y
    broken, x_adv = break_all(oracle, chosen, x, y, radii, right, progress)
    if progress is not None:
        progress(len(radii) * len(chosen), len(radii) * len(chosen), "controls")
    findings = controls.file_findings(oracle, asking, x, y, radii, right, answers, broken)
    return reported(norm, radii, x, x_adv, right, broken, findings)
