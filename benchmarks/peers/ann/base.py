"""What an algorithm of the retrieval bench is, for peers and for tfkit alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Effort = Mapping[str, Any]


class Algorithm(NamedTuple):
    """One algorithm with its settings.

    Attributes:
        build: `build(items)` gives the index; items are float32, (items, dimension), rows one after the other.
        efforts: `efforts(items, k)` gives settings of a search, from little effort to much.
        search: `search(index, queries, k, effort)` gives ids, (queries, k), of queries (queries, dimension).
        single: `single(index, query, k, effort)` gives ids, (k,), of one query (dimension,), as fast as can be.
        memory: `memory(index)` gives bytes, or None where the library does not tell.
    """

    build: Callable[[np.ndarray], Any]
    efforts: Callable[[int, int], Sequence[Effort]]
    search: Callable[[Any, np.ndarray, int, Effort], np.ndarray]
    single: Callable[[Any, np.ndarray, int, Effort], np.ndarray]
    memory: Callable[[Any], int | None] = lambda index: None


def one_parameter(name: str, values: Sequence[int]) -> Callable[[int, int], list[dict[str, int]]]:
    """Returns `efforts` of a single parameter, whose values do not exceed the number of items."""
    return lambda items, k: [{name: value} for value in values if value <= items]


def leaves_and_rescore(items: int, k: int) -> list[dict[str, int]]:
    """Returns efforts of a tree of as many leaves as the square root of the items: how many, and what is scored again.

    The last reach any recall that the codes leave within reach.
    """
    leaves = round(items**0.5)
    shares = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5, 0.7, 1.0)
    pairs = {
        (max(1, round(share * leaves)), min(k * times, items - 1)) for share in shares for times in (6, 20, 60, 200)
    }
    pairs |= {(leaves, min(k * times, items - 1)) for times in (600, 2000)}
    return [{"leaves": some, "rescore": rescore} for some, rescore in sorted(pairs)]


WIDTHS = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448, 640, 900, 1280)
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
