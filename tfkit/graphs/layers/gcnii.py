"""GCNII: deep graph convolution with initial residuals and identity mapping.

Paper: Chen, Wei, Huang, Ding, Li. Simple and deep graph convolutional networks. ICML 2020,
https://arxiv.org/abs/2007.02133
"""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, GraphLayer, seeded, weight_decay
from tfkit.graphs.propagation import check_inputs, propagate
from tfkit.internal import checks


@keras.saving.register_keras_serializable(package="tfkit")
class GCNIIConv(GraphLayer):
    """h = (1 - alpha) adjacency x + alpha x_0, and ((1 - beta) I + beta W) h with beta = log(theta / depth + 1).

    Called on `(features, adjacency, initial features)`, both features with `units` dimensions.

    Args:
        units: dimensions, of inputs as of outputs.
        depth: this layer's number, from 1.
        alpha: share of the initial features.
        theta: how fast the identity mapping grows with the depth.
        **kwargs: as in `GraphLayer`; without a bias by default.
    """

    def __init__(
        self, units: int, depth: int, *, alpha: float = 0.1, theta: float = 0.5, use_bias: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(units, use_bias=use_bias, **kwargs)
        self.depth = checks.integer("depth", depth, 1)
        self.alpha = checks.number("alpha", alpha, 0, 1)
        self.theta = checks.number("theta", theta, 0)

    def build(self, input_shape: Any) -> None:
        if self._width(input_shape) != self.units:
            raise checks.error("units", f"the width of the inputs, {input_shape[0][-1]}", self.units)
        self.kernel = self._kernel("kernel", (self.units, self.units))
        self.bias = self._bias()
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        x, adjacency, initial = check_inputs(inputs, least=3)
        beta = math.log(self.theta / self.depth + 1)
        mixed = (1 - self.alpha) * propagate(adjacency, x)
        mixed += self.alpha * initial[: tf.shape(mixed)[0]]
        return self._finish((1 - beta) * mixed + beta * tf.matmul(mixed, self.kernel), self.bias)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "depth": self.depth, "alpha": self.alpha, "theta": self.theta}


@keras.saving.register_keras_serializable(package="tfkit")
class GCNII(keras.Model):
    """A linear layer, `layers` convolutions with ReLU, a linear layer; gives logits.

    The defaults are the paper's for Cora but for the depth, which was 64 there.

    Args:
        classes: outputs.
        hidden: dimensions of all convolutions.
        layers: convolutions.
        alpha, theta: as in `GCNIIConv`.
        dropout: of the inputs of every layer.
        l2: weight decay of the convolutions, l2 / 2 |W|^2.
        l2_linear: that of the two linear layers.
        seed: of initial weights and dropout.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 64,
        layers: int = 32,
        *,
        alpha: float = 0.1,
        theta: float = 0.5,
        dropout: float = 0.6,
        l2: float = 0.01,
        l2_linear: float = 5e-4,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "layers": checks.integer("layers", layers, 1),
            "alpha": checks.number("alpha", alpha, 0, 1),
            "theta": checks.number("theta", theta, 0),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "l2": checks.number("l2", l2, 0),
            "l2_linear": checks.number("l2_linear", l2_linear, 0),
            "seed": seed,
        }
        own = seeded(seed, layers + 3)
        self.dropout = FeatureDropout(dropout, seed=own[-1])
        self.ends = [keras.initializers.GlorotUniform(own[-2]), keras.initializers.GlorotUniform(own[-3])]
        # As the authors' programs: uniform within 1 / sqrt(units).
        bound = 1 / math.sqrt(hidden)
        self.stack = [
            GCNIIConv(
                hidden,
                i + 1,
                alpha=alpha,
                theta=theta,
                activation="relu",
                kernel_initializer=keras.initializers.RandomUniform(-bound, bound, seed=own[i]),
                kernel_regularizer=weight_decay(l2),
            )
            for i in range(layers)
        ]

    def build(self, input_shape: Any) -> None:
        hidden, classes = self.settings["hidden"], self.settings["classes"]
        decay = weight_decay(self.settings["l2_linear"])
        shapes = {"first": (input_shape[0][-1], hidden), "last": (hidden, classes)}
        for (name, shape), initializer in zip(shapes.items(), self.ends, strict=True):
            kernel = self.add_weight(name=f"{name}_kernel", shape=shape, initializer=initializer, regularizer=decay)
            bias = self.add_weight(name=f"{name}_bias", shape=shape[1:], initializer="zeros")
            setattr(self, name, (kernel, bias))
        for layer in self.stack:
            layer.build([(None, hidden), tuple(input_shape[1]), (None, hidden)])
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        features, adjacency = check_inputs(inputs)
        kernel, bias = self.first
        initial = tf.nn.relu(propagate(self.dropout(features, training=training), tf.convert_to_tensor(kernel)) + bias)
        x = initial
        for layer in self.stack:
            x = layer((self.dropout(x, training=training), adjacency, initial))
        kernel, bias = self.last
        return tf.matmul(self.dropout(x, training=training), kernel) + bias

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[0][0], self.settings["classes"])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
