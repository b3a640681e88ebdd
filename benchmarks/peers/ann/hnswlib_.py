"""hnswlib, by inner product."""

from __future__ import annotations

from typing import Any

import hnswlib
import numpy as np

from benchmarks.peers.ann.base import WIDTHS, Algorithm, Effort, one_parameter


def build(items: np.ndarray) -> Any:
    index = hnswlib.Index("ip", items.shape[1])
    index.set_num_threads(1)
    index.init_index(len(items), M=16, ef_construction=100, random_seed=0)
    index.add_items(items, num_threads=1)
    return index


def search(index: Any, queries: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    index.set_ef(effort["ef"])
    return index.knn_query(queries, k, num_threads=1)[0].astype(np.int64)


def single(index: Any, query: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    return search(index, query, k, effort)[0]


ALGORITHMS = {"hnswlib": Algorithm(build, one_parameter("ef", WIDTHS), search, single)}
