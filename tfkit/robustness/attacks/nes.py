"""NES: signed gradient steps, the gradient estimated by antithetic Gaussian samples.

Paper: Ilyas, Engstrom, Athalye, Lin. Black-box Adversarial Attacks with Limited Queries and Information. ICML 2018,
https://arxiv.org/abs/1804.08598

Differs: all examples step together. The two settings with less information also run untargeted: the class to reach is
then that of the start image.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import BlackBoxAttack, Search, top
from tfkit.robustness.attacks.oracle import OUTPUTS, TopK
from tfkit.robustness.attacks.scores import cross_entropy
from tfkit.robustness.attacks.starts import check_pool, nearest_in_pool

_PLATEAU = 10
_SHRINK_LIMIT = 1e-3


def antithetic(shape: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Returns Gaussian samples, (batch, samples, features), the second half the opposites of the first."""
    half = rng.standard_normal((shape[0], shape[1] // 2, shape[2]), dtype=np.float32)
    return np.concatenate([half, -half], axis=1)


def search_gradient(losses: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
    """Returns the estimate of the gradient, (batch, features), from losses, (batch, samples), at `noise`."""
    return np.asarray(np.einsum("bs,bsf->bf", losses.astype(noise.dtype), noise) / (sigma * losses.shape[1]))


def target_scores(answer: TopK, target: np.ndarray) -> np.ndarray:
    """Returns the log-probability of each row's target, (rows,), or where it is not among the top, the least there."""
    hit = answer.labels == target[:, None]
    return np.asarray(np.where(hit.any(axis=1), (answer.scores * hit).sum(axis=1), answer.scores[:, -1]))


class NES(BlackBoxAttack):
    """The NES attack, for L-infinity, in the paper's three settings.

    With "scores" it starts at the example and is the query-limited attack. With "top-k" and "labels" it starts at an
    image of another class from `pool`, and shrinks the ball around the example while that class stays among the top.

    Args:
        information: what the oracle answers: "scores", "top-k" or "labels".
        samples: points an estimate, even.
        sigma: of the samples, in units of the inputs.
        relative_step: greatest step over epsilon.
        momentum: of the gradient.
        repeats: noisy copies by which "labels" scores a point: the share that has the class.
        spread: L-infinity radius of these copies.
        pool: (images, classes) to start from.
        **settings: of `BlackBoxAttack`.
    """

    norms = ("linf",)
    needs_epsilon = True

    def __init__(
        self,
        information: str = "scores",
        samples: int = 50,
        sigma: float = 1e-3,
        relative_step: float = 0.1,
        momentum: float = 0.9,
        repeats: int = 20,
        spread: float = 1e-2,
        pool: tuple[Any, Any] | None = None,
        *,
        norm: str = "linf",
        **settings: Any,
    ) -> None:
        super().__init__(norm=norm, **settings)
        self.output = checks.choice("information", information, OUTPUTS)
        self.samples = checks.integer("samples", samples, 2)
        if self.samples % 2:
            raise checks.error("samples", "even: each has its opposite", samples)
        self.sigma = checks.number("sigma", sigma, 1e-9)
        self.relative_step = checks.number("relative_step", relative_step, 1e-6)
        self.momentum = checks.number("momentum", momentum, 0, 1, open_high=True)
        self.repeats = checks.integer("repeats", repeats, 1)
        self.spread = checks.number("spread", spread, 1e-9)
        self.pool = check_pool(pool)
        if self.output != "scores" and self.pool is None:
            raise checks.error(
                "pool", f"given with information={information!r}", pool, "It starts from an image of it."
            )

    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Runs the setting that the information asks for."""
        if self.output == "scores":
            self._query_limited(search, rng)
        else:
            self._partial(search, rng)

    def _query_limited(self, search: Search, rng: np.random.Generator) -> None:
        points, velocity = search.x.copy(), np.zeros_like(search.x)
        step = np.full(len(points), self.relative_step * search.inner)
        least, stale = np.full(len(points), np.inf), np.zeros(len(points), int)
        while len(rows := search.active()):
            gradient, loss = self._gradient(search, rows, points[rows], search.y, rng)
            velocity[rows] = self.momentum * velocity[rows] + (1 - self.momentum) * gradient
            # A loss that falls no more asks for shorter steps.
            stale[rows] = np.where(loss < least[rows], 0, stale[rows] + 1)
            least[rows] = np.minimum(least[rows], loss)
            tired = rows[stale[rows] >= _PLATEAU]
            step[tired], stale[tired] = np.maximum(step[tired] / 2, 0.01 * search.radius), 0
            moved = points[rows] - step[rows, None].astype(np.float32) * np.sign(velocity[rows])
            points[rows] = self._within(search, rows, moved, np.full(len(rows), search.inner))
            search.adversarial(points[rows], rows)

    def _partial(self, search: Search, rng: np.random.Generator) -> None:
        rows = search.active()
        assert self.pool is not None
        points, target = np.zeros_like(search.x), search.y.copy()
        points[rows], start_classes = nearest_in_pool(search, rows, self.pool, 0)
        if not self.targeted:
            target[rows] = start_classes
        radius = np.abs(points - search.x).max(axis=1).astype(np.float64)
        shrink, velocity = radius * 0.1, np.zeros_like(points)
        rows = rows[self._reaches(search, points[rows], rows, target)]
        while len(rows := search.active(rows)):
            gradient, _ = self._gradient(search, rows, points[rows], target, rng, reach=True)
            velocity[rows] = self.momentum * velocity[rows] + (1 - self.momentum) * gradient
            step = self.relative_step * radius[rows]
            waiting = np.arange(len(rows))
            # Halves the step, then the ball's decrease, until the class stays.
            for attempt in range(8):
                part = rows[waiting]
                smaller = np.maximum(radius[part] - shrink[part], search.inner)
                moved = points[part] - step[waiting, None].astype(np.float32) * np.sign(velocity[part])
                moved = self._within(search, part, moved, smaller)
                reached = self._reaches(search, moved, part, target)
                points[part[reached]], radius[part[reached]] = moved[reached], smaller[reached]
                waiting = waiting[~reached]
                if not len(waiting) or attempt == 7:
                    break
                step[waiting] /= 2
                if attempt % 2:
                    shrink[rows[waiting]] /= 2
            shrink[rows] = np.clip(shrink[rows] * 1.2, _SHRINK_LIMIT * radius[rows], 0.2 * radius[rows])

    def _reaches(self, search: Search, points: np.ndarray, rows: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Whether the target of each row is among the top; keeps the adversarial points."""
        reached = np.zeros(len(rows), bool)
        allowed = np.flatnonzero(search.queries[rows] < search.allowance)
        if len(allowed):
            held, asked = search.hold(points[allowed]), rows[allowed]
            answer = search.ask(held, asked)
            found = search.broken(top(answer), asked)
            search.keep(held[found], asked[found])
            labels = answer.labels if isinstance(answer, TopK) else answer[:, None]
            reached[allowed] = (labels == target[asked, None]).any(axis=1)
        return reached

    def _gradient(
        self,
        search: Search,
        rows: np.ndarray,
        points: np.ndarray,
        target: np.ndarray,
        rng: np.random.Generator,
        reach: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Estimates the gradient of what to lower, (n, features), and its mean, (n,)."""
        each = self.repeats if self.output == "labels" else 1
        samples = max(min(self.samples, search.left(rows) // each) // 2 * 2, 0)
        if samples == 0:
            # Not enough for a pair: the last queries go to the step.
            return np.zeros_like(points), np.full(len(rows), np.inf)
        noise = antithetic((len(rows), samples, points.shape[1]), rng)
        sigma = max(self.sigma, self.spread) if self.output == "labels" else self.sigma
        around = (points[:, None] + sigma * noise).reshape(-1, points.shape[1])
        repeated = np.repeat(rows, samples)
        if self.output == "labels":
            around, repeated = np.repeat(around, each, axis=0), np.repeat(repeated, each)
            around = around + rng.uniform(-self.spread, self.spread, around.shape).astype(np.float32)
        answer = search.ask(search.hold(around), repeated)
        if self.output == "scores":
            losses = cross_entropy(answer, target[repeated], reach or self.targeted)
        elif isinstance(answer, TopK):
            losses = -target_scores(answer, target[repeated])
        else:
            losses = -(answer == target[repeated]).reshape(-1, each).mean(axis=1)
        losses = losses.reshape(len(rows), samples)
        return search_gradient(losses, noise, sigma), losses.mean(axis=1)

    def _within(self, search: Search, rows: np.ndarray, points: np.ndarray, radius: np.ndarray) -> np.ndarray:
        limit = radius.astype(np.float32)[:, None]
        x = search.x[rows]
        return search.hold(np.clip(points, x - limit, x + limit))
