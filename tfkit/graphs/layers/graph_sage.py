"""GraphSAGE: a node's own features beside an aggregate of its neighbours', for nodes never seen in training.

Paper: Hamilton, Ying, Leskovec. Inductive representation learning on large graphs. NeurIPS 2017,
https://arxiv.org/abs/1706.02216

Differs: the matrix over the concatenation of own and neighbours' features is stored as the two that it consists of.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, GraphLayer, GraphModel, seeded, weight_decay
from tfkit.graphs.propagation import check_inputs, propagate
from tfkit.internal import checks

AGGREGATORS = ("mean", "max_pool", "lstm")


@keras.saving.register_keras_serializable(package="tfkit")
class SAGEConv(GraphLayer):
    """Own features times one kernel, plus the neighbours' aggregate times another, plus a bias.

    The aggregators look at which entries of the adjacency are stored and not at their weights; pass it without self
    loops. A node without neighbours has the aggregate 0.

    Args:
        units: output dimensions.
        aggregator: "mean"; "max_pool", the maximum over a ReLU layer of the neighbours; or "lstm", over the neighbours
            in an order that is random in training, and that of the matrix otherwise.
        normalize: divides outputs by their Euclidean norms.
        seed: of the random order.
        **kwargs: as in `GraphLayer`.
    """

    def __init__(
        self, units: int, aggregator: str = "mean", *, normalize: bool = False, seed: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(units, **kwargs)
        self.aggregator = checks.choice("aggregator", aggregator, AGGREGATORS)
        self.normalize = bool(normalize)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)
        self.lstm = keras.layers.LSTM(self.units, seed=seed) if aggregator == "lstm" else None

    def build(self, input_shape: Any) -> None:
        width = self._width(input_shape)
        self.self_kernel = self._kernel("self_kernel", (width, self.units))
        self.neighbour_kernel = self._kernel(
            "neighbour_kernel", (width if self.aggregator == "mean" else self.units, self.units)
        )
        if self.aggregator == "max_pool":
            self.pool_kernel = self._kernel("pool_kernel", (width, self.units))
            self.pool_bias = self.add_weight(name="pool_bias", shape=(self.units,), initializer="zeros")
        if self.lstm is not None:
            self.lstm.build((None, None, width))
        self.bias = self._bias()
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        features, adjacency = check_inputs(inputs)
        outputs = tf.shape(adjacency)[0] if isinstance(adjacency, tf.Tensor) else adjacency.dense_shape[0]
        # Own features are the first rows; the rest is multiplied in vain, which costs less than slicing sparse rows.
        own = propagate(features, tf.convert_to_tensor(self.self_kernel))[:outputs]
        x = own + self._aggregate(features, adjacency, bool(training))
        x = self._finish(x, self.bias)
        return tf.math.l2_normalize(x, axis=-1, epsilon=1e-12) if self.normalize else x

    def _aggregate(self, features: Any, adjacency: Any, training: bool) -> tf.Tensor:
        kernel = tf.convert_to_tensor(self.neighbour_kernel)
        if self.aggregator == "mean":
            messages = propagate(features, kernel)
            return propagate(mean_weights(adjacency), messages)
        if self.aggregator == "max_pool":
            pooled = tf.nn.relu(propagate(features, tf.convert_to_tensor(self.pool_kernel)) + self.pool_bias)
            return tf.matmul(neighbour_max(pooled, adjacency), kernel)
        assert self.lstm is not None
        dense = tf.sparse.to_dense(features) if isinstance(features, tf.SparseTensor) else features
        seed = self.generator if training else None
        sequences, present = neighbour_sequences(dense, adjacency, seed)
        found = self.lstm(sequences, mask=present)
        # An LSTM without a step would still give its initial state through the mask: zeros, but say so.
        return tf.matmul(found * tf.cast(present[:, :1], found.dtype), kernel)

    def get_config(self) -> dict[str, Any]:
        own = {"aggregator": self.aggregator, "normalize": self.normalize, "seed": self.seed}
        return {**super().get_config(), **own}


def mean_weights(adjacency: Any) -> Any:
    """Returns the adjacency with 1 / (stored entries of the row) at each of them."""
    if isinstance(adjacency, tf.SparseTensor):
        rows = adjacency.indices[:, 0]
        counts = tf.math.unsorted_segment_sum(tf.ones_like(adjacency.values), rows, adjacency.dense_shape[0])
        return adjacency.with_values(tf.gather(1 / tf.maximum(counts, 1), rows))
    present = tf.cast(tf.not_equal(adjacency, 0), "float32")
    return tf.math.divide_no_nan(present, tf.reduce_sum(present, axis=1, keepdims=True))


def neighbour_max(x: tf.Tensor, adjacency: Any) -> tf.Tensor:
    """Returns the maximum over each row's neighbours, 0 where there are none: (outputs, dimensions)."""
    sparse = adjacency if isinstance(adjacency, tf.SparseTensor) else tf.sparse.from_dense(adjacency)
    rows, columns = sparse.indices[:, 0], sparse.indices[:, 1]
    found = tf.math.unsorted_segment_max(tf.gather(x, columns), rows, sparse.dense_shape[0])
    present = tf.math.unsorted_segment_max(tf.ones_like(rows), rows, sparse.dense_shape[0]) == 1
    return tf.where(present[:, None], found, 0.0)


def neighbour_sequences(x: tf.Tensor, adjacency: Any, seed: Any = None) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns each row's neighbours as a padded sequence, and which steps are there.

    Args:
        x: (inputs, dimensions).
        adjacency: (outputs, inputs).
        seed: of a random order; None: that of the matrix.

    Returns:
        (outputs, most neighbours, dimensions), and booleans (outputs, most neighbours).
    """
    sparse = adjacency if isinstance(adjacency, tf.SparseTensor) else tf.sparse.from_dense(adjacency)
    rows, columns = sparse.indices[:, 0], sparse.indices[:, 1]
    if seed is not None:
        noise = tf.cast(keras.random.uniform(tf.shape(rows), seed=seed), "float64")
        columns = tf.gather(columns, tf.argsort(tf.cast(rows, "float64") + noise))
    count = sparse.dense_shape[0]
    ragged = tf.RaggedTensor.from_value_rowids(columns, rows, nrows=count)
    # One step at least, so that a block without any edge is a sequence too.
    width = tf.maximum(ragged.bounding_shape(axis=1), 1)
    padded = ragged.to_tensor(default_value=-1, shape=tf.stack([count, width]))
    present = padded >= 0
    sequences = tf.gather(x, tf.maximum(padded, 0)) * tf.cast(present, x.dtype)[:, :, None]
    sequences.set_shape((None, None, x.shape[1]))
    return sequences, present


def unsupervised_loss(embeddings: tf.Tensor, pairs: tf.Tensor, negatives: tf.Tensor) -> tf.Tensor:
    """The paper's loss without labels: nodes that meet on short walks are alike, random ones are not.

    -log sigmoid(z_u . z_v) - sum over the negatives of log sigmoid(-z_u . z_n), averaged over the pairs.

    Args:
        embeddings: (nodes, dimensions).
        pairs: (pairs, 2) nodes that meet.
        negatives: (pairs, negatives) nodes drawn by degree to the power 3/4.

    Returns:
        A scalar.
    """
    first, second = tf.gather(embeddings, pairs[:, 0]), tf.gather(embeddings, pairs[:, 1])
    alike = tf.reduce_sum(first * second, axis=1)
    other = tf.einsum("pd,pnd->pn", first, tf.gather(embeddings, negatives))
    each = tf.math.softplus(-alike) + tf.reduce_sum(tf.math.softplus(other), axis=1)
    return tf.reduce_mean(each)


@keras.saving.register_keras_serializable(package="tfkit")
class GraphSAGE(GraphModel):
    """GraphSAGE convolutions with ReLU and dropout; gives logits, or embeddings with `normalize`.

    Args:
        classes: outputs.
        hidden: units of each hidden layer.
        layers: convolutions, so blocks of a sampled batch.
        aggregator: as in `SAGEConv`.
        dropout: of the inputs of each layer.
        l2: weight decay of all kernels, l2 / 2 |W|^2.
        normalize: outputs of every layer are divided by their norms, as in the paper's algorithm 1.
        seed: of initial weights, dropout and orders.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 128,
        layers: int = 2,
        *,
        aggregator: str = "mean",
        dropout: float = 0.0,
        l2: float = 0.0,
        normalize: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "layers": checks.integer("layers", layers, 1),
            "aggregator": checks.choice("aggregator", aggregator, AGGREGATORS),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "l2": checks.number("l2", l2, 0),
            "normalize": bool(normalize),
            "seed": seed,
        }
        own = seeded(seed, 3 * layers)
        self.dropouts = [FeatureDropout(dropout, seed=own[3 * i]) for i in range(layers)]
        self.stack = [
            SAGEConv(
                classes if i == layers - 1 else hidden,
                aggregator,
                activation=None if i == layers - 1 else "relu",
                normalize=normalize,
                kernel_initializer=keras.initializers.GlorotUniform(own[3 * i + 1]),
                kernel_regularizer=weight_decay(l2),
                seed=own[3 * i + 2],
            )
            for i in range(layers)
        ]

    def between(self, position: int, x: Any, training: bool | None) -> Any:
        return self.dropouts[position](x, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
