"""ZOO: coordinate descent on the Carlini-Wagner objective, by finite differences of the scores.

Paper: Chen, Zhang, Sharma, Yi, Hsieh. ZOO: Zeroth Order Optimization Based Black-box Attacks to Deep Neural Networks
without Training Substitute Models. AISec 2017, https://arxiv.org/abs/1708.03999

Differs: the constant follows success from step to step; a binary search would spend the queries several times. The
box is kept by clipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import BlackBoxAttack, Search
from tfkit.robustness.attacks.scores import margin

SOLVERS = ("adam", "newton")
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
# What the learning rate falls to, of what it begins with.
_LAST_RATE = 0.1


def differences(plus: np.ndarray, minus: np.ndarray, centre: np.ndarray, h: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the symmetric first and second differences, (batch, coordinates), of f at +h, -h and 0, (batch, 1).

    >>> differences(np.array([[9.0]]), np.array([[1.0]]), np.array([[4.0]]), 1.0)
    (array([[4.]]), array([[2.]]))
    """
    return (plus - minus) / (2 * h), (plus + minus - 2 * centre) / h**2


def adam_step(
    first: np.ndarray, second: np.ndarray, count: np.ndarray, gradient: np.ndarray, rate: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the step of ZOO-ADAM for coordinates that have moved `count` times before, and their new moments."""
    first = _BETA1 * first + (1 - _BETA1) * gradient
    second = _BETA2 * second + (1 - _BETA2) * gradient**2
    mean, square = first / (1 - _BETA1 ** (count + 1)), second / (1 - _BETA2 ** (count + 1))
    return -rate * mean / (np.sqrt(square) + _EPSILON), first, second


def newton_step(gradient: np.ndarray, curvature: np.ndarray, rate: float) -> np.ndarray:
    """Returns the step of ZOO-Newton: plain gradient where the function is not convex along the coordinate."""
    return np.asarray(-rate * gradient / np.where(curvature > 0, np.maximum(curvature, 1e-3), 1.0))


def interpolation(small: int, large: int) -> np.ndarray:
    """Returns the matrix, (large, small), of linear interpolation between pixel centres.

    >>> interpolation(1, 2)
    array([[1.],
           [1.]])
    """
    at = np.clip((np.arange(large) + 0.5) * small / large - 0.5, 0, small - 1)
    low = np.minimum(at.astype(int), max(small - 2, 0))
    matrix = np.zeros((large, small))
    matrix[np.arange(large), low] = 1 - (at - low)
    matrix[np.arange(large), np.minimum(low + 1, small - 1)] += at - low
    return matrix


def pooled(change: np.ndarray, grid: tuple[int, int, int], window: int = 4) -> np.ndarray:
    """Returns the greatest magnitude in the window of each coordinate, (batch, coordinates)."""
    height, width, channels = grid
    padded = np.pad(np.abs(change).reshape(-1, *grid), ((0, 0), (0, -height % window), (0, -width % window), (0, 0)))
    blocks = padded.reshape(len(change), padded.shape[1] // window, window, padded.shape[2] // window, window, channels)
    spread = np.broadcast_to(blocks.max(axis=(2, 4), keepdims=True), blocks.shape).reshape(padded.shape)
    return np.asarray(spread[:, :height, :width].reshape(len(change), -1))


class ZOO(BlackBoxAttack):
    """The ZOO attack, for L2.

    Args:
        solver: "adam" or "newton".
        coordinates: a step, each of which costs two queries.
        rate: first learning rate, that falls to a tenth; None for 0.06 with Adam and 0.2 with Newton. No Newton step is
            longer than it.
        h: of the differences, in units of the inputs.
        constant: first weight of the margin beside the squared distance.
        adaptation: by which share the constant rises after a step that is not adversarial, and falls after one that is.
        confidence: margin, in log-probability, by which the wrong class must lead.
        importance: whether coordinates are drawn by how much those near them have changed.
        hierarchy: heights (and widths) of the attack space, in turn, each for an equal share of the steps; None
            for that of the image. Only for images, (height, width, channels).
        **settings: of `BlackBoxAttack`.
    """

    output = "scores"

    def __init__(
        self,
        solver: str = "adam",
        coordinates: int = 128,
        rate: float | None = None,
        h: float = 1e-3,
        constant: float = 3.0,
        adaptation: float = 0.1,
        confidence: float = 0.0,
        importance: bool = True,
        hierarchy: Sequence[int] | None = None,
        *,
        max_queries: int = 60_000,
        **settings: Any,
    ) -> None:
        super().__init__(max_queries=max_queries, **settings)
        self.solver = checks.choice("solver", solver, SOLVERS)
        self.coordinates = checks.integer("coordinates", coordinates, 1)
        default = 0.06 if self.solver == "adam" else 0.2
        self.rate = default if rate is None else checks.number("rate", rate, 1e-9)
        self.h = checks.number("h", h, 1e-9)
        self.constant = checks.number("constant", constant, 1e-9)
        self.adaptation = checks.number("adaptation", adaptation, 0, 0.5)
        self.confidence = checks.number("confidence", confidence, 0)
        self.importance = bool(importance)
        self.hierarchy = None if hierarchy is None else [checks.integer("hierarchy", size, 1) for size in hierarchy]
        if self.hierarchy is not None and (not self.hierarchy or sorted(self.hierarchy) != self.hierarchy):
            raise checks.error("hierarchy", "sizes that grow", hierarchy)

    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Descends in each attack space in turn, and lets the constant follow success."""
        image = len(search.shape) == 3
        if self.hierarchy is not None and not image:
            raise checks.error("hierarchy", "None where inputs are no images", self.hierarchy)
        grid = search.shape if image else (1, int(np.prod(search.shape)), 1)
        sizes = self.hierarchy or [0]
        constant = np.full(len(search.x), self.constant)
        space = _Space(grid, sizes[0])
        values = np.zeros((len(search.x), space.coordinates))
        cost = 2 * min(self.coordinates, search.x.shape[1]) + 1
        steps = max(1, search.allowance // (cost * len(sizes)))
        for place, size in enumerate(sizes):
            finer = _Space(grid, size)
            values, space = finer.take_over(space, values), finer
            state = [np.zeros(values.shape) for _ in range(3)]
            for step in range(steps if place + 1 < len(sizes) else search.allowance):
                rows = search.active()
                if not len(rows) or search.left(rows) < 3:
                    break
                done = min(1.0, (place * steps + step) / (len(sizes) * steps))
                rate = self.rate * (1 - (1 - _LAST_RATE) * done)
                reached = self._step(search, rows, values, space, state, constant, rate, rng)
                constant[rows] *= np.where(reached, 1 - self.adaptation, 1 + self.adaptation)

    def _step(
        self,
        search: Search,
        rows: np.ndarray,
        values: np.ndarray,
        space: _Space,
        state: list[np.ndarray],
        constant: np.ndarray,
        rate: float,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Moves some coordinates of each row; returns whether the points before were adversarial."""
        count = min(self.coordinates, values.shape[1], (search.left(rows) - 1) // 2)
        weights = np.ones((len(rows), values.shape[1]))
        if self.importance:
            change = pooled(values[rows], space.grid)
            # Coordinates at rest keep a chance: nothing would ever move otherwise.
            weights = change + 0.1 * np.maximum(change.max(axis=1, keepdims=True), 1e-6)
        # The largest of log weight plus Gumbel noise are a draw without replacement.
        keys = np.log(weights) + rng.gumbel(size=weights.shape)
        chosen = np.argpartition(-keys, count - 1, axis=1)[:, :count]
        base = space.points(values[rows])  # (rows, features)
        h = self.h
        if self.quantize_levels is not None:
            # A smaller difference would be rounded away.
            h = max(h, (self.bounds[1] - self.bounds[0]) / (self.quantize_levels - 1))
        probes = h * space.columns(chosen)  # (rows, count, features)
        delta = np.concatenate([base[:, None], base[:, None] + probes, base[:, None] - probes], axis=1)
        each = 2 * count + 1
        repeated = np.repeat(rows, each)
        held = search.hold(search.x[repeated] + delta.reshape(-1, search.x.shape[1]))
        scores = search.ask(held, repeated)
        found = search.broken(np.argmax(scores, axis=1), repeated)
        search.keep(held[found], repeated[found])
        gap = np.maximum(margin(scores.astype(np.float64), search.y[repeated], self.targeted), -self.confidence)
        squared = ((held - search.x[repeated]).astype(np.float64) ** 2).sum(axis=1)
        objective = (squared + constant[repeated] * gap).reshape(len(rows), each)
        gradient, curvature = differences(objective[:, 1 : count + 1], objective[:, count + 1 :], objective[:, :1], h)
        at = (rows[:, None], chosen)
        if self.solver == "adam":
            step, state[0][at], state[1][at] = adam_step(state[0][at], state[1][at], state[2][at], gradient, rate)
            state[2][at] += 1
        else:
            step = np.clip(newton_step(gradient, curvature, rate), -rate, rate)
        values[at] += step
        if space.whole:
            # At full size a coordinate is a pixel: it stays where the box lets it.
            low, high = self.bounds
            values[rows] = np.clip(values[rows], low - search.x[rows], high - search.x[rows])
        return np.asarray(found.reshape(len(rows), each)[:, 0])


class _Space:
    """The attack space: a coarse image whose interpolation is the perturbation; the pixels themselves for size 0."""

    def __init__(self, image: tuple[int, ...], size: int) -> None:
        self.image = image
        self.whole = size == 0 or (size >= image[0] and size >= image[1])
        height, width = (image[0], image[1]) if self.whole else (min(size, image[0]), min(size, image[1]))
        self.grid = (height, width, image[2])
        self.coordinates = height * width * image[2]
        self._down, self._across = interpolation(height, image[0]), interpolation(width, image[1])

    def points(self, values: np.ndarray) -> np.ndarray:
        """Returns perturbations, (batch, features), of values, (batch, coordinates)."""
        if self.whole:
            return values
        image = np.einsum("Hh,bhwc,Ww->bHWc", self._down, values.reshape(-1, *self.grid), self._across, optimize=True)
        return np.asarray(image.reshape(len(values), -1))

    def columns(self, chosen: np.ndarray) -> np.ndarray:
        """Returns what each chosen coordinate, (batch, count), moves: (batch, count, features)."""
        flat = np.zeros((*chosen.shape, int(np.prod(self.image))))
        if self.whole:
            np.put_along_axis(flat, chosen[..., None], 1.0, axis=2)
            return flat
        row, column, channel = np.unravel_index(chosen, self.grid)
        image = flat.reshape(*chosen.shape, *self.image)
        patch = self._down.T[row][..., :, None] * self._across.T[column][..., None, :]
        index = np.broadcast_to(channel[..., None, None, None], (*patch.shape, 1))
        np.put_along_axis(image, index, patch[..., None], axis=4)
        return flat

    def take_over(self, other: _Space, values: np.ndarray) -> np.ndarray:
        """Returns the values in this space nearest to those in a coarser one."""
        if other.grid == self.grid:
            return values
        image = other.points(values).reshape(-1, *self.image)
        down, across = np.linalg.pinv(self._down), np.linalg.pinv(self._across)
        return np.asarray(np.einsum("hH,bHWc,wW->bhwc", down, image, across, optimize=True).reshape(len(values), -1))
