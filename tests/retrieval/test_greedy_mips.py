"""The joint ranking of Greedy-MIPS against NumPy, and what follows from it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfkit import retrieval
from tfkit.retrieval import GreedyMIPS


def normal(count, dimension, seed=0):
    return np.random.default_rng(seed).normal(size=(count, dimension)).astype("float32")


def largest_products(items, query):
    """The z of the paper: max_t q_t x_t for each item."""
    return (items * query).max(axis=1)


@pytest.mark.parametrize("dimension", [1, 2, 3, 4, 5, 13, 64])
def test_candidates_come_in_the_order_of_their_largest_products(dimension):
    items = normal(300, dimension)
    index = GreedyMIPS().build(items)
    for seed in range(5):
        query = normal(1, dimension, seed=10 + seed)[0]
        expected = np.argsort(-largest_products(items, query), kind="stable")
        np.testing.assert_array_equal(index.candidates(query, 300), expected)
        np.testing.assert_array_equal(index.candidates(query, 7), expected[:7])
        np.testing.assert_array_equal(index.candidates(-query, 50), np.argsort(-largest_products(items, -query))[:50])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_with_ties_and_zeros_too_each_item_comes_once_and_no_product_rises(data):
    count, dimension = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 5))
    values = st.sampled_from([0.0, 1.0, -1.0, 2.0, -0.5])
    drawn = data.draw(st.lists(values, min_size=(count + 1) * dimension, max_size=(count + 1) * dimension))
    vectors = np.array(drawn, np.float32).reshape(count + 1, dimension)
    items, query = vectors[1:], vectors[0]
    found = GreedyMIPS().build(items).candidates(query, count + 5)
    assert sorted(found) == list(range(count))
    products = largest_products(items, query)
    np.testing.assert_array_equal(products[found], np.sort(products)[::-1])


def test_the_best_of_the_candidates_are_returned_with_their_inner_products():
    items, queries = normal(1000, 16), normal(20, 16, seed=1)
    index = GreedyMIPS().build(items)
    for budget in (5, 12, 60, 200):
        result = index.search(queries, 5, budget=budget)
        for query, scores, ids in zip(queries, result.scores, result.ids, strict=True):
            chosen = np.argsort(-largest_products(items, query))[:budget]
            expected = chosen[np.argsort(-(items[chosen] @ query))][:5]
            np.testing.assert_array_equal(ids, expected)
            np.testing.assert_allclose(scores, items[expected] @ query, rtol=1e-4, atol=1e-5)


def test_a_query_of_one_coordinate_needs_no_more_than_k_candidates():
    items = np.abs(normal(2000, 8))
    for place, sign in ((0, 1), (5, 1), (3, -1)):
        query = np.zeros(8, np.float32)
        query[place] = sign
        # Of a negative one the other coordinates' products, all 0, would come first: their items are the best too.
        expected = np.sort((sign * np.maximum(items[:, place], 0)) if sign > 0 else items @ query)[::-1][:10]
        result = GreedyMIPS().build(items).search(query, 10, budget=10 if sign > 0 else 2000)
        np.testing.assert_allclose(result.scores, expected, rtol=1e-6)


def test_a_small_budget_still_gives_k_items():
    items = normal(1000, 4)
    assert GreedyMIPS().build(items).search(items[:3], 40, budget=1).ids.min() >= 0


def test_from_a_quarter_of_the_items_on_it_is_exact():
    items, queries = normal(400, 12), normal(10, 12, seed=1)
    index, exact = GreedyMIPS().build(items), retrieval.Exact().build(items)
    np.testing.assert_array_equal(index.search(queries, 5, budget=100).ids, exact.search(queries, 5).ids)


def test_what_breaks_a_rule():
    index = GreedyMIPS()
    with pytest.raises(ValueError, match="build"):
        index.candidates([1.0], 1)
    index.build(normal(10, 4))
    for call in (
        lambda: index.search(np.ones(4), 1, budget=0), lambda: index.candidates(np.ones(4), 0),
        lambda: index.candidates(np.ones(3), 1), lambda: index.candidates([np.nan] * 4, 1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            call()


def test_a_list_that_holds_an_item_twice_is_refused():
    index = GreedyMIPS().build(normal(10, 4))
    order = index.order.copy()
    order[2, 0] = order[2, 1]
    with pytest.raises(retrieval.IndexFileError, match="twice"):
        GreedyMIPS._restore(index, {"order": order})
