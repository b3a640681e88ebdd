"""Post-training quantization: int8 or narrower weights and int8 activations from a little data, without training.

Paper: Nagel, van Baalen, Blankevoort, Welling. Data-free quantization through weight equalization and bias correction.
ICCV 2019, https://arxiv.org/abs/1906.04721, sections 4.1 and 4.2 with appendix D; ranges and scales: see
`tfkit.compression.calibration`.

Differs: biases are corrected by the empirical rule of appendix D with the activations quantized too, not by the
analytic one, as the ranges need data anyway. ReLU6 is kept, and no high biases are absorbed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression import calibration as ranges
from tfkit.compression.base import setting_for
from tfkit.compression.clustering import is_clustered
from tfkit.compression.equalization import EqualizedPair, equalize_in_place
from tfkit.compression.fake_quantize import FakeQuantize, QuantizedGrid, channel_view, weight_scale
from tfkit.compression.quantization_aware import QuantizationAware, split_separable
from tfkit.compression.quantized_layers import WEIGHTED, has_channel_scales
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, folding, surgery


@keras.saving.register_keras_serializable(package="tfkit")
class FixedGrid(WeightTransform):
    """Rounds a kernel to a symmetric grid whose scale was chosen once, and clips it there.

    Gradients pass straight through, so that a calibrated model can be trained on.

    Args:
        bits: width of the integers.
        depthwise: whether the kernel is depthwise, (…, channels, multiplier).
        per_channel: one scale for each output channel; otherwise one for the kernel.
        scale: `"max"`: the grid reaches the largest weight; `"mse"`: least squared error.
    """

    def __init__(
        self,
        bits: int = 8,
        depthwise: bool = False,
        per_channel: bool = True,
        scale: str = "max",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bits = bits
        self.depthwise = depthwise
        self.per_channel = per_channel
        self.scale = scale
        self.enabled = True  # Off while the float model is observed.

    def build(self, input_shape: Any) -> None:
        channels = channel_view(input_shape, self.depthwise, self.per_channel)[-1]
        self.scales = self.add_weight(
            name="scales", shape=(channels,), initializer="ones", trainable=False, autocast=False
        )

    def adapt(self, value: np.ndarray) -> None:
        choose = ranges.mse_weight_scale if self.scale == "mse" else weight_scale
        self.scales.assign(choose(value, bits=self.bits, depthwise=self.depthwise, per_channel=self.per_channel))

    def transform(self, weight: Any) -> Any:
        if not self.enabled:
            return weight
        limit = 2 ** (self.bits - 1) - 1
        view = keras.ops.reshape(weight, channel_view(weight.shape, self.depthwise, self.per_channel))
        steps = keras.ops.clip(keras.ops.round(view / self.scales), -limit, limit)
        return weight + keras.ops.stop_gradient(keras.ops.reshape(steps * self.scales, weight.shape) - weight)

    def constraint(self, weight: np.ndarray) -> QuantizedGrid:
        return QuantizedGrid(keras.ops.convert_to_numpy(self.scales), self.bits, self.depthwise)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "bits": self.bits,
            "depthwise": self.depthwise,
            "per_channel": self.per_channel,
            "scale": self.scale,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class PostTrainingQuantization(QuantizationAware):
    """Quantizes a trained model from a few hundred inputs, without labels or training.

    `prepare` folds batch normalizations, equalizes the ranges of neighbouring layers, chooses the scales of weights and
    the ranges of activations, and corrects the biases; `finalize` gives the model that the file computes, as that of
    `QuantizationAware`: export it with `tfkit.export.convert(..., quantization="int8-qat")`. `apply(model)` does both.
    The prepared model may be trained on; weights then stay on the scales chosen here.

    What is quantized, and what stays in float, is as in `QuantizationAware`, and so is `report()`. Kernels whose values
    are shared keep them so: they are neither folded before quantization nor equalized.

    Args:
        data: representative inputs as the model receives them: an array (samples, ...), a list or dictionary of arrays,
            or an iterable of batches; of `(x, y)` batches, x counts. Arrays cannot ride in a configuration: a
            compressor made by `from_config` has none until its attribute `data` is set.
        bits: width of the weights' integers, from 2 to 8: one number, or a mapping from patterns of names or classes of
            layers to numbers, for mixed precision; layers that no pattern matches get 8.
        activation_bits: width of the activations between the model's inputs and its outputs, which have 8.
        calibration: of the activations' ranges: `"minmax"`, `"percentile"`, `"mse"` or `"kl"`; see
            `tfkit.compression.calibration`.
        percentile: of `calibration="percentile"`, in (50, 100].
        weight_scale: `"max"`: the grid reaches the largest weight; `"mse"`: least squared error.
        per_channel: one scale for each output channel where the file can hold them; otherwise one for each kernel.
        equalize: equalize the ranges of neighbouring layers.
        bias_correction: correct each bias by the mean shift that quantization makes in its layer's output.
        samples: most inputs taken from `data`; of an array, a random choice.
        seed: of that choice.
        momentum, include, exclude, preserve: see `QuantizationAware`.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        bits: int | Mapping[str, int] = 8,
        activation_bits: int = 8,
        calibration: str = "minmax",
        percentile: float = 99.99,
        weight_scale: str = "max",
        per_channel: bool = True,
        equalize: bool = True,
        bias_correction: bool = True,
        samples: int = 300,
        seed: int = 0,
        momentum: float = 0.99,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(
            activation_bits=activation_bits,
            momentum=momentum,
            include=include,
            exclude=exclude,
            preserve=preserve,
        )
        for width in bits.values() if isinstance(bits, Mapping) else [bits]:
            checks.integer("bits", width, 2, 8)
        self.bits: Any = dict(bits) if isinstance(bits, Mapping) else bits
        self.data = data
        self.calibration = checks.choice("calibration", calibration, ranges.CALIBRATIONS)
        self.percentile = checks.number("percentile", percentile, 50, 100)
        self.weight_scale = checks.choice("weight_scale", weight_scale, ranges.WEIGHT_SCALES)
        self.per_channel = per_channel
        self.equalize = equalize
        self.bias_correction = bias_correction
        self.samples = checks.integer("samples", samples, 1)
        self.seed = checks.integer("seed", seed, 0)
        self._pairs: list[EqualizedPair] = []

    @classmethod
    def _arguments(cls) -> dict[str, inspect.Parameter]:
        return {name: p for name, p in super()._arguments().items() if name != "data"}

    @property
    def equalized(self) -> list[EqualizedPair]:
        """The pairs of layers equalized in the last model prepared."""
        return list(self._pairs)

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        if not isinstance(layer, WEIGHTED):
            return []
        bits = setting_for(self.bits, layer, 8, self._names(layer))
        shared = self.preserve and is_clustered(value)
        per_channel = self.per_channel and has_channel_scales(layer, bits) and not shared
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        return [FixedGrid(bits, depthwise, per_channel, self.weight_scale)]

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns the calibrated model.

        Raises:
            TypeError: if the model cannot be rebuilt.
            ValueError: if there are no data, they do not fit the model or are not finite, or the model was prepared by
                another compressor and not finalized.
        """
        self._check_patterns(model)
        if any(isinstance(layer, Reparameterized) for layer in surgery.leaf_layers(surgery.as_functional(model))):
            raise ValueError(
                "Argument `model` must be finished before it is quantized after training. Received: the prepared "
                f"model '{model.name}'. Call `finalize` of the compressor that prepared it, or use `Chain.apply`."
            )
        plain = self._float_form(model)
        self._pairs = []
        if self.equalize:
            self._pairs = equalize_in_place(plain, selects=self.selects, preserve=self.preserve)
        prepared = super().prepare(plain)
        if any(isinstance(layer, Reparameterized) for layer in prepared.layers):
            self._calibrate(prepared, self._batches(model))
        return prepared

    def _float_form(self, model: keras.Model) -> keras.Model:
        """Returns a flat copy in which normalizations are folded, and activations and biases are on their own."""
        flat = split_separable(model, self)
        by_id = {id(layer): layer for layer in surgery.leaf_layers(flat)}
        pairs = {key: norm for key, norm in folding.foldable_pairs(flat).items() if not self._shared(by_id[key])}
        dropped = {id(norm) for norm in pairs.values()}
        activations: dict[int, keras.Layer] = {}

        def replace(layer: Any) -> keras.Layer | None:
            folded = folding.folded(layer, pairs[id(layer)]) if id(layer) in pairs else layer
            if not (isinstance(layer, WEIGHTED) and self.selects(layer)):
                return folded if folded is not layer else None
            if surgery.activation_name(layer) != "linear":
                activations[id(layer)] = keras.layers.Activation(layer.activation, name=f"{layer.name}_activation")
            return self._linear(folded)

        def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
            if id(original) in dropped:
                return args[0]
            outputs = new(*args, **kwargs)
            return activations[id(original)](outputs) if id(original) in activations else outputs

        return surgery.rebuild(flat, replace, call)

    def _shared(self, layer: Any) -> bool:
        return self.preserve and is_clustered(keras.ops.convert_to_numpy(layer.kernel))

    def _linear(self, layer: Any) -> keras.Layer:
        """Returns a copy of a layer without its activation, and with a bias where one is to be corrected."""
        if not self.bias_correction or getattr(layer, "use_bias", True):  # An EinsumDense has `bias_axes` instead.
            return surgery.copy_layer(layer, activation="linear")
        biased = surgery.unbuilt_copy(layer, activation="linear", use_bias=True, bias_initializer="zeros")
        biased.build_from_config(layer.get_build_config())
        biased.kernel.assign(layer.kernel)
        return biased

    def _batches(self, model: keras.Model) -> list[list[tf.Tensor]]:
        if self.data is None:
            raise ValueError(
                "Argument `data` must hold representative inputs. Received: None. Pass a few hundred training inputs; "
                "a configuration does not carry them, so after `from_config` set the attribute `data`."
            )
        return ranges.input_batches(model, self.data, self.samples, self.seed)

    def _calibrate(self, prepared: keras.Model, batches: list[list[tf.Tensor]]) -> None:
        quantizers = [q for q in prepared.layers if isinstance(q, FakeQuantize) and not q.fixed]
        weighted = [layer for layer in prepared.layers if isinstance(layer, Reparameterized)]
        if not self.bias_correction:
            weighted = []
        # Before their ranges are known, quantizers pass their input through.
        with _float_weights(prepared):
            if quantizers:
                observed = keras.Model(prepared.inputs, [q._inbound_nodes[0].input_tensors[0] for q in quantizers])
                histograms = ranges.collect(lambda batch: keras.tree.flatten(observed(batch)), batches)
            means = _channel_means(prepared, weighted, batches)
        for quantizer, histogram in zip(quantizers, histograms if quantizers else [], strict=True):
            low, high = ranges.calibrated_range(
                histogram, self.calibration, bits=quantizer.bits, percentile=self.percentile
            )
            quantizer.moving_minimum.assign(low)
            quantizer.moving_maximum.assign(high)
            quantizer.steps.assign(1.0 / (1.0 - self.momentum))  # As after a long average: training moves it slowly.
        for layer, wanted in zip(weighted, means, strict=True):
            if wanted is not None:  # In the order of computation, since a correction moves what comes after it.
                (shifted,) = _channel_means(prepared, [layer], batches)
                layer.layer.bias.assign(keras.ops.convert_to_numpy(layer.layer.bias) - (shifted - wanted))


@contextlib.contextmanager
def _float_weights(model: keras.Model) -> Iterator[None]:
    """Has the grids of a prepared model pass the weights through, for as long as the context lasts."""
    grids = [
        transform
        for layer in model.layers
        if isinstance(layer, Reparameterized)
        for chain in layer.transforms.values()
        for transform in chain
        if isinstance(transform, FixedGrid)
    ]
    for grid in grids:
        grid.enabled = False
    try:
        yield
    finally:
        for grid in grids:
            grid.enabled = True


def _channel_means(
    model: keras.Model, layers: Sequence[Any], batches: list[list[tf.Tensor]]
) -> list[np.ndarray | None]:
    """Returns the mean output of each layer, over samples, positions and calls, in the shape of its bias."""
    biased = [layer for layer in layers if getattr(layer.layer, "bias", None) is not None]
    if not biased:
        return [None] * len(layers)
    outputs = [(i, x) for i, layer in enumerate(biased) for node in layer._inbound_nodes for x in node.output_tensors]
    part = keras.Model(model.inputs, [tensor for _, tensor in outputs])
    totals = [np.zeros(layer.layer.bias.shape) for layer in biased]
    counts = [0] * len(biased)
    for batch in batches:
        for (position, _), tensor in zip(outputs, keras.tree.flatten(part(batch)), strict=True):
            value = keras.ops.convert_to_numpy(tensor).astype(np.float64)
            totals[position] += _sum_to(value, totals[position].shape)
            counts[position] += value.size // totals[position].size
    means = iter([total / count for total, count in zip(totals, counts, strict=True)])
    return [next(means) if getattr(layer.layer, "bias", None) is not None else None for layer in layers]


def _sum_to(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Sums over the axes along which an array of `shape` would be broadcast to `value`."""
    value = value.sum(axis=tuple(range(value.ndim - len(shape))))
    return value.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)
