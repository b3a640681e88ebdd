"""Inverted file: the items in clusters, of which a search looks at the few that promise most.

Paper: Auvolat, Chandar, Vincent, Larochelle, Bengio. Clustering is efficient for approximate maximum inner product
search. 2015, https://arxiv.org/abs/1507.05910 (clusters by cosine); the residual codes are those of Jegou, Douze,
Schmid. Product quantization for nearest neighbor search. IEEE TPAMI 33(1), 2011.

Differs: one level of clusters, ranked by the product of query and centroid times the longest projection of an item on
that centroid, or the shortest where the product is negative; the paper scales nothing. So a cluster of long items comes
first, or last. What codes select is scored exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from tfkit.internal import checks
from tfkit.retrieval import kernels
from tfkit.retrieval.base import Index, SearchResult, expect
from tfkit.retrieval.kmeans import EXAMPLES_PER_CLUSTER, assign, kmeans
from tfkit.retrieval.vectors import BLOCK_ROWS, ITEMS_RANGE

CODEWORDS = 256
#: No mean of items of moderate norms has a coordinate beyond this; of what a file holds beyond it products overflow.
LARGEST = 2.0 ** (ITEMS_RANGE + 1)


class IVF(Index):
    """Looks at the items of the clusters nearest to the query.

    Search takes `probes`, how many clusters are looked at; and with codes `rescore`, how many of the items that look
    best by their codes are scored exactly (at least k; None: ten for each item wanted). Memory: the items twice, once
    by cluster; with codes once, and the codes.

    Args:
        clusters: how many; None: about four times the square root of the items. There are never more than items.
        clustering: `"cosine"`, by direction; `"euclidean"`, by distance.
        code_bytes: of the product code that stands for an item while candidates are chosen; None: none are made.
        iterations: of k-means.
        seed: of k-means.
    """

    _multiplies = True

    def __init__(
        self,
        clusters: int | None = None,
        *,
        clustering: Literal["cosine", "euclidean"] = "cosine",
        code_bytes: int | None = None,
        iterations: int = 12,
        seed: int = 0,
    ) -> None:
        self.clusters = None if clusters is None else checks.integer("clusters", clusters, 1)
        self.clustering = checks.choice("clustering", clustering, ("cosine", "euclidean"))
        self.code_bytes = None if code_bytes is None else checks.integer("code_bytes", code_bytes, 1)
        self.iterations = checks.integer("iterations", iterations, 1)
        self.seed = checks.integer("seed", seed, 0)

    def _build(self, threads: int) -> None:
        count = len(self.items)
        wanted = self.clusters if self.clusters is not None else max(1, round(4 * math.sqrt(count)))
        self.centroids = kmeans(
            self.items, min(wanted, count), iterations=self.iterations, seed=self.seed, spherical=self._spherical
        )
        self.codewords = np.zeros((0, CODEWORDS, 0), np.float32)
        labels = assign(self.items, self.centroids, spherical=self._spherical)
        if self.code_bytes is not None:
            most = CODEWORDS * EXAMPLES_PER_CLUSTER
            rows = np.arange(count)
            if count > most:
                rows = np.sort(np.random.default_rng([self.seed, 1]).choice(count, most, replace=False))
            parts = split(self._residuals(rows, labels[rows]), self.code_bytes)
            self.codewords = np.zeros((parts.shape[1], CODEWORDS, parts.shape[2]), np.float32)
            for number, words in enumerate(self.codewords):
                part = np.ascontiguousarray(parts[:, number])
                learned = kmeans(part, min(CODEWORDS, count), iterations=self.iterations, seed=self.seed + 1 + number)
                words[: len(learned)] = learned
        self._sort(labels)

    @property
    def _spherical(self) -> bool:
        return self.clustering == "cosine"

    def _lengths(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns the projections of items on their centroids of norm 1; with other centroids, 1."""
        if not self._spherical:
            return np.ones(len(rows), np.float32)
        return np.einsum("ij,ij->i", self.items[rows], self.centroids[labels])

    def _residuals(self, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns what is left of items when their projections, or their centroids, are taken away."""
        left: np.ndarray = self.items[rows]
        for start in range(0, len(rows), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            left[part] -= self.centroids[labels[part]] * self._lengths(rows[part], labels[part])[:, None]
        return left

    def _sort(self, labels: np.ndarray) -> None:
        """Lays the items, or their codes, out by cluster."""
        self.labels = labels
        self.order = np.argsort(labels, kind="stable").astype(np.int64, copy=False)
        self.starts = np.searchsorted(labels[self.order], np.arange(len(self.centroids) + 1))
        count, coded = len(labels), self.code_bytes is not None
        self.lengths = np.empty(count, np.float32)
        self.sorted_items = np.empty((0 if coded else count, self.dimension), np.float32)
        self.codes = np.empty((count, len(self.codewords)) if coded else (0, 0), np.uint8)
        for start in range(0, count, BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            rows = self.order[part]
            self.lengths[part] = self._lengths(rows, labels[rows])
            if not coded:
                self.sorted_items[part] = self.items[rows]
                continue
            parts = split(self._residuals(rows, labels[rows]), len(self.codewords))
            for number, words in enumerate(self.codewords):
                self.codes[part, number] = assign(np.ascontiguousarray(parts[:, number]), words)
        #: The longest and the shortest projection in each cluster; (clusters,), and 0 where it has no items.
        self.longest, self.shortest = np.zeros((2, len(self.centroids)), np.float32)
        filled = np.flatnonzero(self.starts[1:] > self.starts[:-1])
        self.longest[filled] = np.maximum.reduceat(self.lengths, self.starts[filled])
        self.shortest[filled] = np.minimum.reduceat(self.lengths, self.starts[filled])

    def _extend(self, first: int, threads: int) -> None:
        new = assign(self.items[first:], self.centroids, spherical=self._spherical)
        self._sort(np.concatenate([self.labels, new]))

    def _search(self, queries: np.ndarray, k: int, *, probes: int = 16, rescore: int | None = None) -> SearchResult:
        probes = min(checks.integer("probes", probes, 1), len(self.centroids))
        if rescore is not None:
            if self.code_bytes is None:
                raise checks.error("rescore", "left out where `code_bytes` is None", rescore, "All scores are exact.")
            checks.integer("rescore", rescore, k)
        coarse = queries @ self.centroids.T
        best = np.maximum(coarse * self.longest, coarse * self.shortest)  # What an item along the centroid would have.
        best[:, self.starts[1:] == self.starts[:-1]] = -np.inf
        visited = best_columns(best, probes)
        if self.code_bytes is None:
            scores, ids, counts = kernels.empty_heaps(len(queries), k)
            _scan(queries, visited, self.starts, self.sorted_items, self.order, scores, ids, counts)
        else:
            kept = min(rescore if rescore is not None else 10 * k, len(self.items))
            tables = np.einsum("qpd,pwd->qpw", split(queries, len(self.codewords)), self.codewords)
            rough, chosen, found = kernels.empty_heaps(len(queries), kept)
            _scan_codes(
                tables, coarse, visited, self.starts, self.codes, self.lengths, self.order, rough, chosen, found
            )
            scores, ids, counts = kernels.empty_heaps(len(queries), k)
            _rescore(queries, self.items, chosen, found, scores, ids, counts)
        kernels.sort_heaps(scores, ids, counts)
        return SearchResult(scores, ids)

    def efforts(self, k: int = 10) -> list[dict[str, Any]]:
        probes = sorted({min(2**power, len(self.centroids)) for power in range(1, 12)})
        if self.code_bytes is None:
            return [{"probes": number} for number in probes]
        # The more clusters, the more items of which the codes must tell which are worth scoring.
        most = len(self.items)
        ladder = [{"probes": n, "rescore": min(max(k, round(4 * k * math.sqrt(n))), most)} for n in probes]
        return [*ladder, {"probes": probes[-1], "rescore": most}]

    def _arrays(self) -> dict[str, np.ndarray]:
        return {"centroids": self.centroids, "codewords": self.codewords, "labels": self.labels}

    def _kept(self) -> list[np.ndarray]:
        beside: list[np.ndarray] = [
            self.order,
            self.starts,
            self.longest,
            self.shortest,
            self.lengths,
            self.sorted_items,
            self.codes,
        ]
        return [*self._arrays().values(), *beside]

    def _restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.centroids = expect(arrays, "centroids", np.float32, (None, self.dimension), -LARGEST, LARGEST)
        parts = 0 if self.code_bytes is None else min(self.code_bytes, self.dimension)
        width = -(-self.dimension // parts) if parts else 0
        shape = (parts, CODEWORDS, width)
        self.codewords = expect(arrays, "codewords", np.float32, shape, -LARGEST, LARGEST)
        most = len(self.centroids) - 1
        self._sort(expect(arrays, "labels", np.int64, (len(self.items),), 0, most))


def split(vectors: np.ndarray, parts: int) -> np.ndarray:
    """Returns the vectors cut into parts of equal width, (vectors, parts, width), with zeros behind the last one."""
    count, dimension = vectors.shape
    parts = min(parts, dimension)
    width = -(-dimension // parts)
    if dimension == parts * width:
        return vectors.reshape(count, parts, width)
    padded = np.zeros((count, parts * width), np.float32)
    padded[:, :dimension] = vectors
    return padded.reshape(count, parts, width)


def best_columns(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the columns of the largest scores of each row, the largest first, int64, (rows, count)."""
    if count < scores.shape[1]:
        chosen = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    else:
        chosen = np.broadcast_to(np.arange(count), scores.shape)
    order = np.argsort(-np.take_along_axis(scores, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


@kernels.kernel
def _scan(queries, visited, starts, items, order, scores, ids, counts):  # type: ignore[no-untyped-def]
    for query in range(queries.shape[0]):
        count = counts[query]
        for place in range(visited.shape[1]):
            cluster = visited[query, place]
            for row in range(starts[cluster], starts[cluster + 1]):
                score = kernels.dot(queries[query], items[row])
                if count < scores.shape[1] or score >= scores[query, 0]:
                    count = kernels.offer(scores[query], ids[query], count, score, order[row])
        counts[query] = count


@kernels.kernel
def _scan_codes(tables, coarse, visited, starts, codes, lengths, order, scores, ids, counts):  # type: ignore[no-untyped-def]
    for query in range(visited.shape[0]):
        count, table = counts[query], tables[query]
        for place in range(visited.shape[1]):
            cluster = visited[query, place]
            for row in range(starts[cluster], starts[cluster + 1]):
                score = coarse[query, cluster] * lengths[row]
                for part in range(codes.shape[1]):
                    score += table[part, codes[row, part]]
                if count < scores.shape[1] or score >= scores[query, 0]:
                    count = kernels.offer(scores[query], ids[query], count, score, order[row])
        counts[query] = count


@kernels.kernel
def _rescore(queries, items, chosen, found, scores, ids, counts):  # type: ignore[no-untyped-def]
    for query in range(queries.shape[0]):
        count = counts[query]
        for place in range(found[query]):
            item = chosen[query, place]
            count = kernels.offer(scores[query], ids[query], count, kernels.dot(queries[query], items[item]), item)
        counts[query] = count
