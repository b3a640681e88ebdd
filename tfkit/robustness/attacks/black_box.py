"""Black-box attacks: what those share that see a model only through an `Oracle`.

Points are rows of float32, flattened. A method moves many examples at once: `Search.active` says which still search,
and one call of the oracle asks for all of them.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.base import Attack
from tfkit.robustness.attacks.norms import distances
from tfkit.robustness.attacks.oracle import Oracle, TopK

# How far, in units of the greatest input, rounding to float32 may carry a value.
_ROUNDING = 1.2e-7


class Search:
    """The examples of one batch, what was found for them, and the oracle that they ask.

    Args:
        oracle: asked for labels or scores.
        x: float32, (batch, features).
        y: int, (batch,).
        shape: of one input.
        examples: the oracle's numbers of the examples, (batch,).
        allowance: queries each may make.
        radius: an example is done once a point as near is found; 0 to use all queries.
        attack: whose bounds, levels, norm and aim hold.
    """

    def __init__(
        self,
        oracle: Oracle,
        x: np.ndarray,
        y: np.ndarray,
        shape: tuple[int, ...],
        examples: np.ndarray,
        allowance: int,
        radius: float,
        attack: BlackBoxAttack,
    ) -> None:
        self.oracle, self.x, self.y, self.shape, self.examples = oracle, x, y, shape, examples
        self.allowance, self.radius, self.attack = allowance, radius, attack
        # Where a search puts points: rounding leaves them in the ball.
        self.inner = max(0.0, radius - _ROUNDING * max(abs(limit) for limit in attack.bounds))
        if attack.quantize_levels is not None:
            step = (attack.bounds[1] - attack.bounds[0]) / (attack.quantize_levels - 1)
            self.inner = np.floor(radius / step + 1e-4) * step
            self.radius = radius + 1e-4 * step if radius else 0.0
        self.queries = np.zeros(len(x), np.int64)
        self.best = x.copy()
        self.distance = np.full(len(x), math.inf)

    def active(self, among: np.ndarray | None = None) -> np.ndarray:
        """Returns the rows that have queries left and are not done, of `among` if given."""
        rows = np.arange(len(self.x)) if among is None else among
        return rows[(self.queries[rows] < self.allowance) & (self.distance[rows] > self.radius)]

    def left(self, rows: np.ndarray) -> int:
        """Returns the fewest queries that one of `rows` has left."""
        return int(self.allowance - self.queries[rows].max())

    def hold(self, points: np.ndarray) -> np.ndarray:
        """Returns `points` within the bounds, on the levels if there are any."""
        low, high = self.attack.bounds
        points = np.clip(points, low, high, dtype=np.float32)
        if self.attack.quantize_levels is None:
            return points
        step = (high - low) / (self.attack.quantize_levels - 1)
        return (low + step * np.rint((points - low) / step)).astype(np.float32)

    def ask(self, points: np.ndarray, rows: np.ndarray) -> Any:
        """Asks the oracle about held points, (n, features), for the examples `rows`, (n,)."""
        self.queries += np.bincount(rows, minlength=len(self.x))
        return self.oracle(points.reshape(-1, *self.shape), self.examples[rows])

    def broken(self, labels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns whether labels, (n,), are what the attack wants of the examples `rows`."""
        reached = labels == self.y[rows]
        return np.asarray(reached if self.attack.targeted else ~reached)

    def adversarial(self, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns whether each of `points`, once held, is adversarial; keeps the nearest that are.

        A point for which its example has no query left is not asked about, and counts as not adversarial.
        """
        held = self.hold(points)
        within = self._within(rows)
        found = np.zeros(len(rows), bool)
        if within.all():
            found = self.broken(top(self.ask(held, rows)), rows)
        elif within.any():
            found[within] = self.broken(top(self.ask(held[within], rows[within])), rows[within])
        self.keep(held[found], rows[found])
        return found

    def _within(self, rows: np.ndarray) -> np.ndarray:
        asked = np.bincount(rows, minlength=len(self.x))
        if (self.queries + asked <= self.allowance).all():
            return np.ones(len(rows), bool)
        order = np.argsort(rows, kind="stable")
        first = np.cumsum(asked) - asked
        place = np.empty(len(rows), np.int64)
        place[order] = np.arange(len(rows)) - first[rows[order]]
        return self.queries[rows] + place < self.allowance

    def keep(self, points: np.ndarray, rows: np.ndarray) -> None:
        """Keeps held adversarial points that are nearer than the nearest so far."""
        if not len(rows):
            return
        length = distances(points.astype(np.float64) - self.x[rows], self.attack.norm)
        nearer = length < self.distance[rows]
        # Farthest first: of several points of an example the last assignment, the nearest, stays.
        order = np.flatnonzero(nearer)[np.argsort(-length[nearer], kind="stable")]
        self.best[rows[order]], self.distance[rows[order]] = points[order], length[order]


def top(answer: Any) -> np.ndarray:
    """Returns the labels, (rows,), of whatever an oracle answered."""
    if isinstance(answer, TopK):
        return answer.labels[:, 0]
    return np.asarray(answer if answer.ndim == 1 else np.argmax(answer, axis=1))


class BlackBoxAttack(Attack):
    """Base of the attacks that only ask.

    What is given as the model may be an `Oracle`; anything else is put behind one. The base's question whether the
    result is adversarial is the evaluator's, and no query.

    Args:
        max_queries: an example may make; the oracle's budget may be less.
        batch_size: examples searched together.
        **settings: of `Attack`.
    """

    #: What the oracle must answer with.
    output = "labels"
    #: Whether the search needs a ball to stay in.
    needs_epsilon = False
    norms: Sequence[str] = ("l2",)

    def __init__(self, *, max_queries: int = 10_000, norm: str = "l2", batch_size: int = 64, **settings: Any) -> None:
        super().__init__(norm=norm, batch_size=batch_size, **settings)
        self.max_queries = checks.integer("max_queries", max_queries, 1)

    @abc.abstractmethod
    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Asks, until no row is active or nothing more can be gained; `search` keeps the best."""

    def _open(self, model: Any) -> Oracle:
        if not isinstance(model, Oracle):
            return Oracle(model, self.output)
        if model.output != self.output:
            raise checks.error("model", f"an oracle that answers with {self.output}", model.output)
        return model

    def _logits(self, logits: Any, x: np.ndarray) -> np.ndarray:
        return np.asarray(logits.inspect(x))

    def run(self, model: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, epsilon: float | None) -> tuple[Any, Any]:
        """Searches for `batch_size` examples at a time."""
        if epsilon is None and self.needs_epsilon:
            raise checks.error("epsilon", f"a radius for {type(self).__name__}", epsilon, "Pass one.")
        radius = 0.0 if epsilon is None else epsilon
        assert isinstance(model, Oracle)
        limit = model.allowance(len(x))
        allowance = self.max_queries if limit is None else min(self.max_queries, limit)
        model.start(len(x))
        flat = x.reshape(len(x), -1)
        found, queries = flat.copy(), np.zeros(len(x), np.int64)
        for at in range(0, len(x), self.batch_size):
            part = np.arange(at, min(at + self.batch_size, len(x)))
            search = Search(model, flat[part], y[part], x.shape[1:], part, allowance, radius, self)
            # An example that the model already gets wrong is done, at distance 0.
            search.adversarial(search.x, np.arange(len(part)))
            if len(search.active()):
                self.search(search, np.random.default_rng([self.seed, at]))
            found[part], queries[part] = search.best, search.queries
            if self.progress is not None:
                self.progress(int(part[-1]) + 1, len(x))
        return found.reshape(x.shape), queries
