"""ScaNN as its own package offers it: the builder and the searcher's methods, with the settings its page advises."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scann import scann_ops_pybind

from benchmarks.peers.ann.base import Algorithm, Effort, leaves_and_rescore


def tree(items: np.ndarray) -> Any:
    leaves = round(math.sqrt(len(items)))
    builder = scann_ops_pybind.builder(items, 10, "dot_product").set_n_training_threads(1)
    builder = builder.tree(leaves, max(1, leaves // 10), training_sample_size=min(len(items), 250_000))
    return builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build()


def brute_force(items: np.ndarray) -> Any:
    builder = scann_ops_pybind.builder(items, 10, "dot_product").set_n_training_threads(1)
    return builder.score_brute_force().build()


def search(index: Any, queries: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    return index.search_batched(queries, k, effort.get("rescore"), effort.get("leaves"))[0].astype(np.int64)


def single(index: Any, query: np.ndarray, k: int, effort: Effort) -> np.ndarray:
    return index.search(query, k, effort.get("rescore", -1), effort.get("leaves", -1))[0]


ALGORITHMS = {
    "scann": Algorithm(tree, leaves_and_rescore, search, single),
    "scann brute force": Algorithm(brute_force, lambda items, k: [{}], search, single),
}
