"""Batch normalization and AdaMax with shifts in place of products.

Paper: Hubara et al. Quantized neural networks: training neural networks with low precision weights and activations.
JMLR 18, 2017, https://arxiv.org/abs/1609.07061, algorithms 3 and 4.

Differs: the arithmetic is that of shifts, done in float by multiplying with powers of two, as TensorFlow has no shifts
of floats. A shift by the reciprocal of x is a product with AP2(1 / x). The normalization has an offset beta, and its
variance is that of the paper's shifted squares in training and in its moving average. Gradients flow through AP2 as
through the identity.
"""

from __future__ import annotations

import math
from typing import Any, Self

import keras
import numpy as np


def ap2(x: Any) -> Any:
    """Returns sign(x) * 2**round(log2|x|), the power of two nearest on the scale of logarithms; 0 for 0.

    Args:
        x: a tensor, or an array, of floats.

    Returns:
        A float32 tensor of the shape of `x`.
    """
    x = keras.ops.cast(x, "float32")
    magnitude = keras.ops.abs(x)
    # The smallest normal number: below it, logarithms of float32 are not safe.
    exponent = keras.ops.round(keras.ops.log(keras.ops.maximum(magnitude, 1.2e-38)) * (1.0 / math.log(2.0)))
    return keras.ops.where(magnitude < 1.2e-38, 0.0, keras.ops.sign(x) * _power_of_two(exponent))


def _power_of_two(exponent: Any) -> Any:
    """Returns 2**exponent of whole numbers, exactly: `power` is off by a rounding for some."""
    whole = keras.ops.cast(keras.ops.clip(exponent, -126, 127), "int32")
    return keras.ops.view(keras.ops.left_shift(whole + 127, 23), "float32")


def _mean(x: Any, counted: Any, axes: tuple[int, ...]) -> Any:
    """Returns the mean of a tensor over some axes; `counted` (…, 1) is 1 where it counts, or None: everywhere."""
    if counted is None:
        return keras.ops.mean(x, axis=axes)
    counted = keras.ops.broadcast_to(counted, keras.ops.shape(x))
    return keras.ops.sum(x * counted, axis=axes) / keras.ops.maximum(keras.ops.sum(counted, axis=axes), 1.0)


def _ap2_straight(x: Any) -> Any:
    return keras.ops.stop_gradient(ap2(x)) + (x - keras.ops.stop_gradient(x))


@keras.saving.register_keras_serializable(package="tfkit")
class ShiftBatchNormalization(keras.layers.Layer):
    """Batch normalization over the last axis, by shifts (algorithm 3).

    With c = x - mean(x): the variance is the mean of c * AP2(c), and the output AP2(gamma) * c * AP2(1 / deviation) +
    beta, where deviation = sqrt(variance + epsilon). Each factor is off by a factor of at most sqrt(2).

    Args:
        momentum: of the moving averages of mean and variance.
        epsilon: added to the variance.
        center, scale: whether there is a beta, and a gamma.

    Call: (batch, …, channels) in and out. In training the statistics are those of the batch, of the steps that `mask`
    leaves, of shape (batch, …).
    """

    def __init__(
        self, momentum: float = 0.99, epsilon: float = 1e-3, center: bool = True, scale: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= momentum < 1:
            raise ValueError(f"Argument `momentum` must be in [0, 1). Received: {momentum}.")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"Argument `epsilon` must be positive and finite. Received: {epsilon}.")
        self.momentum = momentum
        self.epsilon = epsilon
        self.center = center
        self.scale = scale
        self.supports_masking = True

    @classmethod
    def replacing(cls, norm: keras.layers.BatchNormalization) -> Self:
        """Returns a layer with the parameters and statistics of a batch normalization over the last axis."""
        new = cls(norm.momentum, norm.epsilon, norm.center, norm.scale, name=norm.name, dtype=norm.dtype_policy)
        new.build((*[None] * (norm.input_spec.ndim - 1), norm.moving_mean.shape[0]))
        for name in new._parameters():
            getattr(new, name).assign(getattr(norm, name))
        return new

    def freeze(self) -> keras.layers.BatchNormalization:
        """Returns the plain batch normalization that computes the same at inference."""
        plain = keras.layers.BatchNormalization(
            -1, self.momentum, self.epsilon, self.center, self.scale, name=self.name, dtype=self.dtype_policy
        )
        plain.build((*[None] * (self.rank - 1), self.moving_mean.shape[0]))
        for name in self._parameters():
            getattr(plain, name).assign(getattr(self, name))
        deviation = np.sqrt(keras.ops.convert_to_numpy(self.moving_variance) + self.epsilon)
        plain.moving_variance.assign(1.0 / keras.ops.convert_to_numpy(ap2(1.0 / deviation)) ** 2 - self.epsilon)
        if self.scale:
            plain.gamma.assign(ap2(self.gamma))
        return plain

    def build(self, input_shape: Any) -> None:
        shape, self.rank = (input_shape[-1],), len(input_shape)
        if self.scale:
            self.gamma = self.add_weight(name="gamma", shape=shape, initializer="ones")
        if self.center:
            self.beta = self.add_weight(name="beta", shape=shape, initializer="zeros")
        fixed: dict[str, Any] = {"shape": shape, "trainable": False, "autocast": False}
        self.moving_mean = self.add_weight(name="moving_mean", initializer="zeros", **fixed)
        self.moving_variance = self.add_weight(name="moving_variance", initializer="ones", **fixed)

    def call(self, inputs: Any, training: bool = False, mask: Any = None) -> Any:
        x = keras.ops.cast(inputs, "float32")
        if training and self.trainable:
            axes = tuple(range(len(inputs.shape) - 1))
            counted = None if mask is None else keras.ops.cast(mask, "float32")[..., None]
            mean = _mean(x, counted, axes)
            centered = x - mean
            variance = _mean(centered * _ap2_straight(centered), counted, axes)
            for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
                moving.assign(self.momentum * moving + (1.0 - self.momentum) * keras.ops.stop_gradient(value))
        else:
            centered, variance = x - self.moving_mean, self.moving_variance
        outputs = centered * _ap2_straight(1.0 / keras.ops.sqrt(variance + self.epsilon))
        if self.scale:
            outputs = outputs * _ap2_straight(keras.ops.cast(self.gamma, "float32"))
        if self.center:
            outputs = outputs + keras.ops.cast(self.beta, "float32")
        return keras.ops.cast(outputs, inputs.dtype)

    def _parameters(self) -> list[str]:
        return ["gamma"] * self.scale + ["beta"] * self.center + ["moving_mean", "moving_variance"]

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class ShiftBasedAdaMax(keras.optimizers.Optimizer):
    """AdaMax whose divisions are shifts (algorithm 4).

    m = beta_1 * m + (1 - beta_1) * g; v = max(beta_2 * v, |g|); then the weight loses
    learning_rate * AP2(1 / (1 - beta_1**t)) * m * AP2(1 / v). With the defaults every product is with a power of two,
    or with one less a power of two.

    Args:
        learning_rate: 2**-10 in the paper.
        beta_1, beta_2: decay of the mean and of the largest gradient; 1 - 2**-3 and 1 - 2**-10 in the paper.
        **kwargs: as of every Keras optimizer.
    """

    def __init__(
        self,
        learning_rate: Any = 2.0**-10,
        beta_1: float = 1.0 - 2.0**-3,
        beta_2: float = 1.0 - 2.0**-10,
        name: str = "shift_based_adamax",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        for label, value in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not 0 <= value < 1:
                raise ValueError(f"Argument `{label}` must be in [0, 1). Received: {value}.")
        self.beta_1 = beta_1
        self.beta_2 = beta_2

    def build(self, variables: Any) -> None:
        if self.built:
            return
        super().build(variables)
        self._means, self._largest = self.add_optimizer_variables(variables, ["mean", "largest"])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        index = self._get_variable_index(variable)
        mean, largest = self._means[index], self._largest[index]
        gradient = keras.ops.cast(gradient, variable.dtype)
        time = keras.ops.cast(self.iterations + 1, "float32")
        rate = keras.ops.cast(learning_rate, "float32") * ap2(1.0 / (1.0 - keras.ops.power(self.beta_1, time)))
        self.assign(mean, self.beta_1 * mean + (1.0 - self.beta_1) * gradient)
        self.assign(largest, keras.ops.maximum(self.beta_2 * largest, keras.ops.abs(gradient)))
        # Where no gradient ever came, the mean is zero too.
        divisor = ap2(1.0 / keras.ops.maximum(keras.ops.cast(largest, "float32"), 1e-30))
        self.assign_sub(variable, keras.ops.cast(rate * keras.ops.cast(mean, "float32") * divisor, variable.dtype))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "beta_1": self.beta_1, "beta_2": self.beta_2}
