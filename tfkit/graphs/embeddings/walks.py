"""DeepWalk and node2vec: random walks read as sentences by skip-gram.

Paper: Perozzi, Al-Rfou, Skiena. DeepWalk: online learning of social representations. KDD 2014,
https://arxiv.org/abs/1403.6652; Grover, Leskovec. node2vec: scalable feature learning for networks. KDD 2016,
https://arxiv.org/abs/1607.00653

Differs: DeepWalk learns by negative sampling in place of the hierarchical softmax, as its later comparisons have it;
node2vec's steps are drawn by rejection, without a table for each edge.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.graphs.embeddings import kernels
from tfkit.graphs.embeddings.base import Embedding
from tfkit.graphs.graph import Graph
from tfkit.internal import checks

#: Entries of the table from which negatives are drawn.
TABLE = 1 << 20


def random_walks(
    graph: Graph, walks: int = 10, length: int = 80, *, p: float = 1.0, q: float = 1.0, seed: int = 0
) -> np.ndarray:
    """Returns random walks, along edges as (i, j) of the adjacency, shuffled.

    Args:
        graph: directed or not; edges with larger weights are taken more often.
        walks: from each node.
        length: nodes of a walk.
        p: return parameter of node2vec: going straight back weighs 1 / p.
        q: in-out parameter: going where the node before has no edge to weighs 1 / q.
        seed: of the draws.

    Returns:
        (nodes * walks, length) int32; -1 after the end of a walk that found no way on.
    """
    matrix = graph.adjacency
    starts = start_nodes(matrix.shape[0], checks.integer("walks", walks, 1), seed)
    return _walk(matrix, starts, checks.integer("length", length, 1), p, q, seed)


def start_nodes(nodes: int, walks: int, seed: int) -> np.ndarray:
    """Returns every node `walks` times, each pass in an order of its own."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(nodes) for _ in range(walks)]).astype(np.int64)


def _walk(matrix: sp.csr_array, starts: np.ndarray, length: int, p: float, q: float, seed: int) -> np.ndarray:
    p, q = checks.number("p", p, 1e-6), checks.number("q", q, 1e-6)
    weighted = bool(len(matrix.data)) and bool((matrix.data != matrix.data[0]).any())
    cumulated = _cumulated_rows(matrix) if weighted else np.zeros(1)
    found = np.empty((len(starts), length), np.int32)
    graph = (np.asarray(matrix.indptr, np.int64), np.asarray(matrix.indices, np.int32))
    bits = np.random.SeedSequence([seed, 1]).generate_state(1, np.uint64)[0]
    if p != 1 or q != 1:
        kernels.biased_walks(*graph, cumulated, weighted, starts, length, p, q, bits, found)
    elif weighted:
        kernels.weighted_walks(*graph, cumulated, starts, length, bits, found)
    else:
        kernels.uniform_walks(*graph, starts, length, bits, found)
    return found


def _cumulated_rows(matrix: sp.csr_array) -> np.ndarray:
    """Returns the running sums of the weights within each row."""
    sums = np.cumsum(matrix.data, dtype=np.float64)
    before = np.concatenate([[0.0], sums])[matrix.indptr[:-1]]
    return sums - np.repeat(before, np.diff(matrix.indptr))


def negative_table(counts: np.ndarray, power: float = 0.75, size: int = TABLE) -> np.ndarray:
    """Returns node ids, each as often as its count to the power."""
    weights = np.asarray(counts, np.float64) ** power * (np.asarray(counts) > 0)
    positions = (np.arange(size) + 0.5) / size * weights.sum()
    return np.searchsorted(np.cumsum(weights), positions).astype(np.int32)


class DeepWalk(Embedding):
    """Uniform walks, and skip-gram with negative sampling.

    Args:
        dimension: of the vectors.
        walks: from each node.
        length: nodes of a walk.
        window: the most steps between a node and its context.
        negatives: noise nodes a pair.
        epochs: passes over fresh walks; the learning rate falls along all of them.
        learning_rate: at the start; it falls linearly to a ten-thousandth of it.
        seed: of walks and vectors.
    """

    p, q = 1.0, 1.0

    def __init__(
        self,
        dimension: int = 128,
        *,
        walks: int = 80,
        length: int = 40,
        window: int = 10,
        negatives: int = 5,
        epochs: int = 1,
        learning_rate: float = 0.025,
        seed: int = 0,
    ) -> None:
        super().__init__(dimension, seed=seed)
        self.walks, self.length = checks.integer("walks", walks, 1), checks.integer("length", length, 2)
        self.window, self.negatives = checks.integer("window", window, 1), checks.integer("negatives", negatives, 1)
        self.epochs = checks.integer("epochs", epochs, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        nodes = adjacency.shape[0]
        rng = np.random.default_rng([self.seed, 2])
        centers = ((rng.random((nodes, self.dimension), "float32") - 0.5) / self.dimension).astype("float32")
        contexts = np.zeros_like(centers)
        # The walks of a pass are made together: their count decides how often a node is a negative.
        for epoch in range(self.epochs):
            walks = _walk(
                adjacency,
                start_nodes(nodes, self.walks, self.seed + epoch),
                self.length,
                self.p,
                self.q,
                self.seed + epoch,
            )
            table = negative_table(np.bincount(walks[walks >= 0], minlength=nodes))
            ends = [self.learning_rate * max(1 - share / self.epochs, 1e-4) for share in (epoch, epoch + 1)]
            kernels.skip_gram(
                walks, self.window, self.negatives, table, 0, len(walks), np.array(ends), self.seed, centers, contexts
            )
        return centers


class Node2Vec(DeepWalk):
    """Walks biased by p and q, and skip-gram with negative sampling.

    Args:
        dimension: of the vectors.
        p, q: as in `random_walks`.
        **kwargs: as in `DeepWalk`.
    """

    def __init__(self, dimension: int = 128, *, p: float = 1.0, q: float = 1.0, **kwargs: object) -> None:
        super().__init__(dimension, **kwargs)  # type: ignore[arg-type]
        self.p, self.q = checks.number("p", p, 1e-6), checks.number("q", q, 1e-6)
