"""The mathematics of low rank: matrices and convolution kernels as products of smaller ones, with known error.

Eckart, Young. The approximation of one matrix by another of lower rank. Psychometrika 1, 1936: the truncated singular
value decomposition is the best approximation W_r of rank r, and its squared error is the sum of the squared singular
values left out. The error that counts is that of the outputs, ||X W - X W_r||; with the Gram matrix G = X'X = L L' it
is ||L'W - L'W_r||, so the decomposition of L'W is the optimum, and L' is taken out again afterwards.

Everything is NumPy in double precision; no Keras, no TensorFlow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

#: Most ranks tried along one axis where two ranks are chosen together.
LEVELS = 32


class Options(NamedTuple):
    """The ranks that one factorisation offers, and what each gives up.

    Attributes:
        ranks: (options, ranks of one option), ints.
        loss: share of the squared norm lost, in 0..1, (options,).
    """

    ranks: np.ndarray
    loss: np.ndarray


def gram_root(gram: np.ndarray | None, ridge: float) -> np.ndarray | None:
    """Returns L with L L' = G + ridge * mean(diag G) * I.

    Args:
        gram: (n, n), or its diagonal (n,), or None for the identity.
        ridge: keeps directions that the data never took from being free; and L from being singular.

    Returns:
        Lower triangular (n, n), or the diagonal (n,), or None.
    """
    if gram is None:
        return None
    gram = np.asarray(gram, np.float64)
    mean = float(gram.mean() if gram.ndim == 1 else np.trace(gram) / len(gram))
    if mean <= 0:
        return None  # Nothing but zeros arrives: no direction is worth more than another.
    if gram.ndim == 1:
        return np.sqrt(gram + ridge * mean)
    return np.linalg.cholesky(gram + ridge * mean * np.eye(len(gram)))


def whiten(root: np.ndarray | None, matrix: np.ndarray) -> np.ndarray:
    """Returns L'W for W of shape (n, m)."""
    if root is None:
        return matrix
    return root[:, None] * matrix if root.ndim == 1 else root.T @ matrix


def unwhiten(root: np.ndarray | None, matrix: np.ndarray) -> np.ndarray:
    """Returns the inverse of L' times a matrix of shape (n, m)."""
    if root is None:
        return matrix
    return matrix / root[:, None] if root.ndim == 1 else np.linalg.solve(root.T, matrix)


def balance(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rescales the columns of a (m, r) and the rows of b (r, n) to equal norms; a @ b stays. It trains better so."""
    left, right = np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1)
    usable = (left > 0) & (right > 0)
    scale = np.sqrt(np.divide(right, left, out=np.ones_like(left), where=usable), where=usable, out=np.ones_like(left))
    return a * scale, b / scale[:, None]


def output_error(matrix: np.ndarray, approximation: np.ndarray, gram: np.ndarray | None = None) -> float:
    """Returns ||X W - X W_r|| / ||X W|| (Frobenius), from the Gram matrix of X; without it ||W - W_r|| / ||W||."""

    def energy(value: np.ndarray) -> float:
        if gram is None:
            return float(np.sum(value**2))
        return float(np.sum(value * (gram[:, None] * value if gram.ndim == 1 else gram @ value)))

    whole = energy(matrix)
    return math.sqrt(max(energy(matrix - approximation), 0.0) / whole) if whole > 0 else 0.0


def _tail(singular: np.ndarray) -> np.ndarray:
    """Returns, for each rank from 1, the share of the squared norm in the singular values left out."""
    squares = np.asarray(singular, np.float64) ** 2
    total = squares.sum()
    left = np.concatenate([np.cumsum(squares[:0:-1])[::-1], [0.0]])
    return left / total if total > 0 else np.zeros_like(left)


class MatrixFactors:
    """W (m, n) ~ a (m, r) @ b (r, n) with the least error over inputs of a given Gram matrix.

    Args:
        matrix: (m, n).
        gram: of the inputs, (m, m) or its diagonal (m,); None: the identity, which is the plain decomposition.
        ridge: see `gram_root`.
    """

    def __init__(self, matrix: np.ndarray, gram: np.ndarray | None = None, ridge: float = 0.0) -> None:
        self.matrix = np.asarray(matrix, np.float64)
        self.root = gram_root(gram, ridge)
        self.u, self.singular, self.vt = np.linalg.svd(whiten(self.root, self.matrix), full_matrices=False)

    def options(self) -> Options:
        return Options(np.arange(1, len(self.singular) + 1)[:, None], _tail(self.singular))

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns a (m, rank) and b (rank, n), balanced."""
        a = unwhiten(self.root, self.u[:, :rank] * self.singular[:rank])
        return balance(a, self.vt[:rank])


class TuckerFactors:
    """A kernel as a 1x1 convolution, a smaller k x k one, and a 1x1 one: Tucker-2, truncating one axis after another.

    Kim et al. Compression of deep convolutional neural networks. ICLR 2016, https://arxiv.org/abs/1511.06530; the
    sequential truncation is that of Vannieuwenhoven et al., SIAM J. Sci. Comput. 34, 2012: its squared error is at most
    the sum of what the two axes leave out. With data the first step weights the input channels by their own Gram matrix
    (an approximation: pixels of a patch count as alike); the second is exact for the inputs that the first leaves.

    Args:
        kernel: (height, width, input channels, filters).
        gram: of the patches, (height * width * channels, same), or None.
        ridge: see `gram_root`.
    """

    def __init__(self, kernel: np.ndarray, gram: np.ndarray | None = None, ridge: float = 0.0) -> None:
        self.kernel = np.asarray(kernel, np.float64)
        self.gram, self.ridge = gram, ridge
        height, width, channels, filters = kernel.shape
        channel_gram = None
        if gram is not None:
            blocks = gram.reshape(height * width, channels, height * width, channels)
            channel_gram = np.einsum("pcpd->cd", blocks)
        unfolded = self.kernel.transpose(2, 0, 1, 3).reshape(channels, -1)
        self.inner = MatrixFactors(unfolded, channel_gram, ridge)
        self.outer_singular = MatrixFactors(self.kernel.reshape(-1, filters), gram, ridge).singular

    def options(self, wanted: int | Sequence[int] = ()) -> Options:
        """Returns pairs of ranks; where there are many, some of them, and those of `wanted`: one rank, or a pair."""
        pair = np.broadcast_to(np.asarray(wanted, int), (2,)) if np.size(wanted) else np.empty(0, int)
        first = _levels(len(self.inner.singular), pair[:1])
        second = _levels(len(self.outer_singular), pair[1:])
        losses = _tail(self.inner.singular)[first - 1][:, None] + _tail(self.outer_singular)[second - 1]
        ranks = np.stack(np.meshgrid(first, second, indexing="ij"), axis=-1)
        return Options(ranks.reshape(-1, 2), np.minimum(losses, 1.0).ravel())

    def factors(self, inner_rank: int, outer_rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (channels, inner), (height, width, inner, outer) and (outer, filters)."""
        height, width, _, filters = self.kernel.shape
        first, rest = self.inner.factors(inner_rank)
        core = rest.reshape(-1, height, width, filters).transpose(1, 2, 0, 3).reshape(-1, filters)
        # The columns of `first` are scaled, so an error of the core does not count alike in all its rows.
        gram = np.tile(np.sum(first**2, axis=0), height * width)
        if self.gram is not None:
            project = np.kron(np.eye(height * width), first)
            gram = project.T @ self.gram @ project
        outer_rank = min(outer_rank, *core.shape)
        ridge = 1e-12 if self.gram is None else self.ridge
        core, last = MatrixFactors(core, gram, ridge).factors(outer_rank)
        return first, core.reshape(height, width, -1, outer_rank), last

    @staticmethod
    def product(first: np.ndarray, core: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Returns the kernel that the three factors stand for."""
        return np.einsum("ca,hwab,bf->hwcf", first, core, last, optimize=True)


class HeadFactors:
    """Products a_h @ b_h', one for each head, all brought to one smaller inner dimension.

    Queries and keys meet only in such a product, and so do values and the output projection: the narrower heads are
    again an attention layer, and need no more layers than before.

    Args:
        a: (heads, m, inner).
        b: (heads, n, inner).
        gram_a, gram_b: of what multiplies from either side, (m, m) and (n, n), or None.
        ridge: see `gram_root`.
    """

    def __init__(
        self,
        a: np.ndarray,
        b: np.ndarray,
        gram_a: np.ndarray | None = None,
        gram_b: np.ndarray | None = None,
        ridge: float = 0.0,
    ) -> None:
        self.roots = (gram_root(gram_a, ridge), gram_root(gram_b, ridge))
        parts = [
            self._product_svd(whiten(self.roots[0], x), whiten(self.roots[1], y)) for x, y in zip(a, b, strict=True)
        ]
        self.u, self.singular, self.v = (np.stack(part) for part in zip(*parts, strict=True))

    @staticmethod
    def _product_svd(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns u (m, k), s (k,), v (n, k) with u diag(s) v' = a b', without forming the product."""
        (qa, ra), (qb, rb) = np.linalg.qr(a), np.linalg.qr(b)
        u, singular, vt = np.linalg.svd(ra @ rb.T)
        size = min(len(singular), a.shape[1])
        return qa @ u[:, :size], singular[:size], qb @ vt[:size].T

    def losses(self) -> np.ndarray:
        """Returns the share of the products' squared norm lost, for each inner dimension from 1, (inner,)."""
        return _tail(np.sqrt(np.sum(self.singular**2, axis=0)))

    def factors(self, rank: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns (heads, m, rank) and (heads, n, rank)."""
        made = []
        for u, singular, v in zip(self.u, self.singular, self.v, strict=True):
            left = unwhiten(self.roots[0], u[:, :rank] * singular[:rank])
            left, right = balance(left, unwhiten(self.roots[1], v[:, :rank]).T)
            made.append((left, right.T))
        return np.stack([left for left, _ in made]), np.stack([right for _, right in made])


def allocate(costs: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: float) -> list[int]:
    """Chooses one option for each layer: the least sum of losses whose sum of costs is within the budget.

    One price for cost serves all layers (for a matrix: one threshold on squared singular value over cost of a rank);
    the price is found by bisection, and what is left of the budget then goes to the best buys that fit.

    Args:
        costs, losses: for each layer, arrays over its options.
        budget: most cost in all, in the unit of `costs`.

    Returns:
        The index of the option of each layer.

    Raises:
        ValueError: even the cheapest options cost more.
    """
    cheapest = sum(float(cost.min()) for cost in costs)
    if cheapest > budget:
        raise ValueError(f"The cheapest options cost {cheapest:g}, more than the budget of {budget:g}.")

    def at(price: float) -> list[int]:
        # Ties go to the cheaper option, so that a high price surely gives the cheapest.
        return [int(np.lexsort((cost, loss + price * cost))[0]) for cost, loss in zip(costs, losses, strict=True)]

    def total(chosen: Sequence[int]) -> float:
        return sum(float(cost[i]) for cost, i in zip(costs, chosen, strict=True))

    low, high = 1e-15, 1e9
    chosen = at(low)
    if total(chosen) > budget:
        for _ in range(100):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if total(at(middle)) > budget else (low, middle)
        chosen = at(high)
        if total(chosen) > budget:
            chosen = [int(np.argmin(cost)) for cost in costs]
    while True:
        slack = budget - total(chosen)
        best: tuple[float, int, int] | None = None
        for layer, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            extra, gain = cost - cost[chosen[layer]], loss[chosen[layer]] - loss
            rate = np.where((extra <= slack) & (gain > 1e-15), gain / np.maximum(extra, 1e-9), -1.0)
            option = int(np.argmax(rate))
            if rate[option] > 0 and (best is None or rate[option] > best[0]):
                best = (float(rate[option]), layer, option)
        if best is None:
            return chosen
        chosen[best[1]] = best[2]


def _levels(size: int, wanted: np.ndarray) -> np.ndarray:
    """Returns ranks from 1 to `size`: all of them, or about `LEVELS` if there are more; and those wanted."""
    even = np.round(np.linspace(1, size, min(size, LEVELS))).astype(int)
    return np.unique(np.concatenate([even, np.clip(wanted, 1, size)]))
