"""TensorFlow Recommenders: a model's two towers in an index of tfkit, and its metrics over all candidates.

The package needs Keras 2; nothing of it is imported here. A tower is anything that is called with a batch of inputs and
gives vectors, as `tfrs.Model`s hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import Exact, Index
from tfkit.retrieval.base import as_vectors


def index_candidates(tower: Callable[[Any], Any], batches: Iterable[Any], index: Index | None = None) -> Index:
    """Builds an index of what a candidate tower gives.

    Args:
        tower: from a batch of candidates to vectors, (batch, dimension).
        batches: of candidates, such as a batched `tf.data.Dataset`; ids of the index count them in this order.
        index: to build; None: `Exact`.
    """
    vectors = [np.asarray(tower(batch)) for batch in batches]
    if not vectors:
        raise checks.error("batches", "at least one batch of candidates", vectors)
    return (Exact() if index is None else index).build(np.concatenate(vectors))


def factorized_top_k(
    queries: Any, positives: Any, candidates: Any, ks: Sequence[int] = (1, 5, 10, 50, 100), *, batch: int = 256
) -> dict[str, float]:
    """Returns what `tfrs.metrics.FactorizedTopK` gives when it is not told ids.

    A query counts at k if fewer than k candidates score above its positive; seen candidates are not left out.

    Args:
        queries, positives: (queries, dimension): vectors of both towers, row by row.
        candidates: (candidates, dimension): of all candidates.
        ks: lengths.
        batch: queries scored at a time.

    Returns:
        By name, as `factorized_top_k/top_5_categorical_accuracy`.

    >>> factorized_top_k([[1.0]], [[2.0]], [[1.0], [2.0], [3.0]], ks=[2])
    {'factorized_top_k/top_2_categorical_accuracy': 1.0}
    """
    everything = as_vectors("candidates", candidates)
    asked = as_vectors("queries", queries, everything.shape[1])
    own = as_vectors("positives", positives, everything.shape[1])
    if len(asked) != len(own):
        raise checks.error("positives", f"{len(asked)} vectors, one a query", own)
    lengths = [checks.integer("ks", k, 1) for k in ks]
    above = np.empty(len(asked), np.int64)
    for start in range(0, len(asked), checks.integer("batch", batch, 1)):
        rows = slice(start, start + batch)
        score = np.einsum("ij,ij->i", asked[rows], own[rows])
        # A positive is among the candidates, where a matrix product may round it otherwise than a single one does.
        slack = 1e-5 * np.maximum(np.abs(score), 1)
        above[rows] = (asked[rows] @ everything.T > (score + slack)[:, None]).sum(1)
    return {f"factorized_top_k/top_{k}_categorical_accuracy": float((above < k).mean()) for k in lengths}
