"""Layer-wise importance sampling: one set of nodes for each layer, drawn by the norms of the adjacency's columns.

Paper: Chen, Ma, Xiao. FastGCN: fast learning with graph convolutional networks via importance sampling. ICLR 2018,
https://arxiv.org/abs/1801.10247
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfkit.graphs.sampling import kernels
from tfkit.graphs.sampling.blocks import Batch, Block, Sampler
from tfkit.internal import checks


class LayerWiseSampler(Sampler):
    """Draws `sizes[l]` inputs of layer l with replacement, node v with chance q(v) ~ |adjacency[:, v]|^2.

    Entries are divided by size * q(v), so that the product with a block is unbiased. For layers that need no features
    of the output nodes themselves, as `GCNConv`.

    Args:
        adjacency: as in `Sampler`, normalised.
        sizes: draws of each layer, the first layer's first.
        batch_size: nodes a batch.
        nodes: ids of the nodes to cover; None: all.
        seed: of the draws.
    """

    def __init__(
        self, adjacency: Any, sizes: Sequence[int], batch_size: int = 512, nodes: Any = None, *, seed: int = 0
    ) -> None:
        super().__init__(adjacency, nodes, seed=seed)
        if not sizes:
            raise checks.error("sizes", "a number of nodes for each layer", sizes)
        self.sizes = [checks.integer("sizes", size, 1) for size in sizes]
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        squares = np.bincount(self.indices, self.values.astype(np.float64) ** 2, minlength=self.num_nodes)
        if not squares.sum():
            raise checks.error("adjacency", "with an entry that is not 0", adjacency)
        self.chances = squares / squares.sum()
        self._cumulated = np.cumsum(self.chances)

    def __len__(self) -> int:
        return -(-len(self.nodes) // self.batch_size)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        order = self._shuffled(epoch)
        for number, start in enumerate(range(0, len(order), self.batch_size)):
            yield self.sample(order[start : start + self.batch_size], epoch, number)

    def sample(self, targets: np.ndarray, *counters: int) -> Batch:
        """Draws the batch of `targets`; other `counters` give other draws."""
        targets = np.asarray(targets, np.int64)
        rng = np.random.default_rng([self.seed, *counters])
        outputs, blocks = targets, []
        for size in reversed(self.sizes):
            draws = np.searchsorted(self._cumulated, rng.random(size) * self._cumulated[-1], side="right")
            inputs, times = np.unique(np.minimum(draws, self.num_nodes - 1), return_counts=True)
            blocks.append(self._between(outputs, inputs, times / (size * self.chances[inputs])))
            outputs = inputs
        return Batch(outputs, tuple(reversed(blocks)), targets, np.ones(len(targets), "float32"))

    def _between(self, outputs: np.ndarray, inputs: np.ndarray, scales: np.ndarray) -> Block:
        position = np.full(self.num_nodes, -1, np.int32)
        position[inputs] = np.arange(len(inputs))
        most = int((self.indptr[outputs + 1] - self.indptr[outputs]).sum())
        pairs, entries = np.empty((most, 2), np.int64), np.empty(most, np.int64)
        count = kernels.rows_between(self.indptr, self.indices, outputs, position, pairs[:, 0], pairs[:, 1], entries)
        values = self.values[entries[:count]] * scales[pairs[:count, 1]]
        return Block(pairs[:count], values.astype("float32"), (len(outputs), len(inputs)))
