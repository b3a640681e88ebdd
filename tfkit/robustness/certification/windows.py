"""Windows: bounds of a convolution's outputs, each from the small part of the network that it sees.

A number in the output of the second or third convolution depends on few pixels, and so do the linear functions that
bound it: all coefficients outside of its window are zero. So each place of the output becomes an example of its own, of
a network of windows: the same convolutions without padding on small images, with ranges, lines and errors cut out of
the whole ones. All filters of a place share its windows. The bounds are the same as those of `propagation.backward`
over whole images, for which a row costs as much as a pass of the whole network.

Where padding makes a window reach over the edge, what is cut out there is zero, and coefficients are set to zero before
a bias or a norm could meet them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfkit.robustness.certification import propagation
from tfkit.robustness.certification.activations import Activation, Lines
from tfkit.robustness.certification.nodes import Convolution, Input, Node, Scale
from tfkit.robustness.certification.propagation import Bounds, Row, Setting
from tfkit.robustness.certification.region import Ball

Tensor = Any
Pair = tuple[int, int]


class Mask(Node):
    """Sets what lies outside of the image to zero; its slopes are ones and zeros."""


class Place(NamedTuple):
    """Where the windows of a node lie: that of the place o of the target starts at o * step - before.

    Attributes:
        position: of the node in the whole graph.
        size, step, before: rows and columns.
    """

    position: int
    size: Pair
    step: Pair
    before: Pair


class Windows(NamedTuple):
    """A target's network of windows.

    Attributes:
        target: position of the convolution in the whole graph.
        nodes: from the input to what the target reads.
        places: of the nodes; those of a mask are its input's.
    """

    target: int
    nodes: tuple[Node, ...]
    places: tuple[Place, ...]

    @property
    def volume(self) -> int:
        """Coefficients of a row, of all nodes together."""
        return sum(node.size for node in self.nodes)


def windows_of(nodes: Sequence[Node], target: int) -> Windows | None:
    """The windows of a convolution below which there is only a chain of convolutions, scales and activations."""
    node, position = nodes[target], target
    size, step, before = (1, 1), (1, 1), (0, 0)
    chain: list[tuple[Node, Place]] = []
    masked = True
    if type(node) is not Convolution:
        return None
    while True:
        if isinstance(node, Convolution):
            kernel = node.kernel(tf.float32).shape[:2]
            strides = tuple(node.strides[1:3])
            margins = [
                max((out - 1) * s + k - n, 0) // 2 if node.padding == "SAME" else 0
                for out, s, k, n in zip(node.shape[:2], strides, kernel, node.input_shape[:2], strict=True)
            ]
            before = _pair(b * s + m for b, s, m in zip(before, strides, margins, strict=True))
            size = _pair((n - 1) * s + k for n, s, k in zip(size, strides, kernel, strict=True))
            step = _pair(a * s for a, s in zip(step, strides, strict=True))
            masked = False
        if isinstance(node, Activation):
            masked = True
        position = node.inputs[0]
        node = nodes[position]
        if len(node.shape) != 3 or not isinstance(node, (Input, Convolution, Scale, Activation)):
            return None
        if isinstance(node, Scale) and not _by_channel(node):
            return None
        place = Place(position, size, step, before)
        outside = any(
            b > 0 or (out - 1) * s + n - b > length
            for b, n, s, out, length in zip(before, size, step, nodes[target].shape[:2], node.shape[:2], strict=True)
        )
        if outside and not masked and not isinstance(node, Activation):
            chain.append((Mask(node.name, (), (*size, node.shape[2])), place))
            masked = True
        chain.append((node, place))
        if isinstance(node, Input):
            break
    made: list[Node] = []
    for number, (whole, place) in enumerate(reversed(chain)):
        small = copy.copy(whole)
        small.inputs = (number - 1,) if number else ()
        small.shape = (*place.size, whole.shape[2])
        if isinstance(small, Convolution):
            small.padding, small.input_shape = "VALID", made[-1].shape
        made.append(small)
    return Windows(target, tuple(made), tuple(place for _, place in reversed(chain)))


def _pair(values: Any) -> Pair:
    first, second = (int(value) for value in values)
    return first, second


def _by_channel(node: Scale) -> bool:
    """Whether all places of an image are scaled and shifted alike."""
    return all(math.prod(value(tf.float32).shape[:-1]) == 1 for value in (node.scale, node.shift) if value is not None)


def bounded(
    windows: Windows,
    target: Convolution,
    bounds: Bounds,
    region: Ball,
    setting: Setting,
    first: Tensor,
    rows: int,
    parallel: bool,
) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds of some rows of places of the target's output, (examples, rows, columns, filters).

    Args:
        windows: of the target.
        target: the node.
        bounds, region: of the whole network; see `propagation.backward`.
        first: the first row of places, an integer tensor.
        rows: how many.
        parallel: whether upper bounds come with the lower ones.
    """
    columns, filters = target.shape[1:]
    dtype = region.x.dtype

    def cut(values: Tensor, place: Place) -> Tensor:
        return _cut(values, place, target.shape[:2], first, rows)

    parts = [cut(values, windows.places[0]) for values in (region.x, region.low, region.high, region.error)]
    small_region = Ball(parts[0], tf.repeat(region.epsilon, rows * columns), *parts[1:])
    small = Bounds({0: parts[0]}, {}, {}, {})
    for number, (node, place) in enumerate(zip(windows.nodes, windows.places, strict=True)):
        if isinstance(node, Mask):
            inside = cut(tf.ones_like(bounds.low[place.position]), place)
            none = tf.zeros_like(inside)
            small.lines[number] = Lines(inside, none, inside, none, none)
        elif isinstance(node, Activation):
            lines = bounds.lines[place.position]
            whole = tf.shape(bounds.low[place.position])
            small.lines[number] = Lines(*(cut(tf.broadcast_to(values, whole), place) for values in lines))
        elif not isinstance(node, Input):
            small.error[number] = cut(bounds.error[place.position], place)
    kernel = tf.transpose(target.kernel(dtype), (3, 0, 1, 2))
    coefficients = tf.broadcast_to(kernel, tf.concat([tf.shape(parts[0])[:1], tf.shape(kernel)], 0))
    row = Row(len(windows.nodes) - 1, coefficients=coefficients, mirrored=not parallel)
    least, largest = propagation.backward(windows.nodes, small, small_region, row, setting, both=parallel)
    if not parallel:
        least, largest = tf.split(least, 2, 1)
        largest = -largest
    error = bounds.error[windows.target]
    error = tf.slice(error, [0, first, 0, 0], [-1, rows, -1, -1])
    constant = target.constant(dtype)
    if constant is not None:
        least, largest = least + constant, largest + constant
    shape = (-1, rows, columns, filters)
    return tf.reshape(least, shape) - error, tf.reshape(largest, shape) + error


def _cut(values: Tensor, place: Place, out: Sequence[int], first: Tensor, rows: int) -> Tensor:
    """Cuts windows out of images; (examples * rows * columns, *size, channels)."""
    (height, width), (down, right), (top, left) = place.size, place.step, place.before
    rest = [
        max((n - 1) * step + size - before - length, 0)
        for n, step, size, before, length in zip(
            out, place.step, place.size, place.before, values.shape[1:3], strict=True
        )
    ]
    padded = tf.pad(values, [[0, 0], [top, rest[0]], [left, rest[1]], [0, 0]])
    slab = tf.slice(padded, [0, first * down, 0, 0], [-1, (rows - 1) * down + height, -1, -1])
    found = tf.image.extract_patches(slab, [1, height, width, 1], [1, down, right, 1], [1, 1, 1, 1], "VALID")
    return tf.reshape(found[:, :, : out[1]], (-1, height, width, values.shape[3]))
