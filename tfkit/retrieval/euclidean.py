"""Euclidean: coordinates added so that the largest inner product becomes the nearest neighbour, or the smallest angle.

Paper: Bachrach, Finkelstein, Gilad-Bachrach, Katzir, Koenigstein, Nice, Paquet. Speeding up the Xbox recommender system
using a Euclidean transformation for inner-product spaces. RecSys 2014, https://doi.org/10.1145/2645710.2645741, for
`EuclideanTransform`. Shrivastava, Li. Asymmetric LSH (ALSH) for sublinear time maximum inner product search (MIPS).
NIPS 2014, https://arxiv.org/abs/1405.5869, for `L2ALSHTransform`. Shrivastava, Li. Improved asymmetric locality
sensitive hashing (ALSH) for maximum inner product search (MIPS). UAI 2015, https://arxiv.org/abs/1410.5410, for
`SignALSHTransform`. Neyshabur, Srebro. On symmetric and asymmetric LSHs for inner product search. ICML 2015,
https://arxiv.org/abs/1410.5518, for `SimpleLSHTransform`.

Differs: the powers of the norms and the roots are taken in float64, and the result is rounded to float32.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval.vectors import as_vectors, normalized, norms_of


@dataclass(frozen=True)
class Transform(abc.ABC):
    """Maps items and queries to a space in which a search by distance or by angle finds large inner products.

    Args:
        bound: M, at least the largest norm of the items; `of` finds it.
    """

    bound: float

    def __post_init__(self) -> None:
        checks.number("bound", self.bound, 0.0)

    @classmethod
    def of(cls, items: Any, **settings: Any) -> Self:
        """Returns the transformation whose bound is the largest norm of these items, (items, dimension)."""
        return cls(bound=float(norms_of(as_vectors("items", items)).max()), **settings)

    @abc.abstractmethod
    def items(self, items: Any) -> np.ndarray:
        """Returns the items in the new space, float32, (items, dimension and what is added).

        Raises:
            ValueError: a norm is beyond the bound, or the items are no finite matrix.
        """

    @abc.abstractmethod
    def queries(self, queries: Any) -> np.ndarray:
        """Returns the queries in the new space, float32, (queries, dimension and what is added).

        Raises:
            ValueError: the queries are no finite matrix.
        """

    def _measured(self, items: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items as float32 and their norms in parts of the bound."""
        vectors = as_vectors("items", items)
        norms = norms_of(vectors)
        if norms.max() > self.bound * (1 + 1e-6):
            rule = f"of norms up to the bound {self.bound:g}"
            raise checks.error("items", rule, float(norms.max()), "Make the transformation with `of(items)`.")
        return vectors, np.minimum(norms / (self.bound or 1.0), 1.0)


@dataclass(frozen=True)
class EuclideanTransform(Transform):
    """x -> (sqrt(M^2 - |x|^2), x) and q -> (0, q): the order of distances is that of inner products.

    The squared distance is M^2 + |q|^2 - 2 <q, x>. All items come to lie on the sphere of radius M.

    >>> transform = EuclideanTransform.of([[3.0, 0.0], [0.0, 5.0]])
    >>> transform.items([[3.0, 0.0]]).tolist(), transform.queries([[1.0, 2.0]]).tolist()
    ([[4.0, 3.0, 0.0]], [[0.0, 1.0, 2.0]])
    """

    def items(self, items: Any) -> np.ndarray:
        vectors, norms = self._measured(items)
        return _rows(self.bound * _leg(norms), vectors)

    def queries(self, queries: Any) -> np.ndarray:
        vectors = as_vectors("queries", queries, least=0)
        return _rows(np.zeros(len(vectors)), vectors)


@dataclass(frozen=True)
class L2ALSHTransform(Transform):
    """x -> (Ux/M, |Ux/M|^2, |Ux/M|^4, …) and q -> (q/|q|, 1/2, 1/2, …): distances follow inner products but for a rest.

    With m powers the squared distance is 1 + m/4 - 2 U <q, x> / (M |q|) + |Ux/M|^(2^(m+1)), and the rest, which is the
    last term, falls fast with m, as U is below 1.

    Args:
        bound: M, at least the largest norm of the items.
        powers: m, the paper's 3 if not given.
        shrink: U in (0, 1), the paper's 0.83.
    """

    powers: int = 3
    shrink: float = 0.83

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.powers, self.shrink)

    def items(self, items: Any) -> np.ndarray:
        vectors, norms = self._measured(items)
        return _rows(vectors * (self.shrink / (self.bound or 1.0)), _powers(self.shrink * norms, self.powers))

    def queries(self, queries: Any) -> np.ndarray:
        units = _units(queries)
        return _rows(units, np.full((len(units), self.powers), 0.5))


@dataclass(frozen=True)
class SignALSHTransform(Transform):
    """x -> (Ux/M, 1/2 - |Ux/M|^2, 1/2 - |Ux/M|^4, …) and q -> (q/|q|, 0, 0, …): angles follow but for a rest.

    The cosine is U <q, x> / (M |q| sqrt(m/4 + |Ux/M|^(2^(m+1)))) for m powers, and the power under the root falls fast.

    Args:
        bound: M, at least the largest norm of the items.
        powers: m, the paper's 2 if not given.
        shrink: U in (0, 1), the paper's 0.75.
    """

    powers: int = 2
    shrink: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.powers, self.shrink)

    def items(self, items: Any) -> np.ndarray:
        vectors, norms = self._measured(items)
        return _rows(vectors * (self.shrink / (self.bound or 1.0)), 0.5 - _powers(self.shrink * norms, self.powers))

    def queries(self, queries: Any) -> np.ndarray:
        units = _units(queries)
        return _rows(units, np.zeros((len(units), self.powers)))


@dataclass(frozen=True)
class SimpleLSHTransform(Transform):
    """x -> (x/M, sqrt(1 - |x/M|^2)) and q -> (q/|q|, 0): the cosine is <q, x> / (M |q|), without a rest."""

    def items(self, items: Any) -> np.ndarray:
        vectors, norms = self._measured(items)
        return _rows(vectors / (self.bound or 1.0), _leg(norms))

    def queries(self, queries: Any) -> np.ndarray:
        units = _units(queries)
        return _rows(units, np.zeros(len(units)))


def _rows(*columns: np.ndarray) -> np.ndarray:
    matrices = [column if column.ndim == 2 else column[:, None] for column in columns]
    rows = np.empty((len(matrices[0]), sum(matrix.shape[1] for matrix in matrices)), np.float32)
    at = 0
    for matrix in matrices:  # One after the other, so that none is held in float64 beside them.
        rows[:, at : at + matrix.shape[1]] = matrix
        at += matrix.shape[1]
    return rows


def _leg(norms: np.ndarray) -> np.ndarray:
    """Returns the other leg of a right triangle whose hypotenuse is 1."""
    return np.sqrt((1.0 - norms) * (1.0 + norms))


def _powers(norms: np.ndarray, powers: int) -> np.ndarray:
    """Returns the norms to the powers 2, 4, 8, …, (items, powers)."""
    raised: np.ndarray = norms[:, None] ** 2.0 ** np.arange(1, powers + 1)
    return raised


def _units(queries: Any) -> np.ndarray:
    """Returns the queries at norm 1; zeros stay zeros."""
    vectors = as_vectors("queries", queries, least=0)
    return normalized(vectors)


def _check(powers: int, shrink: float) -> None:
    checks.integer("powers", powers, 1)
    if not checks.number("shrink", shrink, 0.0, 1.0, open_high=True):
        raise checks.error("shrink", "above 0", shrink)
