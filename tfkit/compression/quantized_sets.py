"""Quantized sets of weights, and the compressors that train weights into them.

What `ProxQuant` and `BinaryConnect` share: the sets, their fitted scales, and the epoch of the hard quantization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from tfkit.compression.base import Compressor, copy_wrapped, setting_for
from tfkit.compression.fake_quantize import FakeQuantizeWeight, QuantizedGrid
from tfkit.compression.pruning import is_sparse
from tfkit.compression.quantized_layers import WEIGHTED
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, surgery

#: Rounds of alternation that fit a scale from scratch; a training step does one.
ROUNDS = 20


def nearest_point(w: Any, scale: Any, bits: int) -> Any:
    """Returns the nearest point of the set, a tensor of the shape of `w`.

    The set is {-scale, scale} for 1 bit, and scale * {-limit … limit} with limit = 2**(bits - 1) - 1 for more: 2 bits
    are ternary.
    """
    if bits == 1:
        return keras.ops.where(w >= 0, scale, -scale)
    limit = 2 ** (bits - 1) - 1
    return keras.ops.clip(keras.ops.round(w / scale), -limit, limit) * scale


def refined_scale(w: Any, scale: Any, bits: int) -> Any:
    """Returns the best scale for the points that `scale` picks: one round of alternating minimisation of |w - p|^2.

    For 1 bit it is the mean magnitude, whatever `scale` is. Exact zeros of a 1-bit weight, made by an earlier pruning,
    do not count. A weight of zeros keeps its scale.
    """
    if bits == 1:
        count = keras.ops.cast(keras.ops.count_nonzero(w), w.dtype)
        fitted = keras.ops.sum(keras.ops.abs(w)) / keras.ops.maximum(count, 1)
    else:
        steps = nearest_point(w, scale, bits) / scale
        squares = keras.ops.sum(steps * steps)
        fitted = keras.ops.sum(w * steps) / keras.ops.maximum(squares, 1)
    return keras.ops.where(fitted > 0, fitted, scale)


def fit_scale(value: np.ndarray, bits: int) -> float:
    """Returns the scale of the set nearest to a weight: alternating minimisation from the best of several starts.

    A ternary weight starts at the threshold 0.7 mean|w| of ternary weight networks; wider grids from shares of max|w|.
    """
    magnitude = np.abs(np.asarray(value, dtype=np.float64))
    if not magnitude.any():
        return 1.0
    largest = magnitude.max()
    starts = [largest * share / max(2 ** (bits - 1) - 1, 1) for share in (0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 1.0)]
    if bits == 2:
        starts.append(magnitude[magnitude >= 0.7 * magnitude.mean()].mean())
    best, least = 1.0, np.inf
    for scale in starts if bits > 1 else starts[:1]:
        for _ in range(ROUNDS):
            before, scale = scale, float(_numpy_refined(magnitude, scale, bits))
            if scale == before:
                break
        error = float(np.sum((magnitude - _numpy_nearest(magnitude, scale, bits)) ** 2))
        if error < least:
            best, least = scale, error
    return best


def _numpy_nearest(magnitude: np.ndarray, scale: float, bits: int) -> np.ndarray:
    if bits == 1:
        return np.full_like(magnitude, scale)
    return np.minimum(np.rint(magnitude / scale), 2 ** (bits - 1) - 1) * scale


def _numpy_refined(magnitude: np.ndarray, scale: float, bits: int) -> float:
    if bits == 1:
        return float(magnitude[magnitude > 0].mean())
    steps = _numpy_nearest(magnitude, scale, bits) / scale
    return float((magnitude * steps).sum() / max((steps * steps).sum(), 1.0)) or scale


@keras.saving.register_keras_serializable(package="tfkit")
class HardQuantized(WeightTransform):
    """`w' = w` until `harden` is called; then the point of the set that was nearest, which trains no more.

    Args:
        bits: width; see `nearest_point`.
        scale: the set's scale, or None to fit it to the weight.
        keep_zeros: whether exact zeros are left alone, as an earlier pruning wants.
        grid: whether a plain layer can carry the set as its constraint.
    """

    def __init__(
        self, bits: int = 1, scale: float | None = None, keep_zeros: bool = False, grid: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.bits = bits
        self.fixed_scale = scale
        self.keep_zeros = keep_zeros
        self.grid = grid

    def build(self, input_shape: Sequence[int]) -> None:
        options: dict[str, Any] = {"initializer": "zeros", "trainable": False, "autocast": False}
        self.scale = self.add_weight(name="scale", shape=(), **options)
        self.hardened = self.add_weight(name="hardened", shape=(), **options)
        self.value = self.add_weight(name="value", shape=tuple(input_shape), **options)

    def adapt(self, value: np.ndarray) -> None:
        self.scale.assign(self.fixed_scale or fit_scale(value, self.bits))

    def point(self, weight: Any, scale: Any) -> Any:
        """Returns the nearest point of the set; zeros stay where they are to be kept."""
        point = nearest_point(weight, keras.ops.cast(scale, weight.dtype), self.bits)
        return keras.ops.where(weight == 0, keras.ops.zeros_like(weight), point) if self.keep_zeros else point

    def refined(self, weight: Any) -> Any:
        """Returns the scale after one round of alternation; the fixed one if it is fixed."""
        scale = keras.ops.convert_to_tensor(self.scale)
        if self.fixed_scale is not None:
            return scale
        return refined_scale(keras.ops.cast(weight, scale.dtype), scale, self.bits)

    def soft(self, weight: Any) -> Any:
        """Returns what the layer computes with before the hard quantization."""
        return weight

    def transform(self, weight: Any) -> Any:
        return keras.ops.where(self.hardened > 0, keras.ops.cast(self.value, weight.dtype), self.soft(weight))

    def harden(self, weight: np.ndarray) -> None:
        """Fixes the weight at the point nearest to `weight`, the value that arrives here."""
        self.adapt(weight)
        self.value.assign(self.point(keras.ops.convert_to_tensor(weight), self.scale))
        self.hardened.assign(1.0)

    def constraint(self, weight: np.ndarray) -> QuantizedGrid | None:
        # Two points are a part of the three that two bits give; int8 kernels know no narrower grid.
        return QuantizedGrid(float(self.scale), max(self.bits, 2)) if self.grid else None

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "bits": self.bits,
            "scale": self.fixed_scale,
            "keep_zeros": self.keep_zeros,
            "grid": self.grid,
        }


class Quantity(NamedTuple):
    """A weight on its way to the set: the stored variable, the transforms before ours, and ours."""

    variable: keras.Variable
    before: list[WeightTransform]
    transform: HardQuantized

    def incoming(self, weight: Any) -> Any:
        """Returns the weight as the transforms before ours leave it, but for their rounding.

        Fake quantization rounds finely and passes the gradient through: a proximal step from the rounded weight would
        undo every update of less than half a step.
        """
        value = keras.ops.convert_to_tensor(weight)
        for transform in self.before:
            if not isinstance(transform, FakeQuantizeWeight):
                value = transform.transform(value)
        return value

    @property
    def trained(self) -> bool:
        """Whether the stored weight is what training moves."""
        return not any(transform.replaces_weight for transform in self.before)


def quantities(model: keras.Model) -> list[Quantity]:
    """Returns the weights of a prepared model that go to a set."""
    found = []
    for layer in surgery.leaf_layers(model):
        if isinstance(layer, Reparameterized):
            weights = surgery.compressible_weights(layer.layer)
            for name, chain in layer.transforms.items():
                for position, transform in enumerate(chain):
                    if isinstance(transform, HardQuantized):
                        found.append(Quantity(weights[name], chain[:position], transform))
    return found


def harden(model: keras.Model) -> None:
    """Quantizes, in place, the weights of a prepared model that are not yet in their sets."""
    for quantity in quantities(model):
        if not float(quantity.transform.hardened):
            quantity.transform.harden(keras.ops.convert_to_numpy(quantity.incoming(quantity.variable)))


class SetQuantizer(Compressor):
    """What ProxQuant and BinaryConnect share: the sets, and the epoch of the hard quantization.

    Args:
        bits: 1 for {-a, a}, 2 for {-a, 0, a}, k for the even grid of 2**k - 1 values; one number, or a mapping from
            layer-name patterns to numbers (layers without a match are left alone).
        scale: a. "fit": one for each weight tensor, fitted to it all along; or a number, 1.0 for the sets of the paper.
        hard_epoch: when the weights are quantized for good: an int is an epoch counted from 0, a float in [0, 1] a
            fraction of the `fit` call. The epochs from it on train biases, normalizations and what is not quantized.
        include, exclude, preserve: see `Compressor`. Papers leave the first and the last layer in float.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int] = 1,
        *,
        scale: float | Literal["fit"] = "fit",
        hard_epoch: float = 2 / 3,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        for width in bits.values() if isinstance(bits, Mapping) else [bits]:
            checks.integer("bits", width, 1, 8)
        if scale != "fit" and (checks.number("scale", scale, 0) == 0):
            raise checks.error("scale", "'fit' or a number above 0", scale)
        if isinstance(hard_epoch, float):
            checks.number("hard_epoch", hard_epoch, 0, 1)
        else:
            checks.integer("hard_epoch", hard_epoch, 0)
        self.bits = bits
        self.scale = scale
        self.hard_epoch = hard_epoch

    transform: type[HardQuantized] = HardQuantized

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        bits = setting_for(self.bits, layer)
        if bits is None:
            return []
        scale = None if self.scale == "fit" else float(self.scale)
        keep = self.preserve and is_sparse(value)
        return [self.transform(bits, scale, keep_zeros=keep, grid=isinstance(layer, WEIGHTED))]

    def callbacks(self) -> list[keras.callbacks.Callback]:
        return [SetQuantizerCallback(self)]

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns the plain model with every weight in its set, quantized now if it was not yet.

        Its layers carry the set as a `QuantizedGrid`. An int8 file stores binary and ternary weights as -127, 0 and 127
        however it is made. For the very integers of wider sets prepare and train `Chain([QuantizationAware(),
        ProxQuant(...)])` as one, and convert with "int8-qat".
        """
        hard = surgery.rebuild(model, copy_wrapped)
        harden(hard)
        return super().finalize(hard)

    def step(self, quantity: Quantity, optimizer: Any, start: int, horizon: int | None) -> Any:
        """Returns what is done to a weight after each step of the optimizer, as a constraint; None: nothing.

        Args:
            quantity: the weight.
            optimizer: that of the model.
            start: its step count where training starts.
            horizon: steps from there to the hard quantization, if known.
        """
        return None


class SetQuantizerCallback(keras.callbacks.Callback):
    """Does a compressor's step after each of the optimizer's, and quantizes for good at its epoch.

    At the end of an epoch it logs `distance_to_set`: the mean distance of the weights from their points, in scales.
    """

    def __init__(self, compressor: SetQuantizer) -> None:
        super().__init__()
        self.compressor = compressor

    def on_train_begin(self, logs: Any = None) -> None:
        self._quantities = quantities(self.model)
        if not self._quantities:
            raise ValueError(
                f"The callback must train a model that `{type(self.compressor).__name__}.prepare` gave. "
                f"Received: model '{self.model.name}' without weights to quantize."
            )
        moment = self.compressor.hard_epoch
        self._hard_epoch = round(moment * self.params["epochs"]) if isinstance(moment, float) else moment
        self._started = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if not self._started:
            self._install(epoch)
            self._started = True
        if epoch >= self._hard_epoch:
            harden(self.model)

    def _install(self, epoch: int) -> None:
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        steps = self.params.get("steps")
        # A fit that goes on at a later epoch goes on with the homotopy.
        start = int(optimizer.iterations) - epoch * (steps or 0)
        horizon = None if steps is None else min(self._hard_epoch, self.params["epochs"]) * steps
        self._before = [(q.variable, q.variable.constraint) for q in self._quantities]
        for quantity in self._quantities:
            if isinstance(quantity.variable.constraint, QuantizedGrid):
                quantity.variable.constraint = None  # The grid of an earlier quantization would hold the weight fast.
            if quantity.trained:
                step = self.compressor.step(quantity, optimizer, start, horizon)
                quantity.variable.constraint = step or quantity.variable.constraint
        # The graph of an earlier fit knows nothing of these constraints.
        self.model.make_train_function(force=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            away = [_distance(quantity) for quantity in self._quantities]
            logs["distance_to_set"] = float(sum(d.sum() for d in away) / sum(d.size for d in away))

    def on_train_end(self, logs: Any = None) -> None:
        for variable, constraint in self._before if self._started else ():
            variable.constraint = constraint
        self.model.train_function = None


def _distance(quantity: Quantity) -> np.ndarray:
    transform = quantity.transform
    if float(transform.hardened):
        return np.zeros(quantity.variable.shape, np.float32)
    value = quantity.incoming(quantity.variable)
    away = keras.ops.abs(value - transform.point(value, transform.scale)) / transform.scale
    return np.asarray(keras.ops.convert_to_numpy(away))
