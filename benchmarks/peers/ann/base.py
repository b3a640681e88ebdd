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


WIDTHS = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448, 640, 900, 1280)
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
