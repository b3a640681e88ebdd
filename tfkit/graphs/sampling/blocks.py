"""Blocks: what the samplers give, in NumPy; and their common base."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import tensorflow as tf

from tfkit.graphs.graph import Graph, finite_rows
from tfkit.graphs.sampling import kernels
from tfkit.internal import checks


class Block(NamedTuple):
    """A sparse matrix between numbered nodes: (outputs, inputs), sorted by row.

    Attributes:
        indices: (entries, 2) int64.
        values: (entries,) float32.
        shape: (outputs, inputs).
    """

    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]

    def tensor(self) -> tf.SparseTensor:
        """Returns it as a sparse tensor."""
        return tf.SparseTensor(self.indices, self.values, self.shape)


class Batch(NamedTuple):
    """A batch of nodes with what a model needs to compute them.

    Attributes:
        inputs: ids of the nodes whose features are needed.
        blocks: an adjacency for each layer, the first layer's first. In a sampled subgraph it is one for all.
        targets: ids of the nodes that come out, in the order of the model's rows.
        weights: (targets,) the loss weight of each; their sum over an epoch is the number of nodes asked for.
    """

    inputs: np.ndarray
    blocks: tuple[Block, ...]
    targets: np.ndarray
    weights: np.ndarray

    def tensors(self, features: Any) -> tuple[Any, ...]:
        """Returns (features of the inputs, *blocks) as tensors, for a model.

        Args:
            features: those of the whole graph: an array, a memory-mapped one, or a SciPy CSR array.
        """
        return (rows_of(features, self.inputs), *(block.tensor() for block in self.blocks))


class Sampler(abc.ABC):
    """Draws batches. `batches(epoch)` gives the same ones for the same seed and epoch, whatever was asked before.

    Args:
        adjacency: the matrix by which layers propagate, normalised as they need it; or a graph, for its plain one.
        nodes: ids of the nodes to cover; None: all.
        seed: of the draws.
    """

    def __init__(self, adjacency: sp.csr_array | Graph, nodes: Any = None, *, seed: int = 0) -> None:
        matrix = adjacency.adjacency if isinstance(adjacency, Graph) else sp.csr_array(adjacency)
        if matrix.shape[0] != matrix.shape[1] or matrix.shape[0] == 0:
            raise checks.error("adjacency", "square, of one node or more", adjacency)
        self.indptr = np.asarray(matrix.indptr, np.int64)
        self.indices = np.asarray(matrix.indices, np.int32)
        self.values = np.asarray(matrix.data, np.float32)
        self.num_nodes = matrix.shape[0]
        self.nodes = np.arange(self.num_nodes) if nodes is None else np.asarray(nodes, np.int64).ravel()
        if not len(self.nodes) or self.nodes.min() < 0 or self.nodes.max() >= self.num_nodes:
            raise checks.error("nodes", f"one id or more from 0 to {self.num_nodes - 1}", nodes)
        self.seed = checks.integer("seed", seed, 0)

    @abc.abstractmethod
    def batches(self, epoch: int = 0) -> Iterator[Batch]:
        """Yields one epoch's batches."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Batches of an epoch."""

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.nodes)

    def _bits(self, *counters: int) -> np.uint64:
        """Returns 64 bits that belong to these counters."""
        return np.random.SeedSequence([self.seed, *counters]).generate_state(1, np.uint64)[0]

    def induced(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the entries among `nodes`: (entries, 2) local numbers, and positions in the CSR arrays."""
        position = np.full(self.num_nodes, -1, np.int32)
        size = kernels.induced_size(self.indptr, self.indices, nodes, position)
        pairs, entries = np.empty((size, 2), np.int64), np.empty(size, np.int64)
        kernels.induced_fill(self.indptr, self.indices, nodes, position, pairs[:, 0], pairs[:, 1], entries)
        return pairs, entries


def rows_of(features: Any, nodes: np.ndarray) -> Any:
    """Returns the rows as a tensor; a `tf.SparseTensor` if `features` are sparse.

    Raises:
        ValueError: a row holds NaN or infinity. Memory-mapped ones only are looked at: no one has before.
    """
    chosen = features[nodes]
    if not sp.issparse(chosen):
        dense = np.ascontiguousarray(chosen, "float32")
        return tf.convert_to_tensor(finite_rows(dense, nodes) if isinstance(features, np.memmap) else dense)
    rows = np.repeat(np.arange(len(nodes)), np.diff(chosen.indptr))
    indices = np.stack([rows, chosen.indices], axis=1).astype(np.int64)
    return tf.SparseTensor(indices, chosen.data.astype("float32"), chosen.shape)
