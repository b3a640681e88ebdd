"""SGC: a linear layer over features that were propagated k times.

Paper: Wu, Zhang, Souza, Fifty, Yu, Weinberger. Simplifying graph convolutional networks. ICML 2019,
https://arxiv.org/abs/1902.07153
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.layers.base import GraphLayer, GraphModel, weight_decay
from tfkit.graphs.propagation import check_inputs, is_sparse, propagate
from tfkit.internal import checks


@keras.saving.register_keras_serializable(package="tfkit")
class SGCConv(GraphLayer):
    """adjacency^k @ features @ kernel + bias.

    Where `features` do not change, propagate them once beforehand and use a dense layer: it is the same.

    Args:
        units: output dimensions.
        k: propagations.
        **kwargs: as in `GraphLayer`.
    """

    def __init__(self, units: int, k: int = 2, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.k = checks.integer("k", k, 0)

    def build(self, input_shape: Any) -> None:
        self.kernel = self._kernel("kernel", (self._width(input_shape), self.units))
        self.bias = self._bias()
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> tf.Tensor:
        x, adjacency = check_inputs(inputs)
        first = is_sparse(x) or self.units <= self.kernel.shape[0]
        x = propagate(x, tf.convert_to_tensor(self.kernel)) if first else x
        for _ in range(self.k):
            x = propagate(adjacency, x)
        return self._finish(x if first else tf.matmul(x, self.kernel), self.bias)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "k": self.k}


@keras.saving.register_keras_serializable(package="tfkit")
class SGC(GraphModel):
    """One `SGCConv`; gives logits.

    Args:
        classes: outputs.
        k: propagations.
        l2: weight decay, l2 / 2 |W|^2.
        seed: of initial weights.
    """

    def __init__(self, classes: int, k: int = 2, *, l2: float = 5e-4, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = {
            "classes": checks.integer("classes", classes, 1),
            "k": checks.integer("k", k, 0),
            "l2": checks.number("l2", l2, 0),
            "seed": seed,
        }
        initializer = keras.initializers.GlorotUniform(seed)
        self.stack = [SGCConv(classes, k, kernel_initializer=initializer, kernel_regularizer=weight_decay(l2))]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self.settings}
