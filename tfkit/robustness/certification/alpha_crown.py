"""alpha-CROWN: lower lines whose slopes are optimised by gradient ascent on the bound.

Paper: Xu, Zhang, Wang, Wang, Jana, Lin, Hsieh. Fast and complete: enabling complete verification with rapid and
massively parallel incomplete verifiers. ICLR 2021, https://arxiv.org/abs/2011.13824

Any slope between the least and the largest derivative is sound, so the bound holds after every step and the best of
each row is kept. The slopes of the bound on the output are optimised for each of its rows; those behind each bound of
an inner layer are shared by that layer's numbers, and optimised through the whole computation. Adam ascends, and the
best slopes are where the search at the next radius starts.

Differs: activations other than ReLUs are optimised too, in the same way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.certification import propagation
from tfkit.robustness.certification.activations import Activation, LeakyReLU
from tfkit.robustness.certification.base import Method, without_nan
from tfkit.robustness.certification.network import Network, Problem, finite
from tfkit.robustness.certification.propagation import Bounds, Row
from tfkit.robustness.certification.region import Ball

Tensor = Any
#: Of Adam's moving averages.
MOMENTUM, SCALING = 0.9, 0.999


class AlphaCrown(Method):
    """CROWN with optimised slopes.

    Args:
        steps: gradient steps at each radius.
        learning_rate: of Adam, on slopes between 0 and 1.
        decay: factor of the learning rate after each step.
        inner: whether slopes behind inner bounds are optimised too: tighter, and far more costly.
    """

    name = "alpha_crown"

    def __init__(self, steps: int = 20, learning_rate: float = 0.1, decay: float = 0.98, inner: bool = True) -> None:
        self.steps = checks.integer("steps", steps, 1)
        self.learning_rate = checks.number("learning_rate", learning_rate, 1e-6, 10)
        self.decay = checks.number("decay", decay, 0.1, 1)
        self.inner = bool(inner)

    def lower(self, network: Network, problem: Problem, rows: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        region, bounds = network.intermediate(problem)
        best = network.lower(region, bounds, rows, problem.setting)
        best = np.fmax(best, network.lower(region, bounds, rows, problem.setting, stop=True))
        valid = finite(bounds)
        sites = self._sites(network, bounds, problem)
        if not sites:
            return without_nan(best, valid)
        places = self._start(sites, bounds, rows, memory, network)
        names = sorted(places)
        moments = [(np.zeros_like(places[name]), np.zeros_like(places[name])) for name in names]
        kept = {name: places[name].copy() for name in names}
        kept_worst = np.full(len(rows), -np.inf)

        def step(region: Ball, bounds: Bounds, rows: Tensor, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            with tf.GradientTape() as tape:
                tape.watch(values)
                slopes = dict(zip(names, values, strict=True))
                found = self._bound(network, region, bounds, rows, slopes, sites, problem)
                total = tf.reduce_sum(found)
            gradients = tape.gradient(total, values, unconnected_gradients="zero")
            return found, [tf.where(tf.math.is_finite(g), g, tf.zeros_like(g)) for g in gradients]

        shaped = np.asarray(rows, problem.x.dtype).reshape(*rows.shape[:2], *network.nodes[-1].shape)
        for number in range(1, self.steps + 1):
            found, gradients = network.compiled(
                ("alpha", tuple(names), tuple(sites), rows.shape[1], problem.setting), step, region, bounds, shaped,
                [places[name] for name in names],
            )  # fmt: skip
            found = found.numpy()
            better = np.fmin.reduce(found, 1) > kept_worst
            kept_worst = np.where(better, np.fmin.reduce(found, 1), kept_worst)
            best = np.fmax(best, found)
            rate = self.learning_rate * self.decay ** (number - 1)
            for at, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                kept[name][better] = places[name][better]
                first = MOMENTUM * moments[at][0] + (1 - MOMENTUM) * gradient.numpy()
                second = SCALING * moments[at][1] + (1 - SCALING) * gradient.numpy() ** 2
                moments[at] = first, second
                move = first / (1 - MOMENTUM**number) / (np.sqrt(second / (1 - SCALING**number)) + 1e-12)
                places[name] = np.clip(places[name] + rate * move, 0, 1).astype(places[name].dtype)
        memory.update(kept)
        return without_nan(best, valid)

    def _sites(self, network: Network, bounds: Bounds, problem: Problem) -> dict[int, int]:
        """Activations with slopes to choose, and the most numbers of an example among them that are undecided."""
        found = {}
        for position, node in enumerate(network.nodes):
            if isinstance(node, Activation):
                source = node.inputs[0]
                mask = np.asarray(node.undecided(bounds.low[source], bounds.high[source]))
                if mask.any():
                    found[position] = int(mask.reshape(len(mask), -1).sum(1).max())
        return dict.fromkeys(found, 0)

    def _targets(self, network: Network, sites: dict[int, int]) -> list[int]:
        """Nodes behind whose bounds slopes are optimised: they depend on a site."""
        if not self.inner:
            return []
        return [t for t in network.targets if t not in network.affine and t and any(site < t for site in sites)]

    def _start(
        self, sites: dict[int, int], bounds: Bounds, rows: np.ndarray, memory: dict[str, Any], network: Network
    ) -> dict[str, np.ndarray]:
        """Numbers in [0, 1] that stand for slopes: those of CROWN, or the best of another radius."""
        start: dict[str, np.ndarray] = {}
        for site in sites:
            node = network.nodes[site]
            assert isinstance(node, Activation)
            source = node.inputs[0]
            least, largest = (np.asarray(v) for v in node.derivative_range(bounds.low[source], bounds.high[source]))
            width = np.where(largest > least, largest - least, 1.0)
            place = np.clip((np.asarray(bounds.lines[site].lower_slope) - least) / width, 0, 1).astype(least.dtype)
            if isinstance(node, LeakyReLU):  # A slope for each row.
                start[f"out/{site}"] = np.repeat(place[:, None], rows.shape[1], 1)
            else:
                start[f"out/{site}"] = place
            for target in self._targets(network, sites):
                if site < target:
                    start[f"{target}/{site}"] = place.copy()
        for name, value in start.items():
            if name in memory and memory[name].shape == value.shape:
                start[name] = memory[name].astype(value.dtype)
        return start

    def _bound(
        self,
        network: Network,
        region: Ball,
        bounds: Bounds,
        rows: Tensor,
        slopes: dict[str, Tensor],
        sites: dict[int, int],
        problem: Problem,
    ) -> Tensor:
        """The bound of the rows as a differentiable function of the slopes."""
        nodes, setting = network.nodes, problem.setting
        for target in self._targets(network, sites):
            bounds = self._with_lines(network, bounds, slopes, f"{target}/", target, setting)
            low, high = bounds.low[target], bounds.high[target]
            undecided = tf.zeros_like(low, tf.bool)
            for node in nodes:
                if isinstance(node, Activation) and node.inputs == (target,):
                    undecided |= node.undecided(low, high)
            size = nodes[target].size
            flat = tf.reshape(undecided, (-1, size))
            most = tf.reduce_max(tf.reduce_sum(tf.cast(flat, tf.int32), 1))
            indices = tf.argsort(tf.cast(~flat, tf.int32), axis=1, stable=True)[:, :most]
            both, _ = propagation.backward(nodes, bounds, region, Row(target, indices=indices, mirrored=True), setting)
            least, largest = tf.split(both, 2, 1)
            shape = tf.shape(low)
            places = tf.stack([tf.broadcast_to(tf.range(shape[0])[:, None], tf.shape(indices)), indices], -1)
            low = tf.tensor_scatter_nd_max(tf.reshape(low, (-1, size)), places, least)
            high = tf.tensor_scatter_nd_min(tf.reshape(high, (-1, size)), places, -largest)
            bounds = bounds.copy()
            bounds.low[target] = tf.reshape(low, shape)
            bounds.high[target] = tf.maximum(tf.reshape(high, shape), bounds.low[target])
        bounds = self._with_lines(network, bounds, slopes, "out/", network.last, setting)
        own = {}
        for site in sites:
            node = nodes[site]
            if isinstance(node, LeakyReLU):
                source = node.inputs[0]
                least, largest = node.derivative_range(bounds.low[source], bounds.high[source])
                undecided = node.undecided(bounds.low[source], bounds.high[source])[:, None]
                free = least[:, None] + slopes[f"out/{site}"] * (largest - least)[:, None]
                own[site] = tf.where(undecided, free, bounds.lines[site].lower_slope[:, None])
        return propagation.backward(nodes, bounds, region, Row(network.last, coefficients=rows), setting, slopes=own)[0]

    def _with_lines(
        self, network: Network, bounds: Bounds, slopes: dict[str, Tensor], prefix: str, until: int, setting: Any
    ) -> Bounds:
        """New lines from the present bounds and the slopes of one backward pass."""
        bounds = bounds.copy()
        for position, node in enumerate(network.nodes[:until]):
            if isinstance(node, Activation):
                place = slopes.get(f"{prefix}{position}")
                if place is not None and place.shape.rank == len(node.shape) + 2:
                    place = None  # For each row: put in later.
                source = node.inputs[0]
                bounds.lines[position] = propagation.activation_lines(
                    node, bounds.low[source], bounds.high[source], setting, "adaptive", place
                )
        return bounds
