"""The largest radius that a method certifies, for each example.

The margin that a method proves falls as the ball grows. Its zero is enclosed by a certified and an uncertified radius,
and the bracket shrinks by false position with bisection as the safeguard, over a batch from which finished examples
leave. The search may compute in float32; what it returns was certified in float64 with an account of every rounding,
and a radius that fails there is made smaller until it passes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.certification.base import Method, as_method
from tfkit.robustness.certification.margins import check_classes, check_examples, margin_rows
from tfkit.robustness.certification.network import as_network
from tfkit.robustness.certification.region import Clip, check_clip, norm_order
from tfkit.robustness.certification.rounding import check_arithmetic

#: Examples that are searched together.
GROUP = 128
MOST_STEPS = 60
#: Where a radius fails in float64, these shares of it are tried.
RETREATS = (1 - 1e-6, 1 - 1e-5, 1 - 1e-4, 1 - 1e-3)
#: First radius to try, over the width of an input of 784 numbers between 0 and 1, by norm.
FIRST = {1.0: 1.0, 2.0: 0.2, np.inf: 0.01}

Margin = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class CertifiedRadii:
    """Radii, and what they are certificates of. `numpy.asarray` gives the radii.

    Attributes:
        radius: (examples,), float64. No input within this distance changes the class; 0 where nothing is certified.
        margin: the smallest proven margin at the radius, (examples,); not positive where nothing is certified.
        norm: "linf", "l2" or "l1".
        method: its name.
        clip: the range that inputs are known to lie in, or None. It makes radii larger: compare like with like.
        arithmetic: "float32": of the network as it runs; "real": of the function its weights define.
        targeted: whether one target class was kept away, not all.
        seconds: that it took.
    """

    radius: np.ndarray
    margin: np.ndarray
    norm: str
    method: str
    clip: Clip
    arithmetic: str
    targeted: bool
    seconds: float

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.radius, dtype=dtype)

    def __len__(self) -> int:
        return len(self.radius)


def certified_radius(
    model: Any,
    x: Any,
    y: Any = None,
    norm: str = "linf",
    method: str | Method = "crown",
    tolerance: float = 1e-3,
    *,
    targets: Any = None,
    clip: tuple[float, float] | None = None,
    arithmetic: str = "float32",
    dtype: str = "float32",
    limit: float | None = None,
) -> CertifiedRadii:
    """Finds, for each example, the largest radius within which a method proves that the class cannot change.

    Args:
        model: a Keras model to logits, or a `Network` of it.
        x: examples, (examples, *shape).
        y: their classes, (examples,); None: those that the model predicts. A wrong prediction has radius 0.
        norm: "linf", "l2" or "l1".
        method: a name, see `method_names`, or a `Method`.
        tolerance: of the radius, relative.
        targets: a class for each example that it is not to be taken for; None: all others.
        clip: the range of inputs, such as (0, 1): points outside are no threat. Part of the result.
        arithmetic: "float32" certifies the network as it runs in float32; "real" the function that its weights define.
        dtype: of the search; the certificate is always computed in float64.
        limit: the largest radius to try; None: the diameter of the clip range, or a million first steps.

    Returns:
        The radii with margin and settings.

    Raises:
        ValueError: an argument breaks its rule, or a layer cannot be bounded.
    """
    started = time.perf_counter()
    network, method, order = as_network(model), as_method(method), norm_order(norm)
    clip, arithmetic = check_clip(clip), network.graph.arithmetic or check_arithmetic(arithmetic)
    dtype = checks.choice("dtype", dtype, ("float32", "float64"))
    tolerance = checks.number("tolerance", tolerance, 1e-9, 0.5)
    x = check_examples(x, network.graph.input_shape, clip)
    if network.outputs < 2:
        raise checks.error("model", "a classifier with at least two outputs", f"{network.outputs} output")
    labels = network.forward(x).argmax(1) if y is None else check_classes("y", y, len(x), network.outputs)
    if targets is not None:
        targets = check_classes("targets", targets, len(x), network.outputs)
        if (targets == labels).any():
            raise checks.error("targets", "another class than `y` for each example", targets)
    rows = margin_rows(labels, network.outputs, targets)
    count = network.nodes[0].size
    first = FIRST[order] * (1.0 if clip is None else clip[1] - clip[0])
    if limit is not None:
        largest = checks.number("limit", limit, 0)
    elif clip is not None:
        largest = (clip[1] - clip[0]) * (1.0 if np.isinf(order) else count ** (1 / order))
    else:
        largest = 1e6 * first
    radius, margin = np.zeros(len(x)), np.full(len(x), -np.inf)
    for at in range(0, len(x), GROUP):
        part = slice(at, at + GROUP)
        memory: dict[str, Any] = {}

        def proven(chosen: np.ndarray, epsilon: np.ndarray, kind: str) -> np.ndarray:
            # In float32 the account of float64's rounding would be lost among the errors that it does not count.
            counted = "ignored" if kind == "float32" and arithmetic == "real" else arithmetic
            problem = network.problem(x[part][chosen], epsilon, order, clip, counted, kind)  # noqa: B023
            own = _taken(memory, chosen)  # noqa: B023
            found = method.lower(network, problem, rows[part][chosen], own).min(1)  # noqa: B023
            _put(memory, chosen, own, len(x[part]))  # noqa: B023
            return found.astype(np.float64)

        found = _search(lambda c, e: proven(c, e, dtype), len(x[part]), min(first, largest), largest, tolerance)
        radius[part], margin[part] = _decide(lambda c, e: proven(c, e, "float64"), found, tolerance)
    return CertifiedRadii(
        radius, margin, norm, method.name, clip, arithmetic, targets is not None,
        time.perf_counter() - started,
    )  # fmt: skip


def _taken(memory: dict[str, Any], chosen: np.ndarray) -> dict[str, Any]:
    return {name: value[chosen] for name, value in memory.items()}


def _put(memory: dict[str, Any], chosen: np.ndarray, own: dict[str, Any], count: int) -> None:
    for name, value in own.items():
        if name not in memory:
            memory[name] = np.zeros((count, *value.shape[1:]), value.dtype)
        memory[name][chosen] = value


def _search(margin: Margin, count: int, first: float, limit: float, tolerance: float) -> np.ndarray:
    """Returns the certified ends of the brackets; see the module's description."""
    everything = np.arange(count)
    low, high = np.zeros(count), np.full(count, np.inf)
    at_low, at_high = margin(everything, low), np.full(count, -np.inf)
    origin = at_low.copy()
    active = at_low > 0
    trial = np.full(count, first)
    width, kept = np.full(count, np.inf), np.zeros(count, int)
    for _ in range(MOST_STEPS):
        chosen = np.flatnonzero(active)
        if not len(chosen):
            break
        trial[chosen] = np.minimum(trial[chosen], limit)
        found = margin(chosen, trial[chosen])
        good = found > 0
        up, down = chosen[good], chosen[~good]
        low[up], at_low[up] = trial[up], found[good]
        high[down], at_high[down] = trial[down], found[~good]
        # Illinois: an end that stays twice counts half.
        kept[up], kept[down] = np.maximum(kept[up], 0) + 1, np.minimum(kept[down], 0) - 1
        open_end = np.isinf(high[chosen])
        wide = high[chosen] - low[chosen] > tolerance * np.where(open_end, 0.0, high[chosen])
        active[chosen] = np.where(open_end, low[chosen] < limit, wide)
        left, right = np.where(kept < -1, at_low * 0.5, at_low), np.where(kept > 1, at_high * 0.5, at_high)
        for i in np.flatnonzero(active):
            if np.isinf(high[i]):  # The margin bends downwards: a straight line through it overshoots.
                slope = (origin[i] - at_low[i]) / low[i]
                guess = origin[i] / slope if slope > 0 else np.inf
                trial[i] = min(max(guess, 1.5 * low[i]), 8 * low[i])
                continue
            now = high[i] - low[i]
            ratio = left[i] / (left[i] - right[i]) if np.isfinite(right[i]) else 0.5
            # Half of the tolerance beside an end that is nearly right closes the bracket.
            edge = 0.4 * tolerance * high[i]
            trial[i] = low[i] + min(max(now * ratio, edge), now - edge)
            if now > 0.6 * width[i]:
                trial[i] = low[i] + 0.5 * now
            width[i] = now
    return low


def _decide(margin: Margin, found: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Certifies radii in float64: those found, slightly smaller ones, or what a search in float64 gives.

    Slopes that are chosen by a comparison can come out otherwise in float64, and the bound with them.
    """
    radius = found.copy()
    proven = margin(np.arange(len(found)), radius)

    def failed() -> np.ndarray:
        return np.flatnonzero(~(proven > 0) & (found > 0))

    for share in RETREATS:
        if not len(left := failed()):
            break
        radius[left] = found[left] * share
        proven[left] = margin(left, radius[left])
    if len(left := failed()):
        start = 0.9 * float(found[left].min())
        radius[left] = _search(lambda c, e: margin(left[c], e), len(left), start, float(found[left].max()), tolerance)
        proven[left] = margin(left, radius[left])
    return np.where(proven > 0, radius, 0.0), proven
