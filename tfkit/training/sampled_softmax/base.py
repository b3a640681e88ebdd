"""What samplers of classes share: negatives with the exact probability of each."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Self

import numpy as np

from tfkit.internal import checks

#: Draws for one sample until it is no positive; then the last draw stays, and the loss masks it.
ATTEMPTS = 1000


class Samples(NamedTuple):
    """Classes drawn independently, with replacement.

    Attributes:
        ids: int64, (queries, count).
        log_probability: float32, (queries, count): of a single draw, given that it is no positive.
    """

    ids: np.ndarray
    log_probability: np.ndarray


class Sampler:
    """Base of the samplers. A method writes `_build`, `_sample` and `probabilities`.

    A sampler keeps what it needs of the classes' weights, so that probabilities are exact for that copy: after a
    change, call `update` for some classes or `build` for all. A stale copy makes worse samples, not a
    wrong correction.
    """

    weights: np.ndarray

    def get_config(self) -> dict[str, Any]:
        """Returns each argument of the constructor."""
        return {name: getattr(self, name) for name in list(inspect.signature(type(self).__init__).parameters)[1:]}

    def build(self, weights: Any) -> Self:
        """Takes the weights of all classes, (classes, dimension), finite; they are copied."""
        self.weights = np.array(_matrix("weights", weights), np.float32, order="C", copy=True)
        self._build()
        return self

    def update(self, ids: Any, weights: Any) -> None:
        """Takes new weights of some classes.

        Args:
            ids: (classes,): numbers of classes.
            weights: (classes, dimension).
        """
        self._check_built()
        rows = self._known(ids)
        new = _matrix("weights", weights)
        if new.shape != (len(rows), self.weights.shape[1]):
            raise checks.error("weights", f"of shape ({len(rows)}, {self.weights.shape[1]})", new)
        self.weights[rows] = new
        self._update(np.unique(rows))

    def sample(self, queries: Any, count: int, *, positives: Any = None, seed: int = 0) -> Samples:
        """Draws negatives.

        Args:
            queries: (queries, dimension).
            count: draws for each query.
            positives: (queries,) or (queries, most): classes never to be drawn; -1 for none. The probabilities are
                those given that. None: all classes may be drawn.
            seed: of the draws; the same draws for the same seed.

        Raises:
            ValueError: not built; the queries are of another dimension or not finite; a positive is no class.
        """
        self._check_built()
        rows = np.ascontiguousarray(_matrix("queries", queries), np.float32)
        if rows.shape[1] != self.weights.shape[1]:
            raise checks.error("queries", f"of dimension {self.weights.shape[1]}", rows)
        count, seed = checks.integer("count", count, 1), checks.integer("seed", seed, 0)
        known = np.full((len(rows), 1), -1, np.int64)
        if positives is not None:
            known = np.asarray(positives, np.int64).reshape(len(rows), -1)
            if known.size and (known.min() < -1 or known.max() >= len(self.weights)):
                raise checks.error("positives", f"classes from 0 to {len(self.weights) - 1}, or -1", known)
        return self._sample(rows, count, known, seed)

    def probabilities(self, queries: Any) -> np.ndarray:
        """Returns the distribution of one draw, float64, (queries, classes), without positives; for tests and plots."""
        raise NotImplementedError

    def memory_bytes(self) -> int:
        """Returns the bytes that the sampler keeps, its copy of the weights among them."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, np.ndarray))

    def _build(self) -> None:
        raise NotImplementedError

    def _update(self, ids: np.ndarray) -> None:
        """Follows a change of these classes' weights."""

    def _sample(self, queries: np.ndarray, count: int, positives: np.ndarray, seed: int) -> Samples:
        raise NotImplementedError

    def _check_built(self) -> None:
        if getattr(self, "weights", None) is None:
            raise checks.error(type(self).__name__, "built before it samples", "no weights", "Call `build`.")

    def _known(self, ids: Any) -> np.ndarray:
        rows = np.asarray(ids)
        if (
            rows.ndim != 1
            or rows.dtype.kind not in "iu"
            or (len(rows) and (rows.min() < 0 or rows.max() >= len(self.weights)))
        ):
            raise checks.error("ids", f"classes from 0 to {len(self.weights) - 1}", rows)
        if len(np.unique(rows)) != len(rows):
            raise checks.error("ids", "there once each", rows)
        return rows.astype(np.int64)


def _matrix(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 2 or not array.shape[1] or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise checks.error(name, "a matrix of finite numbers", array)
    return array
