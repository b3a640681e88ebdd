"""Sums that a file and Keras agree on: biases in whole steps, and odd sums before a sign.

Used where weights or activations have fewer than 8 bits. The file runs on int8 kernels, which add int32 products of
integers and an int32 bias; the sign of such a sum is exact if it never is zero.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from tfkit.compression.fake_quantize import FakeQuantize, QuantizedGrid, channel_view
from tfkit.compression.low_precision import IntegerSign, levels
from tfkit.compression.quantized_layers import SAME_GRID, WEIGHTED
from tfkit.internal import folding, surgery

#: Layers whose thresholds can be made integers.
SIGNED = (keras.layers.Dense, keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
#: Of these, those for whose kernels the converter can be told a scale for each channel.
CHANNEL_SCALES = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)
#: In 8 bits, counted from the zero point.
LARGEST_INPUT = 255


def whole_biases(model: keras.Model) -> keras.Model:
    """Puts every bias on the grid on which the file adds it, where weights and inputs are on grids of their own."""
    return _changed(model, signs=False)


def integer_sums(model: keras.Model) -> keras.Model:
    """Does what `whole_biases` does, and makes the sums before each `IntegerSign` odd."""
    return _changed(model, signs=True)


def _changed(model: keras.Model, signs: bool) -> keras.Model:
    changed: dict[int, Any] = {}
    for layer, reader in readers(model).items():
        grid = getattr(layer, surgery.constraint_name(layer, "kernel"), None)
        step = _input_step(layer) if isinstance(grid, QuantizedGrid) and isinstance(layer, SIGNED) else None
        if isinstance(grid, QuantizedGrid) and step is not None:
            change = _odd if signs and isinstance(reader, IntegerSign) else _whole
            changed[id(layer)] = change(layer, grid, step)
    return surgery.rebuild(model, lambda layer: changed.get(id(layer)))


def _whole(layer: Any, grid: QuantizedGrid, step: float) -> keras.Layer:
    """Returns a copy of a layer whose bias is a whole number of the steps in which the file counts it."""
    copy: Any = surgery.copy_layer(layer)
    if 2 < grid.bits < 8 and grid.scale.size > 1 and not isinstance(layer, CHANNEL_SCALES):
        grid = _as_stored(copy, grid)
    if layer.use_bias:
        finest = np.where(grid.scale > 0, grid.scale, 1.0).astype(np.float64) * step / (127 // levels(grid.bits))
        bias = keras.ops.convert_to_numpy(layer.bias).astype(np.float64)
        copy.bias.assign(np.clip(np.rint(bias / finest), -(2**30), 2**30) * finest)
    return copy


def _as_stored(layer: Any, grid: QuantizedGrid) -> QuantizedGrid:
    """Moves a kernel to the 8-bit grid that its file will have, by at most 1 / 254 of each channel's largest weight.

    A normalization folded into a Dense layer leaves it with a scale for each channel. The converter cannot be told
    them and takes max|w| / 127, of which the narrow grid's steps are no whole multiple.
    """
    kernel = keras.ops.convert_to_numpy(layer.kernel).astype(np.float64)
    safe = np.where(grid.scale > 0, grid.scale, 1.0).astype(np.float64)
    integers = np.rint(kernel / safe)
    largest = np.maximum(np.abs(integers).max(axis=tuple(range(kernel.ndim - 1))), 1)
    stored = QuantizedGrid(largest * grid.scale / 127, 8)
    layer.kernel.assign(np.rint(integers * 127 / largest) * stored.scale)
    layer.kernel_constraint = layer.kernel.constraint = stored
    return stored


def _odd(layer: Any, grid: QuantizedGrid, step: float) -> keras.Layer:
    """Returns a copy of a layer whose sums have the same signs, and are odd whole numbers, times two.

    Integer weights q of scale s, a bias b and inputs of integers x times a step give a number that is not negative
    where sum(q * x) >= ceil(-b / (s * step)) =: n. So does 2 * sum(q * x) - 2 * n + 1, which is never zero. Twice that
    leaves room for the half step by which the file rounds this bias.
    """
    kernel = keras.ops.convert_to_numpy(layer.kernel).astype(np.float64)
    view = np.reshape(kernel, channel_view(kernel.shape, grid.depthwise, True))
    scale = np.broadcast_to(grid.scale.astype(np.float64), view.shape[-1:])
    dead = scale == 0  # By a batch normalization that multiplies with zero.
    safe = np.where(dead, 1.0, scale)
    integers = np.where(dead, 0.0, np.rint(view / safe))
    bias = keras.ops.convert_to_numpy(layer.bias).astype(np.float64) if layer.use_bias else np.zeros(len(scale))
    # The tolerance is for a bias that is, but for its rounding, a whole number of steps.
    thresholds = np.where(dead, np.where(bias >= 0, 0.0, 1.0), np.ceil(-bias / (safe * step) - 1e-6))
    # No sum goes beyond this, so that a threshold at infinity needs no larger bias.
    bound = np.abs(integers).reshape(-1, len(scale)).sum(axis=0) * LARGEST_INPUT + 1
    thresholds = np.clip(thresholds, -bound, bound)

    new_grid = QuantizedGrid(4.0 / step, grid.bits, grid.depthwise)
    overrides = {"use_bias": True, surgery.constraint_name(layer, "kernel"): keras.constraints.serialize(new_grid)}
    odd: Any = surgery.unbuilt_copy(layer, **overrides)
    odd.build_from_config(layer.get_build_config())
    odd.kernel.assign(np.reshape(integers * (4.0 / step), kernel.shape))
    odd.bias.assign(2.0 * (1.0 - 2.0 * thresholds))
    return odd


def _input_step(layer: Any) -> float | None:
    """Returns the step of the grid on which the inputs of a layer are; None if it reads several, or a float."""
    steps = {_step_of(tensor) for node in layer._inbound_nodes for tensor in node.input_tensors}
    return steps.pop() if len(steps) == 1 else None


def _step_of(tensor: Any) -> float | None:
    operation, index, _ = tensor._keras_history
    while type(operation).__name__ in SAME_GRID:
        operation, index, _ = operation._inbound_nodes[index].input_tensors[0]._keras_history
    if isinstance(operation, IntegerSign):
        return operation.step
    if isinstance(operation, FakeQuantize) and operation.minimum is not None and operation.maximum is not None:
        return float(operation.maximum - operation.minimum) / (2**operation.bits - 1)
    return None


def readers(model: keras.Model) -> dict[Any, Any]:
    """Maps each layer with weights to what alone reads its sums, past its batch normalization; None: several do."""
    consumers, pairs = surgery.sole_consumers(model), folding.foldable_pairs(model)
    return {
        surgery.source(layer): consumers.get(id(pairs.get(id(layer), layer)))
        for layer in surgery.leaf_layers(model)
        if isinstance(surgery.source(layer), WEIGHTED)
    }
