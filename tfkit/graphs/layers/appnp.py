"""APPNP: predictions of a perceptron, spread by personalised PageRank.

Paper: Gasteiger, Bojchevski, Guennemann. Predict then propagate: graph neural networks meet personalized PageRank.
ICLR 2019, https://arxiv.org/abs/1810.05997
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, seeded, weight_decay
from tfkit.graphs.propagation import check_inputs, propagate
from tfkit.internal import checks


@keras.saving.register_keras_serializable(package="tfkit")
class PageRankPropagation(keras.layers.Layer):
    """z <- (1 - alpha) adjacency z + alpha x, k times from z = x, on `(features, adjacency)`.

    For k without bound it tends to alpha (I - (1 - alpha) adjacency)^-1 x.

    Args:
        k: steps.
        alpha: chance of a restart, in (0, 1].
        edge_dropout: share of the adjacency's entries dropped in each step of training.
        seed: of that dropout.
    """

    def __init__(
        self,
        k: int = 10,
        alpha: float = 0.1,
        *,
        edge_dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.k = checks.integer("k", k, 0)
        self.alpha = checks.number("alpha", alpha, 1e-6, 1)
        self.dropout = FeatureDropout(edge_dropout, seed=seed)

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        x, adjacency = check_inputs(inputs)
        z = x
        for _ in range(self.k):
            z = (1 - self.alpha) * propagate(self.dropout(adjacency, training=training), z) + self.alpha * x
        return z

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        own = {"k": self.k, "alpha": self.alpha, "edge_dropout": self.dropout.rate, "seed": self.dropout.seed}
        return {**super().get_config(), **own}


@keras.saving.register_keras_serializable(package="tfkit")
class APPNP(keras.Model):
    """A perceptron with one hidden layer, then `PageRankPropagation`; gives logits.

    Args:
        classes: outputs.
        hidden: units of the hidden layer.
        k, alpha: as in `PageRankPropagation`.
        dropout: of the inputs of both layers and of the adjacency's entries.
        l2: weight decay of the first kernel, l2 / 2 |W|^2.
        seed: of initial weights and dropout.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 64,
        k: int = 10,
        alpha: float = 0.1,
        *,
        dropout: float = 0.5,
        l2: float = 5e-3,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "k": checks.integer("k", k, 0),
            "alpha": checks.number("alpha", alpha, 1e-6, 1),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "l2": checks.number("l2", l2, 0),
            "seed": seed,
        }
        own = seeded(seed, 5)
        self.dropouts = [FeatureDropout(dropout, seed=own[i]) for i in range(2)]
        self.initializers = [keras.initializers.GlorotUniform(own[2 + i]) for i in range(2)]
        self.spread = PageRankPropagation(k, alpha, edge_dropout=dropout, seed=own[4])

    def build(self, input_shape: Any) -> None:
        hidden, classes = self.settings["hidden"], self.settings["classes"]
        width = input_shape[0][-1]
        self.hidden_kernel = self.add_weight(
            name="hidden_kernel",
            shape=(width, hidden),
            initializer=self.initializers[0],
            regularizer=weight_decay(self.settings["l2"]),
        )
        self.kernel = self.add_weight(name="kernel", shape=(hidden, classes), initializer=self.initializers[1])
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        x, adjacency = check_inputs(inputs)
        x = tf.nn.relu(propagate(self.dropouts[0](x, training=training), tf.convert_to_tensor(self.hidden_kernel)))
        x = tf.matmul(self.dropouts[1](x, training=training), self.kernel)
        return self.spread((x, adjacency), training=training)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[0][0], self.settings["classes"])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
