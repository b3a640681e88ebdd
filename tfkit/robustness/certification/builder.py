"""A graph of nodes, as it is put together: what readers of Keras models and of files share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from tfkit.robustness.certification import activations
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.nodes import (
    Convolution,
    DepthwiseConvolution,
    Input,
    Node,
    Rearrange,
    Scale,
    Weight,
    weight,
)

Tensor = Any
#: Activations by their names in Keras.
FUNCTIONS: dict[str, type[activations.Activation]] = {
    "relu": activations.LeakyReLU,
    "sigmoid": activations.Sigmoid,
    "tanh": activations.Tanh,
    "gelu": activations.GELU,
    "softplus": activations.Softplus,
    "elu": activations.ELU,
    "silu": activations.SiLU,
    "swish": activations.SiLU,
}


class UnsupportedLayerError(ValueError):
    """A layer through which bounds cannot be passed."""


class Graph(NamedTuple):
    """A network as nodes in the order of computation; the first is the input, the last the output.

    Attributes:
        nodes: the nodes.
        dropped_softmax: whether a last softmax was left out: it changes no order of classes.
        arithmetic: "int8" for a file, whose nodes bear its roundings; None: as asked for.
        copied: what was copied from layers, such as ranges: how to get it, and its value then.
    """

    nodes: tuple[Node, ...]
    dropped_softmax: bool
    arithmetic: str | None = None
    copied: tuple[tuple[Callable[[], Any], np.ndarray], ...] = ()

    @property
    def outdated(self) -> bool:
        """Whether what was copied has changed since. Weights are not copied, but read anew in each computation."""
        return any(not np.array_equal(get(), value) for get, value in self.copied)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.nodes[0].shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Of one example."""
        return self.nodes[-1].shape


class Builder:
    """Collects the nodes of a graph."""

    def __init__(self, name: str, shape: Sequence[int]) -> None:
        self.nodes: list[Node] = [Input(name, shape)]
        self.softmax: int | None = None  # The position that a softmax was to be applied to.
        self.copied: list[tuple[Callable[[], Any], np.ndarray]] = []

    def copy(self, get: Callable[[], Any]) -> np.ndarray:
        """Numbers of a layer that decide what nodes there are, and so cannot be read anew in each computation."""
        value = np.asarray(get(), np.float64)
        self.copied.append((get, value))
        return value

    def finish(self, output: int) -> Graph:
        """The graph of what the output needs, the output last."""
        if self.softmax is not None and output != self.softmax:
            raise UnsupportedLayerError("A softmax inside of a network cannot be bounded, only one at its end.")
        needed = {0, output}
        for position in range(output, -1, -1):
            if position in needed:
                needed.update(self.nodes[position].inputs)
        if output == 0:
            output = self.scale("identity", 0, None)
            needed.add(output)
        kept = sorted(needed)
        places = {position: place for place, position in enumerate(kept)}
        for position in kept:
            node = self.nodes[position]
            node.inputs = tuple(places[source] for source in node.inputs)
        return Graph(
            tuple(self.nodes[position] for position in kept), self.softmax is not None, copied=tuple(self.copied)
        )

    def add(self, node: Node) -> int:
        """Appends a node; returns its position."""
        self.nodes.append(node)
        return len(self.nodes) - 1

    def shape(self, position: int) -> tuple[int, ...]:
        """Of a node's output."""
        return self.nodes[position].shape

    def scale(self, name: str, source: int, scale: Weight | None, shift: Weight | None = None, **options: Any) -> int:
        """x * scale + shift."""
        return self.add(Scale(name, source, self.shape(source), scale, shift, **options))

    def reshape(self, name: str, source: int, shape: Sequence[int]) -> int:
        """The same numbers in another shape."""
        old, new = self.shape(source), tuple(shape)
        if old == new:
            return source
        return self.add(
            Rearrange(name, source, new, lambda x: tf.reshape(x, (-1, *new)), lambda a: tf.reshape(a, (-1, *old)))
        )

    def activation(self, name: str, source: int, kind: str, **options: Any) -> int:
        """An activation by its name in Keras."""
        if kind in FUNCTIONS:
            return self.add(FUNCTIONS[kind](name, source, self.shape(source), **options))
        if kind == "linear":
            return source
        if kind == "softmax":
            self.softmax = source
            return source
        if kind == "relu6":
            return self.clip(name, source, 0.0, 6.0)
        if kind == "leaky_relu":
            return self.activation(name, source, "relu", **{"negative_slope": 0.2, **options})
        if kind == "hard_sigmoid":
            return self.clip(name, self.scale(name, source, weight(1 / 6), weight(0.5)), 0.0, 1.0)
        raise UnsupportedLayerError(
            f"The activation '{kind}' of layer '{name}' cannot be bounded. Supported: "
            f"{', '.join(sorted([*FUNCTIONS, 'hard_sigmoid', 'leaky_relu', 'linear', 'relu6']))}, softmax at the end."
        )

    def clip(self, name: str, source: int, low: float, high: float) -> int:
        """min(max(x, low), high), as two ReLUs."""
        above = source if low == 0 else self.scale(name, source, None, weight(-low))
        above = self.add(activations.LeakyReLU(name, above, self.shape(source)))
        below = self.scale(name, above, weight(-1.0), weight(high - low))
        below = self.add(activations.LeakyReLU(name, below, self.shape(source)))
        return self.scale(name, below, weight(-1.0), weight(high))

    def convolution(
        self,
        name: str,
        source: int,
        kernel: Weight,
        kernel_shape: Sequence[int],
        bias: Weight | None,
        strides: Sequence[int],
        padding: str,
        depthwise: bool = False,
    ) -> int:
        """A convolution of an image; kernel_shape is that after dilation."""
        height, width, channels = self.shape(source)
        size = [
            output_length(length, window, stride, padding)
            for length, window, stride in zip((height, width), kernel_shape[:2], strides, strict=True)
        ]
        filters = channels * kernel_shape[3] if depthwise else kernel_shape[3]
        fan_in = math.prod(kernel_shape[:2]) * (1 if depthwise else channels)
        kind = DepthwiseConvolution if depthwise else Convolution
        return self.add(
            kind(
                name,
                source,
                (*size, filters),
                kernel,
                bias,
                fan_in,
                strides,
                padding,
                (height, width, channels),
            )
        )


def output_length(length: int, window: int, stride: int, padding: str) -> int:
    """Of a convolution or a pooling along one axis."""
    return -(-length // stride) if padding.upper() == "SAME" else (length - window) // stride + 1


def max_pool(
    build: Builder, name: str, source: int, size: tuple[int, int], strides: tuple[int, int], padding: str
) -> int:
    """Lays the places of each window along an axis, and takes the maximum over it."""
    height, width, channels = build.shape(source)
    out = [output_length(n, k, s, padding) for n, k, s in zip((height, width), size, strides, strict=True)]
    spans = [(n - 1) * s + 1 for n, s in zip(out, strides, strict=True)]
    reach = [span + k - 1 for span, k in zip(spans, size, strict=True)]
    before = [
        max(r - n, 0) // 2 if padding.upper() == "SAME" else 0 for r, n in zip(reach, (height, width), strict=True)
    ]
    after = [max(r - n - b, 0) for r, n, b in zip(reach, (height, width), before, strict=True)]
    padded = (height + before[0] + after[0], width + before[1] + after[1])
    offsets = [(i, j) for i in range(size[0]) for j in range(size[1])]
    around = [[0, 0], [before[0], after[0]], [before[1], after[1]], [0, 0]]

    def bounds_of(i: int, j: int) -> tuple[list[int], list[int], list[int]]:
        return [i, j], [i + spans[0], j + spans[1]], [1, *strides, 1]

    def forward(x: Tensor) -> Tensor:
        x = tf.pad(x, around)
        parts = []
        for i, j in offsets:
            (top, left), (bottom, right), _ = bounds_of(i, j)
            parts.append(x[:, top : bottom : strides[0], left : right : strides[1]])
        return tf.stack(parts, -2)

    def backward(a: Tensor) -> Tensor:
        rows = tf.shape(a)[0]
        total = []
        for place, (i, j) in enumerate(offsets):
            (top, left), (bottom, right), steps = bounds_of(i, j)
            total.append(
                tf.raw_ops.StridedSliceGrad(
                    shape=tf.stack([rows, *padded, channels]), begin=[0, top, left, 0],
                    end=tf.stack([rows, bottom, right, channels]), strides=steps, dy=a[..., place, :],
                )
            )  # fmt: skip
        image = tf.add_n(total)[:, before[0] : before[0] + height, before[1] : before[1] + width]
        return tf.ensure_shape(image, (None, height, width, channels))

    places = build.add(Rearrange(name, source, (*out, len(offsets), channels), forward, backward))
    inside = np.zeros(padded, bool)
    inside[before[0] : before[0] + height, before[1] : before[1] + width] = True
    valid = np.stack([inside[i : i + spans[0] : strides[0], j : j + spans[1] : strides[1]] for i, j in offsets], -1)
    return build.add(Maximum(name, places, (*out, channels), valid))


def add_padding(build: Builder, name: str, source: int, around: Sequence[Sequence[int]]) -> int:
    """Zeros around all axes but the last; negative numbers crop."""
    shape = build.shape(source)
    around = [(int(a), int(b)) for a, b in around] + [(0, 0)]
    pads = [[0, 0], *([max(a, 0), max(b, 0)] for a, b in around)]
    crops = [[0, 0], *([max(-a, 0), max(-b, 0)] for a, b in around)]
    out = [n + a + b for n, (a, b) in zip(shape, around, strict=True)]

    def change(x: Tensor, pad: list[list[int]], crop: list[list[int]]) -> Tensor:
        x = tf.pad(x, pad)
        ends = [None, *(n - b for n, (_, b) in zip(x.shape[1:], crop[1:], strict=True))]
        return x[tuple(slice(a, end) for (a, _), end in zip(crop, ends, strict=True))]

    return build.add(Rearrange(name, source, out, lambda x: change(x, pads, crops), lambda a: change(a, crops, pads)))
