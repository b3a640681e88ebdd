"""Cross-layer equalization: share the range of the weights between two layers, at no change of the function.

Paper: Nagel, van Baalen, Blankevoort, Welling. Data-free quantization through weight equalization and bias correction.
ICCV 2019, https://arxiv.org/abs/1906.04721, section 4.1.

Differs: ReLU6 is left as it is, since it is not scale-equivariant (the paper replaces it by ReLU, which changes the
function); no biases are absorbed, as ranges come from data here. Poolings, paddings, dropout and a flattening may lie
between the two layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit.compression.clustering import is_clustered
from tfkit.internal import checks, surgery

LINEAR = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
#: Commute with scaling each channel by a positive number; `Flatten` does when channels come last.
CHANNELWISE = {
    "MaxPooling1D", "MaxPooling2D", "AveragePooling1D", "AveragePooling2D", "GlobalMaxPooling1D", "GlobalMaxPooling2D",
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "ZeroPadding1D", "ZeroPadding2D", "Cropping1D", "Cropping2D",
    "Dropout", "SpatialDropout1D", "SpatialDropout2D", "Identity", "Flatten", "Relu",
}  # fmt: skip


class EqualizedPair(NamedTuple):
    """Two layers whose ranges were shared.

    Attributes:
        first, second: names of the layers.
        spread_before, spread_after: largest range of an output channel of the first layer over its median one.
    """

    first: str
    second: str
    spread_before: float
    spread_after: float


def equalize(
    model: keras.Model,
    *,
    iterations: int = 20,
    tolerance: float = 1e-4,
    selects: Callable[[keras.Layer], bool] = lambda layer: True,
    preserve: bool = True,
) -> tuple[keras.Model, list[EqualizedPair]]:
    """Scales the channels between two layers so that both have the same range of weights in each.

    With r1 and r2 the largest magnitudes of the weights that make and read channel i, s = sqrt(r1 / r2): the first
    layer's weights and bias are divided by s, the second layer's weights multiplied by it, and both then reach
    sqrt(r1 r2). Pairs are gone through until no scale is off by more than `tolerance`, since pairs share layers.

    Args:
        model: a functional or built sequential model; fold its batch normalization first.
        iterations: most passes over the pairs.
        tolerance: of |log s|.
        selects: layers it may touch.
        preserve: leave a pair alone if the values of one of its kernels are shared, which scaling would end. Kernels
            that are quantized already are always left alone.

    Returns:
        A new model that computes the same function up to float rounding, and its pairs.
    """
    result = surgery.rebuild(model)
    rows = equalize_in_place(result, iterations=iterations, tolerance=tolerance, selects=selects, preserve=preserve)
    return result, rows


def equalize_in_place(
    model: keras.Model,
    *,
    iterations: int = 20,
    tolerance: float = 1e-4,
    selects: Callable[[keras.Layer], bool] = lambda layer: True,
    preserve: bool = True,
) -> list[EqualizedPair]:
    """Does what `equalize` does to a model that is the caller's own; returns its pairs."""
    checks.integer("iterations", iterations, 1)
    checks.number("tolerance", tolerance, 0)

    def usable(layer: Any) -> bool:
        on_grid = hasattr(getattr(layer, surgery.constraint_name(layer, "kernel")), "scale")
        shared = preserve and is_clustered(keras.ops.convert_to_numpy(layer.kernel))
        return selects(layer) and not on_grid and not shared

    pairs = [(a, b) for a, b in find_pairs(model) if usable(a) and usable(b)]
    before = [_spread(first) for first, _ in pairs]
    for _ in range(iterations):
        largest = max([_equalize_pair(first, second) for first, second in pairs], default=0.0)
        if largest <= tolerance:
            break
    return [
        EqualizedPair(first.name, second.name, spread, _spread(first))
        for (first, second), spread in zip(pairs, before, strict=True)
    ]


def find_pairs(model: keras.Model) -> list[tuple[Any, Any]]:
    """Returns the pairs of layers, in order, with nothing between them that a scale of the channels would not pass."""
    consumers = surgery.sole_consumers(model)
    pairs = []
    for layer in surgery.leaf_layers(model):
        if not _is_linear(layer) or surgery.activation_name(layer) not in ("linear", "relu", "leaky_relu"):
            continue
        follower = consumers.get(id(layer))
        while follower is not None and _passes_scale(follower):
            follower = consumers.get(id(follower))
        if follower is not None and _is_linear(follower) and _matches(layer, follower):
            pairs.append((layer, follower))
    return pairs


def _is_linear(layer: Any) -> bool:
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    return isinstance(layer, LINEAR) and last and getattr(layer, "groups", 1) == 1


def _passes_scale(layer: Any) -> bool:
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return False
    if isinstance(layer, keras.layers.ReLU):
        return layer.max_value is None and not layer.threshold
    if isinstance(layer, keras.layers.Activation):
        return surgery.activation_name(layer) in ("linear", "relu", "leaky_relu")
    return isinstance(layer, keras.layers.LeakyReLU) or type(layer).__name__ in CHANNELWISE


def _matches(first: Any, second: Any) -> bool:
    """Whether the inputs of the second layer are the channels of the first, each once or, flattened, in turn."""
    channels, inputs = _outputs(first).shape[-1], second.kernel.shape[-2]
    return inputs == channels or (isinstance(second, keras.layers.Dense) and inputs % channels == 0)


def _outputs(layer: Any) -> np.ndarray:
    """Returns a kernel as (weights of a channel, output channels)."""
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    return kernel.reshape(-1, kernel.shape[-2] * kernel.shape[-1] if depthwise else kernel.shape[-1])


def _inputs(layer: Any, channels: int) -> np.ndarray:
    """Returns a kernel as (…, input channels, …); a flattening puts the channels fastest, so rows take turns."""
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    return kernel.reshape(-1, channels, kernel.shape[-1])


def _equalize_pair(first: Any, second: Any) -> float:
    made = _outputs(first)
    channels = made.shape[-1]
    read = _inputs(second, channels)
    r1, r2 = np.abs(made).max(axis=0), np.abs(read).max(axis=(0, 2))
    alive = (r1 > 0) & (r2 > 0)  # A dead channel has no range to share.
    scale = np.sqrt(np.where(alive, r1, 1.0) / np.where(alive, r2, 1.0)).astype(np.float32)
    first.kernel.assign((made / scale).reshape(first.kernel.shape))
    if first.use_bias:
        first.bias.assign(keras.ops.convert_to_numpy(first.bias) / scale)
    second.kernel.assign((read * scale[:, None]).reshape(second.kernel.shape))
    return float(np.abs(np.log(scale)).max())


def _spread(layer: Any) -> float:
    ranges = np.abs(_outputs(layer)).max(axis=0)
    ranges = ranges[ranges > 0]
    return float(ranges.max() / np.median(ranges)) if ranges.size else 1.0
