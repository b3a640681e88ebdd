"""FAISS: flat, graph, inverted file, and 4-bit product codes scanned in registers, the best of them scored again."""

from __future__ import annotations

import math
from typing import Any

import faiss
import numpy as np

from benchmarks.peers.ann.base import PROBES, WIDTHS, Algorithm, Effort, one_parameter

faiss.omp_set_num_threads(1)
#: What an index of ours refers to, by its id.
KEPT: dict[int, tuple[Any, Any]] = {}


def flat(items: np.ndarray) -> Any:
    index = faiss.IndexFlatIP(items.shape[1])
    index.add(items)
    return index


def hnsw(items: np.ndarray) -> Any:
    index = faiss.IndexHNSWFlat(items.shape[1], 16, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = 100
    index.add(items)
    return index


def inverted(items: np.ndarray) -> Any:
    count, dimension = items.shape
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, clusters(count), faiss.METRIC_INNER_PRODUCT)
    index.train(items)
    index.add(items)
    return index


def fast_scan(items: np.ndarray) -> Any:
    count, dimension = items.shape
    coarse = faiss.IndexFlatIP(dimension)
    codes = faiss.IndexIVFPQFastScan(coarse, dimension, clusters(count), dimension // 2, 4, faiss.METRIC_INNER_PRODUCT)
    codes.train(items)
    index = faiss.IndexRefineFlat(codes)
    index.add(items)
    KEPT[id(index)] = (coarse, codes)  # Python would let go of them, and of what `find` sets.
    return index


def clusters(count: int) -> int:
    """About the square root of the items, as the other inverted files here."""
    return max(16, round(math.sqrt(count)))


def find(index: Any, queries: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    if "ef" in effort:
        index.hnsw.efSearch = effort["ef"]
    if "probes" in effort:
        index.nprobe = effort["probes"]
    if "rescore" in effort:
        KEPT[id(index)][1].nprobe = effort["leaves"]
        index.k_factor = effort["rescore"] / k
    return index.search(queries, k)[1]


def one(index: Any, query: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    return find(index, query[None], k, effort)[0]


def codes_efforts(items: int, k: int) -> list[dict[str, int]]:
    limit = clusters(items)
    return [{"leaves": p, "rescore": k * max(3, min(40, 2 * p))} for p in PROBES if p <= limit]


ALGORITHMS = {
    "faiss Flat": Algorithm(flat, lambda items, k: [{}], find, one),
    "faiss HNSW": Algorithm(hnsw, one_parameter("ef", WIDTHS), find, one),
    "faiss IVF": Algorithm(
        inverted, lambda items, k: [{"probes": p} for p in PROBES if p <= clusters(items)], find, one
    ),
    "faiss IVFPQ fast scan": Algorithm(fast_scan, codes_efforts, find, one),
}
