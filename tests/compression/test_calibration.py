"""Ranges and scales against brute force, and distributions whose answer is known."""

import numpy as np
import pytest
import tensorflow as tf

from tfkit.compression import calibration
from tfkit.compression.calibration import Histogram, calibrated_range, mse_weight_scale, squared_error
from tfkit.compression.fake_quantize import weight_scale


def quantize(x, low, high, bits):
    """Affine quantization, written out: zero is one of the steps."""
    levels = 2**bits - 1
    step = np.float32(np.float32(high) - np.float32(low)) / np.float32(levels)
    zero = np.clip(np.round(-np.float32(low) / step), 0, levels)
    return (np.clip(np.round(x / step) + zero, 0, levels) - zero) * step


SAMPLES = {
    "normal": np.random.default_rng(0).normal(size=100_000),
    "laplace": np.random.default_rng(1).laplace(size=100_000),
    "relu": np.maximum(np.random.default_rng(2).normal(size=100_000), 0),
    "shifted": np.random.default_rng(3).normal(1.0, 0.5, size=100_000),
}


def test_histogram_counts_every_value_once():
    histogram = Histogram.of([-1.0, 0.0, 0.0, 0.5, 3.0], bins=8)
    assert histogram.zeros == 2 and histogram.counts.sum() == 3
    assert (histogram.low, histogram.high) == (-1, 3)
    np.testing.assert_array_equal(histogram.counts, [1, 0, 0, 1, 0, 0, 0, 1])


def test_histograms_in_the_graph_are_those_of_numpy():
    x = np.random.default_rng(0).normal(size=(70, 30)).astype("float32")
    batches = [[x[:50]], [x[50:]]]
    found = calibration.collect(lambda batch: [batch[0], tf.nn.relu(batch[0] * 2)], batches)
    for got, values in zip(found, (x, np.maximum(2 * x, 0)), strict=True):
        wanted = Histogram.of(values)
        assert (got.low, got.high, got.zeros) == (wanted.low, wanted.high, wanted.zeros)
        assert np.abs(np.cumsum(got.counts - wanted.counts)).max() <= 2  # float32 edges may part a neighbour.


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf]])
def test_bad_values_are_refused(values):
    with pytest.raises(ValueError, match="finite"):
        Histogram.of(values)
    with pytest.raises(ValueError, match="finite|at least one"):
        calibration.collect(lambda batch: batch, [[np.array([values])]] if values else [])


def test_minmax_and_percentile():
    values = np.arange(1, 1001) / 1000
    histogram = Histogram.of(np.concatenate([-values, values]))
    assert calibrated_range(histogram, "minmax") == (-1, 1)
    np.testing.assert_allclose(calibrated_range(histogram, "percentile", percentile=95), (-0.9, 0.9), atol=2e-3)
    assert calibrated_range(histogram, "percentile", percentile=100) == (-1, 1)


def test_percentile_counts_zeros():
    histogram = Histogram.of(np.concatenate([np.zeros(900), np.linspace(0.01, 1, 100)]))
    low, high = calibrated_range(histogram, "percentile", percentile=95)
    assert low == 0 and high == pytest.approx(0.5, abs=0.02)


def test_ranges_hold_zero():
    for method in calibration.CALIBRATIONS:
        low, high = calibrated_range(Histogram.of([2.0, 3.0]), method)
        assert low == 0 and high > 1
        assert calibrated_range(Histogram.of([0.0, 0.0]), method) == (0, 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_squared_error_of_a_range_is_that_of_the_samples(name, bits):
    x = SAMPLES[name]
    for low, high in [(-4.0, 4.0), (-1.0, 2.0), (0.0, 2.5)]:
        (got,) = squared_error(Histogram.of(x), np.array([low]), np.array([high]), bits)
        assert got == pytest.approx(np.square(x - quantize(x, low, high, bits)).sum(), rel=0.01)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_range_is_as_good_as_brute_force(name, bits):
    x = SAMPLES[name][:5_000]
    low, high = calibrated_range(Histogram.of(x), "mse", bits=bits)
    found = np.square(x - quantize(x, low, high, bits)).mean()
    lows = np.linspace(min(x.min(), 0), 0, 13)[:-1] if x.min() < 0 else [0.0]
    tried = [np.square(x - quantize(x, a, b, bits)).mean() for a in lows for b in np.linspace(0.1, x.max(), 30)]
    assert found <= min(tried) * 1.02


def test_mse_clip_of_the_normal_distribution_is_the_known_one():
    # Banner et al. 2019, https://arxiv.org/abs/1810.05723: the best clip of N(0, 1) at 4 bits is about 2.55 sigma.
    low, high = calibrated_range(Histogram.of(SAMPLES["normal"]), "mse", bits=4)
    assert -low == pytest.approx(2.55, abs=0.2) and high == pytest.approx(2.55, abs=0.3)


def test_mse_of_a_uniform_distribution_clips_nothing():
    low, high = calibrated_range(Histogram.of(np.linspace(-1, 1, 100_001)), "mse", bits=8)
    assert low == pytest.approx(-1, abs=0.01) and high == pytest.approx(1, abs=0.01)


def test_kl_of_a_representable_distribution_is_zero_and_its_range_whole():
    # Every 16 bins of 256 are one step of 4 bits, and hold the same count.
    counts = np.repeat(np.random.default_rng(0).integers(1, 100, 16), 16).astype(float)
    histogram = Histogram(counts, 0.0, 1.0)
    assert calibration._divergence(counts, 0, 256, 16) == pytest.approx(0, abs=1e-12)
    assert calibrated_range(histogram, "kl", bits=4) == (0, 1)
    assert calibration._divergence(counts + np.arange(256), 0, 256, 16) > 1e-6


def test_kl_against_a_loop():
    counts = np.random.default_rng(0).integers(0, 50, 64).astype(float)
    start, stop, levels = 8, 48, 8
    reference = counts[start:stop].copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    expected = np.zeros(40)
    for step in range(levels):
        part = counts[start + 5 * step : start + 5 * step + 5]
        for i, count in enumerate(part):
            expected[5 * step + i] = part.sum() / np.sum(part > 0) if count > 0 else 0
    p, q = reference / reference.sum(), expected / expected.sum()
    wanted = sum(a * np.log(a / max(b, 1e-12)) for a, b in zip(p, q, strict=True) if a > 0)
    assert calibration._divergence(counts, start, stop, levels) == pytest.approx(wanted, rel=1e-9)


def test_kl_clips_a_lone_outlier():
    x = np.concatenate([np.abs(np.random.default_rng(0).normal(size=100_000)), [40.0]])
    assert calibrated_range(Histogram.of(x), "kl", bits=4)[1] < 8
    assert calibrated_range(Histogram.of(x), "minmax", bits=4)[1] == 40


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("depthwise", "per_channel"), [(False, True), (False, False), (True, True)])
def test_mse_weight_scale_is_as_good_as_brute_force(bits, depthwise, per_channel):
    weight = np.random.default_rng(0).standard_t(4, size=(12, 12, 4, 2)).astype("float32")
    scales = mse_weight_scale(weight, bits=bits, depthwise=depthwise, per_channel=per_channel)
    view = weight.reshape(144, 8) if depthwise else weight.reshape(-1, 2) if per_channel else weight.reshape(-1, 1)
    limit = 2 ** (bits - 1) - 1
    largest = weight_scale(weight, bits=bits, depthwise=depthwise, per_channel=per_channel)
    assert scales.shape == largest.shape and (scales <= largest * (1 + 1e-6)).all()
    for channel, scale in zip(view.T, scales, strict=True):

        def error(s, channel=channel):
            return np.square(channel - s * np.clip(np.round(channel / s), -limit, limit)).sum()

        tried = min(error(s) for s in np.linspace(0.01, np.abs(channel).max() / limit, 400))
        assert error(float(scale)) <= tried * (1.1 if bits == 8 else 1.02)  # At 8 bits, luck in rounding counts.


def test_weights_on_a_grid_keep_it():
    integers = np.array([[-7, 3], [1, -7], [5, 2]], "float32")
    np.testing.assert_allclose(mse_weight_scale(integers * 0.25, bits=4), [0.25, 0.25], rtol=1e-6)
    assert np.isfinite(mse_weight_scale(np.zeros((3, 2)), bits=4)).all()
