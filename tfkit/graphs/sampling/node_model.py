"""Graph models over node ids: neighbours are drawn inside the step, so that any `fit` trains them, on workers too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import scipy.sparse as sp
import tensorflow as tf

from tfkit.graphs.graph import Graph, finite_rows
from tfkit.graphs.layers.gat import GAT
from tfkit.graphs.layers.gcn import GCN
from tfkit.graphs.layers.graph_sage import GraphSAGE
from tfkit.graphs.normalization import gcn_normalize
from tfkit.internal import checks


class NodeModel(keras.Model):
    """Takes ids of nodes and gives their logits, by a model of blocks: for `fit`, `evaluate` and `predict` on ids.

    In training each layer draws at most its `fanout` of a node's neighbours, without replacement, and scales their
    weights by neighbours / neighbours drawn; otherwise it takes all of them. Graph and features are constants of the
    model, one copy a worker. Save the inner model, `.inner`, which is what was trained.

    Made inside `strategy.scope()`, it trains on several workers by `tfkit.training.distribute.fit(model, ids, labels)`.

    Args:
        inner: a GCN, GraphSAGE or GAT.
        graph: with features, sparse or dense.
        fanouts: neighbours of each layer, the first layer's first; None, or None in a place: all.
        adjacency: by which layers propagate; None: `gcn_normalize` of the graph's. GraphSAGE takes the graph's own.
        seed: of the draws.
    """

    def __init__(
        self,
        inner: GCN | GraphSAGE | GAT,
        graph: Graph,
        fanouts: Sequence[int | None] | None = None,
        *,
        adjacency: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(inner, (GCN, GraphSAGE, GAT)):
            raise checks.error("inner", "a GCN, GraphSAGE or GAT, which take a block for each layer", inner)
        if graph.features is None or not graph.num_nodes:
            raise checks.error("graph", "with nodes and features", graph)
        matrix = gcn_normalize(graph.adjacency) if adjacency is None else sp.csr_array(adjacency)
        if matrix.shape != graph.adjacency.shape:
            raise checks.error("adjacency", f"of shape {graph.adjacency.shape}", matrix)
        depth = len(inner.stack)
        fanouts = [None] * depth if fanouts is None else list(fanouts)
        if len(fanouts) != depth:
            raise checks.error("fanouts", f"{depth} numbers, one for each layer", fanouts)
        self.inner, self.num_nodes, self.width = inner, graph.num_nodes, graph.features.shape[1]
        self.fanouts = [None if each is None else checks.integer("fanouts", each, 1) for each in fanouts]
        self.generator = keras.random.SeedGenerator(seed)
        self.supports_jit = False
        # Eager tensors are captured by a compiled step; NumPy arrays would be copied into it.
        self._matrix = _Rows(matrix)
        features = graph.features
        self._features = (
            _Rows(features)
            if sp.issparse(features)
            else tf.constant(finite_rows(np.asarray(features, "float32")), tf.float32)
        )

    def build(self, input_shape: Any) -> None:
        if not self.inner.built:
            self.inner.build([(None, self.width), (None, None)])
        self.built = True

    def call(self, nodes: tf.Tensor, training: bool | None = False) -> tf.Tensor:
        outputs = tf.cast(tf.reshape(nodes, [-1]), "int64")
        message = f"nodes must be ids from 0 to {self.num_nodes - 1}."
        checked = tf.debugging.assert_less(tf.cast(outputs, "uint64"), tf.constant(self.num_nodes, "uint64"), message)
        with tf.control_dependencies([] if checked is None else [checked]):
            # An id that is given twice is computed once.
            outputs, position = tf.unique(outputs, out_idx=tf.int64)
        blocks = []
        for fanout in reversed(self.fanouts):
            block, outputs = self._block(outputs, fanout if training else None)
            blocks.append(block)
        features = self._rows_of_features(outputs)
        return tf.gather(self.inner((features, *reversed(blocks)), training=training), position)

    def _block(self, outputs: tf.Tensor, fanout: int | None) -> tuple[tf.SparseTensor, tf.Tensor]:
        """Returns the block of `outputs`, and its inputs, the outputs first."""
        rows, columns, values = self._matrix.take(outputs)
        if fanout is not None:
            noise = keras.random.uniform(tf.shape(rows), seed=self.generator)
            kept, scale = draw(rows, noise, fanout, tf.size(outputs))
            rows, columns = tf.boolean_mask(rows, kept), tf.boolean_mask(columns, kept)
            values = tf.boolean_mask(values * scale, kept)
        inputs, numbers = tf.unique(tf.concat([outputs, columns], axis=0), out_idx=tf.int64)
        count = tf.size(outputs, out_type=tf.int64)
        shape = tf.stack([count, tf.size(inputs, out_type=tf.int64)])
        return tf.SparseTensor(tf.stack([rows, numbers[count:]], axis=1), values, shape), inputs

    def _rows_of_features(self, nodes: tf.Tensor) -> Any:
        if not isinstance(self._features, _Rows):
            return tf.gather(self._features, nodes)
        rows, columns, values = self._features.take(nodes)
        shape = tf.stack([tf.size(nodes, out_type=tf.int64), tf.constant(self.width, tf.int64)])
        return tf.SparseTensor(tf.stack([rows, columns], axis=1), values, shape)

    def get_config(self) -> dict[str, Any]:
        """Refuses: a file of the model would be one of the graph.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "A NodeModel holds its graph and is not saved. Save what was trained, model.inner, and wrap it again after "
            "loading: NodeModel(keras.saving.load_model(path), graph)."
        )

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[0], self.inner.stack[-1].units)


def draw(rows: tf.Tensor, noise: tf.Tensor, fanout: int, count: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Chooses at most `fanout` entries of each row: those of the least noise.

    Args:
        rows: (entries,) row numbers, sorted.
        noise: (entries,) uniform in [0, 1).
        fanout: the most of a row.
        count: rows.

    Returns:
        Whether each entry is chosen, and entries of its row / chosen ones of its row.
    """
    order = tf.argsort(tf.cast(rows, "float64") + tf.cast(noise, "float64"))
    degrees = tf.math.bincount(tf.cast(rows, "int32"), minlength=count, maxlength=count)
    # Sorted by row, so that an entry's rank is its place less its row's start.
    rank = tf.range(tf.size(rows)) - tf.gather(tf.cumsum(degrees, exclusive=True), rows)
    kept = tf.scatter_nd(order[:, None], tf.cast(rank < fanout, "int32"), tf.shape(rows)) > 0
    scale = tf.cast(degrees, "float32") / tf.cast(tf.clip_by_value(degrees, 1, fanout), "float32")
    return kept, tf.gather(scale, rows)


class _Rows:
    """A sparse matrix whose rows are taken inside a TensorFlow graph."""

    def __init__(self, matrix: sp.csr_array) -> None:
        self.indptr = tf.constant(matrix.indptr, tf.int64)
        self.indices = tf.constant(matrix.indices, tf.int64)
        self.values = tf.constant(matrix.data, tf.float32)

    def take(self, rows: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns the entries of these rows: place of the row among `rows`, column, value."""
        starts = tf.gather(self.indptr, rows)
        ranges = tf.ragged.range(starts, tf.gather(self.indptr, rows + 1))
        entries = ranges.flat_values
        return ranges.value_rowids(), tf.gather(self.indices, entries), tf.gather(self.values, entries)
