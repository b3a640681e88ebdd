"""Weights and activations of one to a few bits, and the gradients that train them.

Paper: Hubara et al. Quantized neural networks: training neural networks with low precision weights and activations.
JMLR 18, 2017, https://arxiv.org/abs/1609.07061, sections 2 to 4. The method that puts these to work is in `qnn.py`,
which also says where they differ from the paper.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.fake_quantize import FakeQuantize, QuantizedGrid, channel_view, fake_quantize, nudged_range
from tfkit.compression.reparameterized import WeightTransform


def straight_through(value: Any, source: Any) -> Any:
    """Returns exactly `value`, whose gradient goes to `source` in its stead."""
    return keras.ops.stop_gradient(value) + (source - keras.ops.stop_gradient(source))


def binarize(x: Any) -> Any:
    """Returns +1 where x >= 0 and -1 elsewhere; the gradient passes where |x| <= 1 (equations 1 and 4)."""
    return straight_through(keras.ops.where(x >= 0, 1.0, -1.0), keras.ops.clip(x, -1.0, 1.0))


def binarize_stochastically(x: Any, seed: Any = None) -> Any:
    """Returns +1 with probability `hard_sigmoid(x) = clip((x + 1) / 2, 0, 1)`, else -1 (equations 2 and 3).

    Its mean is clip(x, -1, 1), whose gradient is the one that passes.
    """
    draw = keras.random.uniform(keras.ops.shape(x), seed=seed, dtype=x.dtype)
    # A number that is not negative with just that probability has the sign wanted.
    clipped = keras.ops.clip(x, -1.0, 1.0)
    return straight_through(keras.ops.where(draw * 2.0 - 1.0 < clipped, 1.0, -1.0), clipped)


def levels(bits: int) -> int:
    """Returns the number of steps on either side of zero: 1 for 1 bit (which lacks zero), 2**(bits - 1) - 1 above."""
    return max(1, 2 ** (bits - 1) - 1)


def best_unit(view: np.ndarray, bits: int) -> np.ndarray:
    """Returns the range [-unit, unit] that quantizes each column with the least squared error.

    Args:
        view: weights, shape (weights, channels).
        bits: width of the integers. At 1 bit the unit is the mean magnitude of what is not zero, which is the least
            squares solution; above, the best of 60 shares of the largest magnitude.

    Returns:
        Shape (channels,); 1 where a column is all zero.
    """
    magnitudes = np.abs(view.astype(np.float64))
    largest = magnitudes.max(axis=0)
    if bits == 1:
        unit = magnitudes.sum(axis=0) / np.maximum((magnitudes > 0).sum(axis=0), 1)
        return np.where(largest > 0, unit, 1.0)
    limit = levels(bits)
    unit, least = np.ones_like(largest), np.full_like(largest, np.inf)
    for share in np.linspace(1.0, 0.15, 60):
        tried = np.where(largest > 0, share * largest, 1.0)
        rounded = np.minimum(np.rint(magnitudes / tried * limit), limit) * (tried / limit)
        error = ((rounded - magnitudes) ** 2).sum(axis=0)
        unit, least = np.where(error < least, tried, unit), np.minimum(error, least)
    return unit


def rectified_limit(bits: int) -> float:
    """Returns the upper end of the range that quantizes max(0, z), z standard normal, with the least squared error."""
    z = np.linspace(0.0, 8.0, 2001)
    density = np.exp(-(z**2) / 2)
    tried = np.linspace(0.5, 7.0, 261)[:, None]
    step = tried / (2**bits - 1)
    error = (density * (np.minimum(np.rint(z / step) * step, tried) - z) ** 2).sum(axis=1)
    return float(tried[error.argmin(), 0])


@keras.saving.register_keras_serializable(package="tfkit")
class ClipLatent(keras.constraints.Constraint):
    """Keeps the latent weights in [-unit, unit], beyond which they would only grow without effect.

    A constraint is applied by Keras after each update of any optimizer, inside the compiled step.

    Args:
        unit: one number for each output channel, or a single one.
        depthwise: whether the kernel is depthwise, (…, channels, multiplier).
    """

    def __init__(self, unit: Any, depthwise: bool = False) -> None:
        self.unit = np.atleast_1d(np.asarray(unit, dtype=np.float32))
        self.depthwise = bool(depthwise)

    def __call__(self, w: Any) -> Any:
        view = keras.ops.reshape(w, channel_view(w.shape, self.depthwise, self.unit.size > 1))
        return keras.ops.reshape(keras.ops.clip(view, -self.unit, self.unit), w.shape)

    def get_config(self) -> dict[str, Any]:
        return {"unit": [float(u) for u in self.unit], "depthwise": self.depthwise}


@keras.saving.register_keras_serializable(package="tfkit")
class LowPrecisionWeight(WeightTransform):
    """Rounds a kernel to `unit * {-1, 1}` (1 bit), or to `unit * {-limit … limit} / limit`; gradients pass straight.

    Args:
        bits: width of the integers; limit = 2**(bits - 1) - 1.
        depthwise: whether the kernel is depthwise, (…, channels, multiplier).
        scale: `"channel"`: a unit for each output channel, `"tensor"`: one for the kernel; either fits the weights that
            `adapt` receives with the least squared error, and stays. `"none"`: 1, as in the paper.
        keep_zeros: a weight of exactly zero stays zero at 1 bit too, as pruned weights must.
    """

    def __init__(
        self, bits: int = 1, depthwise: bool = False, scale: str = "channel", keep_zeros: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.bits = bits
        self.depthwise = depthwise
        self.scale = scale
        self.keep_zeros = keep_zeros

    @property
    def per_channel(self) -> bool:
        return self.scale == "channel"

    def build(self, input_shape: Any) -> None:
        channels = channel_view(input_shape, self.depthwise, self.per_channel)[-1]
        self.unit = self.add_weight(name="unit", shape=(channels,), initializer="ones", trainable=False, autocast=False)

    def adapt(self, value: np.ndarray) -> None:
        if self.scale != "none":
            view = np.reshape(value, channel_view(value.shape, self.depthwise, self.per_channel))
            self.unit.assign(best_unit(view.reshape(-1, view.shape[-1]), self.bits))

    def transform(self, weight: Any) -> Any:
        limit = levels(self.bits)
        unit = keras.ops.cast(self.unit, weight.dtype)
        view = keras.ops.reshape(weight, channel_view(weight.shape, self.depthwise, self.per_channel))
        if self.bits == 1:
            steps = keras.ops.where(view >= 0, 1.0, -1.0)
            if self.keep_zeros:
                steps = keras.ops.where(view == 0, 0.0, steps)
        else:
            steps = keras.ops.clip(keras.ops.round(view / unit * limit), -limit, limit)
        return straight_through(keras.ops.reshape(steps * (unit / limit), weight.shape), weight)

    def latent_constraint(self) -> ClipLatent:
        """Returns the constraint that the latent weights should have while they are trained."""
        return ClipLatent(keras.ops.convert_to_numpy(self.unit), self.depthwise)

    def constraint(self, weight: np.ndarray) -> QuantizedGrid:
        unit = keras.ops.convert_to_numpy(self.unit)
        return QuantizedGrid(unit / levels(self.bits), max(2, self.bits), self.depthwise)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "bits": self.bits,
            "depthwise": self.depthwise,
            "scale": self.scale,
            "keep_zeros": self.keep_zeros,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class LowPrecisionActivation(keras.layers.Layer):
    """The sign of its input (1 bit), or its input rounded to `2**bits` even steps from 0 to a limit.

    Args:
        bits: 1: -1 or +1, with the gradient of the identity for inputs of at most one unit; 2 to 8: a ReLU with
            `2**bits` values, with the gradient of the identity inside its range.
        stochastic: at 1 bit, in training, +1 with a probability that grows evenly from one unit below zero to one
            above. Never at inference.
        limit: with more bits, the upper end of the range in units; by default the one of least squared error for
            normal inputs.
        unit: what counts as 1, fixed; None: the root mean square of the inputs, a moving average over the batches. It
            is about 1 after a batch normalization.
        momentum: of that average; the first batches are averaged evenly.
        seed: of the stochastic sign.

    Call: any float tensor in, a tensor of the same shape out. With `update=False` the input is only rounded to the
    layer's grid: for a second tensor that must lie on it.
    """

    #: Read by `QuantizationAware`: this layer is the quantizer of what it gives.
    quantizes = True

    def __init__(
        self,
        bits: int = 1,
        stochastic: bool = False,
        limit: float | None = None,
        unit: float | None = None,
        momentum: float = 0.99,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 1 <= bits <= 8:
            raise ValueError(f"Argument `bits` must be from 1 to 8. Received: {bits}.")
        if stochastic and bits != 1:
            raise ValueError(
                f"Argument `stochastic` must be False for bits={bits}: only the sign is ever drawn by chance. "
                "Received: True. Use bits=1."
            )
        for name, number in (("limit", limit), ("unit", unit)):
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f"Argument `{name}` must be positive and finite, or None. Received: {number}.")
        self.bits = bits
        self.stochastic = stochastic
        self.limit = limit
        self.unit = unit
        self.momentum = momentum
        self.seed = seed
        self.supports_masking = True
        if stochastic:
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Any) -> None:
        if self.unit is None:
            options: dict[str, Any] = {"shape": (), "initializer": "zeros", "trainable": False, "autocast": False}
            self.mean_square = self.add_weight(name="mean_square", **options)
            self.steps = self.add_weight(name="steps", **options)

    def call(self, inputs: Any, training: bool = False, update: bool = True) -> Any:
        x = keras.ops.cast(inputs, "float32")
        if self.unit is None and training and update:
            keep = keras.ops.minimum(self.momentum, self.steps / (self.steps + 1.0))
            self.mean_square.assign(keep * self.mean_square + (1.0 - keep) * keras.ops.mean(keras.ops.square(x)))
            self.steps.assign(self.steps + 1.0)
        if self.bits > 1:
            low, high = nudged_range(0.0, self._limit() * self._unit(), self.bits)
            outputs = fake_quantize(x, low, high, self.bits)
        elif not update:
            rounded = keras.ops.clip(keras.ops.round(x), -1.0, 1.0)
            outputs = straight_through(rounded, x)
        elif self.stochastic and training:
            outputs = binarize_stochastically(x / self._unit(), self.seed_generator)
        else:
            outputs = binarize(x / self._unit())
        return keras.ops.cast(outputs, inputs.dtype)

    def freeze(self) -> keras.layers.Layer:
        """Returns the layer to put in its place for good.

        Raises:
            ValueError: if the layer follows the data and has seen none.
        """
        if self.unit is None and (not self.built or float(self.steps) == 0):
            raise ValueError(
                f"Quantizer '{self.name}' has seen no data, so its range is unknown. "
                "Train the prepared model for at least one step before `finalize`."
            )
        if self.bits == 1:
            return IntegerSign(name=self.name)
        low, high = nudged_range(0.0, self._limit() * float(self._unit()), self.bits)
        return FakeQuantize(self.bits, self.momentum, float(low), float(high), name=self.name)

    def _limit(self) -> float:
        return rectified_limit(self.bits) if self.limit is None else self.limit

    def _unit(self) -> Any:
        if self.unit is not None:
            return self.unit
        root = keras.ops.sqrt(keras.ops.maximum(self.mean_square, 1e-12))
        return keras.ops.stop_gradient(keras.ops.where(self.steps > 0, root, 1.0))

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "bits": self.bits,
            "stochastic": self.stochastic,
            "limit": self.limit,
            "unit": self.unit,
            "momentum": self.momentum,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class IntegerSign(keras.layers.Layer):
    """The sign of an odd integer: rounds its input to an integer and clips it to [-1, 1].

    Written so that the converter fuses it into the layer before it, as RELU_N1_TO_1 on an int8 grid of step 1. There a
    padding of zero is zero, which a grid of -1 and +1 alone does not have. The layer before it must never give values
    inside (-1, 1): `QuantizedNeuralNetwork.finalize` sees to it.

    Call: any float tensor in, a tensor of the same shape out. `update` is accepted for the sake of `FakeQuantize`.
    """

    #: The step of its output's grid.
    step = 1.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs: Any, update: bool = True) -> Any:
        clipped = tf.maximum(tf.minimum(keras.ops.cast(inputs, "float32"), 1.0), -1.0)
        rounded = tf.quantization.fake_quant_with_min_max_vars(clipped, -128.0, 127.0)
        return keras.ops.cast(rounded, inputs.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape
