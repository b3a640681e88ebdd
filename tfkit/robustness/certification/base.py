"""What the methods of certification share: a method gives lower bounds of linear functions of the output."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.certification.network import Network, Problem, finite


class Method(abc.ABC):
    """A way to bound a network. Settings go to the constructor; a method holds nothing else.

    Attributes:
        name: what results call it.
    """

    name: ClassVar[str]
    _known: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" in vars(cls):
            Method._known[cls.name] = cls

    @abc.abstractmethod
    def lower(self, network: Network, problem: Problem, rows: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        """Bounds linear functions of the output from below.

        Args:
            network: the network.
            problem: the balls.
            rows: coefficients, (examples, rows, outputs).
            memory: what a method may keep from one radius of these examples to the next, each array by example first.

        Returns:
            (examples, rows); -inf where there is no bound.
        """

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class LinearRelaxation(Method):
    """Activations between two lines, from the output back to the input.

    Args:
        intersect: whether every number's bounds, and the result, are the better ones of the method's and of intervals,
            which cost next to nothing beside it; False: the method's alone, as in its paper.

    Attributes:
        slopes: of the lower lines, see `propagation.advance`.
        refine: whether what activations read is bounded in the same way; otherwise by intervals.
    """

    slopes: ClassVar[str] = "adaptive"
    refine: ClassVar[bool] = True

    def __init__(self, intersect: bool = True) -> None:
        self.intersect = bool(intersect)

    def lower(self, network: Network, problem: Problem, rows: np.ndarray, memory: dict[str, Any]) -> np.ndarray:
        region, bounds = network.intermediate(problem, slopes=self.slopes, refine=self.refine, intersect=self.intersect)
        found = network.lower(region, bounds, rows, problem.setting)
        if self.intersect:
            found = np.fmax(found, network.lower(region, bounds, rows, problem.setting, stop=True))
        return without_nan(found, finite(bounds))


def without_nan(found: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Bounds that are none become -inf: of an example that is not valid, and NaN."""
    return np.where(valid[:, None] & ~np.isnan(found), found, -np.inf)


def as_method(method: str | Method) -> Method:
    """Returns a method by its name, with its default settings, or the method itself.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(method, Method):
        return method
    return Method._known[checks.choice("method", method, Method._known)]()


def method_names() -> tuple[str, ...]:
    """The names that `as_method` knows."""
    return tuple(Method._known)
