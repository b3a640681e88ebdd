"""What the graph layers and models share: inputs, sparse dropout, and the way through a stack of convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfkit.graphs.propagation import check_inputs
from tfkit.internal import checks


class GraphLayer(keras.layers.Layer):
    """A layer on `(features, adjacency)`.

    `features` are (inputs, dimensions), dense or a `tf.SparseTensor`. The adjacency is (outputs, inputs), dense or a
    `tf.SparseTensor`; in a whole graph it is square. In a sampled block the first `outputs` of the inputs are the
    output nodes themselves.

    Args:
        units: output dimensions.
        activation: as in Keras.
        use_bias: whether a bias is added.
        kernel_initializer, kernel_regularizer: as in Keras.
    """

    def __init__(
        self,
        units: int,
        *,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        kernel_regularizer: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = checks.integer("units", units, 1)
        self.activation = keras.activations.get(activation)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self._kernels = 0
        self.supports_jit = False  # XLA has no sparse products.

    def _width(self, input_shape: Any) -> int:
        """Returns the dimensions of the features, or raises if the layer was not given a pair."""
        shapes = check_inputs(input_shape)
        if not all(isinstance(shape, (tuple, list)) for shape in shapes[:2]):
            raise checks.error("inputs", "(features, adjacency)", input_shape, "Pass both in one tuple.")
        return int(shapes[0][-1])

    def _kernel(self, name: str, shape: tuple[int, ...]) -> Any:
        """Adds a matrix with the layer's initializer, of a seed of its own, and regularizer."""
        initializer = self.kernel_initializer
        if isinstance(getattr(initializer, "seed", None), int):
            # One and the same seed would start all kernels of the layer with the same numbers.
            config = {**initializer.get_config(), "seed": (initializer.seed + 7919 * self._kernels) % 2**31}
            initializer = type(initializer).from_config(config)
        self._kernels += 1
        return self.add_weight(name=name, shape=shape, initializer=initializer, regularizer=self.kernel_regularizer)

    def _bias(self, width: int | None = None) -> Any:
        return (
            self.add_weight(name="bias", shape=(width or self.units,), initializer="zeros") if self.use_bias else None
        )

    def _finish(self, x: tf.Tensor, bias: Any) -> tf.Tensor:
        return self.activation(x if bias is None else x + bias)

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[1][0], self.units)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
        }


@keras.saving.register_keras_serializable(package="tfkit")
class FeatureDropout(keras.layers.Layer):
    """Dropout that takes sparse tensors too: of these the stored entries drop out, and zeros stay zeros.

    Args:
        rate: share of the entries that become 0, in [0, 1).
        seed: an integer, or None.
    """

    def __init__(self, rate: float, *, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = checks.number("rate", rate, 0, 1, open_high=True)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)
        self.supports_masking = True
        self.built = True

    def call(self, x: Any, training: bool | None = False) -> Any:
        if not training or self.rate == 0:
            return x
        if isinstance(x, tf.SparseTensor):
            return x.with_values(keras.random.dropout(x.values, self.rate, seed=self.generator))
        return keras.random.dropout(x, self.rate, seed=self.generator)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


class GraphModel(keras.Model):
    """A stack of graph layers on `(features, adjacency)`, or `(features, *blocks)` with a sampled block for each layer.

    Subclasses fill `self.stack`, a list of graph layers in order, and may override `between`.
    """

    stack: Sequence[keras.layers.Layer]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def build(self, input_shape: Any) -> None:
        width, blocks = input_shape[0][-1], input_shape[1:]
        for position, layer in enumerate(self.stack):
            block = blocks[min(position, len(blocks) - 1)]
            if not layer.built:
                layer.build([(None, width), tuple(block)])
            width = layer.compute_output_shape([(None, width), tuple(block)])[-1]
        self.built = True

    def call(self, inputs: Any, training: bool | None = False) -> tf.Tensor:
        x, *blocks = check_inputs(inputs)
        if len(blocks) not in (1, len(self.stack)):
            raise checks.error(
                "inputs", f"features and 1 or {len(self.stack)} adjacencies", len(blocks), "One for each layer."
            )
        blocks = blocks * len(self.stack) if len(blocks) == 1 else blocks
        for position, (layer, block) in enumerate(zip(self.stack, blocks, strict=True)):
            x = layer((self.between(position, x, training), block), training=training)
        return x

    def between(self, position: int, x: Any, training: bool | None) -> Any:
        """What is done to the inputs of a layer; by default nothing."""
        return x

    def compute_output_shape(self, input_shape: Any) -> tuple[int | None, int]:
        return (input_shape[-1][0], self.stack[-1].units)


def seeded(seed: int | None, count: int) -> list[int | None]:
    """Returns a seed of its own for each of `count` parts of a model; all None for None."""
    return [None if seed is None else seed * 1000 + i for i in range(count)]


def weight_decay(strength: float) -> keras.regularizers.L2 | None:
    """Returns the regularizer strength / 2 |W|^2, as the papers' weight decay means it; None for 0."""
    return keras.regularizers.L2(strength / 2) if strength else None
