"""What lets graph convolution go deep: jumping knowledge, DropEdge, PairNorm.

Paper: Zhao, Akoglu. PairNorm: tackling oversmoothing in GNNs. ICLR 2020, https://arxiv.org/abs/1909.12223; Rong, Huang,
Xu, Huang. DropEdge: towards deep graph convolutional networks on node classification. ICLR 2020,
https://arxiv.org/abs/1907.10903; Xu et al. Representation learning on graphs with jumping knowledge networks. ICML
2018, https://arxiv.org/abs/1806.03536

On Cora 32 layers with residual connections alone or DropEdge alone are not fitted, as the sums of the former grow with
every layer; residual connections and `batch_norm` together are, with DropEdge or without. PairNorm trains that deep,
slowly, only with `individually`. `benchmarks/deep_gcn.py` measures it, and says what is open.

Differs: DropEdge's authors give each layer a kernel for a node's own features too.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, seeded, weight_decay
from tfkit.graphs.layers.gcn import GCNConv
from tfkit.graphs.propagation import check_inputs
from tfkit.internal import checks

JUMPS = ("", "concat", "max", "lstm")


@keras.saving.register_keras_serializable(package="tfkit")
class PairNorm(keras.layers.Layer):
    """Centres the nodes and scales them so that the mean squared distance of all pairs stays the same.

    Args:
        scale: mean norm of a row afterwards (root of the mean square).
        individually: every row gets this norm ("PN-SI" of the paper).
    """

    def __init__(self, scale: float = 1.0, *, individually: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = checks.number("scale", scale, 0)
        self.individually = bool(individually)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        centred = x - tf.reduce_mean(x, axis=0, keepdims=True)
        squares = tf.reduce_sum(centred**2, axis=1, keepdims=True)
        if not self.individually:
            squares = tf.reduce_mean(squares, axis=0, keepdims=True)
        return self.scale * centred * tf.math.rsqrt(squares + 1e-6)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "scale": self.scale, "individually": self.individually}


@keras.saving.register_keras_serializable(package="tfkit")
class DropEdge(keras.layers.Layer):
    """Drops entries of a sparse adjacency at random in training, then normalises as a GCN does.

    Takes the plain adjacency, without self loops, and gives D^-1/2 (A + I) D^-1/2 of what is left.

    Args:
        rate: share of the entries that are dropped. Both directions of an undirected edge go or stay together.
        seed: an integer, or None.
    """

    def __init__(self, rate: float, *, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = checks.number("rate", rate, 0, 1, open_high=True)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, adjacency: tf.SparseTensor, training: bool | None = False) -> tf.SparseTensor:
        if training and self.rate:
            kept = edges_kept(adjacency.indices, self.generator.next(), self.rate)
            adjacency = tf.sparse.retain(adjacency, kept)
        count = adjacency.dense_shape[0]
        adjacency = tf.sparse.add(adjacency, tf.sparse.eye(count, dtype=adjacency.dtype))
        rows, columns = adjacency.indices[:, 0], adjacency.indices[:, 1]
        sums = tf.math.unsorted_segment_sum(adjacency.values, rows, count)
        scale = tf.math.rsqrt(sums)
        return adjacency.with_values(adjacency.values * tf.gather(scale, rows) * tf.gather(scale, columns))

    def compute_output_spec(self, adjacency: Any, training: Any = None) -> Any:
        return keras.KerasTensor(adjacency.shape, adjacency.dtype, sparse=True)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


def edges_kept(indices: tf.Tensor, seed: tf.Tensor, rate: float) -> tf.Tensor:
    """Returns whether each entry stays: a hash of the unordered pair and of the seed is compared with the rate."""
    low = tf.cast(tf.reduce_min(indices, axis=1), "uint64")
    high = tf.cast(tf.reduce_max(indices, axis=1), "uint64")
    parts = tf.cast(seed, "uint64")
    mixed = low * tf.constant(0x9E3779B97F4A7C15, "uint64") + high * tf.constant(0xC2B2AE3D27D4EB4F, "uint64")
    mixed += parts[0] * tf.constant(0x165667B19E3779F9, "uint64") + parts[1]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, tf.constant(shift, "uint64")))
        mixed *= tf.constant(factor, "uint64")
    mixed = tf.bitwise.bitwise_xor(mixed, tf.bitwise.right_shift(mixed, tf.constant(31, "uint64")))
    return tf.cast(tf.bitwise.right_shift(mixed, tf.constant(11, "uint64")), "float64") >= rate * 2.0**53


@keras.saving.register_keras_serializable(package="tfkit")
class JumpingKnowledge(keras.layers.Layer):
    """Joins the outputs of all layers, so that each node chooses how far it looks.

    Args:
        mode: "concat"; "max", entry by entry; or "lstm", a weighted sum with weights of a bidirectional LSTM over
            depth.
    """

    def __init__(self, mode: str = "concat", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mode = checks.choice("mode", mode, JUMPS[1:])

    def build(self, input_shape: Any) -> None:
        if self.mode == "lstm":
            width = input_shape[0][-1]
            units = max(1, len(input_shape) * width // 2)
            self.lstm = keras.layers.Bidirectional(keras.layers.LSTM(units, return_sequences=True))
            self.lstm.build((None, len(input_shape), width))
            self.score = keras.layers.Dense(1)
            self.score.build((None, len(input_shape), 2 * units))
        self.built = True

    def call(self, inputs: Any) -> tf.Tensor:
        if self.mode == "concat":
            return tf.concat(list(inputs), axis=-1)
        stacked = tf.stack(list(inputs), axis=1)
        if self.mode == "max":
            return tf.reduce_max(stacked, axis=1)
        return tf.reduce_sum(tf.nn.softmax(self.score(self.lstm(stacked)), axis=1) * stacked, axis=1)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        width = sum(shape[-1] for shape in input_shape) if self.mode == "concat" else input_shape[0][-1]
        return (input_shape[0][0], width)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "mode": self.mode}


@keras.saving.register_keras_serializable(package="tfkit")
class DeepGCN(keras.Model):
    """A GCN of any depth with what was proposed against oversmoothing, each alone or together; gives logits.

    Takes (features, normalised adjacency), or with `drop_edge` (features, plain adjacency).

    Args:
        classes: outputs.
        hidden: units of each hidden layer.
        layers: convolutions.
        residual: adds a layer's input to its output, after the ReLU, where the widths are the same.
        pair_norm: scale of a `PairNorm` between each hidden layer and its ReLU; 0 for none.
        individually: that `PairNorm` gives every row the same norm.
        batch_norm: batch normalisation in that place.
        drop_edge: rate of a `DropEdge` before the first layer; None for none.
        jump: "", or how `JumpingKnowledge` joins the hidden layers before a linear one.
        dropout: of the inputs of each layer.
        l2: weight decay of all kernels, l2 / 2 |W|^2.
        seed: of initial weights and dropout.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 64,
        layers: int = 8,
        *,
        residual: bool = False,
        pair_norm: float = 0.0,
        individually: bool = False,
        batch_norm: bool = False,
        drop_edge: float | None = None,
        jump: str = "",
        dropout: float = 0.5,
        l2: float = 5e-4,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "layers": checks.integer("layers", layers, 2),
            "residual": bool(residual),
            "pair_norm": checks.number("pair_norm", pair_norm, 0),
            "individually": bool(individually),
            "batch_norm": bool(batch_norm),
            "drop_edge": drop_edge,
            "jump": checks.choice("jump", jump, JUMPS),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "l2": checks.number("l2", l2, 0),
            "seed": seed,
        }
        if pair_norm and batch_norm:
            raise checks.error("batch_norm", "False beside a PairNorm", batch_norm, "Or set pair_norm=0.")
        own = seeded(seed, layers + 3)
        self.dropout = FeatureDropout(dropout, seed=own[-1])
        self.drop_edge = None if drop_edge is None else DropEdge(drop_edge, seed=own[-2])
        self.jump = JumpingKnowledge(jump) if jump else None
        initializers = [keras.initializers.GlorotUniform(seed) for seed in own[: layers + 1]]
        hidden_layers = layers if jump else layers - 1
        self.stack = [
            GCNConv(hidden, kernel_initializer=initializers[i], kernel_regularizer=weight_decay(l2))
            for i in range(hidden_layers)
        ]
        self.norms: list[Any] = []
        if pair_norm:
            self.norms = [PairNorm(pair_norm, individually=individually) for _ in range(hidden_layers)]
        elif batch_norm:
            self.norms = [keras.layers.BatchNormalization(momentum=0.9) for _ in range(hidden_layers)]
        self.head = (
            keras.layers.Dense(classes, kernel_initializer=initializers[-1])
            if jump
            else GCNConv(classes, kernel_initializer=initializers[-1], kernel_regularizer=weight_decay(l2))
        )

    def build(self, input_shape: Any) -> None:
        width, hidden, adjacency = input_shape[0][-1], self.settings["hidden"], tuple(input_shape[1])
        for layer in self.stack:
            layer.build([(None, width), adjacency])
            width = hidden
        for norm in self.norms:
            if not norm.built:
                norm.build((None, hidden))
        if self.jump is not None:
            shapes = [(None, hidden)] * len(self.stack)
            self.jump.build(shapes)
            self.head.build(self.jump.compute_output_shape(shapes))
        else:
            self.head.build([(None, hidden), adjacency])
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        x, adjacency = check_inputs(inputs)
        if self.drop_edge is not None:
            adjacency = self.drop_edge(adjacency, training=training)
        found: list[tf.Tensor] = []
        for position, layer in enumerate(self.stack):
            y = layer((self.dropout(x, training=training), adjacency))
            y = tf.nn.relu(self.norms[position](y, training=training) if self.norms else y)
            x = x + y if self.settings["residual"] and position else y
            found.append(x)
        if self.jump is not None:
            return self.head(self.dropout(self.jump(found), training=training))
        return self.head((self.dropout(x, training=training), adjacency))

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[0][0], self.settings["classes"])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
