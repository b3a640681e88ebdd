"""Controls: signs that an attack failed for reasons that have nothing to do with robustness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.black_box import BlackBoxAttack
from tfkit.robustness.attacks.gradients import cross_entropy, slope
from tfkit.robustness.attacks.norms import random_start
from tfkit.robustness.attacks.oracle import Oracle
from tfkit.robustness.attacks.pgd import PGD
from tfkit.robustness.attacks.report import Finding

#: Share of the examples by which results may differ; and where an attack asks, and goes on to find with each question.
TOLERANCE, QUERY_TOLERANCE = 0.01, 0.05

Broken = Mapping[str, np.ndarray]


class Noise(Attack):
    """Uniform points of the ball: what anyone finds without looking. White-box attacks must find more.

    Args:
        draws: for each example.
        **settings: of `Attack`.
    """

    def __init__(self, draws: int = 20, **settings: Any) -> None:
        super().__init__(**settings)
        self.draws = draws

    def _open(self, model: Any) -> Callable[[Any], Any]:
        return model.inspect if isinstance(model, Oracle) else super()._open(model)

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Keeps the first draw that breaks an example."""
        x_adv, queries, left = x.copy(), np.zeros(len(x), np.int64), np.arange(len(x))
        for draw in range(self.draws):
            for at in range(0, len(left), self.batch_size):
                part = left[at : at + self.batch_size]
                seed = tf.constant([self.seed, draw * len(x) + at], tf.int32)
                delta = random_start(tf.constant((len(part), *x.shape[1:])), epsilon, self.norm, seed).numpy()
                x_adv[part] = np.clip(x[part] + delta, *self.bounds)
            queries[left] += 1
            reached = self._logits(model, x_adv[left]).argmax(axis=1) == y[left]
            left = left[reached != self.targeted]
            if not len(left):
                break
        return x_adv, queries


def all_findings(
    model: Any,
    logits: Callable[[Any], Any],
    x: np.ndarray,
    y: np.ndarray,
    radii: Sequence[float],
    right: np.ndarray,
    answers: np.ndarray,
    pgd: PGD,
    white: Broken,
    black: Broken,
) -> list[Finding]:
    """Returns what all controls found.

    Args:
        model: as given; logits: as a function.
        x, y: examples and true classes.
        radii: ascending.
        right: which examples the model gets right, (examples,).
        answers: its logits, (examples, classes).
        pgd: the PGD of the evaluation.
        white, black: which examples each attack broke at each radius, (radii, examples).
    """
    chosen = np.flatnonzero(right)
    if not len(chosen):
        return [Finding("accuracy", False, "The model gets no example right: look at the scale of the inputs.")]
    return [
        repeatable(logits, x, answers, pgd),
        gradients(logits, x[chosen], y[chosen], pgd),
        step_size(pgd),
        loss_rises(model, logits, x[chosen], y[chosen], radii[-1], pgd),
        success(white, chosen),
        single_step(white, chosen),
        masked(white, black, chosen),
        large_radius(model, x[chosen], y[chosen], pgd),
        converged(model, x, y, radii, white, chosen, pgd),
    ]


def repeatable(logits: Callable[[Any], Any], x: np.ndarray, answers: np.ndarray, pgd: PGD) -> Finding:
    """The model answers the same twice, or its gradients are means over draws."""
    same = np.allclose(pgd._logits(logits, x), answers, rtol=1e-3, atol=1e-4)
    if same:
        return Finding("repeatable", True, "Two calls give the same logits.")
    if pgd.samples > 1:
        return Finding("repeatable", True, f"Answers vary; each gradient is the mean of {pgd.samples} draws.")
    return Finding("repeatable", False, "Two calls give different logits. Pass `samples`, 10 or more.")


def gradients(logits: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, pgd: PGD) -> Finding:
    """The loss has a gradient at the examples: neither zero nor NaN."""
    bad = np.zeros(len(x), bool)
    for at in range(0, len(x), pgd.batch_size):
        part = slice(at, at + pgd.batch_size)
        labels = tf.constant(y[part])
        _, gradient = slope(lambda p, labels=labels: cross_entropy(logits(p), labels), tf.constant(x[part]))  # type: ignore[misc]
        flat = np.reshape(gradient, (len(gradient), -1))
        bad[part] = ~np.isfinite(flat).all(axis=1) | ~(np.abs(flat) > 0).any(axis=1)
    remedy = " Logits too large for float32, or saturated units: divide the logits by a constant." if bad.any() else ""
    detail = f"{bad.mean():.1%} of the examples have a zero or undefined gradient of the cross-entropy.{remedy}"
    return Finding("gradients", bool(bad.mean() <= TOLERANCE), detail)


def step_size(pgd: PGD) -> Finding:
    """The steps of PGD can cross the ball."""
    reach = pgd.steps * pgd.relative_step
    return Finding("step size", reach >= 2, f"{pgd.steps} steps go {reach:.3g} radii; 2 cross the ball.")


def loss_rises(
    model: Any, logits: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float, pgd: PGD
) -> Finding:
    """PGD raises the loss of nearly all examples."""
    found = pgd(model, x, y, epsilon=epsilon).x_adv
    before, after = (cross_entropy(pgd._logits(logits, points), y).numpy() for points in (x, found))
    stuck = float(np.mean(~(after > before)))
    return Finding("loss rises", stuck <= 0.05, f"At epsilon {epsilon:.4g} PGD raised no loss for {stuck:.1%}.")


def success(white: Broken, chosen: np.ndarray) -> Finding:
    """Some attack broke something."""
    share = float(np.any([rows[-1][chosen] for rows in white.values()], axis=0).mean())
    remedy = "" if share else " This is no sign of robustness: take larger radii, and look at the other controls."
    return Finding("success", share > 0, f"At the largest radius {share:.1%} of what was right is broken.{remedy}")


def single_step(white: Broken, chosen: np.ndarray) -> Finding:
    """Many steps are stronger than one."""
    many = np.any([rows for name, rows in white.items() if name != "FGSM"], axis=0)
    lead = float(np.max((white["FGSM"][:, chosen] & ~many[:, chosen]).mean(axis=1)))
    return Finding("single step", lead <= TOLERANCE, f"FGSM breaks {lead:.1%} that no attack of many steps does.")


def masked(white: Broken, black: Broken, chosen: np.ndarray) -> Finding:
    """What sees no gradients breaks nothing that white-box attacks leave."""
    seen = np.any(list(white.values()), axis=0)
    leads = {name: float(np.max((rows & ~seen)[:, chosen].mean(axis=1))) for name, rows in black.items()}
    name = max(leads, key=lambda name: leads[name])
    lead = leads[name]
    remedy = " The gradients mislead." if lead > TOLERANCE else ""
    return Finding("masked gradients", lead <= TOLERANCE, f"{name} breaks {lead:.1%} that no gradient finds.{remedy}")


def large_radius(model: Any, x: np.ndarray, y: np.ndarray, pgd: PGD) -> Finding:
    """In a ball that holds the whole box nothing stands."""
    width = pgd.bounds[1] - pgd.bounds[0]
    whole = width if pgd.norm == "linf" else width * float(np.sqrt(np.prod(x.shape[1:])))
    left = 1 - float(pgd(model, x, y, epsilon=whole).success.mean())
    return Finding("large radius", left <= TOLERANCE, f"At epsilon {whole:.4g}, the whole box, {left:.1%} stand.")


def converged(
    model: Any, x: np.ndarray, y: np.ndarray, radii: Sequence[float], white: Broken, chosen: np.ndarray, pgd: PGD
) -> Finding:
    """Twice the steps and restarts break hardly more."""
    # Where the shares are nearest a half, more effort shows most.
    seen = np.any(list(white.values()), axis=0)[:, chosen]
    level = int(np.argmin(np.abs(seen.mean(axis=1) - 0.5)))
    standing = chosen[~seen[level]]
    if not len(standing):
        return Finding("converged", True, "Nothing stands.")
    more = PGD(
        2 * pgd.steps, restarts=2 * pgd.restarts, norm=pgd.norm, bounds=pgd.bounds, seed=pgd.seed + 1,
        samples=pgd.samples, batch_size=pgd.batch_size, early_stop=pgd.early_stop,
    )  # fmt: skip
    found = more(model, x[standing], y[standing], epsilon=radii[level]).success.sum() / len(chosen)
    detail = f"Twice the steps and restarts break {found:.1%} more at epsilon {radii[level]:.4g}."
    return Finding("converged", bool(found <= TOLERANCE), detail)


def file_findings(
    oracle: Oracle,
    asking: BlackBoxAttack,
    x: np.ndarray,
    y: np.ndarray,
    radii: Sequence[float],
    right: np.ndarray,
    answers: np.ndarray,
    broken: Broken,
) -> list[Finding]:
    """Returns what the controls found that need no gradients; arguments as in `all_findings`.

    Args:
        oracle: the model.
        asking: the attack that asks it.
        broken: which examples each attack broke at each radius, (radii, examples); one is named "noise".
    """
    chosen = np.flatnonzero(right)
    if not len(chosen):
        return [Finding("accuracy", False, "The model gets no example right: look at the scale of the inputs.")]
    same = np.allclose(oracle.inspect(x), answers, rtol=1e-3, atol=1e-4)
    aimed = {name: rows for name, rows in broken.items() if name != "noise"}
    return [
        Finding("repeatable", same, f"Two calls give {'the same' if same else 'different'} scores."),
        success(aimed, chosen),
        lucky_noise(aimed, broken["noise"], chosen),
        whole_box(oracle, asking, x[chosen], y[chosen]),
        enough_queries(oracle, asking, x, y, radii, aimed, chosen),
    ]


def lucky_noise(aimed: Broken, noise: np.ndarray, chosen: np.ndarray) -> Finding:
    """Noise breaks nothing that an attack leaves."""
    seen = np.any(list(aimed.values()), axis=0)
    lead = float(np.max((noise & ~seen)[:, chosen].mean(axis=1)))
    remedy = " The attacks need more queries." if lead > TOLERANCE else ""
    return Finding("noise", lead <= TOLERANCE, f"Noise breaks {lead:.1%} that no attack does.{remedy}")


def whole_box(oracle: Oracle, asking: BlackBoxAttack, x: np.ndarray, y: np.ndarray) -> Finding:
    """In a ball that holds the whole box nothing stands."""
    width = asking.bounds[1] - asking.bounds[0]
    whole = width if asking.norm == "linf" else width * float(np.sqrt(np.prod(x.shape[1:])))
    left = 1 - float(asking(oracle, x, y, epsilon=whole).success.mean())
    return Finding("large radius", left <= TOLERANCE, f"At epsilon {whole:.4g}, the whole box, {left:.1%} stand.")


def enough_queries(
    oracle: Oracle, asking: BlackBoxAttack, x: np.ndarray, y: np.ndarray, radii: Sequence[float], aimed: Broken,
    chosen: np.ndarray,
) -> Finding:  # fmt: skip
    """Twice the queries break hardly more."""
    seen = np.any(list(aimed.values()), axis=0)[:, chosen]
    level = int(np.argmin(np.abs(seen.mean(axis=1) - 0.5)))
    standing = chosen[~seen[level]]
    if not len(standing):
        return Finding("converged", True, "Nothing stands.")
    more = copy.copy(asking)
    more.max_queries, more.seed = 2 * asking.max_queries, asking.seed + 1
    found = more(oracle, x[standing], y[standing], epsilon=radii[level]).success.sum() / len(chosen)
    remedy = " Allow more of them." if found > QUERY_TOLERANCE else ""
    detail = f"Twice the queries break {found:.1%} more at epsilon {radii[level]:.4g}.{remedy}"
    return Finding("converged", bool(found <= QUERY_TOLERANCE), detail)
