"""The transformations against the closed forms of their papers, and the orders they keep."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tfkit.retrieval import EuclideanTransform, L2ALSHTransform, SignALSHTransform, SimpleLSHTransform

ALL = (EuclideanTransform, L2ALSHTransform, SignALSHTransform, SimpleLSHTransform)
each = pytest.mark.parametrize("kind", ALL)


def vectors(count, seed, dimension=6, skew=0.7):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimension)) * np.exp(skew * rng.normal(size=(count, 1)))).astype("float32")


ITEMS, QUERIES = vectors(200, 0), vectors(15, 1)
NORMS = np.linalg.norm(ITEMS.astype(np.float64), axis=1)
BOUND = NORMS.max()
PRODUCTS = QUERIES.astype(np.float64) @ ITEMS.astype(np.float64).T  # (queries, items)
LENGTHS = np.linalg.norm(QUERIES.astype(np.float64), axis=1, keepdims=True)


def squared_distances(transform):
    asked, points = transform.queries(QUERIES).astype(np.float64), transform.items(ITEMS).astype(np.float64)
    return ((asked[:, None] - points[None]) ** 2).sum(axis=-1)


def cosines(transform):
    asked, points = transform.queries(QUERIES).astype(np.float64), transform.items(ITEMS).astype(np.float64)
    return asked @ points.T / np.linalg.norm(asked, axis=1)[:, None] / np.linalg.norm(points, axis=1)


def order(values):
    return np.argsort(values, axis=1, kind="stable")


def test_euclidean():
    transform = EuclideanTransform.of(ITEMS)
    assert transform.bound == pytest.approx(BOUND)
    points = transform.items(ITEMS)
    np.testing.assert_array_equal(points[:, 1:], ITEMS)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), BOUND, rtol=1e-6)
    found = squared_distances(transform)
    np.testing.assert_allclose(found, BOUND**2 + LENGTHS**2 - 2 * PRODUCTS, rtol=1e-4, atol=1e-4 * BOUND**2)
    np.testing.assert_array_equal(order(found)[:, :20], order(-PRODUCTS)[:, :20])


def test_simple_lsh():
    found = cosines(SimpleLSHTransform.of(ITEMS))
    np.testing.assert_allclose(found, PRODUCTS / LENGTHS / BOUND, atol=1e-6)
    np.testing.assert_array_equal(order(-found)[:, :20], order(-PRODUCTS)[:, :20])


@pytest.mark.parametrize(("powers", "shrink"), [(3, 0.83), (1, 0.5), (5, 0.9)])
def test_l2_alsh(powers, shrink):
    found = squared_distances(L2ALSHTransform.of(ITEMS, powers=powers, shrink=shrink))
    rest = (shrink * NORMS / BOUND) ** 2.0 ** (powers + 1)
    expected = 1 + powers / 4 - 2 * shrink * PRODUCTS / LENGTHS / BOUND + rest
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(("powers", "shrink"), [(2, 0.75), (1, 0.5), (5, 0.9)])
def test_sign_alsh(powers, shrink):
    found = cosines(SignALSHTransform.of(ITEMS, powers=powers, shrink=shrink))
    rest = (shrink * NORMS / BOUND) ** 2.0 ** (powers + 1)
    expected = shrink * PRODUCTS / LENGTHS / BOUND / np.sqrt(powers / 4 + rest)
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize("kind", [L2ALSHTransform, SignALSHTransform])
def test_with_more_powers_the_order_approaches_that_of_inner_products(kind):
    def agreement(powers):
        transform = kind.of(ITEMS, powers=powers, shrink=0.9)
        found = squared_distances(transform) if kind is L2ALSHTransform else -cosines(transform)
        pairs = zip(order(found)[:, :20], order(-PRODUCTS)[:, :20], strict=True)
        return np.mean([len(set(a) & set(b)) / 20 for a, b in pairs])

    shares = [agreement(powers) for powers in (1, 3, 8)]
    assert shares[0] < shares[1] <= shares[2] == 1.0


def test_the_defaults_are_those_of_the_papers():
    assert (L2ALSHTransform(1.0).powers, L2ALSHTransform(1.0).shrink) == (3, 0.83)
    assert (SignALSHTransform(1.0).powers, SignALSHTransform(1.0).shrink) == (2, 0.75)


@each
def test_shapes_types_and_zeros(kind):
    transform = kind.of(np.zeros((3, 4)))
    points, asked = transform.items(np.zeros((3, 4))), transform.queries(np.zeros((2, 4)))
    assert points.dtype == asked.dtype == np.float32
    assert points.shape[1] == asked.shape[1] == 4 + getattr(transform, "powers", 1)
    assert np.isfinite(points).all() and np.isfinite(asked).all()
    assert transform.queries(np.empty((0, 4))).shape == (0, points.shape[1])
    assert kind.of(ITEMS).items(ITEMS[::2].astype("float64")).shape[0] == 100


@each
def test_what_breaks_a_rule(kind):
    with pytest.raises(ValueError, match="up to the bound 1"):
        kind(1.0).items([[3.0, 4.0]])
    for bad in (-1.0, np.nan, "1", None):
        with pytest.raises(ValueError, match="bound"):
            kind(bad)
    for vectors in ([[np.nan]], [1.0], [["a"]]):
        for method in (kind(1.0).items, kind(1.0).queries):
            with pytest.raises(ValueError, match="must be"):
                method(vectors)
    if "powers" in {field.name for field in dataclasses.fields(kind)}:
        for settings in ({"powers": 0}, {"powers": 1.5}, {"shrink": 0.0}, {"shrink": 1.0}, {"shrink": -1.0}):
            with pytest.raises(ValueError, match="must be"):
                kind(1.0, **settings)
