"""How each layer passes channels on: the rules behind `tfkit.internal.channels`.

A rule sees a layer, the values it is called on, and the shape of its output; it tells the graph which weights run along
which channels and how many multiply-adds the call takes, and returns the channels of the output. It is chosen by the
exact class: a subclass may compute something else. Without a rule all channels of the inputs stay.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfkit.internal import surgery
from tfkit.internal.channels import STAYS, ChannelGraph, Ids, Value

L = keras.layers
Shape = tuple[int | None, ...]
Rule = Callable[[ChannelGraph, Any, list[Value], Shape], Value]

#: Functions of single numbers. Softmax and the gated ones mix channels.
ELEMENTWISE = frozenset(
    """linear relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh exponential softplus softsign hard_sigmoid
    hard_silu hard_tanh hard_shrink soft_shrink tanh_shrink log_sigmoid threshold squareplus sparse_plus""".split()
)
#: Operations of `keras.ops` on one tensor, by the name of their class.
UNARY = frozenset(
    """Relu Relu6 LeakyRelu Elu Selu Celu Gelu Silu Mish Sigmoid Tanh Softplus Softsign HardSigmoid HardSilu HardTanh
    LogSigmoid Exp Expm1 Log Log1p Sqrt Rsqrt Square Absolute Abs Negative Sign Clip Sin Cos Erf Identity
    Cast""".split()
)
BINARY = frozenset("Add Subtract Multiply TrueDivide Divide Maximum Minimum".split())
REDUCTIONS = frozenset("Mean Max Min Sum".split())
MAX_ENTRIES = 2**24


def apply(graph: ChannelGraph, operation: Any, inputs: list[Value], node: Any) -> list[Value]:
    """Applies the rule of one node of the graph; returns the values of its outputs."""
    shapes = [tuple(tensor.shape[1:]) for tensor in node.outputs]
    layer = surgery.source(operation)
    if type(layer) is L.MultiHeadAttention and layer is operation and not _altered(layer):
        return _attention(graph, layer, node, inputs, shapes)
    if isinstance(layer, keras.Layer):
        rule = RULES.get(type(layer))
        if rule and layer is operation and len(shapes) == 1 and not _altered(layer) and _plain_call(node, inputs):
            return [rule(graph, layer, inputs, shapes[0])]
    elif len(shapes) == 1 and type(layer).__module__.startswith("keras.src.ops"):
        found = _operation(graph, layer, inputs, shapes[0], node)
        if found is not None:
            return [found]
    if isinstance(layer, keras.Layer):
        graph.cost(layer, opaque_macs(layer, [value.shape for value in inputs], shapes))
    return _all_stay(graph, operation, inputs, shapes)


def opaque_macs(layer: keras.Layer, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int:
    """Returns the multiply-adds of a layer whose channels are not followed, from its weights and shapes."""
    if not inputs:
        return 0
    if isinstance(layer, L.TimeDistributed):
        return (inputs[0][0] or 1) * opaque_macs(layer.layer, [inputs[0][1:]], [outputs[0][1:]])
    weights = surgery.compressible_weights(layer)
    sizes = sum(math.prod(w.shape) for name, w in weights.items() if not name.endswith("embeddings"))
    name = type(layer).__name__
    if "Conv" in name and "LSTM" not in name:
        source = inputs[0] if "Transpose" in name else outputs[0]
        spatial = source[1:] if getattr(layer, "data_format", "") == "channels_first" else source[:-1]
        return sizes * _product(spatial)
    if isinstance(layer, L.MultiHeadAttention):
        sizes += 2 * layer.num_heads * layer.key_dim * _product(inputs[-1][:-1])
    return sizes * _product(inputs[0][:-1])


def _all_stay(graph: ChannelGraph, operation: Any, inputs: Sequence[Value], shapes: Sequence[Shape]) -> list[Value]:
    for value in inputs:
        graph.keep(value.ids, f"read by '{operation.name}' ({type(operation).__name__})")
    return [Value(shape) for shape in shapes]


def _altered(layer: Any) -> bool:
    """Whether a layer holds more than its class says: an adapter, integers, a grid that its weights must keep."""
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None) is not None:
        return True
    constraints = (value for name, value in vars(layer).items() if name.endswith("_constraint") and value is not None)
    return any(not type(value).__module__.startswith("keras.") for value in constraints)


def _plain_call(node: Any, inputs: Sequence[Value]) -> bool:
    """Whether the layer is called on its inputs alone: no mask, no initial state."""
    first = node.arguments.args[0] if node.arguments.args else next(iter(node.arguments.kwargs.values()), None)
    return len(keras.tree.flatten(first)) == len(inputs)


def _along_last(graph: ChannelGraph, layer: Any, value: Value) -> Ids:
    """Returns the ids along the last axis; channels that lie on another axis stay."""
    size = value.shape[-1]
    assert size is not None
    if value.ids is not None and value.axis % len(value.shape) != len(value.shape) - 1:
        graph.keep(value.ids, f"'{layer.name}' reads them along another axis")
    elif value.ids is not None:
        return value.ids
    return np.full(size, STAYS)


def _product(dimensions: Sequence[int | None]) -> int:
    return math.prod(1 if size is None else size for size in dimensions)


def _made(graph: ChannelGraph, layer: Any, count: int) -> Ids:
    """Returns the ids of the channels a layer makes; they stay if its activation mixes them."""
    ids = graph.units(layer, count)
    function = getattr(layer, "activation", None)
    if not _elementwise(function):
        graph.keep(ids, f"its activation {function_name(function)} mixes channels")
    return ids


def _elementwise(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return function is None or (name in ELEMENTWISE and getattr(keras.activations, name, None) is function)


def function_name(function: Any) -> str:
    """Returns what an activation is called."""
    return str(getattr(function, "__name__", type(function).__name__))


# Layers that make channels.


def _dense(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    read, made = _along_last(graph, layer, inputs[0]), _made(graph, layer, layer.units)
    graph.slice(layer, layer.kernel, 0, read)
    graph.slice(layer, layer.kernel, 1, made, "kernel")
    graph.slice(layer, getattr(layer, "bias", None), 0, made, "bias")
    graph.record(layer, [inputs[0]._replace(axis=len(inputs[0].shape) - 1, ids=read)], {"units": lambda n: n(made)})
    graph.cost(layer, _product(shape[:-1]), read, made)
    return Value(shape, len(shape) - 1, made)


def _einsum(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    value = inputs[0]
    left, right = layer.equation.replace(" ", "").split("->")
    data, _, kernel = left.partition(",")
    made_letters = [letter for letter in kernel if letter not in data]
    known = "." not in layer.equation and len(data) == len(value.shape) + 1 and data[0] not in kernel
    # A letter in all three places would make the output's channels those of the input.
    if not known or any(letter in right and letter in data for letter in kernel) or len(made_letters) > 1:
        graph.cost(layer, opaque_macs(layer, [value.shape], [shape]))
        return _all_stay(graph, layer, inputs, [shape])[0]
    if value.ids is not None and data[value.axis + 1] not in kernel:
        graph.keep(value.ids, f"'{layer.name}' reads them along another axis")
        value = value._replace(ids=None)
    sizes = dict(zip(data[1:], value.shape, strict=True)) | dict(zip(right[1:], shape, strict=True))
    factors = []
    if value.ids is not None:
        read = data[value.axis + 1]
        graph.slice(layer, layer.kernel, kernel.index(read), value.ids)
        factors.append(value.ids)
        sizes[read] = 1  # Counted as a factor.
    config: dict[str, Any] = {}
    result = Value(shape)
    letter = made_letters[0] if made_letters else ""
    if letter and letter in right:
        place = right.index(letter) - 1
        made = _made(graph, layer, int(sizes[letter] or 0))
        graph.slice(layer, layer.kernel, kernel.index(letter), made, "kernel")
        biases = sorted(layer.bias_axes or "", key=right.index)
        if letter in biases:
            if len(biases) == 1:
                graph.slice(layer, getattr(layer, "bias", None), 0, made, "bias")
            else:
                graph.keep(made, "its bias has several axes")
        sizes_out = layer.partial_output_shape
        config["output_shape"] = lambda n: [n(made) if i == place else size for i, size in enumerate(sizes_out)]
        factors.append(made)
        sizes[letter] = 1
        result = Value(shape, place, made)
    graph.record(layer, [value], config)
    graph.cost(layer, _product(list(sizes.values())), *factors)
    return result


def _conv(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    return _convolution(graph, layer, inputs, shape, transposed=False)


def _conv_transpose(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    return _convolution(graph, layer, inputs, shape, transposed=True)


def _convolution(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape, transposed: bool) -> Value:
    if layer.data_format != "channels_last" or getattr(layer, "groups", 1) != 1:
        graph.cost(layer, opaque_macs(layer, [inputs[0].shape], [shape]))
        return _all_stay(graph, layer, inputs, [shape])[0]
    read, made = _along_last(graph, layer, inputs[0]), _made(graph, layer, layer.filters)
    rank = len(layer.kernel.shape)
    graph.slice(layer, layer.kernel, rank - 1 if transposed else rank - 2, read)
    graph.slice(layer, layer.kernel, rank - 2 if transposed else rank - 1, made, "kernel")
    graph.slice(layer, getattr(layer, "bias", None), 0, made, "bias")
    graph.record(layer, [inputs[0]._replace(axis=len(shape) - 1, ids=read)], {"filters": lambda n: n(made)})
    spatial = inputs[0].shape[:-1] if transposed else shape[:-1]
    graph.cost(layer, _product(spatial) * math.prod(layer.kernel.shape[:-2]), read, made)
    return Value(shape, len(shape) - 1, made)


def _depthwise(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    if layer.data_format != "channels_last" or not _elementwise(layer.activation):
        graph.cost(layer, opaque_macs(layer, [inputs[0].shape], [shape]))
        return _all_stay(graph, layer, inputs, [shape])[0]
    read = _along_last(graph, layer, inputs[0])
    passed = np.repeat(read, layer.depth_multiplier)
    graph.slice(layer, layer.kernel, len(layer.kernel.shape) - 2, read)
    graph.slice(layer, getattr(layer, "bias", None), 0, passed, "shift")
    graph.record(layer, [inputs[0]._replace(axis=len(shape) - 1, ids=read)])
    graph.cost(layer, _product(shape[:-1]) * math.prod(layer.kernel.shape[:-2]), passed)
    return Value(shape, len(shape) - 1, passed)


def _separable(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    if layer.data_format != "channels_last":
        graph.cost(layer, opaque_macs(layer, [inputs[0].shape], [shape]))
        return _all_stay(graph, layer, inputs, [shape])[0]
    read, made = _along_last(graph, layer, inputs[0]), _made(graph, layer, layer.filters)
    between = np.repeat(read, layer.depth_multiplier)
    rank = len(layer.pointwise_kernel.shape)
    graph.slice(layer, layer.depthwise_kernel, rank - 2, read)
    graph.slice(layer, layer.pointwise_kernel, rank - 2, between)
    graph.slice(layer, layer.pointwise_kernel, rank - 1, made, "kernel")
    graph.slice(layer, getattr(layer, "bias", None), 0, made, "bias")
    graph.record(layer, [inputs[0]._replace(axis=len(shape) - 1, ids=read)], {"filters": lambda n: n(made)})
    graph.cost(layer, _product(shape[:-1]) * math.prod(layer.depthwise_kernel.shape[:-2]), between)
    graph.cost(layer, _product(shape[:-1]), between, made)
    return Value(shape, len(shape) - 1, made)


def _attention(graph: ChannelGraph, layer: Any, node: Any, inputs: list[Value], shapes: Sequence[Shape]) -> list[Value]:
    given = inspect.signature(type(layer).call).bind(layer, *node.arguments.args, **node.arguments.kwargs).arguments
    values = {id(tensor): value for tensor, value in zip(node.input_tensors, inputs, strict=True)}

    def argument(name: str) -> Value | None:
        tensor = given.get(name)
        return None if tensor is None else values.get(id(tensor))

    query, value = argument("query"), argument("value")
    key = argument("key") or value
    usual = len(shapes) == 1 and len(shapes[0]) == 2 and not getattr(layer, "_use_gate", False)
    if query is None or value is None or key is None or not usual or layer.attention_axes not in (None, (1,)):
        graph.cost(layer, opaque_macs(layer, [v.shape for v in inputs], shapes))
        return _all_stay(graph, layer, inputs, shapes)
    for name in given:
        if name not in ("query", "value", "key") and (extra := argument(name)) is not None:
            graph.keep(extra.ids, f"a mask of '{layer.name}'")
    heads = graph.units(layer, layer.num_heads, "heads")
    made = graph.units(layer, int(shapes[0][-1] or 0))
    read = {name: _along_last(graph, layer, v) for name, v in (("query", query), ("key", key), ("value", value))}
    for name, ids in read.items():
        part = getattr(layer, f"_{name}_dense")
        makes = name == "value"  # What a head adds to the output is linear in its values.
        graph.slice(layer, part.kernel, 0, ids)
        graph.slice(layer, part.kernel, 1, heads, "kernel" if makes else "")
        graph.slice(layer, part.bias, 0, heads, "bias" if makes else "")
    out = layer._output_dense
    graph.slice(layer, out.kernel, 0, heads)
    graph.slice(layer, out.kernel, 2, made, "kernel")
    graph.slice(layer, out.bias, 0, made, "bias")
    config = {"num_heads": lambda n: n(heads), "output_shape": lambda n: (n(made),)}
    built = [v._replace(axis=len(v.shape) - 1, ids=read[n]) for n, v in
             (("query", query), ("value", value), ("key", key))]  # fmt: skip
    graph.record(layer, built, config)
    targets, sources = _product(query.shape[:-1]), _product(value.shape[:-1])
    graph.cost(layer, targets * layer.key_dim, read["query"], heads)
    graph.cost(layer, sources * layer.key_dim, read["key"], heads)
    graph.cost(layer, sources * layer.value_dim, read["value"], heads)
    graph.cost(layer, targets * sources * (layer.key_dim + layer.value_dim), heads)
    graph.cost(layer, targets * layer.value_dim, heads, made)
    return [Value(shapes[0], len(shapes[0]) - 1, made)]


# Layers that pass channels on.


def _same(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    return inputs[0]._replace(shape=shape)


def _activation(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    if _elementwise(layer.activation):
        return inputs[0]
    return _all_stay(graph, layer, inputs, [shape])[0]


def _dropout(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    # Stochastic depth drops whole examples: its noise does not know how many channels there are.
    free = layer.noise_shape is None or layer.noise_shape[inputs[0].axis % len(shape) + 1] in (1, None)
    return inputs[0] if free else _all_stay(graph, layer, inputs, [shape])[0]


def _rescaling(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    single = np.size(layer.scale) == np.size(layer.offset) == 1
    return inputs[0] if single else _all_stay(graph, layer, inputs, [shape])[0]


def _spatial(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    """Pooling, padding, cropping and upsampling: each channel by itself, along all axes but the last."""
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        return _all_stay(graph, layer, inputs, [shape])[0]
    return Value(shape, len(shape) - 1, _along_last(graph, layer, inputs[0]))


def _normalization(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    value = inputs[0]
    if value.ids is None:
        return value
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if [axis % (len(shape) + 1) for axis in axes] != [value.axis + 1]:
        return _all_stay(graph, layer, inputs, [shape])[0]
    rms = isinstance(layer, L.RMSNormalization)
    graph.slice(layer, layer.scale if rms else layer.gamma, 0, value.ids, "scale")
    graph.slice(layer, getattr(layer, "beta", None), 0, value.ids, "shift")
    for statistic in ("moving_mean", "moving_variance"):
        graph.slice(layer, getattr(layer, statistic, None), 0, value.ids)
    graph.record(layer, [value])
    return value


def _prelu(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    value = inputs[0]
    if value.ids is not None:
        if layer.alpha.shape[value.axis] == shape[value.axis]:
            graph.slice(layer, layer.alpha, value.axis, value.ids)
        graph.record(layer, [value])
    return value


def _merge(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    """Element by element; a dimension of 1 is broadcast."""
    axes = {value.axis % len(value.shape) for value in inputs if value.ids is not None}
    ranks = {len(value.shape) for value in inputs}
    if not axes:
        return Value(shape)
    axis = axes.pop()
    if axes or ranks != {len(shape)}:
        return _all_stay(graph, layer, inputs, [shape])[0]
    joined: Ids | None = None
    for value in inputs:
        if value.shape[axis] != shape[axis]:
            graph.keep(value.ids, f"'{layer.name}' spreads it over all channels")
            continue
        ids = np.full(int(shape[axis] or 0), STAYS) if value.ids is None else value.ids
        if joined is None:
            joined = ids
        else:
            graph.tie(joined, ids)
    return Value(shape, axis, joined)


def _concatenate(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    axes = {value.axis % len(value.shape) for value in inputs if value.ids is not None}
    if not axes:
        return Value(shape)
    axis, joint = axes.pop(), layer.axis % (len(shape) + 1) - 1
    if axes or joint < 0 or shape[axis] is None:
        return _all_stay(graph, layer, inputs, [shape])[0]
    parts = [np.full(int(v.shape[axis] or 0), STAYS) if v.ids is None else v.ids for v in inputs]
    if joint == axis:
        return Value(shape, axis, np.concatenate(parts))
    for part in parts[1:]:
        graph.tie(parts[0], part)
    return Value(shape, axis, parts[0])


def _reshaped(graph: ChannelGraph, layer: Any, value: Value, shape: Shape) -> Value:
    """Follows every entry to its new place, then ties those that must go together for a rectangle to be left."""
    if value.ids is None:
        return Value(shape)
    if None in (*value.shape, *shape) or _product(shape) > MAX_ENTRIES:
        return _all_stay(graph, layer, [value], [shape])[0]
    wide = np.ones(len(value.shape), int)
    wide[value.axis] = -1
    entries = np.broadcast_to(value.ids.reshape(wide), value.shape).reshape(shape)  # type: ignore[arg-type]
    varying = [a for a in range(len(shape)) if (entries != entries.take([0], axis=a)).any()]
    axis = varying[-1] if varying else len(shape) - 1
    lines = np.moveaxis(entries, axis, 0).reshape(entries.shape[axis], -1)  # (channels, everything else)
    if len(varying) > 1:
        graph.tie(lines[:, :1], lines)
    return Value(shape, axis, lines[:, 0].copy())


def _flatten(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    if layer.data_format != "channels_last":
        return _all_stay(graph, layer, inputs, [shape])[0]
    return _reshaped(graph, layer, inputs[0], shape)


def _reshape(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    result = _reshaped(graph, layer, inputs[0], shape)
    if result.ids is not None:
        ids, axis = result.ids, result.axis
        graph.target(layer, ids)
        config = {"target_shape": lambda n: tuple(n(ids) if i == axis else size for i, size in enumerate(shape))}
        graph.record(layer, inputs, config)
    return result


def _permute(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    axis = inputs[0].axis % len(shape)
    return inputs[0]._replace(shape=shape, axis=layer.dims.index(axis + 1))


def _repeat_vector(graph: ChannelGraph, layer: Any, inputs: list[Value], shape: Shape) -> Value:
    return Value(shape, 1, inputs[0].ids)


def _operation(graph: ChannelGraph, operation: Any, inputs: list[Value], shape: Shape, node: Any) -> Value | None:
    """The rule of a `keras.ops` operation; None if there is none."""
    name = type(operation).__name__
    tensors = keras.tree.flatten((node.arguments.args, node.arguments.kwargs))
    constants = [x for x in tensors if not isinstance(x, keras.KerasTensor) and hasattr(x, "shape")]
    if any(_product(tuple(x.shape)) > 1 for x in constants):
        return None
    if name in UNARY and len(inputs) == 1:
        return inputs[0]._replace(shape=shape)
    if name in BINARY:
        return _merge(graph, operation, inputs, shape)
    if name == "Concatenate":
        return _concatenate(graph, operation, inputs, shape)
    if name in ("Squeeze", "ExpandDims") and len(inputs) == 1:
        return _reshaped(graph, operation, inputs[0], shape)
    if name in REDUCTIONS and len(inputs) == 1:
        return _reduced(graph, operation, inputs[0], shape)
    return None


def _reduced(graph: ChannelGraph, operation: Any, value: Value, shape: Shape) -> Value | None:
    axes = operation.axis
    if value.ids is None:
        return Value(shape)
    if axes is None:
        return None
    rank = len(value.shape) + 1
    gone = {axis % rank - 1 for axis in ([axes] if isinstance(axes, int) else axes)}
    if value.axis in gone or -1 in gone:
        return None
    shift = 0 if operation.keepdims else sum(axis < value.axis for axis in gone)
    return Value(shape, value.axis - shift, value.ids)


def _layers(*names: str) -> list[type]:
    return [getattr(L, name) for name in names]


RULES: dict[type, Rule] = {
    L.Dense: _dense,
    L.EinsumDense: _einsum,
    **dict.fromkeys(_layers("Conv1D", "Conv2D", "Conv3D"), _conv),
    **dict.fromkeys(_layers("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose"), _conv_transpose),
    **dict.fromkeys(_layers("DepthwiseConv1D", "DepthwiseConv2D"), _depthwise),
    **dict.fromkeys(_layers("SeparableConv1D", "SeparableConv2D"), _separable),
    **dict.fromkeys(_layers("BatchNormalization", "LayerNormalization", "RMSNormalization"), _normalization),
    **dict.fromkeys(
        _layers(
            "ReLU", "LeakyReLU", "ELU", "Identity", "GaussianNoise", "GaussianDropout", "AlphaDropout",
            "SpatialDropout1D", "SpatialDropout2D", "SpatialDropout3D", "ActivityRegularization",
        ),
        _same,
    ),
    **dict.fromkeys(
        [
            getattr(L, f"{kind}{n}D")
            for n in (1, 2, 3)
            for kind in (
                "MaxPooling", "AveragePooling", "GlobalMaxPooling", "GlobalAveragePooling", "ZeroPadding", "Cropping",
                "UpSampling",
            )
        ],
        _spatial,
    ),
    **dict.fromkeys(_layers("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum"), _merge),
    L.Activation: _activation,
    L.Dropout: _dropout,
    L.Rescaling: _rescaling,
    L.PReLU: _prelu,
    L.Concatenate: _concatenate,
    L.Flatten: _flatten,
    L.Reshape: _reshape,
    L.Permute: _permute,
    L.RepeatVector: _repeat_vector,
}  # fmt: skip
