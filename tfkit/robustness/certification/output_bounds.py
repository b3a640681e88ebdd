"""Bounds of a network's outputs over balls."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.certification.base import Method, as_method
from tfkit.robustness.certification.margins import check_examples
from tfkit.robustness.certification.network import as_network
from tfkit.robustness.certification.region import Clip, check_clip, norm_order
from tfkit.robustness.certification.rounding import check_arithmetic


@dataclasses.dataclass(frozen=True)
class OutputBounds:
    """Bounds, and what they hold for. Unpacks into `lower, upper`.

    Attributes:
        lower, upper: (examples, *output shape), float64.
        epsilon: radii, (examples,).
        norm, method, clip, arithmetic: see `CertifiedRadii`.
    """

    lower: np.ndarray
    upper: np.ndarray
    epsilon: np.ndarray
    norm: str
    method: str
    clip: Clip
    arithmetic: str

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.lower, self.upper))


def bounds(
    model: Any,
    x: Any,
    epsilon: Any,
    norm: str = "linf",
    method: str | Method = "crown",
    *,
    clip: tuple[float, float] | None = None,
    arithmetic: str = "float32",
) -> OutputBounds:
    """Bounds each output of a model over the ball around each example, computed in float64.

    Args:
        model: a Keras model that does not end in a softmax, or a `Network` of it.
        x: centres, (examples, *shape).
        epsilon: radius, a number or (examples,).
        norm: "linf", "l2" or "l1".
        method: a name, see `method_names`, or a `Method`.
        clip: the range of inputs, such as (0, 1), or None.
        arithmetic: "float32" or "real", see `certified_radius`.

    Returns:
        Bounds that hold for every point of the ball.

    Raises:
        ValueError: an argument breaks its rule, or a layer cannot be bounded.
    """
    network, method, order = as_network(model), as_method(method), norm_order(norm)
    if network.graph.dropped_softmax:
        raise checks.error(
            "model", "a network to logits", "one that ends in a softmax",
            "Give its last layer no activation; margins and radii need no such change.",
        )  # fmt: skip
    clip, arithmetic = check_clip(clip), network.graph.arithmetic or check_arithmetic(arithmetic)
    x = check_examples(x, network.graph.input_shape, clip)
    radii = check_epsilon(epsilon, len(x))
    unit = np.eye(network.outputs)
    rows = np.broadcast_to(np.concatenate([unit, -unit]), (len(x), 2 * network.outputs, network.outputs))
    found = method.lower(network, network.problem(x, radii, order, clip, arithmetic), rows, {})
    shape = (len(x), *network.graph.output_shape)
    lower, upper = found[:, : network.outputs].reshape(shape), -found[:, network.outputs :].reshape(shape)
    return OutputBounds(lower, upper, radii, norm, method.name, clip, arithmetic)


def check_epsilon(epsilon: Any, count: int) -> np.ndarray:
    """Returns radii, (examples,), as float64.

    Raises:
        ValueError: they are negative or not finite, or of another shape.
    """
    array = np.asarray(epsilon, dtype=np.float64) if np.ndim(epsilon) <= 1 else None
    if array is None or array.shape not in ((), (count,)) or not np.isfinite(array).all() or (array < 0).any():
        raise checks.error("epsilon", f"a number, or {count} of them, finite and not negative", epsilon)
    return np.broadcast_to(array, (count,)).copy()
