"""Neighbour sampling: a few neighbours of each node, layer by layer from the outputs back.

Paper: Hamilton, Ying, Leskovec. Inductive representation learning on large graphs. NeurIPS 2017,
https://arxiv.org/abs/1706.02216

Differs: neighbours are drawn without replacement, and all are taken where there are no more than asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tfkit.graphs.sampling import kernels
from tfkit.graphs.sampling.blocks import Batch, Block, Sampler
from tfkit.internal import checks


class NeighbourSampler(Sampler):
    """Uniform neighbours, at most `fanouts[l]` for layer l.

    A block's values are those of the adjacency times (neighbours / neighbours drawn), so that the product with it is
    unbiased. Its first inputs are its outputs, as `SAGEConv` needs them.

    Args:
        adjacency: as in `Sampler`.
        fanouts: neighbours of each layer, the first layer's first; None in a place: all of them.
        batch_size: nodes a batch.
        nodes: ids of the nodes to cover; None: all.
        shuffle: False keeps the order of `nodes`, for prediction.
        seed: of the draws.
    """

    def __init__(
        self,
        adjacency: Any,
        fanouts: Sequence[int | None],
        batch_size: int = 512,
        nodes: Any = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(adjacency, nodes, seed=seed)
        if not fanouts:
            raise checks.error("fanouts", "a number of neighbours for each layer", fanouts)
        self.fanouts = [None if fanout is None else checks.integer("fanouts", fanout, 1) for fanout in fanouts]
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.shuffle = bool(shuffle)

    def __len__(self) -> int:
        return -(-len(self.nodes) // self.batch_size)

    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        order = self._shuffled(epoch) if self.shuffle else self.nodes
        for number, start in enumerate(range(0, len(order), self.batch_size)):
            yield self.sample(order[start : start + self.batch_size], epoch, number)

    def sample(self, targets: np.ndarray, *counters: int) -> Batch:
        """Draws the batch of `targets`; other `counters` give other draws."""
        targets = np.asarray(targets, np.int64)
        blocks: list[Block] = []
        outputs = targets
        for layer in range(len(self.fanouts) - 1, -1, -1):
            rows, entries, scales = self.draw(outputs, self.fanouts[layer], self._bits(*counters, layer))
            inputs, columns = self.number(outputs, self.indices[entries])
            indices = np.stack([rows, columns], axis=1)
            blocks.append(Block(indices, self.values[entries] * scales, (len(outputs), len(inputs))))
            outputs = inputs
        return Batch(outputs, tuple(reversed(blocks)), targets, np.ones(len(targets), "float32"))

    def draw(
        self, outputs: np.ndarray, fanout: int | None, bits: np.uint64
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws entries of the rows `outputs`.

        Returns:
            For each entry its row among `outputs`, its position in the CSR arrays, and neighbours / neighbours drawn.
        """
        degrees = self.indptr[outputs + 1] - self.indptr[outputs]
        if fanout is None:
            rows, entries = self.whole_rows(outputs)
            return rows, entries, np.ones(len(rows), "float32")
        chosen, counts = np.empty((len(outputs), fanout), np.int64), np.empty(len(outputs), np.int64)
        kernels.sample_rows(self.indptr, outputs, fanout, bits, chosen, counts)
        rows = np.repeat(np.arange(len(outputs)), counts)
        entries = chosen[np.arange(fanout) < counts[:, None]]
        # Rows are sorted, so that the block is sorted by column only within what was drawn; products need rows alone.
        return rows, entries, np.repeat((degrees / np.maximum(counts, 1)).astype("float32"), counts)

    def whole_rows(self, outputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns row number and CSR position of every entry of the rows `outputs`."""
        total = int((self.indptr[outputs + 1] - self.indptr[outputs]).sum())
        rows, entries = np.empty(total, np.int64), np.empty(total, np.int64)
        kernels.all_entries(self.indptr, outputs, rows, entries)
        return rows, entries

    def number(self, outputs: np.ndarray, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the inputs, `outputs` first, and the local numbers of `found` among them."""
        columns = found.astype(np.int64)
        order = np.empty(len(outputs) + len(columns), np.int64)
        if not hasattr(self, "_position"):
            self._position = np.full(self.num_nodes, -1, np.int64)
        count = kernels.renumber(outputs, columns, self._position, order)
        return order[:count], columns
