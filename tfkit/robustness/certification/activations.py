"""Activations as nodes: values, ranges, and the lines that hold them.

Over an interval [l, u] of its input, an activation f lies between two lines of slopes that a method may choose:

    s p + min over q in [l, u] of (f(q) - s q)  <=  f(p)  <=  s' p + max over q in [l, u] of (f(q) - s' q).

So any slope is sound, and all that has to be right is the extreme of f(q) - s q, which lies at l, at u, or where
f'(q) = s. An activation tells these points (`candidates`); the relaxations, their optimised variants and the conjugate
of the dual approach follow from them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from tfkit.robustness.certification.nodes import Node
from tfkit.robustness.certification.rounding import ARITHMETIC, FUNCTION_UNITS, SAFETY, UNIT64, gamma

Tensor = Any
#: Steps of a bisection for a tangent; any slope is sound, so that the last digits do not matter.
TANGENT_STEPS = 24
CRITICAL_STEPS = 60


class Lines(NamedTuple):
    """lower_slope p + lower <= f(p) <= upper_slope p + upper, all of shape (examples, *shape).

    Attributes:
        error: of each number of the output, beyond the lines: the account of rounding.
    """

    lower_slope: Tensor
    lower: Tensor
    upper_slope: Tensor
    upper: Tensor
    error: Tensor


def repeated(step: Callable[..., Any], values: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    """Applies a step so often, as a loop of the graph; no gradients pass."""
    stopped = tuple(tf.stop_gradient(value) for value in values)
    found = tf.while_loop(lambda *_: True, lambda *now: step(*now), stopped, maximum_iterations=count)
    return tuple(tf.stop_gradient(value) for value in found)


class Activation(Node, abc.ABC):
    """A function applied number by number; a subclass that does not rise everywhere gives its own `range`."""

    #: Whether the function is linear on each side of 0: where the input's sign is known, its bounds need no tightening.
    kinked = False
    #: Units of rounding error of the function itself.
    units: float = FUNCTION_UNITS

    def __init__(self, name: str, source: int, shape: Sequence[int]) -> None:
        super().__init__(name, (source,), shape)

    @abc.abstractmethod
    def value(self, x: Tensor) -> Tensor:
        """f."""

    @abc.abstractmethod
    def derivative(self, x: Tensor) -> Tensor:
        """f'; at a kink, that to the right."""

    @abc.abstractmethod
    def derivative_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest f' in [low, high]."""

    @abc.abstractmethod
    def critical(self, slope: Tensor) -> list[Tensor]:
        """Points that hold every inner extreme of f(q) - slope q; others do no harm, nor does a NaN."""

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The slopes that CROWN takes: of the lower and of the upper line."""
        chord = self.chord(low, high)
        return chord, chord

    def magnitude(self, low: Tensor, high: Tensor) -> Tensor:
        """What the units of rounding errors are relative to."""
        return tf.maximum(tf.abs(low), tf.abs(high))

    # The rest is the same for all.

    def chord(self, low: Tensor, high: Tensor) -> Tensor:
        """The slope from (low, f(low)) to (high, f(high))."""
        width = high - low
        small = width <= 1e-12 * (1 + tf.abs(low))
        slope = (self.value(high) - self.value(low)) / tf.where(small, tf.ones_like(width), width)
        return tf.where(small, self.derivative(low), slope)

    def candidates(self, slope: Tensor, low: Tensor, high: Tensor) -> list[Tensor]:
        """Points of [low, high] among which are the minimum and the maximum of f(q) - slope q."""
        inner = [
            tf.clip_by_value(tf.where(tf.math.is_finite(point), point, low), low, high)
            for point in self.critical(slope)
        ]
        return [low, high, *inner]

    def extremes(self, slope: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The minimum and the maximum of f(q) - slope q over [low, high]."""
        points = self.candidates(tf.stop_gradient(slope), tf.stop_gradient(low), tf.stop_gradient(high))
        points = [low, high, *points[2:]]  # The bounds' own gradients pass.
        values = [self.value(point) - slope * point for point in points]
        return tf.reduce_min(tf.stack(values), 0), tf.reduce_max(tf.stack(values), 0)

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value over [low, high]."""
        return self.value(low), self.value(high)

    def conjugate(self, a: Tensor, slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """The minimum of a f(p) - slope p over [low, high]; gradients are those with p held at the minimum."""
        safe = tf.where(tf.abs(a) > 1e-30, a, tf.ones_like(a))
        points = self.candidates(tf.stop_gradient(slope / safe), low, high)
        shape = tf.shape(a)
        values = [a * self.value(point) - slope * point for point in (tf.broadcast_to(p, shape) for p in points)]
        return tf.reduce_min(tf.stack(values), 0)

    def lines(self, low: Tensor, high: Tensor, lower_slope: Tensor, upper_slope: Tensor, arithmetic: str) -> Lines:
        """The two lines of these slopes, and the account of rounding."""
        lower, _ = self.extremes(lower_slope, low, high)
        _, upper = self.extremes(upper_slope, low, high)
        return Lines(
            lower_slope, lower, upper_slope, upper, self.error(low, high, lower_slope, upper_slope, arithmetic)
        )

    def error(self, low: Tensor, high: Tensor, lower_slope: Tensor, upper_slope: Tensor, arithmetic: str) -> Tensor:
        """Rounding errors in the function (network) and in what a backward pass does with the lines (float64)."""
        reach = tf.maximum(tf.abs(low), tf.abs(high))
        steep = tf.maximum(tf.maximum(tf.abs(lower_slope), tf.abs(upper_slope)), 1.0)
        own = self.units * ARITHMETIC[arithmetic] * self.magnitude(low, high)
        counted = SAFETY * gamma(self.size + 64, UNIT64)
        return own + counted * (steep * reach + self.magnitude(low, high))

    def undecided(self, low: Tensor, high: Tensor) -> Tensor:
        """Where tighter bounds of the input would give tighter lines."""
        return (low < 0) & (high > 0) if self.kinked else low < high


class LeakyReLU(Activation):
    """max(x, negative_slope x), 0 <= negative_slope < 1; with 0 the ReLU."""

    kinked = True

    def __init__(self, name: str, source: int, shape: Sequence[int], negative_slope: float = 0.0) -> None:
        super().__init__(name, source, shape)
        self.negative_slope = negative_slope
        self.units = 1.0 if negative_slope else 0.0

    def value(self, x: Tensor) -> Tensor:
        return tf.nn.relu(x) if self.negative_slope == 0 else tf.maximum(x, self.negative_slope * x)

    def derivative(self, x: Tensor) -> Tensor:
        return tf.where(x >= 0, tf.ones_like(x), self.negative_slope * tf.ones_like(x))

    def derivative_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        # A bound of 0 belongs to both sides.
        flat = self.negative_slope * tf.ones_like(low)
        return tf.where(low > 0, tf.ones_like(low), flat), tf.where(high >= 0, tf.ones_like(low), flat)

    def critical(self, slope: Tensor) -> list[Tensor]:
        return [tf.zeros_like(slope)]

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        chord = self.chord(low, high)
        nearest = tf.where(high > -low, tf.ones_like(low), self.negative_slope * tf.ones_like(low))
        return tf.where(self.undecided(low, high), nearest, chord), chord


class Convex(Activation):
    """A smooth convex function: the chord is above it, each tangent below."""

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self.derivative((low + high) / 2), self.chord(low, high)

    def derivative_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self.derivative(low), self.derivative(high)


class Softplus(Convex):
    """log(1 + exp(x))."""

    def value(self, x: Tensor) -> Tensor:
        return tf.nn.softplus(x)

    def derivative(self, x: Tensor) -> Tensor:
        return tf.sigmoid(x)

    def critical(self, slope: Tensor) -> list[Tensor]:
        return [tf.math.log(slope) - tf.math.log1p(-slope)]

    def magnitude(self, low: Tensor, high: Tensor) -> Tensor:
        return self.value(high) + 1.0


class ELU(Convex):
    """x for x >= 0, exp(x) - 1 below."""

    def value(self, x: Tensor) -> Tensor:
        return tf.nn.elu(x)

    def derivative(self, x: Tensor) -> Tensor:
        return tf.exp(tf.minimum(x, tf.zeros_like(x)))

    def critical(self, slope: Tensor) -> list[Tensor]:
        return [tf.math.log(slope), tf.zeros_like(slope)]


class SShaped(Activation):
    """A function that is convex up to 0 and concave from there: sigmoid, tanh."""

    def derivative_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self.derivative(low), self.derivative(high)
        nearest = tf.clip_by_value(tf.zeros_like(low), low, high)
        return tf.minimum(left, right), self.derivative(nearest)

    def magnitude(self, low: Tensor, high: Tensor) -> Tensor:
        return tf.ones_like(low)

    def slopes(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """On the curved side the tangent at the middle; across 0, the tangent through the far end, or the chord."""
        low, high = tf.stop_gradient(low), tf.stop_gradient(high)
        chord, middle = self.chord(low, high), self.derivative((low + high) / 2)

        def above(end: Tensor, at: Tensor) -> Tensor:
            """Whether the tangent at `at` passes above (end, f(end))."""
            return self.value(at) + self.derivative(at) * (end - at) >= self.value(end)

        def narrow(inner: Tensor, outer: Tensor, inner_low: Tensor, outer_low: Tensor) -> tuple[Tensor, ...]:
            trial, trial_low = (inner + outer) / 2, (inner_low + outer_low) / 2
            good, good_low = above(low, trial), ~above(high, trial_low)
            return (
                tf.where(good, inner, trial), tf.where(good, trial, outer),
                tf.where(good_low, inner_low, trial_low), tf.where(good_low, trial_low, outer_low),
            )  # fmt: skip

        # The point that the upper line touches lies in [0, high], that of the lower one in [low, 0].
        zero = tf.zeros_like(low)
        _, outer, _, outer_low = repeated(narrow, (zero, high, zero, low), TANGENT_STEPS)
        upper = tf.where(above(low, high), self.derivative(outer), chord)
        lower = tf.where(above(high, low), chord, self.derivative(outer_low))
        concave, convex = low >= 0, high <= 0
        return (
            tf.where(concave, chord, tf.where(convex, middle, lower)),
            tf.where(convex, chord, tf.where(concave, middle, upper)),
        )


class Sigmoid(SShaped):
    """1 / (1 + exp(-x))."""

    def value(self, x: Tensor) -> Tensor:
        return tf.sigmoid(x)

    def derivative(self, x: Tensor) -> Tensor:
        return tf.sigmoid(x) * tf.sigmoid(-x)

    def critical(self, slope: Tensor) -> list[Tensor]:
        # f (1 - f) = s, hence f / (1 - f) = (1 + root)^2 / (4 s), written without cancellation.
        root = tf.sqrt(tf.nn.relu(1 - 4 * slope))
        point = 2 * tf.math.log1p(root) - tf.math.log(4 * slope)
        return [point, -point]


class Tanh(SShaped):
    """Hyperbolic tangent."""

    def value(self, x: Tensor) -> Tensor:
        return tf.tanh(x)

    def derivative(self, x: Tensor) -> Tensor:
        return 4 * tf.sigmoid(2 * x) * tf.sigmoid(-2 * x)

    def critical(self, slope: Tensor) -> list[Tensor]:
        root = tf.sqrt(tf.nn.relu(1 - slope))
        point = tf.math.log1p(root) - 0.5 * tf.math.log(slope)
        return [point, -point]


class Wavy(Activation):
    """A function whose derivative rises between -turn and turn and falls outside: GELU, SiLU."""

    #: Where the second derivative is zero, and how far out the derivative is constant to all digits.
    turn = 0.0
    far = 0.0

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self.extremes(tf.zeros_like(low), low, high)

    def derivative_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        points = [low, high] + [tf.clip_by_value(t * tf.ones_like(low), low, high) for t in (-self.turn, self.turn)]
        values = tf.stack([self.derivative(point) for point in points])
        return tf.reduce_min(values, 0), tf.reduce_max(values, 0)

    def critical(self, slope: Tensor) -> list[Tensor]:
        pieces = ((-self.far, -self.turn, False), (-self.turn, self.turn, True), (self.turn, self.far, False))
        slopes = tf.stack([slope] * len(pieces), -1)
        left, right = (tf.constant([piece[end] for piece in pieces], slope.dtype) for end in (0, 1))
        rising = tf.constant([piece[2] for piece in pieces])

        def halve(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
            middle = (left + right) / 2
            beyond = (self.derivative(middle) > slopes) == rising
            return tf.where(beyond, left, middle), tf.where(beyond, middle, right)

        found = repeated(halve, tuple(tf.zeros_like(slopes) + end for end in (left, right)), CRITICAL_STEPS)
        return [point for side in found for point in tf.unstack(side, axis=-1)]


class GELU(Wavy):
    """x Phi(x), Phi being the distribution function of the standard normal."""

    turn = math.sqrt(2)
    far = 40.0

    def value(self, x: Tensor) -> Tensor:
        return 0.5 * x * tf.math.erfc(-x / math.sqrt(2))

    def derivative(self, x: Tensor) -> Tensor:
        density = tf.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        return 0.5 * tf.math.erfc(-x / math.sqrt(2)) + x * density


class SiLU(Wavy):
    """x sigmoid(x), also called swish."""

    turn = 2.399357280520546
    far = 800.0

    def value(self, x: Tensor) -> Tensor:
        return x * tf.sigmoid(x)

    def derivative(self, x: Tensor) -> Tensor:
        s = tf.sigmoid(x)
        return s * (1 + x * (1 - s))
