"""Fake quantization: the arithmetic of int8, computed in float so that it can be trained through.

Paper: Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
2018, https://arxiv.org/abs/1712.05877, section 3; the scheme is that of TFLite's int8 kernels: weights symmetric on
{-127 … 127}, activations affine on {-128 … 127}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.reparameterized import WeightTransform


def channel_view(shape: Sequence[int], depthwise: bool, per_channel: bool) -> tuple[int, ...]:
    """Returns the shape in which a kernel's output channels are its last axis; one channel if not `per_channel`.

    A depthwise kernel (…, channels, multiplier) has channels * multiplier output channels.
    """
    if not per_channel:
        return (math.prod(shape), 1)
    return (*shape[:-2], shape[-2] * shape[-1]) if depthwise else tuple(shape)


def weight_scale(weight: np.ndarray, *, bits: int = 8, depthwise: bool = False, per_channel: bool = True) -> np.ndarray:
    """Returns max|w| / (2**(bits-1) - 1) for each output channel, shape (channels,); 1 where a channel is all zero."""
    view = np.reshape(weight, channel_view(weight.shape, depthwise, per_channel))
    largest = np.abs(view).max(axis=tuple(range(view.ndim - 1)))
    return np.where(largest > 0, largest, 1.0) / (2 ** (bits - 1) - 1)


@keras.saving.register_keras_serializable(package="tfkit")
class QuantizedGrid(keras.constraints.Constraint):
    """Says, and sees to it, that a kernel lies on the grid `scale * {-limit … limit}`.

    It rides on plain layers as `kernel_constraint`: a saved model keeps the scales, and `tfkit.export.convert` writes
    these very scales into the file. In further training the kernel stays on the grid, so that updates of less than half
    a step are lost: prepare the model with `QuantizationAware` again to train it on.

    Args:
        scale: one number for each output channel, or a single number for the whole kernel.
        bits: width of the integers; limit = 2**(bits - 1) - 1.
        depthwise: whether the kernel is depthwise, (…, channels, multiplier).
    """

    def __init__(self, scale: Any, bits: int = 8, depthwise: bool = False) -> None:
        self.scale = np.atleast_1d(np.asarray(scale, dtype=np.float32))
        self.bits = int(bits)
        self.depthwise = bool(depthwise)

    @property
    def per_channel(self) -> bool:
        return self.scale.size > 1

    def scaled(self, factors: np.ndarray) -> QuantizedGrid:
        """Returns the grid of the kernel whose output channels are multiplied by `factors`, shape (channels,)."""
        return QuantizedGrid(self.scale * np.abs(factors), self.bits, self.depthwise)

    def __call__(self, w: Any) -> Any:
        limit = 2 ** (self.bits - 1) - 1
        view = keras.ops.reshape(w, channel_view(w.shape, self.depthwise, self.per_channel))
        divisor = np.where(self.scale > 0, self.scale, 1.0)  # A channel may have been folded to zero.
        steps = keras.ops.clip(keras.ops.round(view / divisor), -limit, limit)
        return keras.ops.reshape(steps * self.scale, w.shape)

    def holds(self, weight: np.ndarray) -> bool:
        """Whether a kernel lies on the grid, to a thousandth of a step."""
        distance = channel_view(weight.shape, self.depthwise, self.per_channel)
        off = np.abs(np.asarray(self(weight)) - weight).reshape(distance)
        return bool((off <= 1e-3 * self.scale).all())

    def get_config(self) -> dict[str, Any]:
        return {"scale": [float(s) for s in self.scale], "bits": self.bits, "depthwise": self.depthwise}


@keras.saving.register_keras_serializable(package="tfkit")
class FakeQuantizeWeight(WeightTransform):
    """Rounds a kernel to the symmetric grid of its largest magnitude, by channel or as a whole.

    The gradient passes straight through the rounding; nothing is clipped, as the grid reaches the largest weight.

    Args:
        bits: width of the integers.
        depthwise: whether the kernel is depthwise, (…, channels, multiplier).
        per_channel: one scale for each output channel; otherwise one for the kernel, which keeps shared values shared.
    """

    def __init__(self, bits: int = 8, depthwise: bool = False, per_channel: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.bits = bits
        self.depthwise = depthwise
        self.per_channel = per_channel

    def transform(self, weight: Any) -> Any:
        limit = 2 ** (self.bits - 1) - 1
        view = keras.ops.reshape(weight, channel_view(weight.shape, self.depthwise, self.per_channel))
        largest = keras.ops.max(keras.ops.abs(view), axis=tuple(range(len(view.shape) - 1)))
        scale = keras.ops.where(largest > 0, largest, 1.0) / limit  # An all-zero channel would give 0 / 0.
        rounded = keras.ops.reshape(keras.ops.round(view / scale) * scale, weight.shape)
        return weight + keras.ops.stop_gradient(rounded - weight)

    def constraint(self, weight: np.ndarray) -> QuantizedGrid:
        scale = weight_scale(weight, bits=self.bits, depthwise=self.depthwise, per_channel=self.per_channel)
        return QuantizedGrid(scale, self.bits, self.depthwise)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "bits": self.bits,
            "depthwise": self.depthwise,
            "per_channel": self.per_channel,
        }


def nudged_range(minimum: Any, maximum: Any, bits: int = 8) -> tuple[Any, Any]:
    """Widens a range to hold zero and moves it so that zero is one of the `2**bits` steps (Jacob et al., section 3).

    Done here rather than left to the fake-quantization op: op and converter break the tie of a symmetric range
    differently, and clipped values would come out one step apart.
    """
    levels = 2**bits - 1
    low, high = keras.ops.minimum(minimum, 0.0), keras.ops.maximum(maximum, 0.0)
    scale = keras.ops.maximum(high - low, 1e-6) / levels
    zero = keras.ops.clip(keras.ops.round(-low / scale), 0, levels)
    return -zero * scale, (levels - zero) * scale


def fake_quantize(x: Any, minimum: Any, maximum: Any, bits: int = 8) -> Any:
    """Rounds to `2**bits` even steps from `minimum` to `maximum`; gradients pass straight through inside the range.

    The range must hold zero as a step, see `nudged_range`. The operations are those that the converter turns into int8
    ones: below 8 bits the tensor goes on the 8-bit grid of the same step, and is clipped there.

    Args:
        x: float32 tensor.
        minimum, maximum: the range, numbers or scalar tensors.
        bits: from 1 to 16.

    Returns:
        A tensor of the shape of `x`.
    """
    if bits >= 8:
        return tf.quantization.fake_quant_with_min_max_vars(x, minimum, maximum, num_bits=bits)
    wide = minimum + (maximum - minimum) * (255 / (2**bits - 1))
    rounded = tf.quantization.fake_quant_with_min_max_vars(x, minimum, wide)
    return tf.quantization.fake_quant_with_min_max_vars(tf.minimum(rounded, maximum), minimum, wide)


@keras.saving.register_keras_serializable(package="tfkit")
class FakeQuantize(keras.layers.Layer):
    """Quantizes activations to `2**bits` even steps; the range follows the data while training.

    Args:
        bits: width of the integers. TFLite's tensors have 8 at least: with fewer, a file clips to the last of the
            `2**bits` steps by an operation of its own, exactly.
        momentum: of the moving average of each batch's minimum and maximum. The first batches are averaged evenly, so
            the range is right from the first step on. Until then, inference passes its input through.
        minimum, maximum: a fixed range instead; then the layer has no state.

    Call: any float tensor in, a tensor of the same shape out. With `update=False` the range stays as it is: for a
    second tensor that must lie on the same grid.
    """

    def __init__(
        self,
        bits: int = 8,
        momentum: float = 0.99,
        minimum: float | None = None,
        maximum: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (minimum is None) != (maximum is None):
            raise ValueError(
                "Arguments `minimum` and `maximum` must be given together or not at all. "
                f"Received: minimum={minimum}, maximum={maximum}."
            )
        if not 1 <= bits <= 16:
            raise ValueError(f"Argument `bits` must be from 1 to 16. Received: {bits}.")
        self.bits = bits
        self.momentum = momentum
        self.minimum = minimum
        self.maximum = maximum
        self.supports_masking = True

    @property
    def fixed(self) -> bool:
        return self.minimum is not None

    def build(self, input_shape: Any) -> None:
        if not self.fixed:
            options: dict[str, Any] = {"shape": (), "initializer": "zeros", "trainable": False, "autocast": False}
            self.moving_minimum = self.add_weight(name="moving_minimum", **options)
            self.moving_maximum = self.add_weight(name="moving_maximum", **options)
            self.steps = self.add_weight(name="steps", **options)

    def call(self, inputs: Any, training: bool = False, update: bool = True) -> Any:
        if self.fixed:
            return self._quantize(inputs, self.minimum, self.maximum)
        if training and not update:
            return self._quantize(inputs, self.moving_minimum, self.moving_maximum)
        if training:
            # Averages evenly over the first 1 / (1 - momentum) batches, with the given momentum after them.
            keep = keras.ops.minimum(self.momentum, self.steps / (self.steps + 1.0))
            low = keras.ops.cast(keras.ops.min(inputs), "float32")
            high = keras.ops.cast(keras.ops.max(inputs), "float32")
            self.moving_minimum.assign(keep * self.moving_minimum + (1.0 - keep) * low)
            self.moving_maximum.assign(keep * self.moving_maximum + (1.0 - keep) * high)
            self.steps.assign(self.steps + 1.0)
            return self._quantize(inputs, self.moving_minimum, self.moving_maximum)
        return keras.ops.cond(
            self.steps > 0,
            lambda: self._quantize(inputs, self.moving_minimum, self.moving_maximum),
            lambda: inputs,
        )

    def freeze(self) -> FakeQuantize:
        """Returns a layer with the current range fixed.

        Raises:
            ValueError: if the layer has seen no data.
        """
        if self.fixed:
            return FakeQuantize(self.bits, self.momentum, self.minimum, self.maximum, name=self.name)
        if not self.built or float(self.steps) == 0:
            raise ValueError(
                f"Quantizer '{self.name}' has seen no data, so its range is unknown. "
                "Train the prepared model for at least one step before `finalize`."
            )
        low, high = nudged_range(float(self.moving_minimum), float(self.moving_maximum), self.bits)
        return FakeQuantize(self.bits, self.momentum, float(low), float(high), name=self.name)

    def _quantize(self, x: Any, minimum: Any, maximum: Any) -> Any:
        low, high = nudged_range(minimum, maximum, self.bits)
        return keras.ops.cast(fake_quantize(keras.ops.cast(x, "float32"), low, high, self.bits), x.dtype)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "bits": self.bits,
            "momentum": self.momentum,
            "minimum": self.minimum,
            "maximum": self.maximum,
        }
