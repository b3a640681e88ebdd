"""Where a model can be split: its layers, what they cost, and the inputs they get.

Everything here is about the model as given; `low_rank_layers` and `low_rank_attention` make the new layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.base import copy_wrapped
from tfkit.compression.low_rank_factors import Options
from tfkit.internal import surgery
from tfkit.internal.channel_rules import opaque_macs

L = keras.layers
Shape = tuple[int | None, ...]
Rank = int | Sequence[int]

#: What can be split, by exact class: a subclass may compute something else.
HANDLED = (L.Dense, L.EinsumDense, L.Embedding, L.Conv1D, L.Conv2D, L.MultiHeadAttention)


class Site:
    """A layer of the model and where it is called.

    Args:
        layer: the layer.

    Attributes:
        inputs: for each call, the symbolic inputs; of attention: query, value and key.
        outputs: for each call, the symbolic output.
    """

    def __init__(self, layer: keras.Layer) -> None:
        self.layer = layer
        self.inputs: list[list[Any]] = []
        self.outputs: list[Any] = []

    def add(self, inputs: list[Any], output: Any) -> None:
        self.inputs.append(inputs)
        self.outputs.append(output)

    @property
    def multiply_adds(self) -> int:
        """Of all its calls for one example; unknown lengths count as 1."""
        if type(self.layer) is L.MultiHeadAttention:
            return int(attention_cost(self.layer, self, self.layer.key_dim, self.layer.value_dim)[1])
        labels = einsum_labels(self.layer) if type(self.layer) is L.EinsumDense else None
        if labels:
            shape = zip(labels[1], self.layer.kernel.shape, strict=True)
            made = math.prod(size for label, size in shape if label not in labels[3])
            return made * sum(product(inner_shape(inputs[0])) for inputs in self.inputs)
        return sum(
            opaque_macs(self.layer, [inner_shape(x) for x in inputs], [inner_shape(output)])
            for inputs, output in zip(self.inputs, self.outputs, strict=True)
        )

    @property
    def parameters(self) -> int:
        """Of the layer, biases included."""
        return self.layer.count_params()


class TappedModel:
    """A flat copy of a model, and its layers that have weights to compress with the inputs they get."""

    def __init__(self, model: keras.Model) -> None:
        self.found: dict[int, Site] = {}

        def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
            outputs = new(*args, **kwargs)
            if isinstance(original, keras.Layer) and surgery.compressible_weights(original):
                site = self.found.setdefault(id(original), Site(original))
                inputs = list(keras.tree.flatten(args[0]))
                if type(original) is keras.layers.MultiHeadAttention:
                    value = args[1] if len(args) > 1 else kwargs["value"]
                    key = args[2] if len(args) > 2 else kwargs.get("key")
                    inputs = [args[0], value, value if key is None else key]
                site.add(inputs, keras.tree.flatten(outputs)[0])
            return outputs

        self.model = surgery.rebuild(model, copy_wrapped, call, inline=True)


class Split:
    """One way to split a layer.

    Attributes:
        method: its name.
        options: the ranks on offer and their losses.
        parameters, multiply_adds: of the split layer for each option, (options,).
    """

    method: str
    options: Options
    parameters: np.ndarray
    multiply_adds: np.ndarray

    def layers(self, ranks: Sequence[int]) -> tuple[list[keras.Layer], float]:
        """Returns the new layers, built, in order, the last with the old name; and the relative error of the split."""
        raise NotImplementedError


def why_not(layer: Any) -> str:
    """Returns why a layer cannot be split, or nothing."""
    if type(layer) not in HANDLED:
        return f"no factorisation of {type(layer).__name__} here"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None) is not None:
        return "it holds an adapter or integers of Keras' own quantization"
    if isinstance(getattr(layer, "activation", None), keras.Layer):
        return "its activation is a layer"
    if getattr(layer, "groups", 1) != 1:
        return "its channels are in groups"
    if isinstance(layer, L.EinsumDense) and einsum_labels(layer) is None:
        return "an axis of its kernel is in both input and output"
    return ""


def gram_of(layer: Any, inputs: Sequence[tf.Tensor]) -> Any:
    """Returns the Gram matrix of what multiplies a layer's weight, summed over one batch.

    Args:
        layer: the layer.
        inputs: of one call, (batch, ...) each.

    Returns:
        (rows, rows) in float64 for the matrix view of the weight; a diagonal (rows,) for an embedding; for attention, a
        dictionary of them for query, key and value.
    """
    if isinstance(layer, L.MultiHeadAttention):
        tensors = {"query": inputs[0], "value": inputs[1], "key": inputs[2]}
        return {name: _gram(_with_ones(x) if layer.use_bias else x) for name, x in tensors.items()}
    x = inputs[0]
    if isinstance(layer, L.Embedding):
        return np.bincount(np.asarray(x).astype(np.int64).ravel(), minlength=layer.input_dim).astype(np.float64)
    if isinstance(layer, L.EinsumDense):
        labels = einsum_labels(layer)
        assert labels is not None
        spec, _, _, shared = labels
        offset = len(x.shape) - len(spec) if layer.equation.startswith("...") else 0
        axes = [offset + spec.index(label) for label in shared]
        kept = [axis for axis in range(len(x.shape)) if axis not in axes]
        x = tf.transpose(x, kept + axes)
        return _gram(tf.reshape(x, (-1, math.prod(x.shape[len(kept) :]))))
    if isinstance(layer, (L.Conv1D, L.Conv2D)):
        return _gram(_patches(layer, x))
    return _gram(x)


def _gram(x: tf.Tensor) -> np.ndarray:
    rows = tf.reshape(tf.cast(x, tf.float32), (-1, x.shape[-1]))
    return tf.matmul(rows, rows, transpose_a=True).numpy().astype(np.float64)


def _with_ones(x: tf.Tensor) -> tf.Tensor:
    return tf.concat([x, tf.ones_like(x[..., :1])], axis=-1)


def _patches(layer: Any, x: tf.Tensor) -> tf.Tensor:
    """Returns the windows that a convolution sees, (windows, height * width * channels) in the kernel's order."""
    if layer.data_format == "channels_first":
        x = tf.experimental.numpy.moveaxis(x, 1, -1)
    size, strides, dilation = layer.kernel_size, layer.strides, layer.dilation_rate
    padding = layer.padding
    if isinstance(layer, L.Conv1D):
        if padding == "causal":
            x, padding = tf.pad(x, [[0, 0], [dilation[0] * (size[0] - 1), 0], [0, 0]]), "valid"
        x = x[:, :, None]
        size, strides, dilation = (*size, 1), (*strides, 1), (*dilation, 1)
    return tf.image.extract_patches(x, (1, *size, 1), (1, *strides, 1), (1, *dilation, 1), padding.upper())


def attention_cost(layer: Any, site: Site, key_dim: Any, value_dim: Any) -> tuple[Any, Any]:
    """Returns parameters and multiply-adds of attention with these dimensions of the heads, numbers or arrays."""
    heads, one = layer.num_heads, int(layer.use_bias)
    query, key, value = (
        int(dense.kernel.shape[0]) for dense in (layer.query_dense, layer.key_dense, layer.value_dense)
    )
    outputs = math.prod(layer.output_dense.kernel.shape[2:])
    parameters = heads * ((query + key + 2 * one) * key_dim + (value + one + outputs) * value_dim) + one * outputs
    gate = heads * (query + one) * value_dim if is_gated(layer) else 0
    multiply_adds = 0
    for x, y, _ in site.inputs:
        long, wide = product(inner_shape(x)[:-1]), product(inner_shape(y)[:-1])
        dims = (long * query + wide * key + long * wide) * key_dim
        dims = dims + (wide * value + long * outputs + long * wide) * value_dim
        multiply_adds = multiply_adds + heads * dims + (long * heads * query * value_dim if is_gated(layer) else 0)
    return parameters + gate, multiply_adds


def einsum_labels(layer: Any) -> tuple[str, str, str, list[str]] | None:
    """Returns the labels of input, kernel and output, and those summed over; None if a kernel axis is in all three."""
    left, output = layer.equation.replace("...", "").replace(" ", "").split("->")
    spec, kernel = left.split(",")
    if any(label in spec and label in output for label in kernel):
        return None
    return spec, kernel, output, [label for label in kernel if label in spec]


def is_gated(layer: Any) -> bool:
    """Whether attention multiplies its values by a gate."""
    return bool(getattr(layer, "_use_gate", False))


def as_array(variable: Any) -> np.ndarray:
    """Returns a weight in double precision."""
    return keras.ops.convert_to_numpy(variable).astype(np.float64)


def inner_shape(tensor: Any) -> Shape:
    """Returns the shape of one example."""
    return tuple(tensor.shape[1:])


def product(dimensions: Sequence[int | None]) -> int:
    """Returns the product; unknown sizes count as 1."""
    return math.prod(size or 1 for size in dimensions)


def spatial_shape(layer: Any, tensor: Any) -> Shape:
    """Returns height and width, or the length, of what a convolution reads or gives."""
    return inner_shape(tensor)[1:] if layer.data_format == "channels_first" else inner_shape(tensor)[:-1]


def pixels(site: Site, side: str) -> int:
    """Returns the positions of a convolution's `"inputs"` or `"outputs"` over all its calls."""
    tensors = site.outputs if side == "outputs" else [inputs[0] for inputs in site.inputs]
    return sum(product(spatial_shape(site.layer, tensor)) for tensor in tensors)
