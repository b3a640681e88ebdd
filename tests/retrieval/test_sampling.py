"""Means, signs and draws of wedge and diamond sampling."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit import retrieval
from tfkit.retrieval import DiamondSampling, WedgeSampling

each = pytest.mark.parametrize("kind", [WedgeSampling, DiamondSampling])


def normal(count, dimension=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype("float32")


def test_the_tables_hold_each_item_by_the_size_of_its_value():
    items = normal(57)
    items[4], items[:, 2] = 0, np.where(np.arange(57) == 9, -2.0, 0.0)
    index = WedgeSampling().build(items)
    for coordinate in range(6):
        own = np.abs(index.keep[coordinate].astype(np.float64))
        assert own.max() <= 1
        signed = np.zeros(57)
        np.add.at(signed, np.arange(57), np.copysign(own, index.keep[coordinate]) / 57)
        alias = index.alias[coordinate].astype(np.int64)
        np.add.at(signed, np.where(alias < 0, -1 - alias, alias), np.where(alias < 0, -1, 1) * (1 - own) / 57)
        values = items[:, coordinate].astype(np.float64)
        np.testing.assert_allclose(signed, values / np.abs(values).sum(), atol=1e-7)


@each
def test_the_mean_is_the_inner_product_or_its_square(kind):
    items, query = normal(30), normal(1, seed=1)[0]
    items[3] = 0
    runs = np.array([kind(seed=seed).build(items).estimate(query, 2000) for seed in range(200)])
    truth = (items.astype(np.float64) @ query) ** (2 if kind is DiamondSampling else 1)
    error = runs.std(axis=0) / np.sqrt(len(runs))
    assert (np.abs(runs.mean(axis=0) - truth) <= 4.5 * error + 1e-9).all()
    # Few standard errors are of use only if they are small.
    assert error.max() < 0.02 * np.abs(truth).max()
    assert runs[:, 3].any() == np.False_


def test_the_spread_of_a_wedge_is_that_of_its_draws():
    items, query = np.abs(normal(30)), np.abs(normal(1, seed=1)[0])
    samples, total = 500, float(query @ items.sum(axis=0))
    runs = np.array([WedgeSampling(seed=seed).build(items).estimate(query, samples) for seed in range(400)])
    share = items @ query / total
    np.testing.assert_allclose(runs.sum(axis=1), total, rtol=6 / samples)  # Each coordinate's share is rounded.
    drawn = total * np.sqrt(share * (1 - share) / samples)  # If coordinates were drawn as well, a little more.
    assert (runs.std(axis=0) < 1.15 * drawn).all() and (runs.std(axis=0) > 0.7 * drawn).all()


@each
def test_what_is_large_and_negative(kind):
    items, query = normal(400, 12), normal(1, 12, seed=1)[0]
    products = items @ query
    items[7] = -3 * items[products.argmax()]
    found = kind().build(items).estimate(query, 50_000)
    assert found[7] == (found.max() if kind is DiamondSampling else found.min())
    assert kind().build(items).search(query, 1, candidates=40, samples=50_000).ids[0] == products.argmax()


def test_one_coordinate_is_drawn_without_error():
    items = np.zeros((50, 3), np.float32)
    items[17, 1] = -4.0
    for kind, expected in ((WedgeSampling, -8.0), (DiamondSampling, 64.0)):
        found = kind().build(items).estimate([0.0, 2.0, 0.0], 100)
        assert found[17] == pytest.approx(expected) and np.count_nonzero(found) == 1


@each
def test_the_draws_depend_on_seed_and_query_alone(kind):
    items, queries = normal(3000, 16), normal(40, 16, seed=1)
    index = kind(seed=5).build(items)
    expected = index.search(queries, 10, threads=1, candidates=60)
    for threads in (2, 3, 7):
        np.testing.assert_array_equal(index.search(queries, 10, threads=threads, candidates=60).ids, expected.ids)
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(index.search(queries[order], 10, candidates=60).ids, expected.ids[order])
    np.testing.assert_array_equal(index.search(queries[3], 10, candidates=60).ids, expected.ids[3])
    other = kind(seed=6).build(items).search(queries, 10, candidates=60)
    assert (other.ids != expected.ids).any()


@each
def test_more_samples_find_more(kind):
    items, queries = normal(2000, 16), normal(60, 16, seed=1)
    index, truth = kind().build(items), retrieval.Exact().build(items).search(queries, 5).ids

    def recall(samples):
        found = index.search(queries, 5, candidates=100, samples=samples).ids
        return np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, truth, strict=True)])

    few, more, many = recall(200), recall(5000), recall(100_000)
    assert few < more < many and many > 0.8


def test_the_items_of_the_largest_counts_are_scored():
    items, query = normal(1000, 8), normal(1, 8, seed=1)[0]
    index = WedgeSampling(seed=2).build(items)
    counts = np.round(index.estimate(query, 30_000) * 30_000 / (np.abs(query) @ np.abs(items).sum(axis=0)))
    for level in np.unique(counts)[::-1][10:40:7]:
        chosen = np.flatnonzero(counts >= level)
        if len(chosen) < 250:
            found = index.search(query, 3, candidates=len(chosen), samples=30_000).ids
            np.testing.assert_array_equal(found, chosen[np.argsort(-(items[chosen] @ query), kind="stable")][:3])


@each
def test_where_few_items_are_drawn_the_first_fill_up(kind):
    items = np.zeros((200, 3), np.float32)
    items[150:153, 0] = [1.0, 2.0, 3.0]
    result = kind().build(items).search([[1.0, 0, 0], [0.0, 1.0, 0], [0, 0, 0]], 6, candidates=6)
    assert result.ids.tolist() == [[152, 151, 150, 0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]
    assert result.scores[0].tolist() == [3.0, 2.0, 1.0, 0.0, 0.0, 0.0]


def test_what_breaks_a_rule():
    with pytest.raises(ValueError, match="seed"):
        WedgeSampling(seed=-1)
    with pytest.raises(ValueError, match="build"):
        WedgeSampling().estimate([1.0], 3)
    index = DiamondSampling().build(normal(100))
    for effort in ({"candidates": 0}, {"samples": 0}, {"samples": 2.0}):
        with pytest.raises(ValueError, match="must be"):
            index.search(np.ones(6), 1, **effort)
