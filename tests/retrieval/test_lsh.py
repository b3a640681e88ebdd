"""Codes, ranks and candidates of the two hashes against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit import retrieval
from tfkit.retrieval import NormRangingLSH, SimpleLSH
from tfkit.retrieval.lsh import CAUTION, packed


def vectors(count, dimension=8, seed=0, skew=0.5):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimension)) * np.exp(skew * rng.normal(size=(count, 1)))).astype("float32")


@pytest.mark.parametrize("bits", [1, 5, 63, 64, 65, 130])
def test_packed_signs(bits):
    values = np.random.default_rng(0).normal(size=(20, bits))
    values[0] = 0  # Zero counts as positive.
    words = packed(values)
    assert words.dtype == np.uint64 and words.shape == (20, -(-bits // 64))
    for row, found in zip(values, words, strict=True):
        number = sum(int(word) << (64 * place) for place, word in enumerate(found))
        assert number == sum(1 << place for place, value in enumerate(row) if value >= 0)


def apart(index, queries):
    """By how many signs each item differs from each query, from the definition."""
    norms = np.linalg.norm(index.items.astype(np.float64), axis=1)
    parts = np.array_split(np.argsort(norms, kind="stable"), index.ranges)
    signs, largest = np.empty((len(norms), index.bits), bool), np.empty(len(norms))
    for rows in parts:
        largest[rows] = norms[rows].max()
        scaled = index.items[rows] / largest[rows, None]
        leg = np.sqrt(np.maximum(0, 1 - (scaled.astype(np.float64) ** 2).sum(axis=1)))
        signs[rows] = np.column_stack([scaled, leg]) @ index.projections.T >= 0
    asked = queries @ index.projections[:, :-1].T >= 0
    return (asked[:, None] != signs[None]).sum(axis=-1), largest


@pytest.mark.parametrize(
    "index", [SimpleLSH(bits=6), SimpleLSH(bits=40, seed=2), SimpleLSH(bits=100), NormRangingLSH(bits=30, ranges=9)]
)
def test_the_items_that_share_the_most_signs_are_scored(index):
    items, queries = vectors(2000), vectors(15, seed=1)
    index.build(items)
    distances, largest = apart(index, queries)
    caution = CAUTION if index.ranges > 1 else 0.0
    for query, distance in zip(queries, distances, strict=True):
        promised = np.round(largest * np.cos(np.pi * (1 - caution) * distance / index.bits), 12)
        for level in np.unique(promised)[::-1][:6]:
            chosen = np.flatnonzero(promised >= level)
            if not 5 <= len(chosen) < 500:  # From a quarter of the items on all are scored.
                continue
            result = index.search(query, 5, candidates=len(chosen))
            best = chosen[np.argsort(-(items[chosen] @ query), kind="stable")][:5]
            np.testing.assert_array_equal(result.ids, best)


def test_a_sign_differs_with_the_probability_of_the_angle():
    items, queries = vectors(40), vectors(10, seed=1)
    share = np.mean([apart(SimpleLSH(bits=256, seed=s).build(items), queries)[0] for s in range(20)], axis=0) / 256
    lengths = np.linalg.norm(queries, axis=1, keepdims=True) * np.linalg.norm(items, axis=1).max()
    expected = np.arccos(queries @ items.T / lengths) / np.pi
    # Standard error of 20 * 256 signs: 0.007.
    np.testing.assert_allclose(share, expected, atol=0.03)


def test_one_range_is_simple_lsh():
    items, queries = vectors(500), vectors(10, seed=1)
    simple, ranging = SimpleLSH().build(items), NormRangingLSH(ranges=1).build(items)
    np.testing.assert_array_equal(
        simple.search(queries, 5, candidates=50).ids, ranging.search(queries, 5, candidates=50).ids
    )


def test_on_skewed_norms_ranges_find_more():
    items, queries = vectors(8000, 16, skew=1.0), vectors(100, 16, seed=1)
    truth = retrieval.Exact().build(items).search(queries, 10).ids

    def recall(index):
        found = index.build(items).search(queries, 10, candidates=80).ids
        return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth, strict=True)])

    assert recall(NormRangingLSH(bits=32)) > recall(SimpleLSH(bits=32)) + 0.1


def test_the_seed_repeats():
    items, queries = vectors(900), vectors(10, seed=1)
    first, again, other = (SimpleLSH(seed=s).build(items).search(queries, 5, candidates=30) for s in (4, 4, 5))
    np.testing.assert_array_equal(first.ids, again.ids)
    assert (first.ids != other.ids).any()


def test_more_ranges_than_items_and_zero_vectors():
    items = np.zeros((20, 3), np.float32)
    items[3] = 1.0
    index = NormRangingLSH(ranges=256).build(np.repeat(items, 3, axis=0))
    assert set(index.search(np.ones(3), 3, candidates=6).ids) == {9, 10, 11}
    assert NormRangingLSH().build(np.zeros((100, 3))).search(np.ones(3), 2, candidates=5).scores.tolist() == [0.0, 0.0]


def test_a_huge_query_raises_no_warning():
    items = vectors(500)
    index = SimpleLSH().build(items)
    with np.errstate(all="raise"):
        assert index.search(np.full(8, 3e38), 3, candidates=20).ids.min() >= 0


def test_what_breaks_a_rule():
    for kind, arguments in (
        (SimpleLSH, {"bits": 0}), (SimpleLSH, {"bits": 257}), (SimpleLSH, {"seed": -1}),
        (NormRangingLSH, {"ranges": 0}), (NormRangingLSH, {"ranges": 2.0}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(arguments))):
            kind(**arguments)
    with pytest.raises(ValueError, match="candidates"):
        SimpleLSH().build(vectors(30)).search(np.ones(8), 1, candidates=0)


def test_codes_of_more_bits_than_there_are_are_refused():
    index = SimpleLSH(bits=5).build(vectors(30))
    codes = index.codes.copy()
    codes[7] |= np.uint64(1 << 5)
    with pytest.raises(retrieval.IndexFileError, match="more than 5 bits"):
        SimpleLSH._restore(index, {"codes": codes, "projections": index.projections})
