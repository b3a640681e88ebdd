"""The record, its checks and its split."""

from __future__ import annotations

import numpy as np
import pytest

from tfkit.data.dataset import DataError, from_arrays, stratified


def arrays(**changes):
    rng = np.random.default_rng(0)
    good = {
        "x_train": rng.integers(0, 256, (100, 6, 5), dtype=np.uint8),
        "y_train": np.repeat(np.arange(4), (40, 30, 20, 10)),
        "x_test": rng.integers(0, 256, (20, 6, 5), dtype=np.uint8),
        "y_test": np.arange(20) % 4,
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def made(validation=0.1, seed=0, class_names=None, **changes):
    return from_arrays(
        "own", arrays(**changes), source="test", validation=validation, seed=seed, class_names=class_names
    )


def test_pixels_become_unit_floats_with_a_channel():
    data = made(x_train=np.full((100, 6, 5), 255, np.uint8), x_test=np.full((20, 6, 5), 51, np.uint8))
    assert data.x_train.dtype == np.float32 and data.y_train.dtype == np.int64
    assert data.input_shape == (6, 5, 1) and data.num_classes == 4
    assert np.all(data.x_train == 1.0) and np.all(data.x_test == np.float32(0.2))


def test_split_is_a_partition_in_proportion():
    marked = np.arange(100, dtype=np.float32)[:, None]
    data = made(validation=0.2, x_train=marked, x_test=np.zeros((20, 1), np.float32))
    both = np.concatenate([data.x_train, data.x_validation])[:, 0]
    assert sorted(both) == list(range(100))
    labels = np.concatenate([data.y_train, data.y_validation])
    assert np.array_equal(arrays()["y_train"][both.astype(int)], labels)  # each label stays with its example
    assert np.bincount(data.y_validation).tolist() == [8, 6, 4, 2]


def test_seed_decides_the_split():
    first, again, other = made(seed=3), made(seed=3), made(seed=4)
    assert np.array_equal(first.x_validation, again.x_validation) and np.array_equal(first.x_train, again.x_train)
    assert not np.array_equal(first.x_validation, other.x_validation)


def test_no_validation_and_given_validation():
    assert len(made(validation=0).x_validation) == 0
    given = np.full((7, 6, 5), 9, np.uint8)
    data = made(x_validation=given, y_validation=np.zeros(7, int))
    assert len(data.x_train) == 100 and len(data.x_validation) == 7


@pytest.mark.parametrize("count", [0, 1, 7, 50, 100])
def test_stratified_counts(count):
    labels = np.repeat(np.arange(4), (40, 30, 20, 10))
    chosen = stratified(labels, count, np.random.default_rng(1))
    assert len(set(chosen.tolist())) == count
    share = np.bincount(labels[chosen], minlength=4) - count * np.array([0.4, 0.3, 0.2, 0.1])
    assert np.abs(share).max() <= 1


def test_subset_keeps_labels_with_inputs():
    x = np.arange(100, dtype=np.float32)[:, None]
    data = made(validation=0, x_train=x, x_test=np.zeros((20, 1), np.float32))
    small = data.subset(train=40, test=8)
    assert np.bincount(small.y_train).tolist() == [16, 12, 8, 4] and len(small.x_test) == 8
    assert np.array_equal(arrays()["y_train"][small.x_train[:, 0].astype(int)], small.y_train)
    with pytest.raises(ValueError, match="at most 100"):
        data.subset(train=101)


def test_column_labels_and_token_ids():
    data = made(
        y_train=np.repeat(np.arange(4), 25)[:, None],
        x_train=np.full((100, 3), 70_000),
        x_test=np.zeros((20, 3), np.int64),
    )
    assert data.y_train.ndim == 1 and data.x_train.dtype == np.int32 and data.x_train.max() == 70_000


def test_class_names_allow_absent_labels():
    labels = np.repeat([0, 2], 50)
    with pytest.raises(DataError, match="no label 1"):
        made(y_train=labels, y_test=np.zeros(20, int))
    assert made(y_train=labels, y_test=np.zeros(20, int), class_names=["a", "b", "c"]).num_classes == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "missing y_test"),
        ({"x_validation": np.zeros((3, 6, 5), np.uint8)}, "missing y_validation"),
        ({"y_train": np.zeros(99, int)}, "x_train has 100 examples but y_train has 99"),
        ({"x_test": np.zeros((20, 6, 6), np.uint8)}, "must be alike"),
        ({"x_test": np.zeros((20, 6, 5), np.float32)}, "must be alike"),
        ({"x_train": np.zeros((0, 6, 5), np.uint8), "y_train": np.zeros(0, int)}, "not be empty"),
        ({"x_train": np.zeros(100, np.uint8)}, r"shape \(examples, ...\)"),
        ({"x_train": np.array([["a"] * 5] * 100)}, "array of numbers"),
        ({"x_train": np.full((100, 6, 5), np.nan)}, "NaN or infinity .* in 100 of 100"),
        ({"x_train": np.full((100, 6, 5), 1e300)}, "NaN or infinity"),
        ({"x_train": np.full((100, 6), 2**40)}, "beyond 32 bits"),
        ({"y_train": np.eye(4)[np.arange(100) % 4]}, "One-hot"),
        ({"y_train": np.zeros(100)}, "must be integers"),
        ({"y_train": np.arange(100) - 1}, r"must lie in 0\.\."),
        ({"y_train": np.arange(100) % 4 + 1}, "no label 0"),
        ({"y_test": np.full(20, 4)}, "y_test has label 4, but there are 4 classes"),
    ],
)
def test_bad_arrays_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        made(**changes)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan"), "0.1", True])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="validation"):
        made(validation=fraction)
