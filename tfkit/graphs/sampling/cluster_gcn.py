"""Cluster-GCN: batches of whole clusters, with the edges inside and between them.

Paper: Chiang, Liu, Si, Li, Bengio, Hsieh. Cluster-GCN: an efficient algorithm for training deep and large graph
convolutional networks. KDD 2019, https://arxiv.org/abs/1905.07953

Differs: clusters come from a streaming greedy partition with rounds of refinement in place of METIS.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tfkit.graphs.sampling import kernels
from tfkit.graphs.sampling.blocks import Batch, Block, Sampler
from tfkit.internal import checks


class ClusterSampler(Sampler):
    """Joins `clusters_per_batch` random clusters to each batch; every node is in one batch of an epoch.

    The batch's adjacency is the one induced, its entries scaled so that each row has the sum it has in the whole graph.
    Nodes outside `nodes` have loss weight 0.

    Args:
        adjacency: as in `Sampler`.
        clusters: how many the graph is cut into.
        clusters_per_batch: how many are joined.
        nodes: ids of the nodes whose loss counts; None: all.
        rounds: of refinement of the partition.
        seed: of the partition and of the draws.

    Attributes:
        owner: (nodes,) the cluster of each.
    """

    def __init__(
        self,
        adjacency: Any,
        clusters: int,
        clusters_per_batch: int = 1,
        nodes: Any = None,
        *,
        rounds: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__(adjacency, nodes, seed=seed)
        self.clusters = checks.integer("clusters", clusters, 1, self.num_nodes)
        self.clusters_per_batch = checks.integer("clusters_per_batch", clusters_per_batch, 1, self.clusters)
        self.owner = partition(self.indptr, self.indices, self.clusters, rounds=rounds, seed=self.seed)
        self._by_cluster = np.argsort(self.owner, kind="stable")
        self._starts = np.searchsorted(self.owner[self._by_cluster], np.arange(self.clusters + 1))
        self._counts = np.zeros(self.num_nodes, "float32")
        self._counts[self.nodes] = 1

    def __len__(self) -> int:
        return -(-self.clusters // self.clusters_per_batch)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.clusters)
        for start in range(0, self.clusters, self.clusters_per_batch):
            chosen = order[start : start + self.clusters_per_batch]
            parts = [self._by_cluster[self._starts[c] : self._starts[c + 1]] for c in chosen]
            nodes = np.concatenate(parts)
            if not len(nodes):
                continue
            pairs, entries = self.induced(nodes)
            values = self._rescaled(nodes, pairs[:, 0], self.values[entries])
            block = Block(pairs, values, (len(nodes), len(nodes)))
            yield Batch(nodes, (block,), nodes, self._counts[nodes])

    def _rescaled(self, nodes: np.ndarray, rows: np.ndarray, values: np.ndarray) -> np.ndarray:
        starts, ends = self.indptr[nodes], self.indptr[nodes + 1]
        cumulated = np.concatenate([[0.0], np.cumsum(self.values, dtype=np.float64)])
        whole = cumulated[ends] - cumulated[starts]
        inside = np.bincount(rows, values, minlength=len(nodes))
        scale = np.divide(whole, inside, out=np.zeros(len(nodes)), where=inside != 0)
        return (values * scale[rows]).astype("float32")


def partition(indptr: np.ndarray, indices: np.ndarray, parts: int, *, rounds: int = 10, seed: int = 0) -> np.ndarray:
    """Cuts a graph into parts of nearly one size (at most a tenth above the mean) with few edges between them.

    Args:
        indptr, indices: of the CSR adjacency.
        parts: how many.
        rounds: of refinement.
        seed: of the order in which nodes are looked at: breadth first from random roots.

    Returns:
        (nodes,) part numbers.
    """
    nodes = len(indptr) - 1
    order = breadth_first(indptr, indices, np.random.default_rng(seed).permutation(nodes))
    capacity = max(1, int(np.ceil(1.1 * nodes / parts)))
    return kernels.grow_parts(indptr, indices, order, parts, capacity, checks.integer("rounds", rounds, 0))


@kernels.kernel
def breadth_first(indptr, indices, roots):  # type: ignore[no-untyped-def]
    """Returns the nodes breadth first, from the first root, then from the next that was not reached."""
    nodes = roots.shape[0]
    order = np.empty(nodes, np.int64)
    seen = np.zeros(nodes, np.bool_)
    count = 0
    head = 0
    for r in range(nodes):
        if seen[roots[r]]:
            continue
        seen[roots[r]] = True
        order[count] = roots[r]
        count += 1
        while head < count:
            node = order[head]
            head += 1
            for e in range(indptr[node], indptr[node + 1]):
                if not seen[indices[e]]:
                    seen[indices[e]] = True
                    order[count] = indices[e]
                    count += 1
    return order
