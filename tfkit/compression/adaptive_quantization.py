"""Adaptive quantization: each parameter gets its own precision, as coarse as a bound on the loss allows.

Paper: Khoram, Li. Adaptive quantization of neural networks. ICLR 2018, https://openreview.net/forum?id=SyOK1Sg0W. The
bits of all parameters, at most -sum log2(tolerance), are minimised under a first-order bound on the loss, l + |g|'
tolerance <= bound, within a trust region that grows while the bound holds and shrinks when it does not. A parameter
gets the fewest bits that bring it within its tolerance; one whose tolerance exceeds its magnitude gets none.

Differs: the network is trained on between the rounds (straight through the rounding), so the loss that the trust
region is judged by is that of training; the paper quantizes without training. The gradient is the root mean square over
the batches of an epoch, since the mean gradient of a trained network says little. With it the linear bound is far too
careful, so it is the trust region that limits a round: |g|' tolerance may reach a share, the radius, of |g|'|w|, what
dropping every parameter would cost. Reconstructed from the abstract and from summaries of the paper.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.base import Compressor, NoEffectWarning
from tfkit.compression.fake_quantize import QuantizedGrid
from tfkit.compression.quantized_layers import WEIGHTED
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, surgery

FLOAT_BITS = 32
#: Fractional bits beyond which a value is not on a grid but a float.
MOST_BITS = 16
#: An entry of the table that the entropy-coded map of widths is read with.
TABLE_ENTRY_BITS = 32


def fewest_bits(value: Any, tolerance: Any, max_bits: int) -> Any:
    """Returns the number with the fewest fractional bits within the tolerance of each value.

    Args:
        value: tensor; parameters are scaled to [-1, 1].
        tolerance: tensor of the same shape. Where it is 0 or less the value stays as it is; where it reaches the
            value's magnitude the result is 0.
        max_bits: most fractional bits, used also where they do not reach the tolerance.

    Returns:
        round(2**n * value) / 2**n for the smallest n that will do.
    """
    rounded = keras.ops.round(value * 2.0**max_bits) / 2.0**max_bits
    for bits in range(max_bits - 1, -1, -1):
        coarser = keras.ops.round(value * 2.0**bits) / 2.0**bits
        rounded = keras.ops.where(keras.ops.abs(coarser - value) <= tolerance, coarser, rounded)
    rounded = keras.ops.where(keras.ops.abs(value) <= tolerance, keras.ops.zeros_like(value), rounded)
    return keras.ops.where(tolerance > 0, rounded + 0.0, value)  # + 0.0: -0.0 would cost bits.


def tolerances(gradient: np.ndarray, magnitude: np.ndarray, budget: float) -> np.ndarray:
    """Returns the tolerances that maximise sum log2(tolerance) subject to sum |g| min(tolerance, |w|) <= budget.

    Equal shares of the budget for all, tolerance = share / |g|, except that a parameter whose tolerance exceeds its
    magnitude is dropped and needs no more than |g w|: what it leaves goes to the others.

    Args:
        gradient: |g|, shape (n,).
        magnitude: |w|, shape (n,).
        budget: predicted increase of the loss.

    Returns:
        Shape (n,); infinite where the gradient is 0.
    """
    cost = np.sort(gradient * magnitude)  # Of dropping a parameter.
    sums = np.concatenate([[0.0], np.cumsum(cost)])
    remaining = np.arange(len(cost), 0, -1)
    # With the k cheapest dropped, the others share what is left; the share must reach none of those.
    spent = sums[:-1] + cost * remaining
    dropped = int(np.searchsorted(spent, budget))
    share = np.inf if dropped == len(cost) else (budget - sums[dropped]) / remaining[dropped]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(gradient > 0, share / gradient, np.inf) if budget > 0 else np.zeros_like(gradient)


def fractional_bits(value: np.ndarray) -> np.ndarray | None:
    """Returns the bits after the point that each number of [-1, 1] needs; None if some needs more than `MOST_BITS`."""
    steps = np.asarray(value, np.float64) * 2.0**MOST_BITS
    whole = np.rint(steps).astype(np.int64)
    if np.any(whole != steps):
        return None
    lowest = whole & -whole  # The lowest set bit; 0 for 0.
    return np.where(whole == 0, 0, MOST_BITS - np.log2(np.maximum(lowest, 1)).astype(np.int64))


def power_of_two_above(value: np.ndarray) -> float:
    """Returns the smallest power of two that no magnitude exceeds."""
    largest = float(np.abs(value).max(initial=0.0))
    return 2.0 ** np.ceil(np.log2(largest)) if largest > 0 else 1.0


def entropy_bits(symbols: np.ndarray) -> float:
    """Returns n H(symbols): what an ideal entropy coder needs for them, without its table."""
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) + 0.0


class Storage(NamedTuple):
    """The bits of a model whose parameters have each their own width, side information included.

    Attributes:
        parameters: number of parameters, biases and statistics too.
        zeros: those that got no bits.
        value_bits: sign and fractional bits of the others.
        width_bits: the map of the widths, zeros among them, entropy-coded, and its tables.
        scale_bits: an exponent of 8 bits for each weight tensor.
        float_bits: what stays in float: 32 bits each.
    """

    parameters: int
    zeros: int
    value_bits: int
    width_bits: float
    scale_bits: int
    float_bits: int

    @property
    def bits(self) -> float:
        """All of them."""
        return self.value_bits + self.width_bits + self.scale_bits + self.float_bits

    @property
    def ratio(self) -> float:
        """32 bits a parameter over these."""
        return FLOAT_BITS * self.parameters / self.bits

    @property
    def ratio_without_map(self) -> float:
        """The same without the map of the widths, as hardware that knows them would count."""
        return FLOAT_BITS * self.parameters / (self.bits - self.width_bits)


def storage(model: keras.Model) -> Storage:
    """Counts the bits of a finalized model.

    A width is 0 for a zero, else 1 (sign) + the fractional bits of the value over its tensor's power of two.
    """
    parameters = zeros = values = scales = floats = 0
    widths_bits = 0.0
    on_grid: set[int] = set()
    for layer in surgery.leaf_layers(model):
        for variable in surgery.compressible_weights(layer).values():
            value = keras.ops.convert_to_numpy(variable)
            bits = fractional_bits(value / power_of_two_above(value))
            if bits is None:
                continue
            on_grid.add(id(variable))
            widths = np.where(value == 0, 0, 1 + bits).ravel()
            parameters += widths.size
            zeros += int((widths == 0).sum())
            values += int(widths.sum())
            widths_bits += entropy_bits(widths) + TABLE_ENTRY_BITS * len(np.unique(widths))
            scales += 8
    for variable in model.weights:
        if id(variable) not in on_grid:
            size = int(np.prod(variable.shape))
            parameters += size
            floats += FLOAT_BITS * size
    return Storage(parameters, zeros, values, widths_bits, scales, floats)


@keras.saving.register_keras_serializable(package="tfkit")
class AdaptivePrecision(WeightTransform):
    """`w' =` the fewest bits within each weight's tolerance; it gathers the gradient on its way back.

    The gradient goes straight through, except to weights that have no bits: those keep what they hold, so that a
    smaller tolerance brings them back.

    Args:
        max_bits: most fractional bits.
        grid: whether a plain layer can carry a grid as its constraint.
    """

    def __init__(self, max_bits: int = 6, grid: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_bits = max_bits
        self.grid = grid

    def build(self, input_shape: Sequence[int]) -> None:
        options: dict[str, Any] = {"initializer": "zeros", "trainable": False, "autocast": False}
        self.scale = self.add_weight(name="scale", shape=(), **options)
        self.tolerance = self.add_weight(name="tolerance", shape=tuple(input_shape), **options)
        self.squares = self.add_weight(name="squares", shape=tuple(input_shape), **options)
        self.batches = self.add_weight(name="batches", shape=(), **options)

    def adapt(self, value: np.ndarray) -> None:
        self.scale.assign(power_of_two_above(value))

    def transform(self, weight: Any) -> Any:
        scale = tf.cast(self.scale, weight.dtype)
        tolerance = tf.cast(self.tolerance, weight.dtype)

        @tf.custom_gradient
        def rounded(w: Any) -> Any:
            value = fewest_bits(w / scale, tolerance / scale, self.max_bits) * scale

            def backward(gradient: Any) -> Any:
                gradient = tf.convert_to_tensor(gradient)  # That of an embedding arrives as slices.
                self.squares.assign_add(tf.cast(gradient, "float32") ** 2)
                self.batches.assign_add(1.0)
                return tf.where((value == 0) & (tolerance > 0), tf.zeros_like(gradient), gradient)

            return value, backward

        return rounded(tf.convert_to_tensor(weight))

    def take_gradient(self) -> np.ndarray:
        """Returns the root mean square gradient since the last call, and starts anew."""
        squares = keras.ops.convert_to_numpy(self.squares) / max(float(self.batches), 1.0)
        self.squares.assign(keras.ops.zeros_like(self.squares))
        self.batches.assign(0.0)
        return np.asarray(np.sqrt(squares), np.float64)

    def constraint(self, weight: np.ndarray) -> QuantizedGrid | None:
        scale = power_of_two_above(weight)
        bits = fractional_bits(weight / scale)
        if not self.grid or bits is None or not weight.any():
            return None
        step = scale * 2.0 ** -int(bits.max())
        most = int(np.rint(np.abs(weight).max() / step))
        return QuantizedGrid(step, max(most.bit_length() + 1, 2)) if most <= 127 else None

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "max_bits": self.max_bits, "grid": self.grid}


@keras.saving.register_keras_serializable(package="tfkit")
class AdaptiveQuantization(Compressor):
    """Gives each weight its own precision: many get none, most of the others one or two bits.

    Train the prepared model with `callbacks()`. After the first epoch whose training loss keeps the bound, and after
    each epoch from there up to `end`, the tolerances are solved anew; the epochs after that train with the last ones.

    Args:
        loss_bound: the largest training loss allowed; None: that of the first epoch, which nothing is quantized in.
        radius: of the trust region in the first round, in [0, 1): the predicted increase of the loss, as a share of
            what dropping every weight would cost.
        growth: after an epoch that kept the bound, 1 - radius is divided by it. After one that broke it, the radius
            goes back, the tolerances are solved again with the gradients of the last good epoch, and the factor
            becomes its root.
        max_bits: most fractional bits of a weight; with 6 or fewer its integers fit in int8.
        end: last round; an int is an epoch counted from 0, a float in [0, 1] a fraction of the `fit` call.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        loss_bound: float | None = None,
        *,
        radius: float = 0.6,
        growth: float = 1.25,
        max_bits: int = 6,
        end: float = 0.7,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        self.loss_bound = None if loss_bound is None else checks.number("loss_bound", loss_bound, 0)
        self.radius = checks.number("radius", radius, 0, 1, open_high=True)
        self.growth = checks.number("growth", growth, 1)
        self.max_bits = checks.integer("max_bits", max_bits, 1, 12)
        self.end = checks.number("end", end, 0, 1) if isinstance(end, float) else checks.integer("end", end, 0)

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        return [AdaptivePrecision(self.max_bits, isinstance(layer, WEIGHTED))]

    def callbacks(self) -> list[keras.callbacks.Callback]:
        return [AdaptiveCallback(self)]

    def update(self, model: keras.Model, radius: float, gradients: Sequence[np.ndarray]) -> None:
        """Solves the tolerances of a prepared model.

        Args:
            model: a model prepared by this compressor.
            radius: share of |g|'|w| to spend.
            gradients: |g| for each of the model's `precisions`.
        """
        found = precisions(model)
        gradient = np.concatenate([g.ravel() for g in gradients])
        magnitude = np.concatenate([np.abs(value).ravel() for _, value in found]).astype(np.float64)
        solved = tolerances(gradient, magnitude, radius * float(gradient @ magnitude))
        bounds = np.cumsum([value.size for _, value in found])[:-1]
        for (transform, value), tolerance in zip(found, np.split(solved, bounds), strict=True):
            shared = _shared(value, tolerance)
            transform.tolerance.assign(np.minimum(shared, 2.0 * float(transform.scale)).reshape(value.shape))


def _shared(value: np.ndarray, tolerance: np.ndarray) -> np.ndarray:
    """Gives weights that share a value the least of their tolerances, so that they go on sharing."""
    distinct, which = np.unique(value, return_inverse=True)
    if len(distinct) > value.size // 2:
        return tolerance
    least = np.full(len(distinct), np.inf)
    np.minimum.at(least, which.ravel(), tolerance)
    return least[which.ravel()]


def precisions(model: keras.Model) -> list[tuple[AdaptivePrecision, np.ndarray]]:
    """Returns the transforms of a prepared model, each with the weight that arrives at it."""
    found = []
    for layer in surgery.leaf_layers(model):
        if isinstance(layer, Reparameterized):
            weights = surgery.compressible_weights(layer.layer)
            for name, chain in layer.transforms.items():
                value = keras.ops.convert_to_tensor(weights[name])
                for transform in chain:
                    if isinstance(transform, AdaptivePrecision):
                        found.append((transform, keras.ops.convert_to_numpy(value)))
                    value = transform.transform(value)
    return found


class AdaptiveCallback(keras.callbacks.Callback):
    """The rounds of `AdaptiveQuantization`; logs `zeros`, the share of weights without bits, and `radius`."""

    def __init__(self, compressor: AdaptiveQuantization) -> None:
        super().__init__()
        self.compressor = compressor

    def on_train_begin(self, logs: Any = None) -> None:
        if not precisions(self.model):
            raise ValueError(
                "The callback must train a model that `AdaptiveQuantization.prepare` gave. "
                f"Received: model '{self.model.name}' without weights to quantize."
            )
        end = self.compressor.end
        self._end = round(end * self.params["epochs"]) if isinstance(end, float) else end
        self._bound = self.compressor.loss_bound
        self._radius, self._growth = self.compressor.radius, self.compressor.growth
        self._gradients: list[np.ndarray] | None = None  # Of the last epoch that kept the bound.

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._loss = loss = float((logs or {})["loss"])
        gradients = [transform.take_gradient() for transform, _ in precisions(self.model)]
        self._bound = loss if self._bound is None else self._bound
        if epoch <= self._end:
            self._judge(loss <= self._bound, gradients)
        if epoch < self._end and self._gradients is not None:
            self.compressor.update(self.model, self._radius, self._gradients)
        if logs is not None:
            values = [keras.ops.convert_to_numpy(t.transform(value)) for t, value in precisions(self.model)]
            logs["zeros"] = 1 - sum(np.count_nonzero(v) for v in values) / sum(v.size for v in values)
            logs["radius"] = self._radius

    def _judge(self, kept: bool, gradients: list[np.ndarray]) -> None:
        """Moves the trust region by what the last round did to the loss."""
        if kept:
            if self._gradients is not None:
                self._radius = 1 - (1 - self._radius) / self._growth
            self._gradients = gradients
        elif self._gradients is not None:
            self._radius = max(1 - (1 - self._radius) * self._growth, 0.0)
            self._growth **= 0.5

    def on_train_end(self, logs: Any = None) -> None:
        if self._gradients is None:
            warnings.warn(
                f"AdaptiveQuantization changed nothing: no epoch up to {self._end} had a training loss of at most "
                f"{self._bound}. Train longer, or raise `loss_bound`.",
                NoEffectWarning,
                stacklevel=2,
            )
        elif self._bound is not None and self._loss > self._bound:
            warnings.warn(
                f"AdaptiveQuantization: the training loss ended at {self._loss:.4g}, above its bound of "
                f"{self._bound:.4g}. Leave more epochs after the last round (a smaller `end`), or start with a smaller "
                "`radius`.",
                stacklevel=2,
            )
