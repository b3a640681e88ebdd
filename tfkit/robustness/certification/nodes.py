"""Nodes of a network's graph: what each must know so that bounds can pass through it, and the linear ones.

Every method of certification walks the same graph. Forwards it needs a node's bounds from those of its inputs;
backwards, the coefficients of a linear function of a node's output are turned into coefficients on its inputs, which
for a linear node is its transpose. A convolution's transpose is a convolution too, so no dense matrix is ever made.

Tensors of values have shape (examples, *node.shape); coefficients are flattened to (rows, *node.shape).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any
#: Gives a weight in the wanted precision. It is called anew in each computation, so that bounds follow training.
Weight = Callable[[tf.DType], Tensor]


def weight(variable: Any) -> Weight:
    """Returns the getter of a Keras variable or of an array."""
    if isinstance(variable, (np.ndarray, float, int)):
        array = np.asarray(variable, np.float64)
        return lambda dtype: tf.constant(array, dtype)
    return lambda dtype: tf.cast(tf.convert_to_tensor(variable), dtype)


class Node:
    """A step of a network.

    Attributes:
        name: of the layer that it comes from.
        inputs: positions in the graph of the nodes it reads.
        shape: of its output, without the batch.
    """

    def __init__(self, name: str, inputs: Sequence[int], shape: Sequence[int]) -> None:
        self.name = name
        self.inputs = tuple(inputs)
        self.shape = tuple(int(length) for length in shape)

    @property
    def size(self) -> int:
        """Numbers in the output for one example."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, inputs={self.inputs}, shape={self.shape})"


class Input(Node):
    """The network's input."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        super().__init__(name, (), shape)


class Linear(Node, abc.ABC):
    """An affine function of one or several inputs: a linear part, and a constant.

    Attributes:
        terms: the most products or summands that one number of the output adds up, for the bound of rounding errors.
        noise: the largest error of a number of the output beyond float rounding, as an array or a number; a rounding
            to a grid has half a step.
    """

    terms = 0
    noise: Any = 0.0

    @property
    def noisy(self) -> bool:
        """Whether there is any noise."""
        return bool(np.any(self.noise))

    @abc.abstractmethod
    def apply(self, values: list[Tensor]) -> Tensor:
        """The linear part."""

    @abc.abstractmethod
    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        """The linear part with each coefficient replaced by its magnitude."""

    @abc.abstractmethod
    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        """Coefficients on the output to those on each input."""

    def constant(self, dtype: tf.DType) -> Tensor | None:
        """The constant, of a shape that broadcasts to the output; None where there is none."""
        return None


class Dense(Linear):
    """x W + b over the last axis; `kernel` is (inputs, units)."""

    def __init__(
        self, name: str, source: int, shape: Sequence[int], kernel: Weight, bias: Weight | None, fan_in: int
    ) -> None:
        super().__init__(name, (source,), shape)
        self.kernel, self.bias, self.terms = kernel, bias, fan_in + 1

    def apply(self, values: list[Tensor]) -> Tensor:
        return _matmul(values[0], self.kernel(values[0].dtype))

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return _matmul(values[0], tf.abs(self.kernel(values[0].dtype)))

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        return [_matmul(coefficients, self.kernel(coefficients.dtype), transpose=True)]

    def rows(self, indices: Tensor, dtype: tf.DType) -> Tensor:
        """Coefficients on the input of the outputs at `indices`, for a flat output: columns of the kernel."""
        return tf.gather(tf.transpose(self.kernel(dtype)), indices)

    def constant(self, dtype: tf.DType) -> Tensor | None:
        return None if self.bias is None else self.bias(dtype)


def _matmul(values: Tensor, kernel: Tensor, transpose: bool = False) -> Tensor:
    """Multiplies over the last axis, as one matrix product."""
    shape = tf.shape(values)
    flat = tf.matmul(tf.reshape(values, (-1, values.shape[-1])), kernel, transpose_b=transpose)
    return tf.reshape(flat, tf.concat([shape[:-1], [kernel.shape[0 if transpose else 1]]], 0))


class Convolution(Linear):
    """A two-dimensional convolution; `kernel` is (height, width, channels, filters), already dilated.

    Args:
        strides: rows, columns.
        padding: "SAME" or "VALID".
        input_shape: (height, width, channels).
    """

    def __init__(
        self,
        name: str,
        source: int,
        shape: Sequence[int],
        kernel: Weight,
        bias: Weight | None,
        fan_in: int,
        strides: Sequence[int],
        padding: str,
        input_shape: Sequence[int],
    ) -> None:
        super().__init__(name, (source,), shape)
        self.kernel, self.bias, self.terms = kernel, bias, fan_in + 1
        self.strides = [1, *strides, 1]
        self.padding = padding.upper()
        self.input_shape = tuple(input_shape)

    def _convolve(self, values: Tensor, kernel: Tensor) -> Tensor:
        return tf.nn.conv2d(values, kernel, self.strides, self.padding)

    def apply(self, values: list[Tensor]) -> Tensor:
        return self._convolve(values[0], self.kernel(values[0].dtype))

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return self._convolve(values[0], tf.abs(self.kernel(values[0].dtype)))

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        sizes = tf.concat([tf.shape(coefficients)[:1], self.input_shape], 0)
        kernel = self.kernel(coefficients.dtype)
        return [self._transposed(sizes, kernel, coefficients)]

    def _transposed(self, sizes: Tensor, kernel: Tensor, coefficients: Tensor) -> Tensor:
        return tf.ensure_shape(
            tf.raw_ops.Conv2DBackpropInput(
                input_sizes=sizes,
                filter=kernel,
                out_backprop=coefficients,
                strides=self.strides,
                padding=self.padding,
            ),
            (None, *self.input_shape),
        )

    def constant(self, dtype: tf.DType) -> Tensor | None:
        return None if self.bias is None else self.bias(dtype)


class DepthwiseConvolution(Convolution):
    """A convolution of each channel by itself; `kernel` is (height, width, channels, multiplier); equal strides."""

    def _convolve(self, values: Tensor, kernel: Tensor) -> Tensor:
        return tf.nn.depthwise_conv2d(values, kernel, self.strides, self.padding)

    def _transposed(self, sizes: Tensor, kernel: Tensor, coefficients: Tensor) -> Tensor:
        back = tf.nn.depthwise_conv2d_backprop_input(sizes, kernel, coefficients, self.strides, self.padding)
        return tf.ensure_shape(back, (None, *self.input_shape))


class Scale(Linear):
    """x * scale + shift, number by number: batch normalization at inference, rescaling, a rounding to a grid.

    Args:
        scale, shift: of a shape that broadcasts to the output; None for 1 and 0.
        noise: see `Linear`.
    """

    def __init__(
        self,
        name: str,
        source: int,
        shape: Sequence[int],
        scale: Weight | None,
        shift: Weight | None = None,
        noise: Any = 0.0,
        terms: int = 4,
    ) -> None:
        super().__init__(name, (source,), shape)
        self.scale, self.shift, self.noise, self.terms = scale, shift, noise, terms

    def apply(self, values: list[Tensor]) -> Tensor:
        return values[0] if self.scale is None else values[0] * self.scale(values[0].dtype)

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return values[0] if self.scale is None else values[0] * tf.abs(self.scale(values[0].dtype))

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        return [self.apply([coefficients])]

    def constant(self, dtype: tf.DType) -> Tensor | None:
        return None if self.shift is None else self.shift(dtype)


class AveragePool(Linear):
    """The mean of each window; padded places do not count."""

    def __init__(
        self,
        name: str,
        source: int,
        shape: Sequence[int],
        size: Sequence[int],
        strides: Sequence[int],
        padding: str,
        input_shape: Sequence[int],
    ) -> None:
        super().__init__(name, (source,), shape)
        self.window, self.strides, self.padding = [1, *size, 1], [1, *strides, 1], padding.upper()
        self.input_shape = tuple(input_shape)
        self.terms = math.prod(size) + 1

    def apply(self, values: list[Tensor]) -> Tensor:
        return tf.nn.avg_pool2d(values[0], self.window, self.strides, self.padding)

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return self.apply(values)

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        back = tf.raw_ops.AvgPoolGrad(
            orig_input_shape=tf.concat([tf.shape(coefficients)[:1], self.input_shape], 0),
            grad=coefficients,
            ksize=self.window,
            strides=self.strides,
            padding=self.padding,
        )
        return [tf.ensure_shape(back, (None, *self.input_shape))]


class Mean(Linear):
    """The mean over all places of an image: global average pooling. The channels stay."""

    def __init__(self, name: str, source: int, shape: Sequence[int], input_shape: Sequence[int]) -> None:
        super().__init__(name, (source,), shape)
        self.input_shape = tuple(input_shape)
        self.axes = tuple(range(1, len(input_shape)))
        self.terms = math.prod(input_shape[:-1]) + 1

    def apply(self, values: list[Tensor]) -> Tensor:
        return tf.reshape(tf.reduce_mean(values[0], self.axes), (-1, *self.shape))

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return self.apply(values)

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        channels = self.input_shape[-1]
        spread = tf.reshape(coefficients, (-1, *[1] * len(self.axes), channels)) / math.prod(self.input_shape[:-1])
        return [tf.broadcast_to(spread, tf.concat([tf.shape(spread)[:1], self.input_shape], 0))]


class Rearrange(Linear):
    """The same numbers in another order, some perhaps left out, or zeros between them: reshape, crop, pad, permute.

    Args:
        forward: values (examples, *input_shape) to the output.
        backward: coefficients (rows, *shape) to the input.
    """

    def __init__(
        self,
        name: str,
        source: int,
        shape: Sequence[int],
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(name, (source,), shape)
        self.forward, self.backward = forward, backward

    def apply(self, values: list[Tensor]) -> Tensor:
        return self.forward(values[0])

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return self.forward(values[0])

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        return [self.backward(coefficients)]


class Sum(Linear):
    """The sum of inputs of one shape, each with a sign: a residual connection."""

    def __init__(self, name: str, sources: Sequence[int], shape: Sequence[int], signs: Sequence[int]) -> None:
        super().__init__(name, sources, shape)
        self.signs = tuple(signs)
        self.terms = len(signs)

    def apply(self, values: list[Tensor]) -> Tensor:
        return tf.add_n([value if sign > 0 else -value for value, sign in zip(values, self.signs, strict=True)])

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return tf.add_n(values)

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        return [coefficients if sign > 0 else -coefficients for sign in self.signs]


class Concatenate(Linear):
    """Inputs beside each other along an axis; `axis` counts the batch."""

    def __init__(
        self, name: str, sources: Sequence[int], shape: Sequence[int], axis: int, lengths: Sequence[int]
    ) -> None:
        super().__init__(name, sources, shape)
        self.axis, self.lengths = axis, list(lengths)

    def apply(self, values: list[Tensor]) -> Tensor:
        return tf.concat(values, self.axis)

    def apply_absolute(self, values: list[Tensor]) -> Tensor:
        return self.apply(values)

    def transpose(self, coefficients: Tensor) -> list[Tensor]:
        return tf.split(coefficients, self.lengths, self.axis)
