"""The vectors that retrieval is measured on, and how the measurements are read."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import speedups, vectors


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "CACHE", tmp_path)


def test_factors_solve_the_normal_equations():
    seen = np.array([0, 2, 1, 2, 3, 0])
    offsets = np.array([0, 2, 5, 5, 6])  # The third user has seen nothing.
    items, users = vectors.factorise(seen, offsets, 3, weight=2.0, penalty=0.5, rounds=2)
    assert items.shape == (4, 3) and users.shape == (4, 3)
    for user in range(4):
        confidence, wanted = np.ones(4), np.zeros(4)
        confidence[seen[offsets[user] : offsets[user + 1]]] += 2.0
        wanted[seen[offsets[user] : offsets[user + 1]]] = 1.0
        gram = items.T @ (confidence[:, None] * items) + 0.5 * np.eye(3)
        np.testing.assert_allclose(gram @ users[user], items.T @ (confidence * wanted), atol=1e-5)
    assert not users[2].any()


def test_more_rounds_fit_better():
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 8, size=40))])
    seen = np.concatenate([rng.choice(30, size, replace=False) for size in np.diff(offsets)])

    def loss(rounds):
        items, users = vectors.factorise(seen, offsets, 4, rounds=rounds)
        wanted = np.zeros((40, 30))
        wanted[np.repeat(np.arange(40), np.diff(offsets)), seen] = 1.0
        missed = (1 + vectors.WEIGHT * wanted) * (wanted - users @ items.T) ** 2
        return missed.sum() + vectors.PENALTY * ((items**2).sum() + (users**2).sum())

    assert loss(5) <= loss(2) <= loss(1)


def test_synthetic_vectors_have_the_traits_they_claim(tmp_path):
    items, queries = vectors.synthetic(4000, 32, seed=1)
    assert items.shape == (4000, 32) and queries.shape == (vectors.QUERIES, 32) and items.dtype == np.float32
    norms = np.linalg.norm(items, axis=1)
    assert np.log(norms).std() == pytest.approx(0.6, abs=0.03) and norms.std() / norms.mean() > 0.55
    spectrum = np.linalg.svd(items / norms[:, None], compute_uv=False) ** 2
    assert spectrum[:9].sum() > 0.85 * spectrum.sum()  # A quarter of the dimensions, and popularity.
    towards = queries.mean(axis=0) / np.linalg.norm(queries.mean(axis=0))
    assert np.corrcoef(items @ towards / norms, np.maximum(np.log(norms), 0))[0, 1] > 0.2
    again = vectors.synthetic(4000, 32, seed=1)  # From the cache.
    np.testing.assert_array_equal(again.items, items)
    assert len(list(tmp_path.glob("*.npz"))) == 1
    assert (vectors.synthetic(4000, 32, seed=2).items != items).any()
    assert np.linalg.norm(vectors.synthetic(50, 32, skew=0.0).items, axis=1) == pytest.approx(1.0)


def test_without_the_data_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("TFKIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="TFKIT_DATA"):
        vectors.movielens(8)


def point(precision, fast):
    return speedups.Point("m", "", {"10": precision}, fast, 2 * fast)


def test_the_speed_up_at_a_precision_lies_between_points_of_the_front():
    points = [point(0.5, 100.0), point(0.9, 25.0), point(0.8, 20.0), point(1.0, 1.0)]
    assert speedups.speed_up_at(points, 0.4, 10) == 100.0
    assert speedups.speed_up_at(points, 0.7, 10) == pytest.approx(50.0)
    assert speedups.speed_up_at(points, 0.8, 10) > 25.0  # The slower of two less precise ones does not count.
    assert speedups.speed_up_at(points, 0.95, 10) == pytest.approx(5.0)
    assert speedups.speed_up_at(points, 0.95, 10, "over_batch") == pytest.approx(10.0)
    assert speedups.speed_up_at(points[:3], 0.95, 10) is None


def test_a_point_of_an_exact_index_is_precise():
    from tfkit.retrieval import NormScan

    bench = speedups.Bench(vectors.synthetic(500, 8), queries=20, rounds=1)
    (found,) = bench.points("NormScan", NormScan().build(bench.items), [{}])
    assert set(found.precision_at.values()) == {1.0} and found.over_scan > 0 and found.over_batch > 0
