"""Bounds through a graph: forwards as intervals, backwards as linear functions.

`Bounds` holds what is known of each node over a ball. `advance` goes forwards: the range of each node from those of its
inputs, and the lines of its activations. `backward` starts with rows of coefficients on one node and asks for the
smallest value of each row: it carries coefficients from node to node towards the input, where the minimum over the ball
is known in closed form. What happens at an activation is the only thing in which the methods differ:

    lines     each coefficient takes the lower or the upper line, by its sign (Fast-Lin, CROWN, alpha-CROWN)
    free      the coefficients behind the activation are variables, and the conjugate is paid for (the dual approach)
    stop      the range of the activation is taken, and nothing goes further back (interval bounds)

The account of rounding errors of `rounding.py` is in the ranges and in each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfkit.robustness.certification.activations import Activation, Lines
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.nodes import Dense, Input, Linear, Node
from tfkit.robustness.certification.region import Ball, rows_dot, smallest
from tfkit.robustness.certification.rounding import sum_error

Tensor = Any


class Setting(NamedTuple):
    """What does not change while one network is bounded.

    Attributes:
        order: of the norm.
        clipped: whether the ball is cut off where inputs end.
        arithmetic: what the network computes in, see `rounding.ARITHMETIC`.
    """

    order: float
    clipped: bool
    arithmetic: str


class Bounds(NamedTuple):
    """What is known of the nodes over each ball, by position in the graph.

    Attributes:
        low, high: ranges.
        error: rounding errors of linear nodes.
        lines: of activations and maxima.
    """

    low: dict[int, Tensor]
    high: dict[int, Tensor]
    error: dict[int, Tensor]
    lines: dict[int, Lines]

    def copy(self) -> Bounds:
        """The same, in dictionaries of its own."""
        return Bounds(dict(self.low), dict(self.high), dict(self.error), dict(self.lines))


def start(region: Ball) -> Bounds:
    """What is known of the input."""
    return Bounds({0: region.low - region.error}, {0: region.high + region.error}, {0: region.error}, {})


def advance(
    nodes: Sequence[Node],
    bounds: Bounds,
    wanted: Sequence[int],
    setting: Setting,
    slopes: str = "adaptive",
    chosen: Mapping[int, Tensor] | None = None,
    need_lines: bool = True,
) -> Bounds:
    """Returns the bounds with the ranges of the wanted nodes, whose inputs have theirs, and their lines.

    Args:
        nodes: the graph.
        bounds: so far.
        wanted: positions, in order.
        slopes: of the lower lines of ReLUs and other activations: "adaptive" as in CROWN, "parallel" to the upper ones
            as in Fast-Lin.
        chosen: numbers in [0, 1] that place the slope of an activation's lower line between its least and largest
            derivative; in place of `slopes`.
        need_lines: whether lines are made at all.
    """
    bounds = bounds.copy()
    for position in wanted:
        node = nodes[position]
        low = [bounds.low[source] for source in node.inputs]
        high = [bounds.high[source] for source in node.inputs]
        if isinstance(node, Linear):
            interval = linear_range(node, low, high, setting.arithmetic)
            bounds.low[position], bounds.high[position], bounds.error[position] = interval
            continue
        assert isinstance(node, (Activation, Maximum))
        least, largest = node.range(low[0], high[0])
        if isinstance(node, Maximum):
            lines = node.lines(low[0], high[0]) if need_lines else None
            spread = None if lines is None else lines.error
        else:
            lines = (
                activation_lines(node, low[0], high[0], setting, slopes, (chosen or {}).get(position))
                if need_lines
                else None
            )
            one = tf.ones_like(low[0])
            spread = node.error(low[0], high[0], one, one, setting.arithmetic) if lines is None else lines.error
            if setting.arithmetic == "ignored":
                spread = None
        if spread is not None:
            least, largest = least - spread, largest + spread
        bounds.low[position], bounds.high[position] = least, largest
        if lines is not None:
            bounds.lines[position] = lines
    return bounds


def activation_lines(
    node: Activation, low: Tensor, high: Tensor, setting: Setting, slopes: str, chosen: Tensor | None
) -> Lines:
    lower, upper = node.slopes(low, high)
    if chosen is not None:
        least, largest = node.derivative_range(low, high)
        lower = least + chosen * (largest - least)
    elif slopes == "parallel":
        lower = upper = node.chord(low, high)
    return node.lines(low, high, lower, upper, setting.arithmetic)


def linear_range(node: Linear, low: list[Tensor], high: list[Tensor], arithmetic: str) -> tuple[Tensor, Tensor, Tensor]:
    """The range of a linear node over a box of its inputs, and its rounding error."""
    dtype = low[0].dtype
    centre = node.apply([(a + b) / 2 for a, b in zip(low, high, strict=True)])
    radius = node.apply_absolute([(b - a) / 2 for a, b in zip(low, high, strict=True)])
    constant = node.constant(dtype)
    if arithmetic == "ignored":
        centre = centre if constant is None else centre + constant
        error = tf.zeros_like(centre) + tf.cast(node.noise, dtype) if node.noisy else tf.zeros_like(centre)
        return centre - radius - error, centre + radius + error, error
    magnitude = node.apply_absolute([tf.maximum(tf.abs(a), tf.abs(b)) for a, b in zip(low, high, strict=True)])
    if constant is not None:
        centre, magnitude = centre + constant, magnitude + tf.abs(constant)
    error = sum_error(node.terms, node.size, arithmetic) * magnitude + tf.cast(node.noise, dtype)
    return centre - radius - error, centre + radius + error, error


class Row(NamedTuple):
    """Where a backward pass starts: rows of coefficients on one node.

    Attributes:
        position: of the node.
        coefficients: (examples, rows, *shape); None for single numbers of the node.
        indices: (examples, rows): those numbers; None otherwise.
        mirrored: the negatives of all rows follow them, so that lower bounds of all are bounds of both kinds.
    """

    position: int
    coefficients: Tensor | None = None
    indices: Tensor | None = None
    mirrored: bool = False


def backward(
    nodes: Sequence[Node],
    bounds: Bounds,
    region: Ball,
    row: Row,
    setting: Setting,
    *,
    both: bool = False,
    stop: bool = False,
    free: Mapping[int, Tensor] | None = None,
    slopes: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Bounds linear functions of one node over the balls.

    Args:
        nodes: the graph.
        bounds: ranges and lines of all nodes before it.
        region: the balls.
        row: the linear functions.
        both: give upper bounds too. With lines that are parallel they cost nothing; otherwise pass rows and their
            negatives instead.
        stop: take the ranges at the last activations.
        free: coefficients on the inputs of activations, each (examples, rows, *shape): the variables of the dual
            approach.
        slopes: for each row, the slope of the lower lines, (examples, rows, *shape), in place of those in `bounds`.

    Returns:
        Lower bounds (examples, rows), and upper ones or None.
    """
    front, (coefficients, low, high, slack) = None, begin(nodes, bounds, row)
    counted = setting.arithmetic != "ignored"
    for position in range(row.position, -1, -1):
        a = coefficients.pop(position, None)
        if a is None:
            continue
        node = nodes[position]
        if front is None:
            front = tf.shape(a)[:2]
        if isinstance(node, Input):
            inner = smallest(a, region, setting.order, setting.clipped)
            low += inner
            if counted:
                slack += rows_dot(tf.abs(a), region.error)
            if both:
                high -= smallest(-a, region, setting.order, setting.clipped)
            continue
        if isinstance(node, Linear):
            constant = node.constant(a.dtype)
            if constant is not None:
                full = tf.broadcast_to(constant, (1, *node.shape))
                added = tf.linalg.matvec(tf.reshape(a, (-1, node.size)), tf.reshape(full, (node.size,)))
                added = tf.reshape(added, front)
                low, high = low + added, high + added
            if counted or node.noisy:
                slack += rows_dot(tf.abs(a), bounds.error[position])
            pass_linear(nodes, coefficients, position, a)
            continue
        source = node.inputs[0]
        if stop:
            a, value_low, value_high = _flat_rows(a, node), bounds.low[position], bounds.high[position]
            middle, half = (value_low + value_high) / 2, (value_high - value_low) / 2
            centre, spread = rows_dot(a, middle), rows_dot(tf.abs(a), half)
            low, high = low + centre - spread, high + centre + spread
            # The ranges bear their own rounding; this is for the sums.
            if counted:
                slack += sum_error(0, node.size, "real") * rows_dot(tf.abs(a), tf.abs(middle) + half)
            continue
        lines = bounds.lines[position]
        if free is not None and isinstance(node, Activation):
            behind = free[position]
            span = (bounds.low[source][:, None], bounds.high[source][:, None])
            paid = node.conjugate(a, behind, *span)
            reach = tf.maximum(tf.abs(bounds.low[source]), tf.abs(bounds.high[source]))
            slack += rows_dot(tf.abs(a), lines.error)
            slack += sum_error(0, node.size, "real") * rows_dot(tf.abs(behind), reach)
            low += tf.reduce_sum(tf.reshape(paid, tf.concat([front, [-1]], 0)), -1)
            add(coefficients, source, behind)
            continue
        # By the sign of a: a+ lower + a- upper = a (lower + upper) / 2 - |a| (upper - lower) / 2, and so for slopes.
        magnitude = tf.abs(a)
        centre = rows_dot(a, (lines.lower + lines.upper) / 2)
        half = (lines.upper - lines.lower) / 2
        spread = rows_dot(magnitude, half + lines.error if counted else half)
        low, high = low + centre - spread, high + centre + spread
        if isinstance(node, Maximum):
            a, magnitude = a[..., None, :], magnitude[..., None, :]
        if both:
            add(coefficients, source, a * tf.expand_dims(lines.upper_slope, 1))
            continue
        own = None if slopes is None else slopes.get(position)
        lower_slope = tf.expand_dims(lines.lower_slope, 1) if own is None else own
        upper_slope = tf.expand_dims(lines.upper_slope, 1)
        mean, half = (lower_slope + upper_slope) / 2, (lower_slope - upper_slope) / 2
        add(coefficients, source, a * mean + magnitude * half)
    return low - slack, (high + slack if both else None)


def begin(nodes: Sequence[Node], bounds: Bounds, row: Row) -> tuple[dict[int, Tensor], Tensor, Tensor, Tensor]:
    """The first coefficients; for numbers of a flat dense layer, one step further back, without a product."""
    node, position, a = nodes[row.position], row.position, row.coefficients
    dtype = bounds.low[0].dtype
    value = slack = tf.zeros(tf.shape(row.indices if a is None else a)[:2], dtype)
    if a is None and isinstance(node, Dense) and len(node.shape) == len(nodes[node.inputs[0]].shape) == 1:
        constant = node.constant(dtype)
        if constant is not None:
            value = tf.gather(tf.broadcast_to(constant, node.shape), row.indices)
        slack = tf.gather(bounds.error[position], row.indices, batch_dims=1)
        position, a = node.inputs[0], node.rows(row.indices, dtype)
    elif a is None:
        hot = tf.one_hot(row.indices, node.size, dtype=dtype)
        a = tf.reshape(hot, tf.concat([tf.shape(row.indices), node.shape], 0))
    if row.mirrored:
        a, value, slack = tf.concat([a, -a], 1), tf.concat([value, -value], 1), tf.concat([slack, slack], 1)
    return {position: a}, value, value, slack


def pass_linear(nodes: Sequence[Node], coefficients: dict[int, Tensor], position: int, a: Tensor) -> None:
    """Adds, to those on the inputs of a linear node, the coefficients that `a` on its output means."""
    node, front = nodes[position], tf.shape(a)[:2]
    passed = node.transpose(tf.reshape(a, tf.concat([[-1], node.shape], 0)))  # type: ignore[attr-defined]
    for source, back in zip(node.inputs, passed, strict=True):
        add(coefficients, source, tf.reshape(back, tf.concat([front, nodes[source].shape], 0)))


def through_lines(a: Tensor, lines: Lines) -> Tensor:
    """Coefficients behind an activation: the slope of the lower line where positive, of the upper where negative."""
    lower, upper = lines.lower_slope[:, None], lines.upper_slope[:, None]
    return a * ((lower + upper) / 2) + tf.abs(a) * ((lower - upper) / 2)


def _flat_rows(a: Tensor, node: Node) -> Tensor:
    return tf.reshape(a, tf.concat([tf.shape(a)[:2], [node.size]], 0))


def add(coefficients: dict[int, Tensor], position: int, more: Tensor) -> None:
    coefficients[position] = coefficients[position] + more if position in coefficients else more
