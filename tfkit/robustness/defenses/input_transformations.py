"""Input transformations: a warning example. They hide the gradient, and do not make a network robust.

Paper: Xu, Evans, Qi. Feature squeezing: detecting adversarial examples in deep neural networks. NDSS 2018,
https://arxiv.org/abs/1704.01155 (bit depth, median filter). Athalye, Carlini, Wagner. Obfuscated gradients give a
false sense of security. ICML 2018, https://arxiv.org/abs/1802.00420, section 4.1 (BPDA: in the backward pass the
identity stands for the transformation, and the defense is gone).
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks


class FalseSecurityWarning(UserWarning):
    """A defense that stops attacks by hiding the gradient only."""


class InputTransformation(keras.layers.Layer):
    """Base of the transformations; making one warns.

    Args:
        straight_through: let gradients pass as if nothing were done (BPDA). An honest evaluation sets it.
    """

    def __init__(self, straight_through: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.straight_through = bool(straight_through)
        if not self.straight_through:
            warnings.warn(
                f"{type(self).__name__} hides the gradient; it does not make a network robust. Evaluate with "
                "straight_through=True, or use AdversarialTraining.",
                FalseSecurityWarning,
                stacklevel=3,
            )

    def transform(self, inputs: Any) -> Any:
        """Returns what the network sees, shaped as the inputs."""
        raise NotImplementedError

    def call(self, inputs: Any) -> Any:
        changed = self.transform(inputs)
        return inputs + tf.stop_gradient(changed - inputs) if self.straight_through else changed

    def compute_output_spec(self, inputs: Any) -> Any:
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "straight_through": self.straight_through}


@keras.saving.register_keras_serializable(package="tfkit")
class BitDepthReduction(InputTransformation):
    """Rounds inputs in [0, 1] to 2^bits levels. Its gradient is zero everywhere.

    Args:
        bits: of a value.
        straight_through: see `InputTransformation`.
    """

    def __init__(self, bits: int = 1, straight_through: bool = False, **kwargs: Any) -> None:
        super().__init__(straight_through, **kwargs)
        self.bits = checks.integer("bits", bits, 1, 8)

    def transform(self, inputs: Any) -> Any:
        levels = 2**self.bits - 1
        return tf.round(tf.clip_by_value(inputs, 0.0, 1.0) * levels) / levels

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "bits": self.bits}


@keras.saving.register_keras_serializable(package="tfkit")
class MedianFilter(InputTransformation):
    """Replaces each pixel by the median of a square around it, channel by channel.

    Args:
        size: side of the square in pixels, odd.
        straight_through: see `InputTransformation`.
    """

    def __init__(self, size: int = 3, straight_through: bool = False, **kwargs: Any) -> None:
        super().__init__(straight_through, **kwargs)
        if checks.integer("size", size, 1) % 2 == 0:
            raise checks.error("size", "odd", size)
        self.size = size

    def transform(self, inputs: Any) -> Any:
        half = self.size // 2
        padded = tf.pad(inputs, [[0, 0], [half, half], [half, half], [0, 0]], "SYMMETRIC")
        height, width = tf.shape(inputs)[1], tf.shape(inputs)[2]
        shifted = [
            padded[:, row : row + height, column : column + width]
            for row in range(self.size)
            for column in range(self.size)
        ]
        middle = self.size**2 // 2
        return tf.sort(tf.stack(shifted, axis=-1), axis=-1)[..., middle]

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size}
