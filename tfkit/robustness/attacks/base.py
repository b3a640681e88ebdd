"""What all attacks share: checked input, points that stay in the box and the ball, success measured by the base.

A method writes `run`, which only searches; `Attack.__call__` puts what it found back into the ball and the box, rounds
it to what an image file could hold if asked to, and asks the model again.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.models import as_logits, check_logits
from tfkit.robustness.attacks.norms import NORMS, checked_bounds, distances


class AdversarialResult(NamedTuple):
    """What an attack found for each example.

    Attributes:
        x_adv: float32, like `x`: within the bounds and the ball.
        success: bool, (batch,): whether the model, asked again, gives another class than `y` (`y`, if targeted).
        distance: float64, (batch,): from `x` to `x_adv` in the attack's norm.
        queries: int64, (batch,): forward evaluations by the search.
    """

    x_adv: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray


class Attack(abc.ABC):
    """Base of all attacks within a ball of a given radius.

    Args:
        norm: of the ball: "linf", "l2" or "l1"; an attack may know fewer, or others.
        bounds: least and greatest value of an input.
        targeted: whether `y` are the classes to reach, not those to leave.
        seed: of all random choices.
        quantize_levels: levels of an input, evenly spaced over the bounds, 256 for 8-bit images; None for real numbers.
            The examples attacked must lie on them.
        batch_size: rows worked on together.
        progress: called with the examples done and all of them.
    """

    #: Norms that the attack knows.
    norms: Sequence[str] = NORMS

    def __init__(
        self,
        *,
        norm: str = "linf",
        bounds: Sequence[float] = (0.0, 1.0),
        targeted: bool = False,
        seed: int = 0,
        quantize_levels: int | None = None,
        batch_size: int = 512,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.norm = checks.choice("norm", norm, self.norms)
        self.bounds = checked_bounds(bounds)
        self.targeted = bool(targeted)
        self.seed = checks.integer("seed", seed, 0, 2**31 - 1)
        self.quantize_levels = (
            None if quantize_levels is None else checks.integer("quantize_levels", quantize_levels, 2)
        )
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.progress = progress

    @abc.abstractmethod
    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Searches. Returns the points found, like `x`, and the forward evaluations of each, (batch,)."""

    @final
    def __call__(self, model: Any, x: Any, y: Any, *, epsilon: float | None) -> AdversarialResult:
        """Attacks each example.

        Args:
            model: a callable from inputs to logits, or a Keras model.
            x: (batch, ...), within the bounds.
            y: int, (batch,): true classes; the classes to reach if targeted.
            epsilon: radius of the ball; None for no ball: the nearest point that the attack finds.

        Raises:
            ValueError: an argument is not as above, or the model returns what cannot be logits.
        """
        epsilon = None if epsilon is None else checks.number("epsilon", epsilon, 0)
        x, y = self._checked(x, y)
        logits = self._open(model)
        first = self._logits(logits, x[: self.batch_size])
        check_logits(first, min(len(x), self.batch_size))
        if y.min() < 0 or y.max() >= first.shape[1]:
            raise checks.error("y", f"classes from 0 to {first.shape[1] - 1}", y)
        found, queries = self.run(logits, x, y, epsilon)
        x_adv = self._inside(x, np.asarray(found, np.float64), math.inf if epsilon is None else epsilon)
        answers = self._logits(logits, x_adv)
        reached = np.argmax(answers, axis=1) == y
        success = (reached if self.targeted else ~reached) & np.isfinite(answers).all(axis=1)
        return AdversarialResult(x_adv, success, self._distance(x, x_adv), np.asarray(queries, np.int64))

    def _open(self, model: Any) -> Callable[[Any], Any]:
        """Returns the model as `run` may use it."""
        return as_logits(model)

    def _checked(self, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
        x, y = np.asarray(x, np.float32), np.asarray(y)
        if x.ndim < 2 or not x.size:
            raise checks.error("x", "a batch of examples, (batch, ...)", x)
        low, high = np.float32(self.bounds[0]), np.float32(self.bounds[1])
        if not ((x >= low) & (x <= high)).all():
            raise checks.error("x", f"within the bounds {self.bounds}", x, "Scale it, or pass its `bounds`.")
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise checks.error("y", f"integer classes, ({len(x)},)", y)
        if self.quantize_levels and np.abs(self._levels(x) - np.rint(self._levels(x))).max() > 1e-2:
            raise checks.error("x", f"on the {self.quantize_levels} levels", x, "Round it first.")
        return x, y.astype(np.int64)

    def _levels(self, x: np.ndarray) -> np.ndarray:
        low, high = self.bounds
        return (x.astype(np.float64) - low) / (high - low) * (self.quantize_levels - 1)  # type: ignore[operator]

    def _inside(self, x: np.ndarray, found: np.ndarray, epsilon: float) -> np.ndarray:
        """Returns float32 points in the ball, by float64 arithmetic, and in the box; `x` for a row not finite."""
        start, rows = x.astype(np.float64), (len(x),) + (1,) * (x.ndim - 1)
        found = np.where(np.isfinite(found.reshape(len(x), -1)).all(axis=1).reshape(rows), found, start)
        delta = np.clip(found, *self.bounds) - start
        if self.norm == "linf":
            delta = np.clip(delta, -epsilon, epsilon)
        elif self.norm == "l0":
            # Nothing between here and there has fewer coordinates changed.
            delta[distances(delta, "l0") > epsilon] = 0
        else:
            delta *= np.minimum(1, epsilon / np.maximum(distances(delta, self.norm), 1e-300)).reshape(rows)
        if self.quantize_levels:
            low, high = self.bounds
            step = (high - low) / (self.quantize_levels - 1)
            # Towards x, so that no row leaves the ball; 1e-4 of a level forgives the rounding of float32.
            moved = np.trunc(delta / step + 1e-4 * np.sign(delta))
            return (low + step * (np.rint(self._levels(x)) + moved)).astype(np.float32)
        least, greatest = np.float32(self.bounds[0]), np.float32(self.bounds[1])
        x_adv = np.clip((start + delta).astype(np.float32), least, greatest)
        # Rounding to float32 may leave the ball by a last place: values go back towards x, a few at most.
        for _ in range(4):
            outside = (self._distance(x, x_adv) > epsilon).reshape(rows)
            if not outside.any():
                return x_adv
            if self.norm == "linf":
                outside = np.abs(x_adv.astype(np.float64) - start) > epsilon
            x_adv = np.where(outside, np.nextafter(x_adv, x), x_adv)
        still = (self._distance(x, x_adv) > epsilon).reshape(rows)
        return np.where(still, x, x_adv)

    def _distance(self, x: np.ndarray, x_adv: np.ndarray) -> np.ndarray:
        if self.quantize_levels:
            step = (self.bounds[1] - self.bounds[0]) / (self.quantize_levels - 1)
            return distances((np.rint(self._levels(x_adv)) - np.rint(self._levels(x))) * step, self.norm)
        return distances(x_adv.astype(np.float64) - x, self.norm)

    def _logits(self, logits: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
        parts = [x[at : at + self.batch_size] for at in range(0, len(x), self.batch_size)]
        return np.concatenate([np.asarray(logits(tf.constant(part))) for part in parts])
