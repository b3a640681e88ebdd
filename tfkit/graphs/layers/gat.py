"""GAT: attention over neighbours.

Paper: Velickovic, Cucurull, Casanova, Romero, Lio, Bengio. Graph attention networks. ICLR 2018,
https://arxiv.org/abs/1710.10903
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, GraphLayer, GraphModel, seeded, weight_decay
from tfkit.graphs.propagation import check_inputs, propagate, propagate_weighted
from tfkit.internal import checks


def edge_softmax(logits: tf.Tensor, rows: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
    """Returns the softmax of each row's edges.

    Args:
        logits: (edges, heads).
        rows: (edges,) the row of each edge.
        count: rows.
    """
    largest = tf.math.unsorted_segment_max(tf.stop_gradient(logits), rows, count)
    powers = tf.exp(logits - tf.gather(largest, rows))
    return powers / tf.gather(tf.math.unsorted_segment_sum(powers, rows, count), rows)


@keras.saving.register_keras_serializable(package="tfkit")
class GATConv(GraphLayer):
    """Attention: softmax over a node's neighbours of LeakyReLU(a_own . W x_i + a_other . W x_j), times W x_j.

    Looks at which entries of the adjacency are stored and not at their weights. Give it self loops (`add_self_loops`),
    as the paper has them.

    Args:
        units: output dimensions of each head.
        heads: attention heads.
        concat: heads side by side; False: their mean, as in the paper's last layer.
        negative_slope: of the LeakyReLU.
        attention_dropout: share of the attention coefficients dropped in training.
        seed: of that dropout.
        **kwargs: as in `GraphLayer`.
    """

    def __init__(
        self,
        units: int,
        heads: int = 1,
        *,
        concat: bool = True,
        negative_slope: float = 0.2,
        attention_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(units, **kwargs)
        self.heads = checks.integer("heads", heads, 1)
        self.concat = bool(concat)
        self.negative_slope = checks.number("negative_slope", negative_slope, 0)
        self.dropout = FeatureDropout(attention_dropout, seed=seed)

    def build(self, input_shape: Any) -> None:
        self.kernel = self._kernel("kernel", (self._width(input_shape), self.heads * self.units))
        self.own_attention = self._kernel("own_attention", (self.heads, self.units))
        self.other_attention = self._kernel("other_attention", (self.heads, self.units))
        self.bias = self._bias(self.units * (self.heads if self.concat else 1))
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        features, adjacency = check_inputs(inputs)
        x = propagate(features, tf.convert_to_tensor(self.kernel))
        by_head = tf.reshape(x, (-1, self.heads, self.units))
        own = tf.reduce_sum(by_head * self.own_attention, axis=2)  # (nodes, heads)
        other = tf.reduce_sum(by_head * self.other_attention, axis=2)
        attend = self._sparse if isinstance(adjacency, tf.SparseTensor) else self._dense
        heads = attend(by_head, own, other, adjacency, training)
        joined = tf.concat(heads, axis=1) if self.concat else tf.add_n(heads) / self.heads
        return self._finish(joined, self.bias)

    def _sparse(self, x: tf.Tensor, own: tf.Tensor, other: tf.Tensor, adjacency: Any, training: Any) -> list[tf.Tensor]:
        rows, columns = adjacency.indices[:, 0], adjacency.indices[:, 1]
        logits = tf.nn.leaky_relu(tf.gather(own, rows) + tf.gather(other, columns), self.negative_slope)
        weights = self.dropout(edge_softmax(logits, rows, adjacency.dense_shape[0]), training=training)
        return [
            propagate_weighted(adjacency.indices, weights[:, head], adjacency.dense_shape, x[:, head])
            for head in range(self.heads)
        ]

    def _dense(self, x: tf.Tensor, own: tf.Tensor, other: tf.Tensor, adjacency: Any, training: Any) -> list[tf.Tensor]:
        present = tf.not_equal(adjacency, 0)
        outputs = tf.shape(adjacency)[0]
        heads = []
        for head in range(self.heads):
            logits = tf.nn.leaky_relu(own[:outputs, head, None] + other[None, :, head], self.negative_slope)
            # A row without neighbours is all masked; its softmax is replaced by zeros.
            weights = tf.where(present, tf.nn.softmax(tf.where(present, logits, -1e9), axis=1), 0.0)
            heads.append(tf.matmul(self.dropout(weights, training=training), x[:, head]))
        return heads

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[1][0], self.units * (self.heads if self.concat else 1))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "heads": self.heads,
            "concat": self.concat,
            "negative_slope": self.negative_slope,
            "attention_dropout": self.dropout.rate,
            "seed": self.dropout.seed,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class GAT(GraphModel):
    """Two attention layers with ELU between them, as in the paper's transductive experiments; gives logits.

    Args:
        classes: outputs.
        hidden: units of each head of the first layer.
        heads: heads of the first layer.
        output_heads: heads of the last, which are averaged.
        dropout: of the inputs of each layer and of attention coefficients.
        l2: weight decay of all kernels, l2 / 2 |W|^2.
        seed: of initial weights and dropout.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 8,
        heads: int = 8,
        output_heads: int = 1,
        *,
        dropout: float = 0.6,
        l2: float = 5e-4,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "heads": checks.integer("heads", heads, 1),
            "output_heads": checks.integer("output_heads", output_heads, 1),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "l2": checks.number("l2", l2, 0),
            "seed": seed,
        }
        own = seeded(seed, 6)
        self.dropouts = [FeatureDropout(dropout, seed=own[3 * i]) for i in range(2)]
        self.stack = [
            GATConv(
                (hidden, classes)[i],
                (heads, output_heads)[i],
                concat=i == 0,
                activation="elu" if i == 0 else None,
                attention_dropout=dropout,
                kernel_initializer=keras.initializers.GlorotUniform(own[3 * i + 1]),
                kernel_regularizer=weight_decay(l2),
                seed=own[3 * i + 2],
            )
            for i in range(2)
        ]

    def between(self, position: int, x: Any, training: bool | None) -> Any:
        return self.dropouts[position](x, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
