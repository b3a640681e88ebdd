"""From a Keras model to a graph of nodes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import surgery
from tfkit.robustness.certification.builder import (
    Builder,
    Graph,
    UnsupportedLayerError,
    add_padding,
    max_pool,
    output_length,
)
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.nodes import (
    AveragePool,
    Concatenate,
    Dense,
    Mean,
    Rearrange,
    Sum,
    Weight,
    weight,
)

Tensor = Any
layers = keras.layers
#: Layers that pass their input on at inference.
IDENTITIES: tuple[type, ...] = (
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.AlphaDropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.ActivityRegularization,
    layers.Identity,
)


def read(model: keras.Model) -> Graph:
    """Reads a functional or sequential model, nested ones too. Weights stay the model's own.

    Raises:
        UnsupportedLayerError: a layer cannot be bounded; the message names it.
        TypeError, ValueError: it is no such model, or has several inputs or outputs.
    """
    view = surgery.as_functional(model)
    if len(view.inputs) != 1 or len(view.outputs) != 1:
        raise ValueError(
            f"Argument `model` must have one input and one output. Received: {len(view.inputs)} inputs and "
            f"{len(view.outputs)} outputs."
        )
    reader = Builder(view.inputs[0].name, _known(view.inputs[0].shape[1:], "the input"))
    (output,) = run(reader, view, [0])
    return reader.finish(output)


def _known(shape: Sequence[int | None], where: str) -> tuple[int, ...]:
    if any(length is None for length in shape):
        raise ValueError(f"{where} must have a fixed shape. Received: {tuple(shape)}. Build the model with sizes.")
    return tuple(int(length) for length in shape)  # type: ignore[arg-type]


def run(build: Builder, graph: keras.Model, sources: Sequence[int]) -> list[int]:
    """Adds a model's layers; returns the positions of its outputs."""
    places = {id(tensor): position for tensor, position in zip(graph.inputs, sources, strict=True)}
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for call in graph._nodes_by_depth[depth]:
            if call.is_input:
                continue
            operation = call.operation
            given = [places[id(tensor)] for tensor in call.input_tensors]
            if surgery.is_graph(operation):
                made = run(build, surgery.as_functional(operation), given)
            else:
                made = [add_layer(build, operation, given)]
            places |= {id(tensor): position for tensor, position in zip(call.outputs, made, strict=True)}
    return [places[id(tensor)] for tensor in graph.outputs]


def add_layer(build: Builder, layer: Any, given: list[int]) -> int:
    """Adds one layer; returns the position of its output."""
    if build.softmax is not None and build.softmax in given:
        raise UnsupportedLayerError(
            f"Layer '{layer.name}' reads a softmax, which can be bounded only as the last layer."
        )
    for kind, add in LAYERS.items():
        if isinstance(layer, kind):
            return add(build, layer, given)
    kind = type(layer).__name__
    if kind in ("Add", "Subtract") and len(given) == 2:  # x + y of tensors: an operation, not a layer.
        if build.shape(given[0]) == build.shape(given[1]):
            return build.add(Sum(layer.name, given, build.shape(given[0]), (1, 1 if kind == "Add" else -1)))
    if kind in ("Relu", "Sigmoid", "Tanh", "Gelu", "Softplus", "Silu") and len(given) == 1:
        if kind != "Gelu" or not layer.approximate:
            return build.activation(layer.name, given[0], kind.lower())
    raise unsupported(layer)


def unsupported(layer: Any, why: str = "") -> UnsupportedLayerError:
    """The error that names a layer."""
    return UnsupportedLayerError(
        f"Layer '{layer.name}' of type {type(layer).__name__} cannot be bounded{': ' + why if why else ''}. "
        "Supported: Dense, convolutions, batch normalization, pooling, ReLU and its kin, sigmoid, tanh, GELU, "
        "SiLU, ELU, softplus, add, subtract, concatenate, flatten, reshape, permute, padding, cropping, rescaling, "
        "dropout."
    )


def own_activation(build: Builder, layer: Any, source: int) -> int:
    """The activation that a layer such as Dense applies itself."""
    name = surgery.activation_name(layer)
    return build.activation(layer.name, source, name)


def _dilated(kernel: Tensor, rate: Sequence[int]) -> Tensor:
    """Puts rate - 1 zeros between the rows and columns of a kernel, whose convolution is then an ordinary one."""
    for axis, step in enumerate(rate):
        if step > 1:
            length = kernel.shape[axis]
            padding = [[0, 0]] * (len(kernel.shape) + 1)
            padding[axis + 1] = [0, step - 1]
            spread = tf.pad(tf.expand_dims(kernel, axis + 1), padding)
            shape = list(kernel.shape)
            shape[axis] = length * step
            kernel = tf.reshape(spread, shape)
            keep = [slice(None)] * len(shape)
            keep[axis] = slice(0, (length - 1) * step + 1)
            kernel = kernel[tuple(keep)]
    return kernel


def _ungrouped(kernel: Tensor, groups: int) -> Tensor:
    """The kernel of the ordinary convolution that does the same as one in groups: zeros between groups."""
    filters = kernel.shape[-1] // groups
    mask = np.kron(np.eye(groups), np.ones((kernel.shape[-2], filters)))
    return tf.tile(kernel, [1] * (len(kernel.shape) - 2) + [groups, 1]) * tf.constant(mask, kernel.dtype)


def _bias(layer: Any) -> Weight | None:
    return weight(layer.bias) if layer.use_bias else None


def _channels_last(build: Builder, layer: Any) -> None:
    if getattr(layer, "data_format", "channels_last") not in (None, "channels_last"):
        raise unsupported(layer, "its data_format is channels_first")


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))


def add_dense(build: Builder, layer: Any, given: list[int]) -> int:
    shape = build.shape(given[0])
    # A getter, not the variable: a layer with LoRA or int8 weights computes its kernel.
    made = Dense(
        layer.name, given[0], (*shape[:-1], layer.units),
        lambda dtype: tf.cast(tf.convert_to_tensor(layer.kernel), dtype), _bias(layer), shape[-1],
    )  # fmt: skip
    return own_activation(build, layer, build.add(made))


def add_convolution(build: Builder, layer: Any, given: list[int]) -> int:
    """Conv1D, Conv2D and the depthwise and separable ones."""
    _channels_last(build, layer)
    source = given[0]
    flat = len(build.shape(source)) == 2
    strides, rate = tuple(layer.strides), tuple(layer.dilation_rate)
    padding = layer.padding
    if flat:  # A signal is an image of one row.
        if padding == "causal":
            source, padding = (
                add_padding(build, layer.name, source, ((rate[0] * (layer.kernel_size[0] - 1), 0),)),
                "valid",
            )
        source = build.reshape(layer.name, source, (1, *build.shape(source)))
        strides, rate = (1, *strides), (1, *rate)

    def kernel_of(name: str, rate: Sequence[int], groups: int = 1) -> tuple[Weight, list[int]]:
        shape = [1] * flat + list(getattr(layer, name).shape)

        def get(dtype: tf.DType) -> Tensor:
            # By name, not the variable: a layer with LoRA computes its kernel.
            kernel = tf.cast(tf.convert_to_tensor(getattr(layer, name)), dtype)
            kernel = _dilated(tf.reshape(kernel, shape), rate)
            return _ungrouped(kernel, groups) if groups > 1 else kernel

        dilated = [(length - 1) * step + 1 for length, step in zip(shape[:2], rate, strict=True)]
        return get, [*dilated, shape[2] * groups, shape[3]]

    if isinstance(layer, layers.SeparableConv1D | layers.SeparableConv2D):
        kernel, shape = kernel_of("depthwise_kernel", rate)
        source = _depthwise(build, layer, source, kernel, shape, None, strides, padding)
        strides = (1, 1)
        kernel, shape = kernel_of("pointwise_kernel", (1, 1))
        made = build.convolution(layer.name, source, kernel, shape, _bias(layer), strides, "valid")
    elif isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D):
        kernel, shape = kernel_of("kernel", rate)
        made = _depthwise(build, layer, source, kernel, shape, _bias(layer), strides, padding)
    else:
        kernel, shape = kernel_of("kernel", rate, layer.groups)
        made = build.convolution(layer.name, source, kernel, shape, _bias(layer), strides, padding)
    if flat:
        made = build.reshape(layer.name, made, build.shape(made)[1:])
    return own_activation(build, layer, made)


def _depthwise(
    build: Builder, layer: Any, source: int, kernel: Weight, shape: list[int], bias: Any, strides: Any, padding: str
) -> int:
    if strides[0] == strides[1]:
        return build.convolution(layer.name, source, kernel, shape, bias, strides, padding, depthwise=True)
    channels, multiplier = shape[2:]

    def full(dtype: tf.DType) -> Tensor:  # TensorFlow has no depthwise convolution with unequal strides.
        each = kernel(dtype)[:, :, :, None, :] * tf.eye(channels, dtype=dtype)[:, :, None]
        return tf.reshape(each, (*shape[:2], channels, channels * multiplier))

    return build.convolution(layer.name, source, full, [*shape[:3], channels * multiplier], bias, strides, padding)


def add_batch_normalization(build: Builder, layer: Any, given: list[int]) -> int:
    shape = build.shape(given[0])
    if layer.axis not in (-1, len(shape)):
        raise unsupported(layer, f"it normalizes axis {layer.axis}, not the last")

    def scale(dtype: tf.DType) -> Tensor:
        deviation = tf.sqrt(tf.cast(tf.convert_to_tensor(layer.moving_variance), dtype) + layer.epsilon)
        return (tf.cast(tf.convert_to_tensor(layer.gamma), dtype) if layer.scale else 1.0) / deviation

    def shift(dtype: tf.DType) -> Tensor:
        centre = tf.cast(tf.convert_to_tensor(layer.beta), dtype) if layer.center else 0.0
        return centre - tf.cast(tf.convert_to_tensor(layer.moving_mean), dtype) * scale(dtype)

    return build.scale(layer.name, given[0], scale, shift, terms=8)


def add_normalization(build: Builder, layer: Any, given: list[int]) -> int:
    mean, variance = (found[0] for found in build.copy(lambda: np.stack([layer.mean, layer.variance])))
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return build.scale(layer.name, given[0], weight(deviation), weight(mean))
    return build.scale(layer.name, given[0], weight(1 / deviation), weight(-mean / deviation), terms=8)


def add_rescaling(build: Builder, layer: Any, given: list[int]) -> int:
    return build.scale(layer.name, given[0], weight(np.asarray(layer.scale)), weight(np.asarray(layer.offset)))


def add_average_pool(build: Builder, layer: Any, given: list[int]) -> int:
    _channels_last(build, layer)
    shape = build.shape(given[0])
    size, strides = _pair(layer.pool_size), _pair(layer.strides)
    out = [output_length(n, k, s, layer.padding) for n, k, s in zip(shape[:2], size, strides, strict=True)]
    return build.add(AveragePool(layer.name, given[0], (*out, shape[2]), size, strides, layer.padding, shape))


def add_global_average_pool(build: Builder, layer: Any, given: list[int]) -> int:
    _channels_last(build, layer)
    shape = build.shape(given[0])
    out = (1,) * (len(shape) - 1) * layer.keepdims + shape[-1:]
    return build.add(Mean(layer.name, given[0], out, shape))


def add_max_pool(build: Builder, layer: Any, given: list[int]) -> int:
    _channels_last(build, layer)
    return max_pool(build, layer.name, given[0], _pair(layer.pool_size), _pair(layer.strides), layer.padding)


def add_global_max_pool(build: Builder, layer: Any, given: list[int]) -> int:
    _channels_last(build, layer)
    shape = build.shape(given[0])
    count = math.prod(shape[:-1])
    places = build.reshape(layer.name, given[0], (count, shape[-1]))
    made = build.add(Maximum(layer.name, places, shape[-1:], np.ones(count, bool)))
    return build.reshape(layer.name, made, (1,) * (len(shape) - 1) * layer.keepdims + shape[-1:])


def add_relu(build: Builder, layer: Any, given: list[int]) -> int:
    if layer.threshold:
        raise unsupported(layer, "its threshold is not 0")
    if layer.max_value is None:
        return _leaky(build, layer, given[0], float(layer.negative_slope))
    if layer.negative_slope:
        raise unsupported(layer, "it has both a negative slope and a largest value")
    return build.clip(layer.name, given[0], 0.0, float(layer.max_value))


def add_leaky_relu(build: Builder, layer: Any, given: list[int]) -> int:
    return _leaky(build, layer, given[0], float(layer.negative_slope))


def _leaky(build: Builder, layer: Any, source: int, slope: float) -> int:
    if not 0 <= slope < 1:
        raise unsupported(layer, f"its negative slope {slope:g} is not in [0, 1)")
    return build.activation(layer.name, source, "relu", negative_slope=slope)


def add_activation(build: Builder, layer: Any, given: list[int]) -> int:
    return own_activation(build, layer, given[0])


def add_elu(build: Builder, layer: Any, given: list[int]) -> int:
    if layer.alpha != 1:
        raise unsupported(layer, "its alpha is not 1")
    return build.activation(layer.name, given[0], "elu")


def add_softmax(build: Builder, layer: Any, given: list[int]) -> int:
    if layer.axis not in (-1, len(build.shape(given[0]))):
        raise unsupported(layer, "it is not over the last axis")
    return build.activation(layer.name, given[0], "softmax")


def add_sum(build: Builder, layer: Any, given: list[int]) -> int:
    shapes = {build.shape(position) for position in given}
    if len(shapes) > 1:
        raise unsupported(layer, f"its inputs have the shapes {sorted(shapes)}")
    signs = (1, -1) if isinstance(layer, layers.Subtract) else (1,) * len(given)
    return build.add(Sum(layer.name, given, shapes.pop(), signs))


def add_average(build: Builder, layer: Any, given: list[int]) -> int:
    return build.scale(layer.name, add_sum(build, layer, given), weight(1 / len(given)))


def add_concatenate(build: Builder, layer: Any, given: list[int]) -> int:
    shapes = [build.shape(position) for position in given]
    axis = layer.axis if layer.axis > 0 else layer.axis + len(shapes[0]) + 1
    lengths = [shape[axis - 1] for shape in shapes]
    shape = list(shapes[0])
    shape[axis - 1] = sum(lengths)
    return build.add(Concatenate(layer.name, given, shape, axis, lengths))


def add_flatten(build: Builder, layer: Any, given: list[int]) -> int:
    _channels_last(build, layer)
    return build.reshape(layer.name, given[0], (math.prod(build.shape(given[0])),))


def add_reshape(build: Builder, layer: Any, given: list[int]) -> int:
    shape = np.empty(build.shape(given[0])).reshape(layer.target_shape).shape
    return build.reshape(layer.name, given[0], shape)


def add_permute(build: Builder, layer: Any, given: list[int]) -> int:
    order = (0, *layer.dims)
    back = tuple(int(place) for place in np.argsort(order))
    shape = [build.shape(given[0])[axis - 1] for axis in layer.dims]
    return build.add(
        Rearrange(layer.name, given[0], shape, lambda x: tf.transpose(x, order), lambda a: tf.transpose(a, back))
    )


def add_padding_layer(build: Builder, layer: Any, given: list[int]) -> int:
    _channels_last(build, layer)
    crop = isinstance(layer, layers.Cropping1D | layers.Cropping2D)
    around = layer.cropping if crop else layer.padding
    pairs = [around] if isinstance(layer, layers.ZeroPadding1D | layers.Cropping1D) else around
    sign = -1 if crop else 1
    return add_padding(build, layer.name, given[0], [(sign * a, sign * b) for a, b in pairs])


def add_identity(build: Builder, layer: Any, given: list[int]) -> int:
    return given[0]


def add_fake_quantize(build: Builder, layer: Any, given: list[int]) -> int:
    """Rounding to a grid: clipping, then an error of half a step."""
    from tfkit.compression.fake_quantize import nudged_range

    if layer.fixed:
        minimum, maximum = layer.minimum, layer.maximum
    else:
        moving = (layer.moving_minimum, layer.moving_maximum)
        seen, minimum, maximum = build.copy(lambda: [float(layer.steps) > 0, *map(float, moving)]).tolist()
        if not seen:
            return given[0]  # It has seen no data yet, and passes its input through.
    low, high = (float(end) for end in nudged_range(minimum, maximum, layer.bits))
    clipped = build.clip(layer.name, given[0], low, high)
    step = (high - low) / (2**layer.bits - 1)
    return build.scale(layer.name, clipped, None, noise=0.5 * step * (1 + 1e-4))


def _layers() -> dict[Any, Callable[[Builder, Any, list[int]], int]]:
    from tfkit.compression.fake_quantize import FakeQuantize

    convolutions = (
        layers.Conv1D,
        layers.Conv2D,
        layers.DepthwiseConv1D,
        layers.DepthwiseConv2D,
        layers.SeparableConv1D,
        layers.SeparableConv2D,
    )
    return {
        layers.Dense: add_dense,
        convolutions: add_convolution,
        layers.BatchNormalization: add_batch_normalization,
        layers.Normalization: add_normalization,
        layers.Rescaling: add_rescaling,
        layers.AveragePooling2D: add_average_pool,
        (layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D): add_global_average_pool,
        layers.MaxPooling2D: add_max_pool,
        (layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D): add_global_max_pool,
        layers.ReLU: add_relu,
        layers.LeakyReLU: add_leaky_relu,
        layers.ELU: add_elu,
        layers.Activation: add_activation,
        layers.Softmax: add_softmax,
        (layers.Add, layers.Subtract): add_sum,
        layers.Average: add_average,
        layers.Concatenate: add_concatenate,
        layers.Flatten: add_flatten,
        layers.Reshape: add_reshape,
        layers.Permute: add_permute,
        (layers.ZeroPadding1D, layers.ZeroPadding2D, layers.Cropping1D, layers.Cropping2D): add_padding_layer,
        FakeQuantize: add_fake_quantize,
        IDENTITIES: add_identity,
    }


LAYERS = _layers()
