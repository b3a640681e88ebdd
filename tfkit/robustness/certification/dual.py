"""The dual approach: Lagrange multipliers of a network's equations, optimised, each giving a valid bound.

Paper: Dvijotham, Stanforth, Gowal, Mann, Kohli. A dual approach to scalable verification of deep networks. UAI 2018,
https://arxiv.org/abs/1803.06567

The least value of c f(x) over a ball is a program with an equation for each layer. Moved into the objective with
multipliers nu, the equations leave a problem that falls apart number by number: for each activation f with the
coefficient a behind it,

    min over p in [l, u] of  a f(p) - nu p,

in closed form, and a linear function over the ball for the input. Whatever nu is, the sum is a lower bound: the method
can stop at any time. Its maximum over nu is that of the convex relaxation, for ReLUs the LP with the triangle.

Differs: what the paper writes with two multipliers a layer (of p = W h + b and of h = f(p)) is written with one, the
other at its best value: h stays tied to p, which for equal multipliers never loosens the bound. The ascent is Adam on
subgradients, in float64, from CROWN's coefficients or from zero; the ranges [l, u] are those of `inner`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.certification import propagation
from tfkit.robustness.certification.activations import Activation
from tfkit.robustness.certification.base import Method, without_nan
from tfkit.robustness.certification.network import Network, Problem, finite
from tfkit.robustness.certification.propagation import Bounds, Row
from tfkit.robustness.certification.region import Ball

Tensor = Any
INNER = ("interval", "crown")
START = ("crown", "zero")
OFF_KINKS = 0.8


class Dual(Method):
    """The dual approach.

    Args:
        steps: subgradient steps.
        learning_rate: of Adam, relative to the mean size of each layer's coefficients.
        inner: how the range of what activations read is found: "interval" as in the paper, or "crown".
        start: of the multipliers: "crown", CROWN's coefficients, or "zero".
    """

    name = "dual"

    def __init__(
        self, steps: int = 200, learning_rate: float = 0.2, inner: str = "crown", start: str = "crown"
    ) -> None:
        self.steps = checks.integer("steps", steps, 0)
        self.learning_rate = checks.number("learning_rate", learning_rate, 1e-6, 10)
        self.inner = checks.choice("inner", inner, INNER)
        self.start = checks.choice("start", start, START)

    def lower(self, network: Network, problem: Problem, rows: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        return self.trace(network, problem, rows)[-1]

    def trace(self, network: Network, problem: Problem, rows: np.ndarray) -> np.ndarray:
        """The best bound so far after each step.

        Returns:
            (steps + 1, examples, rows); each is valid.
        """
        setting = problem.setting
        region, bounds = network.intermediate(problem, refine=self.inner == "crown")
        valid = finite(bounds)
        best = network.lower(region, bounds, rows, setting, stop=True)
        if self.start == "crown":
            best = np.fmax(best, network.lower(region, bounds, rows, setting))
        shaped = np.asarray(rows, problem.x.dtype).reshape(*rows.shape[:2], *network.nodes[-1].shape)
        sites = [position for position, node in enumerate(network.nodes) if isinstance(node, Activation)]
        values = network.compiled(
            ("dual start", rows.shape[1], setting),
            lambda region, bounds, rows: crown_coefficients(network, region, bounds, rows, setting),
            region, bounds, shaped,
        )  # fmt: skip
        sizes = [float(np.mean(np.abs(value))) + 1e-12 for value in values]
        # CROWN's own coefficients lie on kinks of the dual function, where one subgradient tells little.
        values = [np.asarray(value) * (OFF_KINKS if self.start == "crown" else 0.0) for value in values]
        moments = [(np.zeros_like(value), np.zeros_like(value)) for value in values]

        def step(region: Ball, bounds: Bounds, rows: Tensor, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with tf.GradientTape() as tape:
                tape.watch(values)
                free = dict(zip(sites, values, strict=True))
                row = Row(network.last, coefficients=rows)
                found = propagation.backward(network.nodes, bounds, region, row, setting, free=free)[0]
                total = tf.reduce_sum(found)
            return found, tape.gradient(total, values, unconnected_gradients="zero")

        history = []
        for number in range(1, self.steps + 2):
            found, gradients = network.compiled(("dual", rows.shape[1], setting), step, region, bounds, shaped, values)
            best = np.fmax(best, found.numpy())
            history.append(without_nan(best, valid))
            rate = self.learning_rate / (1 + 9 * number / (self.steps + 1))
            for at, gradient in enumerate(gradients):
                slope = gradient.numpy()
                slope = np.where(np.isfinite(slope), slope, 0)
                first = 0.9 * moments[at][0] + 0.1 * slope
                second = 0.99 * moments[at][1] + 0.01 * slope**2
                moments[at] = first, second
                move = first / (1 - 0.9**number) / (np.sqrt(second / (1 - 0.99**number)) + 1e-12)
                values[at] = (values[at] + rate * sizes[at] * move).astype(slope.dtype)
        return np.stack(history)


def crown_coefficients(network: Network, region: Ball, bounds: Bounds, rows: Tensor, setting: Any) -> list[Tensor]:
    """The coefficients on what each activation reads, (examples, rows, *shape), in CROWN's pass, by position."""
    nodes = network.nodes
    coefficients: dict[int, Tensor] = {network.last: rows}
    found: dict[int, Tensor] = {}
    for position in range(network.last, 0, -1):
        a = coefficients.pop(position, None)
        if a is None:
            continue
        node = nodes[position]
        if isinstance(node, Activation):
            lines = bounds.lines[position]
            found[position] = propagation.through_lines(a, lines)
            propagation.add(coefficients, node.inputs[0], found[position])
        elif position in bounds.lines:  # A maximum.
            behind = propagation.through_lines(a[..., None, :], bounds.lines[position])
            propagation.add(coefficients, node.inputs[0], behind)
        else:
            propagation.pass_linear(nodes, coefficients, position, a)
    return [found[position] for position in sorted(found)]
