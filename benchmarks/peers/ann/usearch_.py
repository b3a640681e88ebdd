"""usearch, by inner product, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
from usearch.index import Index

from benchmarks.peers.ann.base import WIDTHS, Algorithm, Effort, one_parameter


def build(items: np.ndarray) -> Any:
    index = Index(ndim=items.shape[1], metric="ip", dtype="f32", connectivity=16, expansion_add=100)
    index.add(np.arange(len(items)), items, threads=1)
    return index


def search(index: Any, queries: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    index.expansion_search = effort["ef"]
    found = index.search(queries, k, threads=1).keys.astype(np.int64)
    return np.atleast_2d(found)


def single(index: Any, query: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    return search(index, query, k, effort)[0]


ALGORITHMS = {
    "usearch": Algorithm(build, one_parameter("ef", WIDTHS), search, single, lambda index: int(index.memory_usage))
}
