"""tfkit's indexes, called as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.peers.ann.base import PROBES, WIDTHS, Algorithm, Effort, leaves_and_rescore, one_parameter
from tfkit import retrieval


def algorithm(make: Callable[[], retrieval.Index], efforts: Any = None) -> Algorithm:
    return Algorithm(
        lambda items: make().build(items, threads=1),
        efforts if efforts is not None else lambda items, k: [],
        lambda index, queries, k, effort: index.search(queries, k, threads=1, **effort).ids,
        lambda index, query, k, effort: index.search(query, k, threads=1, **effort).ids,
        lambda index: index.memory_bytes,
    )


def budgets(items: int, k: int) -> list[Effort]:
    shares = (0.002, 0.005, 0.01, 0.02, 0.04, 0.07, 0.12, 0.2, 0.35, 0.6, 1.0)
    return [{"budget": int(share * items)} for share in shares if share * items >= k]


def probes(items: int, k: int) -> list[Effort]:
    clusters = round(4 * items**0.5)
    return [{"probes": p} for p in (*PROBES, 768, 1024) if p < clusters] + [{"probes": clusters}]


ALGORITHMS = {
    "tfkit Exact": algorithm(retrieval.Exact, lambda items, k: [{}]),
    "tfkit NormScan": algorithm(retrieval.NormScan, budgets),
    "tfkit NSW": algorithm(retrieval.NSW, one_parameter("ef", (5, 7, *WIDTHS))),
    "tfkit IVF": algorithm(retrieval.IVF, probes),
    "tfkit GreedyMIPS": algorithm(retrieval.GreedyMIPS, budgets),
    "tfkit ScaNN": algorithm(lambda: retrieval.ScaNN("tree"), leaves_and_rescore),
}
