"""GraphSAINT: random subgraphs, with weights that undo how often nodes and edges come into them.

Paper: Zeng, Zhou, Srivastava, Kannan, Prasanna. GraphSAINT: graph sampling based inductive learning method. ICLR 2020,
https://arxiv.org/abs/1907.04931
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tfkit.graphs.sampling import kernels
from tfkit.graphs.sampling.blocks import Batch, Block, Sampler
from tfkit.internal import checks

KINDS = ("node", "edge", "walk")


class SaintSampler(Sampler):
    """Draws subgraphs, and counts in trial draws how often nodes and edges are in them.

    Entry (u, v) of a batch's adjacency is divided by the share of u's subgraphs that hold v, and the loss of v by v's
    share of all subgraphs, so that the first propagation and the loss are unbiased.

    Args:
        adjacency: as in `Sampler`.
        kind: "node", drawn by the squared column norms; "edge", by 1 / degree of both ends; "walk", the nodes of random
            walks from uniform roots.
        size: nodes, edges or roots that are drawn, with replacement.
        walk_length: steps of each walk.
        batches_per_epoch: subgraphs; None: nodes / size.
        trials: subgraphs for the counts.
        nodes: ids of the nodes whose loss counts; None: all.
        seed: of trials and draws.
    """

    def __init__(
        self,
        adjacency: Any,
        kind: str = "walk",
        size: int = 500,
        *,
        walk_length: int = 2,
        batches_per_epoch: int | None = None,
        trials: int = 50,
        nodes: Any = None,
        seed: int = 0,
    ) -> None:
        super().__init__(adjacency, nodes, seed=seed)
        self.kind = checks.choice("kind", kind, KINDS)
        self.size = checks.integer("size", size, 1)
        self.walk_length = checks.integer("walk_length", walk_length, 1)
        default = max(1, self.num_nodes // self.size) if batches_per_epoch is None else batches_per_epoch
        self.batches_per_epoch = checks.integer("batches_per_epoch", default, 1)
        self._rows = np.repeat(np.arange(self.num_nodes), np.diff(self.indptr))
        if kind != "walk" and not len(self.indices):
            raise checks.error("kind", "'walk' for a matrix without entries", kind, "Or add self loops.")
        if kind != "walk":
            self._cumulated = np.cumsum(self._chances())
        self._counts = np.zeros(self.num_nodes)
        self._counts[self.nodes] = 1
        self._estimate(checks.integer("trials", trials, 1))

    def __len__(self) -> int:
        return self.batches_per_epoch

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        for number in range(self.batches_per_epoch):
            yield self.sample(1, epoch, number)

    def sample(self, *counters: int) -> Batch:
        """Draws the subgraph of these counters."""
        nodes = self.draw(*counters)
        pairs, entries = self.induced(nodes)
        # A pair that no trial had is as rare as once in all of them and one more.
        share = np.maximum(self.edge_counts[entries], 1) / np.maximum(self.node_counts[nodes[pairs[:, 0]]], 1)
        values = (self.values[entries] / share).astype("float32")
        chance = np.maximum(self.node_counts[nodes], 1) / self.trials
        weights = (self._counts[nodes] / chance / self.batches_per_epoch).astype("float32")
        return Batch(nodes, (Block(pairs, values, (len(nodes), len(nodes))),), nodes, weights)

    def draw(self, *counters: int) -> np.ndarray:
        """Draws the nodes of a subgraph, sorted."""
        rng = np.random.default_rng([self.seed, *counters])
        if self.kind == "walk":
            roots = rng.integers(0, self.num_nodes, self.size)
            found = np.empty((self.size, self.walk_length + 1), np.int64)
            kernels.walk_nodes(self.indptr, self.indices, roots, self.walk_length, self._bits(*counters), found)
            return np.unique(found)
        draws = np.searchsorted(self._cumulated, rng.random(self.size) * self._cumulated[-1], side="right")
        draws = np.minimum(draws, len(self._cumulated) - 1)
        if self.kind == "node":
            return np.unique(draws)
        return np.unique(np.concatenate([self._rows[draws], self.indices[draws]]))

    def _chances(self) -> np.ndarray:
        if self.kind == "node":
            return np.bincount(self.indices, self.values.astype(np.float64) ** 2, minlength=self.num_nodes)
        degrees = np.maximum(np.diff(self.indptr), 1)
        columns = np.maximum(np.bincount(self.indices, minlength=self.num_nodes), 1)
        return 1 / degrees[self._rows] + 1 / columns[self.indices]

    def _estimate(self, trials: int) -> None:
        self.trials = trials
        self.node_counts, self.edge_counts = np.zeros(self.num_nodes), np.zeros(len(self.indices))
        for trial in range(trials):
            nodes = self.draw(0, trial)
            self.node_counts[nodes] += 1
            self.edge_counts[self.induced(nodes)[1]] += 1
