"""k-means for the indexes that cluster: Lloyd's iterations over matrix products, empty clusters started anew."""

from __future__ import annotations

import numpy as np

from tfkit.retrieval import kernels
from tfkit.retrieval.vectors import normalized

#: Products of a block, which stay in the cache.
BLOCK_PRODUCTS = 1 << 18
#: Examples a cluster that training looks at; more change the centroids little.
EXAMPLES_PER_CLUSTER = 128


def kmeans(
    vectors: np.ndarray, clusters: int, *, iterations: int = 12, seed: int = 0, spherical: bool = False
) -> np.ndarray:
    """Returns centroids of least squared distance, or of largest cosine.

    Args:
        vectors: float32, (vectors, dimension).
        clusters: how many; at most as many as there are vectors.
        iterations: of Lloyd.
        seed: of the start and of the sample that is trained on.
        spherical: centroids have norm 1, and vectors belong to the one of the largest inner product.

    Returns:
        float32, (clusters, dimension).
    """
    rng = np.random.default_rng(seed)
    most = clusters * EXAMPLES_PER_CLUSTER
    sample = vectors if len(vectors) <= most else vectors[np.sort(rng.choice(len(vectors), most, replace=False))]
    centroids = sample[rng.choice(len(sample), clusters, replace=False)].copy()
    if spherical:
        sample, centroids = normalized(sample), normalized(centroids)
    for _ in range(iterations):
        labels = assign(sample, centroids, spherical=spherical)
        sums, counts = np.zeros(centroids.shape, np.float64), np.zeros(clusters, np.int64)
        accumulate(sample, labels, sums, counts)
        empty = np.flatnonzero(counts == 0)
        sums[empty], counts[empty] = centroids[empty], 1
        large = np.flatnonzero(counts > 1)
        for cluster, donor in zip(empty, large[np.argsort(-counts[large], kind="stable")], strict=False):
            sums[cluster] = sample[rng.choice(np.flatnonzero(labels == donor))]
        centroids = (sums / counts[:, None]).astype(np.float32)
        if spherical:
            centroids = normalized(centroids)
    return centroids


def assign(vectors: np.ndarray, centroids: np.ndarray, *, spherical: bool = False) -> np.ndarray:
    """Returns the cluster of each vector, int64, (vectors,): the nearest centroid, or that of the largest product."""
    labels = np.empty(len(vectors), np.int64)
    half = np.zeros(len(centroids), np.float32) if spherical else 0.5 * np.einsum("ij,ij->i", centroids, centroids)
    rows = max(1, BLOCK_PRODUCTS // len(centroids))
    for start in range(0, len(vectors), rows):
        part = slice(start, start + rows)
        products = vectors[part] @ centroids.T
        products -= half
        labels[part] = products.argmax(axis=1)
    return labels


@kernels.kernel
def accumulate(vectors, labels, sums, counts):  # type: ignore[no-untyped-def]
    """Adds each vector to the sum of its cluster."""
    for i in range(vectors.shape[0]):
        label = labels[i]
        counts[label] += 1
        for j in range(vectors.shape[1]):
            sums[label, j] += vectors[i, j]
