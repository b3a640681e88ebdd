"""How much faster than a scan an index answers, and how much of the truth it finds: for the papers' curves.

A speed-up is a ratio of CPU times of this process on one thread: that of a compiled scan that takes the queries one at
a time, as the papers' own is, over that of the index. Both are measured in turn, over and over, and the median of the
ratios counts, since the machine's speed changes. `over_batch` has in place of the scan `Exact`, which
searches all queries at once by matrix products, and is what a user would run who has many queries.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks.vectors import Vectors
from tfkit.retrieval import Exact, Index
from tfkit.retrieval.candidates import score_all
from tfkit.retrieval.kernels import empty_heaps, kernel, sort_heaps

DEPTHS = (1, 5, 10)
#: Times the scan's time, beyond which more effort is not looked at.
HOPELESS = 2.0


class Point(NamedTuple):
    """One setting of one method on one data set."""

    method: str
    effort: str
    precision_at: dict[str, float]
    over_scan: float
    over_batch: float


class Bench:
    """A data set with its true answers and the two ways to find them.

    Args:
        vectors: items and queries.
        queries: how many queries are asked.
        rounds: of the timing.
        seed: of the choice of the queries.
    """

    def __init__(self, vectors: Vectors, queries: int = 200, rounds: int = 5, seed: int = 0) -> None:
        self.items, self.rounds = vectors.items, rounds
        chosen = np.random.default_rng(seed).permutation(len(vectors.queries))[:queries]
        self.queries = np.ascontiguousarray(vectors.queries[chosen])
        self.exact = Exact().build(self.items)
        self.truth = self.exact.search(self.queries, max(DEPTHS), threads=1).ids

    def scan(self) -> np.ndarray:
        """Returns the true ids, query by query."""
        scores, ids, counts = empty_heaps(len(self.queries), max(DEPTHS))
        _scan(self.queries, self.items, scores, ids, counts)
        sort_heaps(scores, ids, counts)
        return ids

    def points(self, method: str, index: Index, efforts: Iterable[Mapping[str, Any]]) -> list[Point]:
        """Measures a built index at efforts from little to much; one that is far slower than a scan is the last."""
        assert np.mean(self.scan() == self.truth) > 0.99, "the scan is wrong"
        searches, precisions, names = [], [], []
        for effort in efforts:
            search = functools.partial(self._search, index, effort)
            found = search()
            precisions.append({str(depth): _precision(found, self.truth, depth) for depth in DEPTHS})
            names.append(", ".join(f"{name}={value}" for name, value in effort.items()))
            searches.append(search)
            if seconds(search) > HOPELESS * seconds(self.scan):
                break
        ratios = np.empty((self.rounds, len(searches), 2))
        for number in range(self.rounds):
            before = seconds(self.scan), seconds(self._batch)
            ours = np.array([seconds(search) for search in searches])
            after = seconds(self.scan), seconds(self._batch)
            ratios[number] = np.add(before, after) / 2 / ours[:, None]
        medians = np.median(ratios, axis=0)
        return [
            Point(method, name, precision, float(scan), float(batch))
            for name, precision, (scan, batch) in zip(names, precisions, medians, strict=True)
        ]

    def _search(self, index: Index, effort: Mapping[str, Any]) -> np.ndarray:
        return index.search(self.queries, max(DEPTHS), threads=1, **effort).ids

    def _batch(self) -> None:
        self.exact.search(self.queries, max(DEPTHS), threads=1)


def _precision(found: np.ndarray, truth: np.ndarray, depth: int) -> float:
    """Returns the share of the true best that are found."""
    return float(np.mean([len({*a[:depth]} & {*b[:depth]}) / depth for a, b in zip(found, truth, strict=True)]))


@kernel
def _scan(queries, items, scores, ids, counts):  # type: ignore[no-untyped-def]
    for row in range(queries.shape[0]):
        counts[row] = score_all(queries[row], items, scores[row], ids[row])


def seconds(call: Callable[[], Any]) -> float:
    """Returns the CPU time of the process for a call, which is made again until the clock can tell."""
    started, calls = time.process_time(), 0
    while True:
        call()
        calls += 1
        passed = time.process_time() - started
        if passed > 2e-3:
            return passed / calls


def speed_up_at(points: Iterable[Point], precision: float, depth: int, field: str = "over_scan") -> float | None:
    """Returns the speed-up of the points' front at a precision, between two points along the logarithm.

    Args:
        points: of one method.
        precision: wanted.
        depth: of precision@depth.
        field: which speed-up.

    Returns:
        None if no point is as precise.
    """
    front: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: -point.precision_at[str(depth)]):
        fast = getattr(point, field)
        if not front or fast > front[-1][1]:
            front.append((point.precision_at[str(depth)], fast))
    front.reverse()  # From the least precise on, each slower than the one before.
    if not front or front[-1][0] < precision:
        return None
    if front[0][0] >= precision:
        return float(front[0][1])
    return float(np.exp(np.interp(precision, [p for p, _ in front], [np.log(s) for _, s in front])))


def table(points: list[Point], depth: int) -> str:
    """Returns the points as lines of text."""
    lines = [f"{'method':28} {'effort':24} {f'p@{depth}':>7} {'over scan':>10} {'over batch':>11}"]
    for point in points:
        lines.append(
            f"{point.method:28} {point.effort:24} {point.precision_at[str(depth)]:7.3f} {point.over_scan:10.1f} "
            f"{point.over_batch:11.2f}"
        )
    return "\n".join(lines)


def rows(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns a flat row for each data set and method: speed-ups over a scan, by what is reached."""
    return [
        {"data": name, "items": result["items"], "method": method}
        | {key.replace("_", " at "): reached["over_scan"] for key, reached in levels.items()}
        for name, result in results.items()
        for method, levels in result["speed_up_at"].items()
    ]
