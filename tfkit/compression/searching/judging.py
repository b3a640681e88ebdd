"""Which of several measured files to keep: the accuracy budget, the Pareto fronts and the best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

Objective = Literal["size", "latency"]

#: Latencies this close to the fastest are taken for equal, since the next measurement may order them otherwise.
LATENCY_TIE = 0.03
#: So are sizes: a few bytes are not worth an accuracy that was to be had for them.
SIZE_TIE = 0.01
#: Accuracies are fractions of counts; a difference below this is rounding, not an example.
ROUNDING = 1e-9


class Measured(NamedTuple):
    """What judging looks at. Test accuracy is not among it, so it cannot decide anything."""

    name: str
    validation_accuracy: float
    packed_bytes: int
    latency_ratio: float


class Judgement(NamedTuple):
    """The outcome.

    Attributes:
        accepted: names within the accuracy budget, the baseline included.
        pareto_size: of these, those that no other one beats in accuracy and packed bytes.
        pareto_latency: likewise for accuracy and latency.
        best: the accepted one that serves the objective best.
    """

    accepted: tuple[str, ...]
    pareto_size: tuple[str, ...]
    pareto_latency: tuple[str, ...]
    best: str


def judge(measured: Sequence[Measured], *, max_drop: float, objective: Objective) -> Judgement:
    """Judges files by their validation accuracy, packed bytes and latency.

    Args:
        measured: the files, the baseline first.
        max_drop: how far the validation accuracy may lie below the baseline's, as a fraction.
        objective: `"size"`: the fewest packed bytes win, and among those within 1 % of it the most accurate;
            `"latency"`: the shortest latency, and among those within 3 % of it the fewest bytes.
    """
    floor = measured[0].validation_accuracy - max_drop - ROUNDING
    accepted = [item for item in measured if item.validation_accuracy >= floor]
    if objective == "latency":
        fastest = min(item.latency_ratio for item in accepted)
        contenders = [item for item in accepted if item.latency_ratio <= fastest * (1 + LATENCY_TIE)]
        best = min(contenders, key=lambda item: (item.packed_bytes, -item.validation_accuracy))
    else:
        smallest = min(item.packed_bytes for item in accepted)
        contenders = [item for item in accepted if item.packed_bytes <= smallest * (1 + SIZE_TIE)]
        best = min(contenders, key=lambda item: (-item.validation_accuracy, item.packed_bytes))
    return Judgement(
        tuple(item.name for item in accepted),
        pareto([(item.name, item.validation_accuracy, item.packed_bytes) for item in accepted]),
        pareto([(item.name, item.validation_accuracy, item.latency_ratio) for item in accepted]),
        best.name,
    )


def pareto(points: Sequence[tuple[str, float, float]]) -> tuple[str, ...]:
    """Returns the names of the points (name, gain, cost) that no other one dominates: no less gain, no more cost.

    Of equal points the first stays.

    >>> pareto([("a", 0.9, 10), ("b", 0.8, 5), ("c", 0.8, 7), ("d", 0.9, 10)])
    ('a', 'b')
    """
    front = []
    for index, (name, gain, cost) in enumerate(points):
        dominated = any(
            other_gain >= gain and other_cost <= cost and ((other_gain, other_cost) != (gain, cost) or position < index)
            for position, (_, other_gain, other_cost) in enumerate(points)
            if position != index
        )
        if not dominated:
            front.append(name)
    return tuple(front)


def standard_error_of_drop(base: np.ndarray, other: np.ndarray) -> float:
    """Returns the standard error of the difference of two accuracies over the same examples.

    Only examples on which one is right and the other wrong count (McNemar's, as in a paired comparison), so it is far
    below that of two accuracies over examples of their own.

    Args:
        base, other: whether each is right, booleans of one shape.

    >>> round(standard_error_of_drop(np.array([True, True, True, False]), np.array([False, True, True, True])), 3)
    0.354
    """
    apart = np.not_equal(base, other)
    drop = float(base.mean() - other.mean())
    return math.sqrt(max(float(apart.mean()) - drop**2, 0.0) / apart.size)
