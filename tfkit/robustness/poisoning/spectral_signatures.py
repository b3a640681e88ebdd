"""Spectral signatures: poison is what stands out along the top directions of a class's features.

Paper: Tran, Li, Madry. Spectral signatures in backdoor attacks. NeurIPS 2018, https://arxiv.org/abs/1811.00636,
algorithm 1 (with `whiten=False`: the squared projection on the top singular vector of each class, from which the top
1.5 times the expected share is removed). Hayase, Kong, Somani, Oh. SPECTRE: defending against backdoor attacks using
robust statistics. ICML 2021, https://arxiv.org/abs/2104.11315 (robust whitening and the quantum entropy score).

Differs: without an expected share, nothing has to be known of the poison. The scores of each class are split in two
where that leaves the least variance, the parts are split again along the line on which they differ most, until they
stay, and the upper one is flagged if it is the smaller one and stands clear (Ashman's D). The robust covariance comes
from concentration steps in place of SPECTRE's filter.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.poisoning import detection
from tfkit.robustness.poisoning.detection import (
    ClassFinding,
    Detection,
    ashman_separation,
    checked_features,
    principal,
    robustly_whitened,
    sharpened,
    split_in_two,
)

#: Of the quantum entropy score, as in SPECTRE.
ALPHA = 4.0
#: What the paper removes, in expected shares.
MARGIN = 1.5


def squared_projections(rows: np.ndarray) -> np.ndarray:
    """Returns the squared projection of each centred row on their top singular vector, (rows,)."""
    return principal(rows, 1)[:, 0] ** 2


def quantum_entropy_scores(white: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """Scores whitened rows: h' Q h / trace(Q), Q = exp(alpha (C - I) / (|C| - 1)), C the mean of h h'.

    At alpha = 0 that is the mean square of a row, for alpha -> infinity its square along the top direction.

    Args:
        white: (rows, dimension).
        alpha: how much the directions of large variance count.

    Returns:
        (rows,).
    """
    values, vectors = np.linalg.eigh(white.T @ white / len(white))
    excess = (values - 1) / max(values[-1] - 1, 1e-12)
    weights = np.exp(alpha * (excess - excess[-1]))
    return (white @ vectors) ** 2 @ weights / weights.sum()


@detection.single_threaded
def spectral_signatures(
    features: Any,
    labels: Any,
    *,
    expected_share: float | None = None,
    whiten: bool = True,
    components: int = 32,
    separation: float = 6.1,
    largest_share: float = 0.35,
) -> Detection:
    """Looks for poison in the features of a network that was trained on it.

    Args:
        features: (examples, features), such as `poisoning.features` gives.
        labels: (examples,), as trained with.
        expected_share: if known, the poison's share of a poisoned class: the top 1.5 times that share of every class
            is flagged, as in the first paper. None: the scores decide where anything is flagged.
        whiten: robust whitening and quantum entropy scores; without, the squared projections of the first paper.
        components: largest directions of a class that are looked at.
        separation: least Ashman's D between the two parts of a class. It lies between clean and poisoned classes of
            digits, in networks other than those that `benchmarks/papers/poisoning.py` reports.
        largest_share: of a class that may be poison.

    Returns:
        What is flagged, with scores, and the finding in each class.
    """
    features, labels = checked_features(features, labels)
    if expected_share is not None:
        checks.number("expected_share", expected_share, 0, 1)
    checks.integer("components", components, 1)
    checks.number("separation", separation, 0)
    checks.number("largest_share", largest_share, 0, 0.5)
    flagged, scores = np.zeros(len(labels), bool), np.zeros(len(labels))
    classes: dict[int, ClassFinding] = {}
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        rows = features[members]
        # Fewer rows than these have no covariance to speak of.
        if len(members) < 4 * components or not np.ptp(rows, axis=0).any():
            classes[int(label)] = ClassFinding(len(members), 0.0, 0.0, False)
            continue
        white = robustly_whitened(principal(rows, components))
        score = quantum_entropy_scores(white) if whiten else squared_projections(rows)
        scores[members] = score
        if expected_share is not None:
            count = min(round(MARGIN * expected_share * len(members)), len(members))
            upper = np.zeros(len(members), bool)
            upper[np.argsort(-score, kind="stable")[:count]] = True
            apart = ashman_separation(np.sqrt(score[upper]), np.sqrt(score[~upper]))
        else:
            root = np.sqrt(score)
            upper, apart = sharpened(white, root > split_in_two(root))
        share = float(upper.mean())
        suspicious = expected_share is not None or (share <= largest_share and apart >= separation)
        classes[int(label)] = ClassFinding(len(members), share, apart, bool(suspicious))
        if suspicious:
            flagged[members[upper]] = True
    return Detection(flagged, scores, classes)
