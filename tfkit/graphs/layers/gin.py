"""GIN: sums over neighbours under a perceptron, as telling as the Weisfeiler-Lehman test.

Paper: Xu, Hu, Leskovec, Jegelka. How powerful are graph neural networks? ICLR 2019,
https://arxiv.org/abs/1810.00826
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, GraphLayer, seeded
from tfkit.graphs.propagation import check_inputs, propagate
from tfkit.internal import checks


@keras.saving.register_keras_serializable(package="tfkit")
class GINConv(GraphLayer):
    """MLP((1 + epsilon) x_i + sum of the neighbours' x_j), the MLP with one hidden ReLU layer.

    The adjacency is used as it is given: of weights 1 and without self loops, as the paper has it.

    Args:
        units: output dimensions, and those of the hidden layer.
        epsilon: start value of the weight of the node itself.
        train_epsilon: whether it is learned.
        **kwargs: as in `GraphLayer`.
    """

    def __init__(self, units: int, *, epsilon: float = 0.0, train_epsilon: bool = True, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.epsilon_start = checks.number("epsilon", epsilon)
        self.train_epsilon = bool(train_epsilon)

    def build(self, input_shape: Any) -> None:
        self.epsilon = self.add_weight(
            name="epsilon",
            shape=(),
            initializer=keras.initializers.Constant(self.epsilon_start),
            trainable=self.train_epsilon,
        )
        self.hidden_kernel = self._kernel("hidden_kernel", (self._width(input_shape), self.units))
        self.hidden_bias = self.add_weight(name="hidden_bias", shape=(self.units,), initializer="zeros")
        self.kernel = self._kernel("kernel", (self.units, self.units))
        self.bias = self._bias()
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        features, adjacency = check_inputs(inputs)
        # The first matrix of the MLP is linear, so it may go before the sum, where the width is smaller.
        x = propagate(features, tf.convert_to_tensor(self.hidden_kernel))
        neighbours = propagate(adjacency, x)
        x = tf.nn.relu((1 + self.epsilon) * x[: tf.shape(neighbours)[0]] + neighbours + self.hidden_bias)
        return self._finish(tf.matmul(x, self.kernel), self.bias)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon_start, "train_epsilon": self.train_epsilon}


@keras.saving.register_keras_serializable(package="tfkit")
class GIN(keras.Model):
    """GIN for whole graphs: convolutions, the sum over each graph's nodes after every one, and a linear layer.

    Called on `(features, adjacency, membership)` as `batch_graphs` makes them; gives (graphs, classes) logits.

    Args:
        classes: outputs.
        hidden: units of each convolution.
        layers: convolutions.
        dropout: before the last linear layer.
        seed: of initial weights and dropout.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 32,
        layers: int = 3,
        *,
        dropout: float = 0.5,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "layers": checks.integer("layers", layers, 1),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "seed": seed,
        }
        own = seeded(seed, layers + 2)
        self.stack = [
            GINConv(hidden, activation="relu", kernel_initializer=keras.initializers.GlorotUniform(own[i]))
            for i in range(layers)
        ]
        self.norms = [keras.layers.BatchNormalization(momentum=0.9) for _ in range(layers)]
        self.dropout = FeatureDropout(dropout, seed=own[-2])
        self.head = keras.layers.Dense(classes, kernel_initializer=keras.initializers.GlorotUniform(own[-1]))

    def build(self, input_shape: Any) -> None:
        width, hidden = input_shape[0][-1], self.settings["hidden"]
        for layer, norm in zip(self.stack, self.norms, strict=True):
            layer.build([(None, width), tuple(input_shape[1])])
            norm.build((None, hidden))
            width = hidden
        self.head.build((None, hidden * len(self.stack)))
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        x, adjacency, membership = check_inputs(inputs, least=3)
        sums = []
        for layer, norm in zip(self.stack, self.norms, strict=True):
            x = norm(layer((x, adjacency)), training=training)
            sums.append(propagate(membership, x))
        return self.head(self.dropout(tf.concat(sums, axis=1), training=training))

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[2][0], self.settings["classes"])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
