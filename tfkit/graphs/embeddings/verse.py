"""VERSE: vectors whose products follow personalised PageRank.

Paper: Tsitsulin, Mottin, Karras, Mueller. VERSE: versatile graph embeddings from similarity measures. WWW 2018,
https://arxiv.org/abs/1803.04742
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from tfkit.graphs.embeddings import kernels
from tfkit.graphs.embeddings.base import Embedding
from tfkit.internal import checks


class VERSE(Embedding):
    """Noise-contrastive estimation of the PageRank from every node, one table of vectors; steps ignore weights.

    Args:
        dimension: of the vectors.
        alpha: chance that a walk goes on at each step.
        samples_per_node: draws, over the nodes there are.
        negatives: noise nodes a draw.
        learning_rate: at the start; it falls linearly to a hundredth of it.
        seed: of draws and vectors.
    """

    def __init__(
        self,
        dimension: int = 128,
        *,
        alpha: float = 0.85,
        samples_per_node: int = 5000,
        negatives: int = 3,
        learning_rate: float = 0.025,
        seed: int = 0,
    ) -> None:
        super().__init__(dimension, seed=seed)
        self.alpha = checks.number("alpha", alpha, 0, 1, open_high=True)
        self.samples_per_node = checks.integer("samples_per_node", samples_per_node, 1)
        self.negatives = checks.integer("negatives", negatives, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 0)

    def _embed(self, adjacency: sp.csr_array) -> np.ndarray:
        nodes = adjacency.shape[0]
        rng = np.random.default_rng([self.seed, 3])
        found = rng.random((nodes, self.dimension), "float32") - np.float32(0.5)
        kernels.similarity_steps(
            np.asarray(adjacency.indptr, np.int64),
            np.asarray(adjacency.indices, np.int32),
            self.alpha,
            self.negatives,
            self.samples_per_node * nodes,
            np.array([self.learning_rate, self.learning_rate * 0.01]),
            self.seed,
            found,
        )
        return found
