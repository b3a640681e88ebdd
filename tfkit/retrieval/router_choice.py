"""The router's rule: what is seen of a query, and which choice is the cheapest for what it is expected to find."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tfkit.retrieval.base import SearchResult
from tfkit.retrieval.kmeans import kmeans, normalized
from tfkit.retrieval.norm_scan import norms_of
from tfkit.retrieval.router_models import Model

CENTROIDS, LARGEST = 32, 6
#: Prices of a miss that are tried, in times of the dearest choice.
PRICES = np.geomspace(1e-3, 1e4, 400)


class Features:
    """What is seen of a query before it is searched.

    Args:
        items: float32, (items, dimension).
        seed: of the clusters.
    """

    def __init__(self, items: np.ndarray, seed: int) -> None:
        centroids = kmeans(items, min(CENTROIDS, len(items)), seed=seed, spherical=True)
        products = items @ centroids.T
        labels = products.argmax(axis=1)
        self.longest = np.zeros(len(centroids), np.float32)
        np.maximum.at(self.longest, labels, products[np.arange(len(items)), labels])
        directions = np.concatenate([centroids, normalized(items.mean(axis=0, keepdims=True))])
        self.directions = np.ascontiguousarray(directions.T)
        self.norms = norms_of(items)
        self.unit = float(self.norms.max()) or 1.0

    def of_queries(self, queries: np.ndarray) -> np.ndarray:
        """Returns, float32, (queries, features): cosines to the clusters of items and to their mean, the largest
        scores that clusters promise, the norm, and the entropy of the squared coordinates."""
        norms = norms_of(queries)[:, None]
        units = np.asarray(queries / np.where(norms > 0, norms, 1), np.float32)
        cosines = units @ self.directions
        promised = np.sort(cosines[:, :-1] * (self.longest / self.unit), axis=1)[:, : -LARGEST - 1 : -1]
        squares = units * units
        entropy = -np.einsum("ij,ij->i", squares, np.log(squares + 1e-12))
        beside = np.stack([np.log(norms[:, 0] + 1e-30), entropy, cosines.std(axis=1)], axis=1)
        return np.concatenate([cosines, promised, beside], axis=1).astype(np.float32)

    def of_results(self, queries: np.ndarray, found: SearchResult) -> np.ndarray:
        """Returns what the first steps tell, float32, (queries, features): scores of the best, the middle and the
        last in units of the norms, the gaps between them, norms of the items found, and whether they are proven."""
        lengths = norms_of(queries)[:, None] * self.unit
        last = found.scores.shape[1] - 1
        places = [0, last // 4, last // 2, last]
        scores = np.where(found.ids < 0, 0, found.scores)[:, places] / np.where(lengths > 0, lengths, 1)
        norms = np.where(found.ids < 0, 0, self.norms[found.ids]) / self.unit
        proven = np.zeros(len(queries)) if found.exact is None else found.exact
        some = [norms.mean(axis=1), norms.min(axis=1), norms.max(axis=1), proven]
        ratios = scores[:, 1:] / np.where(scores[:, :1] > 0, scores[:, :1], 1)
        return np.concatenate([scores, ratios, np.stack(some, axis=1)], axis=1).astype(np.float32)


class Plan(NamedTuple):
    """A way of choosing that was learned: the model, which choice makes the first steps, the price of a miss."""

    name: str
    model: Model
    probe: int | None
    price: float


def cheapest(recalls: np.ndarray, costs: np.ndarray, price: float) -> np.ndarray:
    """Returns the choice of the least time plus price of what is missed, int64, (queries,).

    Args:
        recalls: (queries, choices), expected.
        costs: (choices,), microseconds.
        price: of a recall lost whole, microseconds.

    >>> cheapest(np.array([[0.9, 1.0], [1.0, 1.0]]), np.array([1.0, 5.0]), price=100.0).tolist()
    [1, 0]
    """
    return np.asarray((costs - price * recalls).argmin(axis=1))


def set_price(
    predicted: np.ndarray, recalls: np.ndarray, costs: np.ndarray, target: float
) -> tuple[float, float, float]:
    """Returns the price that reaches a mean recall in the least mean time, that recall, and that time.

    Args:
        predicted: (queries, choices), by which is chosen.
        recalls: (queries, choices), the true ones.
        costs: (choices,), microseconds.
        target: mean recall to be reached; where no price does, the best recall is taken.
    """
    rows, tried = np.arange(len(recalls)), []
    for price in PRICES * costs.max():
        taken = cheapest(predicted, costs, price)
        tried.append((float(price), float(recalls[rows, taken].mean()), float(costs[taken].mean())))
    enough = [found for found in tried if found[1] >= target]
    return min(enough, key=lambda found: found[2]) if enough else max(tried, key=lambda found: found[1])


def costs_after(costs: np.ndarray, probe: int | None) -> np.ndarray:
    """Returns the time of each choice once the first steps are taken: to keep what they found costs nothing."""
    if probe is None:
        return costs
    left = costs.copy()
    left[probe] = 0
    return left
