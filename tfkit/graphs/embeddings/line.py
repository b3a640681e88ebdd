"""LINE: nodes with an edge are alike (first order), and so are nodes with the same neighbours (second order).

Paper: Tang, Qu, Wang, Zhang, Yan, Mei. LINE: large-scale information network embedding. WWW 2015,
https://arxiv.org/abs/1503.03578
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.graphs.embeddings import kernels
from tfkit.graphs.embeddings.base import Embedding, symmetric
from tfkit.graphs.embeddings.walks import negative_table
from tfkit.internal import checks

ORDERS = ("first", "second", "both")


class LINE(Embedding):
    """Edges drawn by weight, each against noise nodes.

    Args:
        dimension: of the vectors; "both" gives each order a half, with rows of unit norm side by side.
        order: "first" (of the graph without directions), "second" or "both".
        samples_per_edge: edges drawn, over the edges there are.
        negatives: noise nodes an edge.
        learning_rate: at the start; it falls linearly to a ten-thousandth of it.
        seed: of draws and vectors.
    """

    def __init__(
        self,
        dimension: int = 128,
        *,
        order: str = "both",
        samples_per_edge: int = 200,
        negatives: int = 5,
        learning_rate: float = 0.025,
        seed: int = 0,
    ) -> None:
        super().__init__(dimension, seed=seed)
        self.order = checks.choice("order", order, ORDERS)
        if order == "both" and dimension % 2:
            raise checks.error("dimension", "even where order is 'both'", dimension)
        self.samples_per_edge = checks.integer("samples_per_edge", samples_per_edge, 1)
        self.negatives = checks.integer("negatives", negatives, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        if self.order != "both":
            return self._one(adjacency, self.order, self.dimension)
        parts = [self._one(adjacency, order, self.dimension // 2) for order in ("first", "second")]
        norms = [np.linalg.norm(part, axis=1, keepdims=True) for part in parts]
        return np.concatenate([part / np.maximum(norm, 1e-12) for part, norm in zip(parts, norms, strict=True)], axis=1)

    def _one(self, adjacency: sp.csr_array, order: str, dimension: int) -> np.ndarray:
        matrix = (symmetric(adjacency) if order == "first" else adjacency).tocoo()
        nodes = matrix.shape[0]
        rng = np.random.default_rng([self.seed, ORDERS.index(order)])
        centers = ((rng.random((nodes, dimension), "float32") - 0.5) / dimension).astype("float32")
        contexts = centers if order == "first" else np.zeros_like(centers)
        degrees = np.bincount(matrix.coords[1], matrix.data, minlength=nodes)
        kernels.edge_steps(
            matrix.coords[0].astype(np.int64),
            matrix.coords[1].astype(np.int64),
            np.cumsum(matrix.data, dtype=np.float64),
            self.negatives,
            negative_table(degrees),
            self.samples_per_edge * matrix.nnz,
            np.array([self.learning_rate, self.learning_rate * 1e-4]),
            self.seed,
            centers,
            contexts,
        )
        return centers
