"""Ranges for activations and scales for weights, from data: min-max, percentile, least squared error, least divergence.

Paper: Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
2018, https://arxiv.org/abs/1712.05877 (the grids). Least divergence: Migacz. 8-bit inference with TensorRT. GTC 2017,
https://on-demand.gputechconf.com/gtc/2017/presentation/s7310-8-bit-inference-with-tensorrt.pdf.

Differs: exact zeros are counted apart from the histogram, since every grid holds zero; after a ReLU they would
otherwise rule the divergence. The squared error is integrated over each bin instead of taken at its centre. The range
of least divergence need not be symmetric: it is cut to where the data lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.fake_quantize import channel_view, nudged_range, weight_scale
from tfkit.internal import checks

BINS = 2048
BATCH_SIZE = 100
CALIBRATIONS = ("minmax", "percentile", "mse", "kl")
WEIGHT_SCALES = ("max", "mse")


class Histogram(NamedTuple):
    """How the values of one tensor are distributed.

    Attributes:
        counts: values in each of the even bins from `low` to `high`, (bins,); exact zeros left out.
        low, high: smallest and largest value.
        zeros: number of exact zeros.
    """

    counts: np.ndarray
    low: float
    high: float
    zeros: float = 0.0

    @classmethod
    def of(cls, values: Any, bins: int = BINS) -> Histogram:
        """Returns the histogram of an array of any shape.

        Raises:
            ValueError: there are no values, or they are not finite.
        """
        values = np.asarray(values, np.float64).ravel()
        if not values.size or not np.isfinite(values).all():
            raise checks.error("values", "finite numbers, at least one", values, "Check the data for NaN.")
        low, high = float(values.min()), float(values.max())
        counts, _ = np.histogram(values[values != 0], bins, (low, max(high, low + 1e-12)))
        return cls(counts.astype(np.float64), low, high, float(np.sum(values == 0)))

    @property
    def edges(self) -> np.ndarray:
        """The bins' limits, (bins + 1,)."""
        return np.linspace(self.low, self.high, len(self.counts) + 1)


def input_batches(model: keras.Model, data: Any, samples: int, seed: int) -> list[list[tf.Tensor]]:
    """Brings representative inputs into batches.

    Args:
        model: the model that will receive them.
        data: an array (samples, ...), a list or dictionary of arrays, or an iterable of batches.
        samples: most samples to take; of arrays a random choice.
        seed: of that choice.

    Returns:
        Batches, each a list of tensors in the order of the model's inputs.

    Raises:
        ValueError: the data do not fit the model, are empty or are not finite.
    """
    from tfkit.export import tracing
    from tfkit.export.convert import collect_samples

    structure = tracing.input_structure(model, None)
    names = tracing.name_inputs(structure)
    specs = [tf.TensorSpec(x.shape, x.dtype) for x in keras.tree.flatten(structure)]
    try:
        arrays = collect_samples(data, dict(zip(names, specs, strict=True)), samples, seed)
    except ValueError as error:
        raise ValueError(str(error).replace("`calibration`", "`data`")) from None
    starts = range(0, len(arrays[names[0]]), BATCH_SIZE)
    return [[tf.constant(arrays[name][start : start + BATCH_SIZE]) for name in names] for start in starts]


def collect(
    function: Callable[[list[Any]], list[Any]], batches: Iterable[Sequence[Any]], bins: int = BINS
) -> list[Histogram]:
    """Takes the histograms of several tensors over batches of data, in two passes: extremes, then counts.

    Args:
        function: gives the tensors of one batch; it is compiled.
        batches: the data, each a list of arrays (samples, ...).
        bins: number of bins.

    Returns:
        A histogram for each tensor.

    Raises:
        ValueError: a tensor holds NaN or infinity, or there are no batches.
    """

    batches = [[tf.convert_to_tensor(x) for x in batch] for batch in batches]
    if not batches:
        raise ValueError("Argument `batches` must yield at least one batch. Received: none.")

    def observe(lows: Any, highs: Any, *batch: Any) -> tuple[Any, Any, Any, Any]:
        rows = []
        for position, tensor in enumerate(function(list(batch))):
            values = tf.reshape(tf.cast(tensor, tf.float32), [-1])
            least = tf.maximum(1e-12, 1e-6 * tf.abs(lows[position]))  # A tensor may be one number throughout.
            limits = tf.stack([lows[position], tf.maximum(highs[position], lows[position] + least)])
            finite = tf.math.is_finite(values)
            counts = tf.histogram_fixed_width(tf.boolean_mask(values, finite & (values != 0)), limits, bins, tf.int64)
            bad = tf.where(tf.reduce_all(finite), 0.0, np.nan)  # Which minimum and maximum do not always pass on.
            zeros = tf.math.count_nonzero(values == 0)
            rows.append((tf.reduce_min(values) + bad, tf.reduce_max(values) + bad, counts, zeros))
        return tuple(map(tf.stack, zip(*rows, strict=True)))

    ends = tf.TensorSpec([None], tf.float32)
    specs = [tf.TensorSpec([None, *x.shape[1:]], x.dtype) for x in batches[0]]
    # One graph for both passes: tracing a model takes longer than counting in vain the first time.
    compiled = tf.function(observe, autograph=False).get_concrete_function(ends, ends, *specs)
    unknown = tf.zeros(compiled.structured_outputs[0].shape)
    extremes = [compiled(unknown, unknown, *batch)[:2] for batch in batches]
    lows = np.min([low for low, _ in extremes], axis=0)
    highs = np.max([high for _, high in extremes], axis=0)
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        raise ValueError("Argument `batches` must give finite activations. Received: NaN or infinity in the model.")
    counted = [compiled(tf.constant(lows), tf.constant(highs), *batch)[2:] for batch in batches]
    counts = np.sum([c for c, _ in counted], axis=0).astype(np.float64)
    zeros = np.sum([z for _, z in counted], axis=0)
    return [Histogram(*row) for row in zip(counts, lows.tolist(), highs.tolist(), map(float, zeros), strict=True)]


def calibrated_range(
    histogram: Histogram, method: str = "minmax", *, bits: int = 8, percentile: float = 99.99
) -> tuple[float, float]:
    """Chooses the range of an activation; it holds zero.

    Args:
        histogram: the activation's values.
        method: `"minmax"`; `"percentile"`; `"mse"`: least squared error of rounding and clipping; `"kl"`: least
            divergence of the quantized distribution from the true one.
        bits: width of the integers.
        percentile: of `"percentile"`, in (50, 100]; so much of the data lies under the upper, or over the lower end.

    Returns:
        (minimum, maximum).
    """
    checks.choice("method", method, CALIBRATIONS)
    if method == "percentile":
        low, high = percentile_range(histogram, percentile)
    elif method == "mse":
        low, high = mse_range(histogram, bits)
    elif method == "kl":
        low, high = kl_range(histogram, bits)
    else:
        low, high = histogram.low, histogram.high
    return min(low, 0.0), max(high, 0.0)


def percentile_range(histogram: Histogram, percentile: float) -> tuple[float, float]:
    """Returns the values below which 100 - `percentile` and `percentile` percent of the data lie."""
    checks.number("percentile", percentile, 50, 100)
    edges = histogram.edges
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)]) + histogram.zeros * (edges >= 0)
    shares = np.array([1 - percentile / 100, percentile / 100]) * (histogram.counts.sum() + histogram.zeros)
    low, high = np.interp(shares, below, edges)
    return float(low), float(high)


def squared_error(histogram: Histogram, minimum: Any, maximum: Any, bits: int) -> np.ndarray:
    """Returns the sum of squared errors that quantizing to `bits` makes, for each of several ranges.

    Args:
        histogram: the values; inside a bin they count as spread evenly.
        minimum, maximum: ranges, (ranges,).
        bits: width of the integers.

    Returns:
        The sums, (ranges,).
    """
    low, high = (np.asarray(end, np.float64)[:, None] for end in _nudged(minimum, maximum, bits))
    step = (high - low) / (2**bits - 1)
    edges = histogram.edges[None]
    inside = np.clip(edges, low, high)
    nearest = np.round(inside / step)
    # The integral of (x - Q(x))**2 from 0: step**3 / 12 for each whole step, r**3 / 3 for what is left.
    integral = nearest * step**3 / 12 + (inside - nearest * step) ** 3 / 3 + (edges - inside) ** 3 / 3
    width = max(histogram.high - histogram.low, 1e-12) / len(histogram.counts)
    return np.diff(integral, axis=1) @ histogram.counts / width


def mse_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Returns the range of least squared error, found by a grid of ranges that is refined three times."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if high - low < 1e-12:
        return low, high
    centre, reach, points = np.array([0.5, 0.5]), 0.5, 17  # Exponents: 64**(x - 1) of each end, from 1/64 to 1.
    best = (np.inf, low, high)
    for _ in range(4):
        exponents = [np.clip(np.linspace(c - reach, c + reach, points), 0, 1) for c in centre]
        lows = low * 64 ** (np.unique(exponents[0]) - 1) if low < 0 else np.zeros(1)
        highs = high * 64 ** (np.unique(exponents[1]) - 1) if high > 0 else np.zeros(1)
        pairs = np.stack(np.meshgrid(lows, highs, indexing="ij"), -1).reshape(-1, 2)
        errors = squared_error(histogram, pairs[:, 0], pairs[:, 1], bits)
        found = int(np.argmin(errors))
        best = min(best, (float(errors[found]), float(pairs[found, 0]), float(pairs[found, 1])))
        for side, (end, extreme) in enumerate(zip(best[1:], (low, high), strict=True)):
            centre[side] = 1 + np.log(end / extreme) / np.log(64) if end else 0.5
        reach, points = 2 * reach / (points - 1), 9
    return best[1], best[2]


def kl_range(histogram: Histogram, bits: int) -> tuple[float, float]:
    """Returns the range whose quantized distribution diverges least from the true one; of equals, the widest.

    For each threshold, P is the histogram inside it with what lies outside counted at the ends, and Q the histogram
    inside it, evened out over the bins of each step that are not empty.
    """
    edges, levels = histogram.edges, 2**bits
    bins = len(histogram.counts)
    furthest = max(-histogram.low, histogram.high)
    if histogram.counts.sum() == 0 or furthest == 0 or bins <= levels:
        return histogram.low, histogram.high
    best = (np.inf, histogram.low, histogram.high)
    width = (histogram.high - histogram.low) / bins
    least = min(levels * width, furthest)
    for threshold in np.linspace(furthest, least, 129):
        start = max(0, int(np.ceil((-threshold - histogram.low) / width - 1e-9)))
        stop = min(bins, int(np.floor((threshold - histogram.low) / width + 1e-9)))
        if stop - start < levels:
            break
        divergence = _divergence(histogram.counts, start, stop, levels)
        if divergence < best[0] - 1e-12:
            best = (divergence, float(edges[start]), float(edges[stop]))
    return best[1], best[2]


def _divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    inside = counts[start:stop]
    reference = inside.copy()
    reference[0] += counts[:start].sum()
    reference[-1] += counts[stop:].sum()
    level = np.arange(len(inside)) * levels // len(inside)
    filled = inside > 0
    sums, members = np.bincount(level, inside, levels), np.bincount(level, filled, levels)
    evened = np.where(filled, (sums / np.maximum(members, 1))[level], 0)
    if not evened.any():
        return float("inf")
    p = reference / reference.sum()
    q = np.maximum(evened / evened.sum(), 1e-12)  # Where clipped values fill an empty bin, Q would be 0.
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))


def mse_weight_scale(
    weight: np.ndarray, *, bits: int = 8, depthwise: bool = False, per_channel: bool = True
) -> np.ndarray:
    """Returns the scales whose symmetric grid rounds and clips a kernel with the least squared error.

    A grid of scales up to the largest magnitude's is tried; the best one's integers are then fitted by least squares.

    Args:
        weight: the kernel.
        bits: width of the integers, which go to 2**(bits-1) - 1.
        depthwise, per_channel: see `weight_scale`.

    Returns:
        The scales, (channels,); never larger than those of `weight_scale`.
    """
    limit = 2 ** (bits - 1) - 1
    largest = weight_scale(weight, bits=bits, depthwise=depthwise, per_channel=per_channel).astype(np.float64)
    view = np.asarray(weight, np.float64).reshape(channel_view(weight.shape, depthwise, per_channel))
    view = view.reshape(-1, view.shape[-1])  # (weights of a channel, channels)

    def integers(scale: np.ndarray) -> np.ndarray:
        return np.clip(np.round(view / scale), -limit, limit)

    best, least = largest.copy(), np.full(largest.shape, np.inf)
    for factor in np.geomspace(1.0, 1 / 16, 129):
        scale = largest * factor
        for _ in range(2 if factor < 1 else 1):
            error = np.square(view - scale * integers(scale)).sum(axis=0)
            best, least = np.where(error < least, scale, best), np.minimum(error, least)
            steps = integers(scale)
            power = np.square(steps).sum(axis=0)
            fitted = (view * steps).sum(axis=0) / np.maximum(power, 1)
            scale = np.where((power > 0) & (fitted > 0), np.minimum(fitted, largest), scale)
    return best.astype(np.float32)


def _nudged(minimum: Any, maximum: Any, bits: int) -> tuple[np.ndarray, np.ndarray]:
    # In float32, as `FakeQuantize` does it, since the ties of symmetric ranges hang on it.
    low, high = nudged_range(np.asarray(minimum, np.float32), np.asarray(maximum, np.float32), bits)
    return np.asarray(low, np.float64), np.asarray(high, np.float64)
