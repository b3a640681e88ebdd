"""GCN: graph convolution with the renormalised adjacency.

Paper: Kipf, Welling. Semi-supervised classification with graph convolutional networks. ICLR 2017,
https://arxiv.org/abs/1609.02907

Differs: a layer multiplies by whichever of adjacency and weights makes the smaller intermediate result first.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import FeatureDropout, GraphLayer, GraphModel, seeded, weight_decay
from tfkit.graphs.propagation import check_inputs, is_sparse, propagate
from tfkit.internal import checks


def gcn(features: Any, adjacency: Any, kernel: tf.Tensor) -> tf.Tensor:
    """Returns adjacency @ features @ kernel in the cheaper order: sparse features meet the kernel first.

    >>> gcn(tf.ones((2, 3)), tf.constant([[0.5, 0.5]]), tf.ones((3, 1))).numpy()
    array([[3.]], dtype=float32)
    """
    if is_sparse(features) or kernel.shape[1] <= kernel.shape[0]:
        return propagate(adjacency, propagate(features, kernel))
    return tf.matmul(propagate(adjacency, features), kernel)


@keras.saving.register_keras_serializable(package="tfkit")
class GCNConv(GraphLayer):
    """Graph convolution: adjacency @ features @ kernel + bias.

    The adjacency is used as it is given; normalise it before, by `gcn_normalize`. Arguments as in `GraphLayer`.
    """

    def build(self, input_shape: Any) -> None:
        self.kernel = self._kernel("kernel", (self._width(input_shape), self.units))
        self.bias = self._bias()
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        features, adjacency = check_inputs(inputs)
        return self._finish(gcn(features, adjacency, tf.convert_to_tensor(self.kernel)), self.bias)


@keras.saving.register_keras_serializable(package="tfkit")
class GCN(GraphModel):
    """Graph convolutions with dropout before each and ReLU between them; gives logits.

    Args:
        classes: outputs.
        hidden: units of each hidden layer.
        layers: convolutions.
        dropout: of the inputs of each layer.
        l2: weight decay of the first layer's kernel, l2 / 2 |W|^2, as in the paper.
        use_bias: whether layers have biases; the paper's programs have none.
        seed: of initial weights and dropout.
    """

    def __init__(
        self,
        classes: int,
        hidden: int = 16,
        layers: int = 2,
        *,
        dropout: float = 0.5,
        l2: float = 5e-4,
        use_bias: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings: dict[str, Any] = {
            "classes": checks.integer("classes", classes, 1),
            "hidden": checks.integer("hidden", hidden, 1),
            "layers": checks.integer("layers", layers, 1),
            "dropout": checks.number("dropout", dropout, 0, 1, open_high=True),
            "l2": checks.number("l2", l2, 0),
            "use_bias": bool(use_bias),
            "seed": seed,
        }
        own = seeded(seed, 2 * layers)
        self.dropouts = [FeatureDropout(dropout, seed=own[2 * i]) for i in range(layers)]
        self.stack = [
            GCNConv(
                classes if i == layers - 1 else hidden,
                activation=None if i == layers - 1 else "relu",
                use_bias=use_bias,
                kernel_initializer=keras.initializers.GlorotUniform(own[2 * i + 1]),
                kernel_regularizer=weight_decay(l2) if i == 0 else None,
            )
            for i in range(layers)
        ]

    def between(self, position: int, x: Any, training: bool | None) -> Any:
        return self.dropouts[position](x, training=training)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
