"""Evaluation: accuracy against epsilon under several attacks, with controls that nobody can forget.

Paper: Carlini, Athalye, Papernot, Brendel, Rauber, Tsipras, Goodfellow, Madry, Kurakin. On Evaluating Adversarial
Robustness. arXiv 1902.06705, https://arxiv.org/abs/1902.06705; Athalye, Carlini, Wagner. Obfuscated Gradients Give a
False Sense of Security. ICML 2018, https://arxiv.org/abs/1802.00420
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks import controls
from tfkit.robustness.attacks.auto_pgd import AutoPGD
from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.fgsm import FGSM
from tfkit.robustness.attacks.models import as_logits, check_logits
from tfkit.robustness.attacks.pgd import PGD
from tfkit.robustness.attacks.report import Finding, RobustnessReport


def evaluate(
    model: Any,
    x: Any,
    y: Any,
    epsilons: Sequence[float],
    *,
    norm: str = "linf",
    bounds: Sequence[float] = (0.0, 1.0),
    steps: int = 40,
    restarts: int = 1,
    samples: int = 1,
    attacks: Mapping[str, Attack] | None = None,
    black_box: Mapping[str, Attack] | None = None,
    seed: int = 0,
    batch_size: int = 512,
    progress: Callable[[int, int, str], None] | None = None,
) -> RobustnessReport:
    """Measures the accuracy that attacks leave, and whether to believe it.

    Always run: FGSM, PGD, Auto-PGD with the cross-entropy and with a DLR loss, and uniform noise; each attack on the
    examples that no smaller radius broke. The controls are those of `controls`.

    Args:
        model: to logits: a callable, or a Keras model.
        x: (examples, ...), within the bounds.
        y: int, (examples,): true classes.
        epsilons: radii, above 0.
        norm: "linf" or "l2".
        bounds: least and greatest value of an input.
        steps, restarts: of PGD; Auto-PGD takes as many steps.
        samples: draws in each gradient of a model that answers at random.
        attacks: further white-box attacks, by name.
        black_box: attacks that see no gradients, by name. Where one beats all others, gradients are masked.
        seed: of all random choices.
        batch_size: rows worked on together.
        progress: called with attacks done, all of them, and the name of the next.

    Raises:
        ValueError: an argument is not as above, or an attack has another norm or other bounds.
    """
    if not len(epsilons):
        raise checks.error("epsilons", "one radius or more", epsilons)
    radii = sorted({checks.number("epsilons", float(epsilon), 1e-12) for epsilon in epsilons})
    checks.choice("norm", norm, ("linf", "l2"))
    settings: dict[str, Any] = {"norm": norm, "bounds": bounds, "seed": seed, "batch_size": batch_size}
    gradient = {**settings, "samples": samples}
    logits = as_logits(model)
    x, y = np.asarray(x, np.float32), np.asarray(y)
    pgd = PGD(steps, restarts=restarts, early_stop=True, **gradient)
    x, y = pgd._checked(x, y)
    answers = pgd._logits(logits, x)
    check_logits(answers, len(x))
    if y.min() < 0 or y.max() >= answers.shape[1]:
        raise checks.error("y", f"classes from 0 to {answers.shape[1] - 1}", y)
    dlr = ("cross_entropy", "dlr", "targeted_dlr")[min(answers.shape[1] - 2, 2)]
    white: dict[str, Attack] = {"FGSM": FGSM(**gradient), "PGD": pgd, "Auto-PGD": AutoPGD(steps, **gradient)}
    if dlr != "cross_entropy":
        white[f"Auto-PGD, {dlr.replace('_dlr', ' DLR').replace('dlr', 'DLR')}"] = AutoPGD(steps, dlr, **gradient)
    white |= attacks or {}
    others: dict[str, Attack] = {"noise": controls.Noise(**settings), **(black_box or {})}
    for name, attack in {**white, **others}.items():
        if (attack.norm, attack.bounds, attack.targeted) != (norm, pgd.bounds, False):
            raise checks.error("attacks", f"untargeted, in {norm} and within {tuple(bounds)}", attack.norm, name)

    right = answers.argmax(axis=1) == y
    everyone = {**white, **others}
    broken, x_adv = break_all(model, everyone, x, y, radii, right, progress)
    if progress is not None:
        total = len(radii) * len(everyone)
        progress(total, total, "controls")

    findings = controls.all_findings(
        model, logits, x, y, radii, right, answers, pgd,
        {name: broken[name] for name in white}, {name: broken[name] for name in others},
    )  # fmt: skip
    return reported(norm, radii, x, x_adv, right, broken, findings)


def break_all(
    model: Any,
    attacks: Mapping[str, Attack],
    x: np.ndarray,
    y: np.ndarray,
    radii: Sequence[float],
    right: np.ndarray,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Runs each attack at each radius, ascending, on the examples that it broke at no smaller one.

    Args:
        model: what the attacks take.
        attacks: by name.
        x, y: examples and true classes.
        radii: ascending.
        right: which examples the model gets right, (examples,).
        progress: called with attacks done, all of them, and the name of the next.

    Returns:
        Which examples each attack broke at each radius, (radii, examples); and of each example the point that broke it
        first, or the example itself.
    """
    x_adv = x.copy()
    broken = {name: np.zeros((len(radii), len(x)), bool) for name in attacks}
    done = 0
    for level, epsilon in enumerate(radii):
        for name, attack in attacks.items():
            if progress is not None:
                progress(done, len(radii) * len(attacks), name)
            done += 1
            if level:
                # The smaller ball is part of this one.
                broken[name][level] = broken[name][level - 1]
            standing = np.flatnonzero(right & ~broken[name][level])
            if not len(standing):
                continue
            found = attack(model, x[standing], y[standing], epsilon=epsilon)
            new = standing[found.success]
            first = ~(x_adv[new] != x[new]).any(axis=tuple(range(1, x.ndim)))
            x_adv[new[first]] = found.x_adv[found.success][first]
            broken[name][level][new] = True
    return broken, x_adv


def reported(
    norm: str,
    radii: Sequence[float],
    x: np.ndarray,
    x_adv: np.ndarray,
    right: np.ndarray,
    broken: Mapping[str, np.ndarray],
    findings: Sequence[Finding],
) -> RobustnessReport:
    """Returns the report on what `break_all` found."""
    worst = np.any(list(broken.values()), axis=0)
    by_attack = {name: tuple(float(np.mean(right & ~row)) for row in rows) for name, rows in broken.items()}
    remaining = tuple(float(np.mean(right & ~row)) for row in worst)
    return RobustnessReport(
        norm, tuple(radii), float(right.mean()), remaining, by_attack, tuple(findings), len(x), x, x_adv
    )
