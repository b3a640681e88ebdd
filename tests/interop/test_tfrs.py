import numpy as np
import pytest

from tfkit.interop.tfrs import factorized_top_k, index_candidates


def test_counts_candidates_above_the_positive():
    generator = np.random.default_rng(0)
    queries, candidates = generator.normal(size=(30, 4)), generator.normal(size=(50, 4))
    positives = candidates[:30]
    found = factorized_top_k(queries, positives, candidates, [1, 10], batch=7)
    ranks = ((queries @ candidates.T) > np.sum(queries * positives, 1)[:, None]).sum(1)
    assert list(found.values()) == [np.mean(ranks < 1), np.mean(ranks < 10)]


def test_towers_make_an_index():
    index = index_candidates(lambda batch: np.asarray(batch) * 2.0, [np.eye(3)[:2], np.eye(3)[2:]])
    assert index.search([0.0, 0.0, 1.0], 1).ids.tolist() == [2]


def test_bad_input():
    with pytest.raises(ValueError, match="positives"):
        factorized_top_k(np.eye(2), np.eye(2)[:1], np.eye(2))
    with pytest.raises(ValueError, match="batches"):
        index_candidates(lambda batch: batch, [])
