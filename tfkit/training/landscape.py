"""Loss landscapes: the loss along the line between two solutions, and on a plane around one, with plots.

Paper: Li, Xu, Taylor, Studer, Goldstein. Visualizing the loss landscape of neural nets. NeurIPS 2018,
https://arxiv.org/abs/1712.09913: random directions are scaled filter by filter to the norms of the weights, so that
plots of networks with other scales can be compared. The line between a small-batch and a large-batch solution is that
of Keskar et al., https://arxiv.org/abs/1609.04836, figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from tfkit.internal import checks
from tfkit.training.weight_space import WeightSpace

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Line(NamedTuple):
    """The loss along a line.

    Attributes:
        positions: 0 at the first solution, 1 at the second, (points,).
        losses: for each data set that was given, (points,).
    """

    positions: np.ndarray
    losses: dict[str, np.ndarray]

    def plot(self) -> Figure:
        """Draws a curve for each data set."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
        for name, values in self.losses.items():
            axes.plot(self.positions, values, label=name)
        axes.set(xlabel="position on the line", ylabel="loss", yscale="log")
        axes.legend()
        return figure


class Surface(NamedTuple):
    """The loss on a plane.

    Attributes:
        positions: along both directions, in units of the filters' norms, (points,).
        losses: (points, points); the first axis is the first direction.
    """

    positions: np.ndarray
    losses: np.ndarray

    def plot(self) -> Figure:
        """Draws contours of the logarithm of the loss."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(4.2, 3.6), layout="constrained")
        drawn = axes.contourf(self.positions, self.positions, np.log10(self.losses.T + 1e-12), levels=20)
        axes.plot(0, 0, "w+")
        figure.colorbar(drawn, label="log10 of the loss")
        axes.set(xlabel="first direction", ylabel="second direction")
        return figure


def filter_normalised(model: keras.Model, seed: int = 0) -> np.ndarray:
    """Returns a random direction in the space of trainable weights, each filter as long as the model's, a vector.

    A filter is what makes one output channel: a slice along the last axis. Biases and the scales and shifts of
    normalisation do not move.

    Args:
        model: a built model.
        seed: of the direction.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for variable in model.trainable_weights:
        weight = np.asarray(variable)
        direction = rng.normal(size=weight.shape)
        if weight.ndim < 2:
            parts.append(np.zeros(weight.size))
            continue
        axes = tuple(range(weight.ndim - 1))
        scale = np.linalg.norm(weight.reshape(-1, weight.shape[-1]), axis=0)
        length = np.sqrt(np.square(direction).sum(axis=axes))
        parts.append((direction * scale / np.maximum(length, 1e-12)).ravel())
    return np.concatenate(parts)


def line(
    first: keras.Model,
    second: keras.Model,
    data: dict[str, tuple[Any, Any]],
    positions: Sequence[float] = tuple(np.linspace(-1, 2, 25)),
    *,
    loss: Any = None,
) -> Line:
    """Measures the loss along the line through two solutions of one architecture.

    Moving statistics of normalisation are interpolated as the weights are.

    Args:
        first, second: the models; both are the same afterwards.
        data: name to (x, y), such as {"train": ..., "test": ...}.
        positions: where to measure: 0 is `first`, 1 is `second`.
        loss: a mean over examples; that of `first` if None.

    Raises:
        ValueError: the models differ in the shapes of their weights.
    """
    starts, ends = first.get_weights(), second.get_weights()
    if [each.shape for each in starts] != [each.shape for each in ends]:
        raise checks.error("second", "a model of the same shapes of weights as `first`", second.name)
    spaces = {name: WeightSpace(first, part, loss) for name, part in data.items()}
    found: dict[str, list[float]] = {name: [] for name in spaces}
    try:
        for position in positions:
            mixed = [(1 - position) * start + position * end for start, end in zip(starts, ends, strict=True)]
            first.set_weights(mixed)
            for name, space in spaces.items():
                with space.kept() as vector:
                    found[name].append(space.value(vector))
    finally:
        first.set_weights(starts)
    return Line(np.asarray(positions), {name: np.array(values) for name, values in found.items()})


def surface(
    model: keras.Model,
    data: tuple[Any, Any],
    radius: float = 1.0,
    points: int = 15,
    *,
    loss: Any = None,
    seed: int = 0,
) -> Surface:
    """Measures the loss on the plane of two random filter-normalised directions around a solution.

    Args:
        model: the model; the same afterwards.
        data: (x, y).
        radius: how far to go, in units of the filters' norms.
        points: along each direction; an odd number has the solution in the middle.
        loss: a mean over examples; the compiled one if None.
        seed: of the directions.
    """
    checks.number("radius", radius, 0)
    positions = np.linspace(-radius, radius, checks.integer("points", points, 2))
    one, two = (filter_normalised(model, seed=2 * seed + offset) for offset in (0, 1))
    space = WeightSpace(model, data, loss)
    with space.kept() as x:
        losses = [[space.value(x + a * one + b * two) for b in positions] for a in positions]
    return Surface(positions, np.array(losses))
