"""Fast-Lip: a bound of the local Lipschitz constant, and the radius that follows from it.

Paper: Weng, Zhang, Chen, Song, Hsieh, Boning, Dhillon, Daniel. Towards fast computation of certified robustness for
ReLU networks. ICML 2018, https://arxiv.org/abs/1804.09699 (section 3.3)

Within a ball, each derivative of an activation lies in a known range: for a ReLU 0 or 1 where the sign of its input is
decided, either elsewhere. Intervals of the gradient of a margin g follow, and L, the largest dual norm in them. Then
g(x + d) >= g(x) - L ||d|| for each x + d of the ball.

Differs: the intervals go from the margin back to the input, over the margins only, where the paper goes forwards over
all neurons; derivatives of any activation; the ranges of what activations read are CROWN's, the paper's are
Fast-Lin's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.robustness.certification import propagation
from tfkit.robustness.certification.activations import Activation
from tfkit.robustness.certification.base import Method, without_nan
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.network import Network, Problem, finite
from tfkit.robustness.certification.nodes import Linear
from tfkit.robustness.certification.propagation import Bounds
from tfkit.robustness.certification.region import Ball, dual_norm, rows_dot
from tfkit.robustness.certification.rounding import SAFETY, UNIT64, gamma, sum_error

Tensor = Any


class FastLip(Method):
    """Fast-Lip."""

    name = "fast_lip"

    def lower(self, network: Network, problem: Problem, rows: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        region, bounds = network.intermediate(problem)
        at_centre = problem._replace(epsilon=np.zeros_like(problem.epsilon))
        middle, there = network.intermediate(at_centre)
        value = network.lower(middle, there, rows, problem.setting)
        steepest, rounding = self._steepest(network, problem, rows, region, bounds)
        return without_nan(value - rounding - problem.epsilon[:, None] * steepest, finite(bounds))

    def lipschitz(self, network: Network, problem: Problem, rows: np.ndarray) -> np.ndarray:
        """Bounds from above the local Lipschitz constants of rows of the output, (examples, rows)."""
        region, bounds = network.intermediate(problem)
        return self._steepest(network, problem, rows, region, bounds)[0]

    @staticmethod
    def _steepest(
        network: Network, problem: Problem, rows: np.ndarray, region: Ball, bounds: Bounds
    ) -> tuple[np.ndarray, np.ndarray]:
        shaped = np.asarray(rows, problem.x.dtype).reshape(*rows.shape[:2], *network.nodes[-1].shape)

        def function(region: Ball, bounds: Bounds, rows: Tensor) -> tuple[Tensor, Tensor]:
            return gradient_bound(network, bounds, region, rows, problem.setting)

        found = network.compiled(("lipschitz", problem.setting, rows.shape[1]), function, region, bounds, shaped)
        return found[0].numpy(), found[1].numpy()


def gradient_bound(network: Network, bounds: Bounds, region: Ball, rows: Tensor, setting: Any) -> tuple[Tensor, Tensor]:
    """The largest dual norm of the gradient of each row over each ball, and what rounding may add to a row's value.

    Args:
        rows: coefficients on the output, (examples, rows, *shape).

    Returns:
        Both (examples, rows).
    """
    nodes = network.nodes
    centre: dict[int, Tensor] = {network.last: rows}
    radius: dict[int, Tensor] = {network.last: tf.zeros_like(rows)}
    rounding = tf.zeros(tf.shape(rows)[:2], rows.dtype)
    for position in range(network.last, 0, -1):
        a, spread = centre.pop(position, None), radius.pop(position, None)
        if a is None or spread is None:
            continue
        node = nodes[position]
        own = bounds.error[position] if isinstance(node, Linear) else bounds.lines[position].error
        rounding += rows_dot(tf.abs(a) + spread, own)
        if isinstance(node, Linear):
            propagation.pass_linear(nodes, centre, position, a)
            _pass_absolute(nodes, radius, position, spread + sum_error(node.terms, 0, "real") * tf.abs(a))
            continue
        source = node.inputs[0]
        if isinstance(node, Activation):
            least, largest = node.derivative_range(bounds.low[source], bounds.high[source])
        elif isinstance(node, Maximum):
            can_win = tf.cast(node.possible(bounds.low[source], bounds.high[source]), a.dtype)
            alone = tf.reduce_sum(can_win, -2, keepdims=True) < 1.5
            least, largest = tf.where(alone, can_win, tf.zeros_like(can_win)), can_win
            a, spread = a[..., None, :], spread[..., None, :]
        middle, half = ((largest + least) / 2)[:, None], ((largest - least) / 2)[:, None]
        # Product of two intervals given by centre and radius.
        propagation.add(centre, source, a * middle)
        propagation.add(radius, source, tf.abs(a) * half + spread * (tf.abs(middle) + half))
    count = int(np.prod(region.x.shape[1:]))
    largest = tf.reshape(tf.abs(centre[0]) + radius[0], (tf.shape(rows)[0], -1, count))
    return dual_norm(largest, setting.order) * (1 + SAFETY * gamma(count + 64, UNIT64)), rounding


def _pass_absolute(nodes: Any, coefficients: dict[int, Tensor], position: int, a: Tensor) -> None:
    """As `pass_linear`, with the magnitude of each coefficient of the node: by differentiating its forward pass."""
    node, front = nodes[position], tf.shape(a)[:2]
    flat = tf.reshape(a, tf.concat([[-1], node.shape], 0))
    inputs = [tf.zeros(tf.concat([tf.shape(flat)[:1], nodes[source].shape], 0), a.dtype) for source in node.inputs]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        result = node.apply_absolute(inputs)
    for source, back in zip(node.inputs, tape.gradient(result, inputs, output_gradients=flat), strict=True):
        propagation.add(coefficients, source, tf.reshape(back, tf.concat([front, nodes[source].shape], 0)))
