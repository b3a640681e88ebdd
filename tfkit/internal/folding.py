"""Folding batch normalization into the layer before it, exactly: the same function, one layer less."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfkit.internal import surgery

FOLDABLE: tuple[type[keras.Layer], ...] = (
    keras.layers.Dense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv2DTranspose,
    keras.layers.DepthwiseConv2D,
)


def foldable_pairs(model: keras.Model) -> dict[int, keras.layers.BatchNormalization]:
    """Maps `id(layer)` to the batch normalization that alone reads the layer's linear output along its channels.

    Reparameterized layers count as what they wrap; unwrap them before folding.
    """
    consumers = surgery.sole_consumers(model)
    pairs = {}
    for layer in surgery.leaf_layers(model):
        follower = consumers.get(id(layer))
        plain = surgery.source(layer)
        if (
            isinstance(plain, FOLDABLE)
            and isinstance(follower, keras.layers.BatchNormalization)
            and surgery.activation_name(plain) == "linear"
            and _normalizes_channels(plain, follower)
        ):
            pairs[id(layer)] = follower
    return pairs


def fold_batch_normalization(model: keras.Model) -> keras.Model:
    """Returns a new model in which each batch normalization that follows a linear layer is part of that layer.

    With gamma, beta, mean and variance of the normalization, w' = w * gamma / sqrt(variance + epsilon) for each output
    channel and b' = beta + (b - mean) * gamma / sqrt(variance + epsilon): equal at inference up to float rounding.
    A `QuantizedGrid` on the kernel is scaled with it, so the integers of the kernel stay what they were.
    """
    pairs = foldable_pairs(model)
    dropped = {id(follower) for follower in pairs.values()}

    def replace(layer: keras.Layer) -> keras.Layer | None:
        return folded(layer, pairs[id(layer)]) if id(layer) in pairs else None

    def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if id(original) in dropped else new(*args, **kwargs)

    return surgery.rebuild(model, replace, call)


def folded(layer: Any, norm: keras.layers.BatchNormalization) -> keras.Layer:
    """Returns the linear layer that computes what `layer` and then `norm` do at inference."""
    mean = keras.ops.convert_to_numpy(norm.moving_mean)
    deviation = np.sqrt(keras.ops.convert_to_numpy(norm.moving_variance) + norm.epsilon)
    gamma = keras.ops.convert_to_numpy(norm.gamma) if norm.scale else np.ones_like(mean)
    beta = keras.ops.convert_to_numpy(norm.beta) if norm.center else np.zeros_like(mean)
    bias = keras.ops.convert_to_numpy(layer.bias) if layer.use_bias else np.zeros_like(mean)
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    factor = gamma / deviation

    overrides: dict[str, Any] = {"use_bias": True}
    attribute = surgery.constraint_name(layer, "kernel")
    grid = getattr(layer, attribute, None)
    if grid is not None and hasattr(grid, "scaled"):
        # A transposed kernel has one grid for all channels (see `PER_TENSOR`), which folding ends.
        transposed = isinstance(layer, keras.layers.Conv2DTranspose)
        overrides[attribute] = None if transposed else keras.constraints.serialize(grid.scaled(factor))
    folded = surgery.unbuilt_copy(layer, **overrides)
    folded.build_from_config(layer.get_build_config())
    folded.kernel.assign(kernel * _along_output_channels(layer, factor, kernel.shape))
    folded.bias.assign(beta + (bias - mean) * factor)
    return folded


def _along_output_channels(layer: keras.Layer, factor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return factor.reshape(shape[-2:])
    if isinstance(layer, keras.layers.Conv2DTranspose):
        return factor[:, None]  # Its kernel is (height, width, output, input).
    return factor


def _normalizes_channels(layer: keras.Layer, norm: keras.layers.BatchNormalization) -> bool:
    channels_last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return channels_last and norm.axis in (-1, norm.input_spec.ndim - 1)
