"""What the detectors share: robust whitening of the features of a class, a split in two, and precision and recall.

Poison that shares a trigger is a small cluster beside its class. The largest directions of a class need not show it:
the spread of the clean examples hides it. So the class is projected to its few largest directions, and whitened there
by a mean and covariance that a minority of any kind cannot move. Then the poison lies many standard deviations away.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec

import numpy as np
from threadpoolctl import threadpool_limits

from tfkit.internal import checks
from tfkit.robustness.poisoning.record import PoisonRecord

Arguments = ParamSpec("Arguments")


def single_threaded(function: Callable[Arguments, Detection]) -> Callable[Arguments, Detection]:
    """Lets a detector run on one thread: a class is so little work that several threads would wait for each other."""

    @functools.wraps(function)
    def limited(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Detection:
        with threadpool_limits(1):
            return function(*args, **kwargs)

    return limited


class DetectionScore(NamedTuple):
    """How well the flagged examples are the changed ones.

    Attributes:
        precision: share of the flagged examples that were changed; 0 if none are flagged.
        recall: share of the changed examples that are flagged.
        flagged: how many are flagged.
    """

    precision: float
    recall: float
    flagged: int


class ClassFinding(NamedTuple):
    """What a detector found in one class.

    Attributes:
        examples: of the class.
        share: of them in the smaller part.
        separation: how far apart the two parts are, as the detector measures it.
        suspicious: whether the smaller part is flagged.
    """

    examples: int
    share: float
    separation: float
    suspicious: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Detection:
    """Suspected examples.

    Attributes:
        flagged: bool, (examples,).
        scores: float64, (examples,): the higher, the more suspicious within its class.
        classes: what was found in each class.
    """

    flagged: np.ndarray
    scores: np.ndarray
    classes: Mapping[int, ClassFinding]

    def score(self, record: PoisonRecord) -> DetectionScore:
        """Compares with what was changed.

        Raises:
            ValueError: the record is of another number of examples.
        """
        if record.examples != len(self.flagged):
            raise checks.error("record", f"of {len(self.flagged)} examples, as were searched", record.examples)
        hits = int(self.flagged[record.indices].sum())
        count = int(self.flagged.sum())
        return DetectionScore(hits / max(count, 1), hits / max(len(record.indices), 1), count)


def checked_features(features: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns features as float64 rows, and labels as integers.

    Raises:
        ValueError: they are not finite rows with a label each.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or features.dtype.kind not in "fiu" or not np.isfinite(features).all():
        raise checks.error("features", "finite numbers, (examples, features)", features)
    if labels.shape != (len(features),) or labels.dtype.kind not in "iu":
        raise checks.error("labels", f"integers of shape ({len(features)},)", labels)
    return features.astype(np.float64), labels.astype(np.int64)


def principal(rows: np.ndarray, components: int) -> np.ndarray:
    """Returns the rows along their largest directions, centred, (rows, at most components)."""
    centred = rows - rows.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    kept = min(components, int((sizes > 1e-6 * max(sizes[0], 1e-300)).sum()))
    return centred @ directions[:kept].T


def robustly_whitened(rows: np.ndarray, core: float = 0.75, rounds: int = 20) -> np.ndarray:
    """Whitens rows by the mean and covariance of their core: the share of them that lies nearest to it.

    The core is found by concentration steps (Rousseeuw, Van Driessen, 1999) from the coordinatewise median.

    Args:
        rows: (rows, dimension), of full rank.
        core: share of the rows; what is foreign must be less than the rest.
        rounds: most concentration steps.

    Returns:
        (rows, dimension); the core has mean 0 and covariance 1.
    """
    # The core must span the space, or its covariance has no inverse.
    count = min(len(rows), max(round(core * len(rows)), rows.shape[1] + 1))
    spread = np.median(np.abs(rows - np.median(rows, axis=0)), axis=0)
    kept = np.argsort((((rows - np.median(rows, axis=0)) / np.maximum(spread, 1e-12)) ** 2).sum(axis=1))[:count]
    for _ in range(rounds):
        mean = rows[kept].mean(axis=0)
        values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(rows[kept].T)))
        white = (rows - mean) @ vectors / np.sqrt(np.maximum(values, 1e-9 * max(values[-1], 1e-300)))
        nearest = np.argsort((white**2).sum(axis=1))[:count]
        if np.array_equal(np.sort(nearest), np.sort(kept)):
            break
        kept = nearest
    return white


def split_in_two(values: np.ndarray) -> float:
    """Returns the threshold that leaves the least variance within its two sides (Otsu, 1979)."""
    ordered = np.sort(values)
    left = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    apart = sums[:-1] / left - (sums[-1] - sums[:-1]) / (len(ordered) - left)
    at = int(np.argmax(left * (len(ordered) - left) * apart**2))
    return float((ordered[at] + ordered[at + 1]) / 2)


def sharpened(white: np.ndarray, upper: np.ndarray, rounds: int = 10) -> tuple[np.ndarray, float]:
    """Splits whitened rows anew along the line on which two groups differ most (Fisher's discriminant), until it stays.

    Poison is a second cluster, which such a line sets apart from the rest more and more; a tail cut off is none.

    Args:
        white: (rows, dimension), whitened by what is not poison.
        upper: bool, (rows,): a first split.
        rounds: splits at most.

    Returns:
        The last split, and Ashman's D of its groups along the line; the first one and 0 if a group is too small.
    """
    apart = 0.0
    for _ in range(rounds):
        one, other = white[upper], white[~upper]
        if min(len(one), len(other)) < 5:
            return upper, 0.0
        # The addition is a tenth of what the clean rows vary: a small group has no covariance of its own to speak of.
        within = (len(one) * np.cov(one.T) + len(other) * np.cov(other.T)) / len(white)
        line = np.linalg.solve(np.atleast_2d(within) + 0.1 * np.eye(white.shape[1]), one.mean(0) - other.mean(0))
        along = white @ line
        again = along > split_in_two(along)
        apart = ashman_separation(along[again], along[~again])
        if np.array_equal(again, upper):
            break
        upper = again
    return upper, apart


def ashman_separation(one: np.ndarray, other: np.ndarray) -> float:
    """Returns Ashman's D of two groups of numbers: sqrt(2) |difference of means| / root of the summed variances.

    >>> round(ashman_separation(np.array([0.0, 2.0]), np.array([9.0, 11.0])), 6)
    9.0
    """
    if not len(one) or not len(other):
        return 0.0
    return float(np.sqrt(2) * abs(one.mean() - other.mean()) / max(np.hypot(one.std(), other.std()), 1e-300))
