"""Detectors against clusters whose place is known."""

import numpy as np
import pytest

from tfkit.robustness.poisoning import PoisonRecord, activation_clustering, spectral_signatures
from tfkit.robustness.poisoning.detection import robustly_whitened, sharpened, split_in_two
from tfkit.robustness.poisoning.spectral_signatures import quantum_entropy_scores, squared_projections


def clusters(poison=30, shift=6.0, seed=0, per_class=300, classes=4, dimension=20):
    """Classes with a wide spread of their own; the poison in class 1 is moved along a narrow direction."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), per_class)
    scales = np.geomspace(10, 1, dimension)
    features = rng.normal(size=(len(labels), dimension)) * scales + 20 * rng.normal(size=(classes, dimension))[labels]
    rows = np.flatnonzero(labels == 1)[:poison]
    features[rows, 9] += shift * scales[9]
    return features, labels, record_of(rows, len(labels))


def record_of(rows, count):
    return PoisonRecord("test", "labels", rows, np.zeros(len(rows)), np.ones(len(rows)), count, 0, {})


@pytest.mark.parametrize("detect", [spectral_signatures, activation_clustering])
def test_finds_a_small_cluster_without_knowing_where(detect):
    features, labels, record = clusters(shift=9.0)
    found = detect(features, labels)
    score = found.score(record)
    assert score.recall >= 0.9
    assert score.precision >= 0.9
    assert [found.classes[c].suspicious for c in range(4)] == [False, True, False, False]


@pytest.mark.parametrize("detect", [spectral_signatures, activation_clustering])
@pytest.mark.parametrize("seed", range(3))
def test_flags_nothing_where_there_is_nothing(detect, seed):
    features, labels, _ = clusters(poison=0, seed=seed)
    assert not detect(features, labels).flagged.any()


def test_whitening_finds_what_the_largest_direction_hides():
    features, labels, record = clusters(shift=6.0)
    plain = spectral_signatures(features, labels, whiten=False, expected_share=0.1).score(record)
    white = spectral_signatures(features, labels, components=12, expected_share=0.1).score(record)
    assert white.recall > 0.9 > 0.5 > plain.recall
    assert white.flagged == plain.flagged == 4 * 45


def test_plain_scores_are_the_paper_s():
    rows = np.random.default_rng(0).normal(size=(50, 6))
    centred = rows - rows.mean(axis=0)
    top = np.linalg.eigh(centred.T @ centred)[1][:, -1]
    np.testing.assert_allclose(squared_projections(rows), (centred @ top) ** 2, rtol=1e-8)


def test_quantum_entropy_score_has_its_limits():
    white = np.random.default_rng(0).normal(size=(200, 3)) * [1, 1, 4]
    np.testing.assert_allclose(quantum_entropy_scores(white, 0.0), (white**2).mean(axis=1))
    top = np.linalg.eigh(white.T @ white)[1][:, -1]
    np.testing.assert_allclose(quantum_entropy_scores(white, 1e4), (white @ top) ** 2, rtol=1e-6)


def test_whitening_is_not_moved_by_a_minority():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(500, 3)) @ np.array([[2.0, 0, 0], [1, 1, 0], [0, 0, 0.1]])
    moved = rows.copy()
    moved[:80] += [0, 0, 50.0]
    white = robustly_whitened(moved)
    assert np.abs(np.median(white[80:], axis=0)).max() < 0.3
    assert np.linalg.norm(white[:80], axis=1).min() > 100
    # The core of a normal distribution is narrower than the whole, by the same factor in every direction.
    spread = np.linalg.eigvalsh(np.cov(white[80:].T))
    assert spread.max() / spread.min() < 1.8


def test_split_is_where_the_gap_is():
    assert 2 < split_in_two(np.array([0.0, 1, 2, 9, 10])) < 9


def test_a_cluster_is_sharpened_and_a_tail_is_not():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(600, 10))
    tail = sharpened(rows, rows[:, 0] > 1.5)[1]
    poison = np.arange(600) < 60
    rows[poison] += 3.0
    # A first split that misses a third of the cluster, and takes as many others.
    first = np.roll(poison, 20)
    upper, found = sharpened(rows, first)
    assert (upper == poison).mean() > 0.99
    assert found > 1.5 * tail
    assert sharpened(rows, np.arange(600) < 2)[1] == 0


def test_score_counts():
    features, labels, record = clusters()
    found = spectral_signatures(features, labels, expected_share=0.1)
    hits = found.flagged[record.indices].sum()
    assert found.score(record) == (hits / found.flagged.sum(), hits / 30, found.flagged.sum())
    with pytest.raises(ValueError, match="record"):
        found.score(record_of(np.array([0]), 5))


@pytest.mark.parametrize("detect", [spectral_signatures, activation_clustering])
def test_odd_classes_and_bad_input(detect):
    features, labels, _ = clusters()
    few = np.concatenate([labels[:-3], [7, 8, 8]])
    assert not detect(features, few).flagged[-3:].any()
    assert not detect(np.zeros((100, 4)), np.zeros(100, int)).flagged.any()
    with pytest.raises(ValueError, match="features"):
        detect(np.full((4, 2), np.nan), np.zeros(4, int))
    with pytest.raises(ValueError, match="labels"):
        detect(features, labels[1:])
    with pytest.raises(ValueError, match="components"):
        detect(features, labels, components=0)
