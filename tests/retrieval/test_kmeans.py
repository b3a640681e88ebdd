"""k-means: centroids follow the scale of the vectors, and clusters are those of NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit.retrieval.kmeans import assign, kmeans
from tfkit.retrieval.vectors import exponent_of, moderate, normalized, norms_of, scaled


def vectors(count, dimension=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype("float32")


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("power", [-60, 50])
def test_the_scale_changes_nothing(spherical, power):
    sample = vectors(500)
    plain = kmeans(sample, 9, spherical=spherical)
    large = kmeans(scaled(sample, power), 9, spherical=spherical)
    np.testing.assert_allclose(large, plain if spherical else scaled(plain, power), rtol=1e-6)


def test_norms_of_extreme_vectors_are_one():
    for power in (-140, -100, 0, 100, 120):
        units = normalized(scaled(vectors(50), power))
        np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-6 if power > -120 else 1e-2)
    assert not normalized(np.zeros((2, 3), np.float32)).any()


@pytest.mark.parametrize("clusters", [1, 7])
def test_the_nearest_centroid(clusters):
    sample, centroids = vectors(300), vectors(clusters, seed=1)
    distances = ((sample[:, None].astype(float) - centroids) ** 2).sum(axis=2)
    np.testing.assert_array_equal(assign(sample, centroids), distances.argmin(axis=1))
    np.testing.assert_array_equal(assign(sample, centroids, spherical=True), (sample @ centroids.T).argmax(axis=1))


def test_exponents():
    for norm in (1e-45, 3e-20, 1.0, 2.0**40, 3.3e38):
        exponent = exponent_of(norm, 16)
        assert exponent == 0 if 2.0**-16 <= norm <= 2.0**16 else 1 <= norm / 2.0**exponent < 2
    rows = np.float32([[3e38, 3e38], [0, 0], [1, 1], [1e-40, 0]])
    moved, exponents = moderate("queries", rows)
    assert exponents[1] == exponents[2] == 0
    np.testing.assert_array_equal(scaled(moved, exponents[:, None]), rows)
    assert 1 <= norms_of(moved)[0] < 2 and 1 <= norms_of(moved)[3] < 2
    same, none = moderate("queries", rows[1:3])
    assert none is None and same is not None
