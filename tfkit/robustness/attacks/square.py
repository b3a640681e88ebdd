"""Square: random search by squares, each kept if it lowers the margin.

Paper: Andriushchenko, Croce, Flammarion, Hein. Square Attack: a query-efficient black-box adversarial attack via random
search. ECCV 2020, https://arxiv.org/abs/1912.00049

Differs: inputs that are no images, (batch, features), are taken as one row of pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tfkit.internal import checks
from tfkit.robustness.attacks.black_box import BlackBoxAttack, Search
from tfkit.robustness.attacks.scores import margin

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def share_at(step: int, steps: int, first: float) -> float:
    """Returns the share of the pixels that the square of a step covers: halved at fixed parts of all steps.

    >>> [share_at(step, 10_000, 0.8) for step in (0, 10, 11, 9_000)]
    [0.8, 0.8, 0.4, 0.0015625]
    """
    scaled = step / steps * 10_000
    return float(first / 2 ** sum(scaled > limit for limit in _HALVINGS))


def bump(height: int, width: int) -> np.ndarray:
    """Returns the paper's L2 pattern, (height, width): a pyramid of nested rectangles, of L2 length 1."""
    down, across = np.abs(np.arange(height) - height // 2), np.abs(np.arange(width) - width // 2)
    ring = np.maximum(down[:, None], across[None])
    # A cell on the ring r lies in the rectangles r, r + 1, ...; the one numbered l weighs 1 / (l + 1)^2.
    weights = 1.0 / np.arange(1, max(height, width) // 2 + 2) ** 2
    pattern = np.cumsum(weights[::-1])[::-1][ring]
    return np.asarray(pattern / np.linalg.norm(pattern))


def signed_bump(size: int, rng: np.random.Generator) -> np.ndarray:
    """Returns two halves of opposite sign, (size, size), of L2 length 1, lying or standing."""
    half = size // 2
    pattern = np.concatenate([bump(half, size), -bump(size - half, size)]) if size > 1 else bump(1, 1)
    pattern /= np.linalg.norm(pattern)
    return pattern.T if rng.random() < 0.5 else pattern


class Square(BlackBoxAttack):
    """The Square attack, for L-infinity and L2.

    Args:
        share: of the pixels in the first square.
        **settings: of `BlackBoxAttack`.
    """

    output = "scores"
    needs_epsilon = True
    norms = ("linf", "l2")

    def __init__(self, share: float | None = None, *, norm: str = "linf", **settings: Any) -> None:
        super().__init__(norm=norm, **settings)
        self.share = checks.number("share", share if share is not None else 0.8 if norm == "linf" else 0.1, 1e-6, 1)

    def search(self, search: Search, rng: np.random.Generator) -> None:
        """Proposes a square an example a step."""
        rows = search.active()
        # An image is (height, width, channels); whatever else there is, is one row.
        grid = search.shape if len(search.shape) == 3 else (1, int(np.prod(search.shape)), 1)
        x = search.x.reshape(-1, *grid)
        start = self._stripes(x, search.inner, rng) if self.norm == "linf" else self._bumps(x, search.inner, rng)
        points = self._cut(search, x, start)
        loss = np.full(len(x), np.inf)
        loss[rows] = self._losses(search, points[rows], rows)
        steps = int(search.allowance - search.queries.max()) + 1
        step = 0
        while len(rows := search.active(rows)):
            share = share_at(step, max(steps, 1), self.share)
            propose = self._squares if self.norm == "linf" else self._windows
            proposed = self._cut(search, x, propose(x, points, rows, share, search.inner, rng), rows)
            losses = self._losses(search, proposed, rows)
            better = losses < loss[rows]
            points[rows[better]], loss[rows[better]] = proposed[better], losses[better]
            step += 1

    def _losses(self, search: Search, points: np.ndarray, rows: np.ndarray) -> np.ndarray:
        held = points.reshape(len(points), -1)
        scores = search.ask(held, rows)
        found = search.broken(np.argmax(scores, axis=1), rows)
        search.keep(held[found], rows[found])
        return margin(scores, search.y[rows], self.targeted)

    def _cut(self, search: Search, x: np.ndarray, points: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """Cuts points to the box, and for L2 first to the ball: cutting to the box brings them nearer to `x`."""
        if self.norm == "l2":
            delta = points - x[rows]
            length = np.sqrt((delta.reshape(len(delta), -1) ** 2).sum(axis=1)).reshape(-1, 1, 1, 1)
            points = x[rows] + delta * np.minimum(1, search.inner / np.maximum(length, 1e-12))
        else:
            points = np.clip(points, x[rows] - search.inner, x[rows] + search.inner)
        return search.hold(points)

    def _stripes(self, x: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
        signs = rng.choice((-1.0, 1.0), (len(x), 1, x.shape[2], x.shape[3]))
        return np.asarray(x + radius * signs, np.float32)

    def _squares(
        self, x: np.ndarray, points: np.ndarray, rows: np.ndarray, share: float, radius: float, rng: np.random.Generator
    ) -> np.ndarray:
        """A square of each point at the example plus or minus the radius, with a sign a channel."""
        _, height, width, channels = x.shape
        size = np.sqrt(share * height * width) if height > 1 else share * width
        tall, wide = (int(np.clip(round(size), 1, limit)) for limit in (height, width))
        top = rng.integers(0, height - tall + 1, len(rows))[:, None]
        left = rng.integers(0, width - wide + 1, len(rows))[:, None]
        across = np.arange(width)
        down = np.arange(height)
        inside = ((down >= top) & (down < top + tall))[:, :, None] & ((across >= left) & (across < left + wide))[
            :, None
        ]
        signs = rng.choice((-1.0, 1.0), (len(rows), 1, 1, channels))
        return np.where(inside[..., None], x[rows] + radius * signs, points[rows]).astype(np.float32)

    def _bumps(self, x: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
        """Tiles of signed bumps."""
        _, height, width, channels = x.shape
        size = max(min(height, width) // 5, 1)
        delta = np.zeros(x.shape)
        for top in range(0, height - size + 1, size):
            for left in range(0, width - size + 1, size):
                signs = rng.choice((-1.0, 1.0), (len(x), 1, 1, channels))
                delta[:, top : top + size, left : left + size] += signed_bump(size, rng)[..., None] * signs
        length = np.sqrt((delta**2).sum(axis=(1, 2, 3), keepdims=True))
        return np.asarray(x + radius * delta / np.maximum(length, 1e-12), np.float32)

    def _windows(
        self, x: np.ndarray, points: np.ndarray, rows: np.ndarray, share: float, radius: float, rng: np.random.Generator
    ) -> np.ndarray:
        """Moves the L2 mass of one window into a signed bump in another one, with what the ball has left."""
        _, height, width, channels = x.shape
        size = int(np.clip(round(np.sqrt(share * height * width)), 3, max(height - 1, 1)))
        size = min(size if size % 2 else size + 1, height, width)
        delta = (points[rows] - x[rows]).astype(np.float64)
        (top, left), (top2, left2) = (
            (rng.integers(0, height - size + 1, len(rows)), rng.integers(0, width - size + 1, len(rows)))
            for _ in range(2)
        )
        here, there = _window(top, left, size), _window(top2, left2, size)
        old = delta[here]  # (rows, size, size, channels)
        masked = np.zeros((len(rows), height, width, 1), bool)
        masked[here] = masked[there] = True
        mass = np.where(masked, delta**2, 0.0).sum(axis=(1, 2), keepdims=True)
        spare = np.maximum(radius**2 - (delta**2).sum(axis=(1, 2, 3), keepdims=True), 0.0)
        signs = rng.choice((-1.0, 1.0), (len(rows), 1, 1, channels))
        fresh = signed_bump(size, rng)[None, :, :, None] * signs + _normalised(old)
        delta[there] = 0.0
        delta[here] = _normalised(fresh) * np.sqrt(mass + spare / channels)
        return np.asarray(x[rows] + delta, np.float32)


def _normalised(windows: np.ndarray) -> np.ndarray:
    """Returns windows, (rows, size, size, channels), each channel of L2 length 1, or 0."""
    length = np.sqrt((windows**2).sum(axis=(1, 2), keepdims=True))
    return np.asarray(windows / np.maximum(length, 1e-12))


def _windows(
    self, x: np.ndarray, points: np.ndarray, rows: np.ndarray, share: float, radius: float, rng: np.random.Generator
) -> np.ndarray:
    """Moves the L2 mass of one window into a signed bump in another one, with what the ball has left."""
    _, height, width, channels = x.shape
    size = int(np.clip(round(np.sqrt(share * height * width)), 3, max(height - 1, 1)))
    size = min(size if size % 2 else size + 1, height, width)
    delta = (points[rows] - x[rows]).astype(np.float64)
    (top, left), (top2, left2) = (
        (rng.integers(0, height - size + 1, len(rows)), rng.integers(0, width - size + 1, len(rows))) for _ in range(2)
    )
    here, there = _window(top, left, size), _window(top2, left2, size)
    one, two = delta[here], delta[there]  # (rows, size, size, channels)
    length = np.sqrt((one**2).sum(axis=(1, 2), keepdims=True))
    whole = np.sqrt((delta**2).sum(axis=(1, 2, 3), keepdims=True))
    masked = np.zeros((len(rows), height, width), bool)
    masked[here] = masked[there] = True
    outside = (np.where(masked[..., None], 0.0, delta) ** 2).sum(axis=(1, 2, 3))[:, None, None, None]
    signs = rng.choice((-1.0, 1.0), (len(rows), 1, 1, channels))
    fresh = signed_bump(size, rng)[None, :, :, None] * signs + one / np.maximum(length, 1e-12)
    fresh /= np.maximum(np.sqrt((fresh**2).sum(axis=(1, 2), keepdims=True)), 1e-12)
    # All length that is not outside the two windows, shared by the channels.
    budget = np.sqrt(np.maximum(np.maximum(radius, whole) ** 2 - outside, 0.0) / channels)
    del two
    delta[there] = 0.0
    delta[here] = fresh * budget
    return np.asarray(x[rows] + delta, np.float32)


def _window(top: np.ndarray, left: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns indices of a window of each row, that pick (rows, size, size, ...)."""
    offsets = np.arange(size)
    return (
        np.arange(len(top))[:, None, None],
        top[:, None, None] + offsets[:, None],
        left[:, None, None] + offsets,
    )
