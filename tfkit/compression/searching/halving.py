"""Successive halving over two aims: of the points of a rung, those that spread along the Pareto front go on.

Paper: Jamieson, Talwalkar. Non-stochastic best arm identification and hyperparameter optimization. AISTATS 2016,
https://arxiv.org/abs/1502.07943; the order within a rung is the non-dominated sorting and crowding distance of Deb,
Pratap, Agarwal, Meyarivan. A fast and elitist multiobjective genetic algorithm: NSGA-II. IEEE Trans. Evol. Comput.
6(2), 2002, https://doi.org/10.1109/4235.996017.

Differs: halving ranks by two figures, accuracy and bytes (or latency), instead of one loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tfkit.compression.searching.judging import pareto


class Point(NamedTuple):
    """One trial of a rung: its name, what is wanted more of, and what is wanted less of (above zero)."""

    name: str
    gain: float
    cost: float


def promote(points: Sequence[Point], count: int, *, floor: float = -math.inf) -> list[str]:
    """Returns the names of the points that go on, the best first.

    Args:
        points: the rung.
        count: how many go on; all if there are fewer.
        floor: points of less gain come after all the others.
    """
    ordered: list[str] = []
    for group in (
        [point for point in points if point.gain >= floor],
        [point for point in points if point.gain < floor],
    ):
        left = list(group)
        while left:
            front = set(pareto(left))
            members = [point for point in left if point.name in front]
            distances = crowding(members)
            order = sorted(range(len(members)), key=lambda i: (-distances[i], members[i].cost, members[i].name))
            ordered += [members[i].name for i in order]
            left = [point for point in left if point.name not in front]
    return ordered[:count]


def spread(points: Sequence[Point], count: int) -> list[str]:
    """Returns the names of the points of the Pareto front that lie nearest to even steps of log cost, cheapest first.

    Where the front has fewer points than that, those that `promote` puts first among the others are added.

    Args:
        points: candidates.
        count: how many are wanted; all if there are fewer.
    """
    front = set(pareto(points))
    left = sorted((point for point in points if point.name in front), key=lambda point: point.cost)
    if count >= len(left):
        others = [point for point in points if point.name not in front]
        return [point.name for point in left] + promote(others, count - len(left))
    places = np.linspace(math.log(max(left[0].cost, 1e-12)), math.log(max(left[-1].cost, 1e-12)), count)
    chosen = []
    for place in places:
        nearest = min(left, key=lambda point: abs(math.log(max(point.cost, 1e-12)) - place))
        left.remove(nearest)
        chosen.append(nearest)
    return [point.name for point in sorted(chosen, key=lambda point: point.cost)]


def crowding(front: Sequence[Point]) -> list[float]:
    """Returns how far apart each point's neighbours on a front are, costs on a log scale; its ends are infinite."""
    distances = np.zeros(len(front))
    for values in ([point.gain for point in front], [math.log(max(point.cost, 1e-12)) for point in front]):
        order = np.argsort(values, kind="stable")
        ranked = np.asarray(values)[order]
        span = ranked[-1] - ranked[0]
        distances[order[0]] = distances[order[-1]] = math.inf
        if span > 0:
            distances[order[1:-1]] += (ranked[2:] - ranked[:-2]) / span
    return [float(value) for value in distances]


def shares(rungs: int, reduction: float) -> list[float]:
    """Returns the share of the full epochs that each rung trains with: the last 1, each before it 1/reduction of it."""
    return [reduction ** (rung + 1 - rungs) for rung in range(rungs)]


def sizes(count: int, rungs: int, reduction: float) -> list[int]:
    """Returns how many trials each rung has, at least one."""
    return [max(1, math.ceil(count / reduction**rung - 1e-9)) for rung in range(rungs)]
