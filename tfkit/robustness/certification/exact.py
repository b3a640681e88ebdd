"""Exact answers for small networks by mixed-integer programming, and those of the linear relaxation.

Paper: Tjeng, Xiao, Tedrake. Evaluating robustness of neural networks with mixed integer programming. ICLR 2019,
https://arxiv.org/abs/1711.07356

Each undecided ReLU h = max(p, a p) with l < 0 < u gets a binary z that says on which side it is,

    h >= p,  h >= a p,  h <= p - (1 - a) l (1 - z),  h <= a p + (1 - a) u z,

and each maximum one binary a place. With the binaries left to [0, 1] this is the LP with the triangle of each ReLU,
which bounds every method that relaxes neurons one by one.

Differs: layers are put in as sparse matrices, found by sending unit vectors through them; the norms are L1 and Linf.
HiGHS works to a feasibility tolerance of 1e-7, so the answers are not proven to the last digit, as certificates are:
they are what the tests compare with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse as sparse
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.certification.activations import LeakyReLU
from tfkit.robustness.certification.margins import check_classes, check_examples, margin_rows
from tfkit.robustness.certification.maximum import Maximum
from tfkit.robustness.certification.network import Network, as_network
from tfkit.robustness.certification.nodes import Linear
from tfkit.robustness.certification.region import check_clip, norm_order

#: Numbers of all nodes together beyond which a program is not even set up.
MOST_NUMBERS = 20_000


class ExactDistance(NamedTuple):
    """What branch and bound found for one example.

    Attributes:
        distance: of the nearest input of another class that was found; inf if none within `limit`.
        bound: no such input is nearer than this, up to the solver's tolerance. Equal to `distance` when it finished.
        example: that input; None if none was found.
    """

    distance: float
    bound: float
    example: np.ndarray | None


def exact_margin(
    model: Any,
    x: np.ndarray,
    epsilon: float,
    row: np.ndarray,
    norm: str = "linf",
    *,
    clip: tuple[float, float] | None = None,
    relaxed: bool = False,
    time_limit: float = 60.0,
) -> float:
    """The smallest value of a linear function of the outputs over the ball around one example.

    Args:
        model: a Keras model of linear layers, ReLUs and maxima, or a `Network`.
        x: the example, of the input's shape.
        epsilon: radius.
        row: coefficients, (outputs,).
        norm: "linf" or "l1".
        clip: the range of inputs.
        relaxed: solve the LP instead, a lower bound.
        time_limit: seconds; when it ends first, the solver's lower bound is the answer.
    """
    network = as_network(model)
    program = _Program(network, x, norm_order(norm), check_clip(clip), checks.number("epsilon", epsilon, 0), relaxed)
    program.minimize(program.last, np.asarray(row, np.float64))
    return program.solve(time_limit)[1]


def exact_distance(
    model: Any,
    x: np.ndarray,
    y: int,
    norm: str = "linf",
    *,
    limit: float,
    clip: tuple[float, float] | None = None,
    time_limit: float = 60.0,
) -> ExactDistance:
    """The distance from one example to the nearest input of another class.

    Args:
        model, x, norm, clip: see `exact_margin`.
        y: the example's class.
        limit: how far to look; the tighter, the faster.
        time_limit: seconds for each other class.
    """
    network = as_network(model)
    (label,) = check_classes("y", np.asarray([y]), 1, network.outputs)
    best = ExactDistance(np.inf, np.inf, None)
    for row in margin_rows(np.array([label]), network.outputs)[0]:
        program = _Program(network, x, norm_order(norm), check_clip(clip), checks.number("limit", limit, 0), False)
        program.require(program.last, row, 0.0)
        program.minimize_distance()
        value, bound, found = program.solve(time_limit)
        bound = max(bound, 0.0)
        example = found[: network.nodes[0].size].reshape(network.graph.input_shape) if found is not None else None
        if value < best.distance:
            best = ExactDistance(value, min(best.bound, bound), example)
        else:
            best = best._replace(bound=min(best.bound, bound))
    return best


class _Program:
    """Variables: the numbers of all nodes, one after the other; then moves of the input, the radius, and binaries."""

    def __init__(self, network: Network, x: Any, order: float, clip: Any, epsilon: float, relaxed: bool) -> None:
        if order == 2.0:
            raise checks.error("norm", "'linf' or 'l1' for an exact answer, which is that of a linear program", "l2")
        x = check_examples(np.asarray(x)[None], network.graph.input_shape, clip)
        nodes = network.nodes
        if sum(node.size for node in nodes) > MOST_NUMBERS:
            raise checks.error("model", f"small, at most {MOST_NUMBERS} numbers in all layers together", network)
        self.order, self.relaxed = order, relaxed
        problem = network.problem(x, np.array([epsilon]), order, clip, "real")
        region, bounds = network.intermediate(problem)
        self.low: list[float] = []
        self.high: list[float] = []
        self.whole: list[int] = []
        self.start: list[int] = []
        self.entries: list[tuple[list[int], list[float], float, float]] = []
        for position in range(len(nodes)):
            self.start.append(self._variables(bounds.low[position], bounds.high[position]))
        self.last = len(nodes) - 1
        self.count = nodes[0].size
        self.centre = x.astype(np.float64).reshape(-1)
        self.low[: self.count] = np.asarray(region.low).ravel()
        self.high[: self.count] = np.asarray(region.high).ravel()
        self.radius = self._variables(np.zeros(1), np.array([epsilon]))
        self._ball()
        for position, node in enumerate(nodes[1:], 1):
            if isinstance(node, Linear):
                self._linear(position, node)
            elif isinstance(node, LeakyReLU):
                self._relu(position, node, bounds)
            elif isinstance(node, Maximum):
                self._maximum(position, node, bounds)
            else:
                raise ValueError(f"Layer '{node.name}' of type {type(node).__name__} is not piecewise linear.")
        self.cost = np.zeros(len(self.low))

    def _variables(self, low: Any, high: Any, whole: bool = False) -> int:
        at = len(self.low)
        low, high = np.asarray(low, np.float64).ravel(), np.asarray(high, np.float64).ravel()
        self.low.extend(low)
        self.high.extend(high)
        self.whole.extend([1 if whole and not self.relaxed else 0] * len(low))
        return at

    def _row(self, places: list[int], values: list[float], low: float, high: float) -> None:
        self.entries.append((places, values, low, high))

    def _ball(self) -> None:
        moves = self._variables(np.zeros(self.count), np.full(self.count, np.inf))
        for i in range(self.count):
            self._row([moves + i, i], [1, -1], -self.centre[i], np.inf)  # move >= x - centre
            self._row([moves + i, i], [1, 1], self.centre[i], np.inf)
            if np.isinf(self.order):
                self._row([self.radius, moves + i], [1, -1], 0, np.inf)
        if not np.isinf(self.order):
            places = list(range(moves, moves + self.count))
            self._row([self.radius, *places], [1.0] + [-1.0] * self.count, 0, np.inf)

    def _linear(self, position: int, node: Linear) -> None:
        shape = node.shape
        unit = tf.reshape(tf.eye(node.size, dtype=tf.float64), (-1, *shape))
        constant = node.constant(tf.float64)
        shift = np.zeros(node.size) if constant is None else np.broadcast_to(np.asarray(constant), (1, *shape)).ravel()
        backs = [np.asarray(back).reshape(node.size, -1) for back in node.transpose(unit)]
        for i in range(node.size):
            places, values = [self.start[position] + i], [-1.0]
            for source, back in zip(node.inputs, backs, strict=True):
                there = np.flatnonzero(back[i])
                places.extend((self.start[source] + there).tolist())
                values.extend(back[i][there].tolist())
            self._row(places, values, -shift[i], -shift[i])

    def _relu(self, position: int, node: LeakyReLU, bounds: Any) -> None:
        a, source = node.negative_slope, node.inputs[0]
        low, high = (np.asarray(side[source]).ravel() for side in (bounds.low, bounds.high))
        for i, (least, largest) in enumerate(zip(low, high, strict=True)):
            p, h = self.start[source] + i, self.start[position] + i
            if least >= 0 or largest <= 0:
                self._row([h, p], [1, -1.0 if least >= 0 else -a], 0, 0)
                continue
            z = self._variables(np.zeros(1), np.ones(1), whole=True)
            self._row([h, p], [1, -1], 0, np.inf)
            self._row([h, p], [1, -a], 0, np.inf)
            # p - (1 - a) l (1 - z) and a p + (1 - a) u z, from above.
            self._row([h, p, z], [1, -1, -(1 - a) * least], -np.inf, -(1 - a) * least)
            self._row([h, p, z], [1, -a, -(1 - a) * largest], -np.inf, 0)

    def _maximum(self, position: int, node: Maximum, bounds: Any) -> None:
        source = node.inputs[0]
        low, high = (np.asarray(side[source])[0] for side in (bounds.low, bounds.high))
        can_win = np.asarray(node.possible(low[None], high[None]))[0]
        places = np.arange(low.size).reshape(low.shape)
        moved = [np.moveaxis(v, -2, -1).reshape(-1, low.shape[-2]) for v in (places, can_win, low, high)]
        for i, (where, possible, bottom, top) in enumerate(zip(*moved, strict=True)):
            h = self.start[position] + i
            choices = []
            ceiling = top[possible].max()
            for place, least in zip(where[possible], bottom[possible], strict=True):
                p = self.start[source] + int(place)
                z = self._variables(np.zeros(1), np.ones(1), whole=True)
                self._row([h, p], [1, -1], 0, np.inf)
                gap = ceiling - least  # h <= p + gap (1 - z)
                self._row([h, p, z], [1, -1, gap], -np.inf, gap)
                choices.append(z)
            self._row(choices, [1.0] * len(choices), 1, 1)

    def minimize(self, position: int, row: np.ndarray) -> None:
        self.cost = np.zeros(len(self.low))
        self.cost[self.start[position] : self.start[position] + len(row)] = row

    def minimize_distance(self) -> None:
        self.cost = np.zeros(len(self.low))
        self.cost[self.radius] = 1.0

    def require(self, position: int, row: np.ndarray, most: float) -> None:
        """Adds: row times the node is at most this."""
        there = np.flatnonzero(row)
        self._row((self.start[position] + there).tolist(), row[there].tolist(), -np.inf, most)

    def solve(self, time_limit: float) -> tuple[float, float, np.ndarray | None]:
        """Returns the value, a lower bound of it, and the variables; inf and None where there is no solution."""
        lengths = [len(places) for places, *_ in self.entries]
        matrix = sparse.csr_matrix(
            (
                np.concatenate([values for _, values, *_ in self.entries]),
                (np.repeat(np.arange(len(lengths)), lengths), np.concatenate([places for places, *_ in self.entries])),
            ),
            shape=(len(lengths), len(self.low)),
        )
        low, high = (np.array([entry[side] for entry in self.entries]) for side in (2, 3))
        found = scipy.optimize.milp(
            self.cost,
            constraints=scipy.optimize.LinearConstraint(matrix, low, high),
            bounds=scipy.optimize.Bounds(np.array(self.low), np.array(self.high)),
            integrality=np.array(self.whole),
            options={"time_limit": time_limit, "mip_rel_gap": 1e-9},
        )
        if found.status == 2:  # Infeasible.
            return np.inf, np.inf, None
        if found.x is None:
            bound = getattr(found, "mip_dual_bound", None)
            return np.inf, -np.inf if bound is None else float(bound), None
        bound = found.fun if self.relaxed or found.mip_dual_bound is None else found.mip_dual_bound
        return float(found.fun), float(bound), found.x
