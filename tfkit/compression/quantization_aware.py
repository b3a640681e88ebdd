"""Int8 quantization-aware training: train with the rounding that the phone will do.

Paper: Jacob et al. Quantization and training of neural networks for efficient integer-arithmetic-only inference. CVPR
2018, https://arxiv.org/abs/1712.05877, section 3.

Differs: weights are quantized by output channel, before batch normalization. Folding multiplies a channel's weights by
one number, so the integers are the same before and after it, and training needs neither the paper's second convolution
nor corrections for the batch statistics: a convolution with its normalization (and ReLU) trains as ever, and becomes
one integer operation at `finalize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from tfkit.compression.base import Compressor
from tfkit.compression.clustering import is_clustered
from tfkit.compression.fake_quantize import FakeQuantize, FakeQuantizeWeight
from tfkit.compression.integer_sums import whole_biases
from tfkit.compression.quantized_layers import SAME_GRID, WEIGHTED, has_channel_scales
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import checks, folding, surgery

#: Compute new values with an integer kernel, and so need a grid for their output.
REQUANTIZED = {
    "Add", "Subtract", "Multiply", "Concatenate", "GlobalAveragePooling1D", "GlobalAveragePooling2D", "ReLU", "Relu",
    "LeakyReLU",
}  # fmt: skip
#: Compute new values, which their integer kernel rounds to the grid of their input.
ROUNDED_TO_INPUT = {"AveragePooling1D", "AveragePooling2D"}
#: The output grids that TFLite's integer kernels prescribe.
FIXED_RANGES = {"softmax": (0.0, 255 / 256), "sigmoid": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)}
FUSED_ACTIVATIONS = ("linear", "relu", "relu6")
REASONS = {
    "BatchNormalization": "no linear layer before it to fold into",
    "LayerNormalization": "TFLite has no integer kernel for it",
    "MultiHeadAttention": "softmax of batched products loses too much in 8 bits without dedicated kernels",
    "LSTM": "recurrent state would need 16-bit kernels",
    "GRU": "recurrent state would need 16-bit kernels",
    "Embedding": "a table look-up; quantize it with `dynamic` range",
    "Conv3D": "TFLite has no integer kernel for it",
}


#: What a quantized activation is to the model. Inputs and outputs are few, and what is lost there is lost for good.
Role = Literal["input", "hidden", "output"]


class QuantizationRow(NamedTuple):
    """What quantization-aware training did with one layer."""

    layer: str
    kind: str
    status: str  # "int8", "folded", "float" or "same grid"
    note: str


@keras.saving.register_keras_serializable(package="tfkit")
class QuantizationAware(Compressor):
    """Prepares a model so that what it trains is what an int8 `.tflite` file computes.

    Dense, EinsumDense, Conv1D/2D, Conv2DTranspose, DepthwiseConv2D and SeparableConv2D (split in two) get int8
    weights; each batch normalization after one of them is folded at `finalize`, and a ReLU or ReLU6 is fused.
    Residual adds, concatenations and poolings are quantized; the inputs of a concatenation share its output's grid.
    LayerNormalization, attention, recurrent layers and activations such as GELU stay in float, knowingly: `report()`
    names every layer, and why.

    A file of one path through such layers agrees with the finalized model to one step of the output, as a rule: a
    softmax, sigmoid or tanh at the end has a finer grid than what it reads, and a step before it may be two behind it.
    Where branches meet, two inputs may each be a step apart; and the mean that an average pooling takes of few integers
    is often a tie, which TFLite's kernel and fake quantization break differently. With fewer than 8 bits a step is
    wide, and a hidden value that falls on the other side of a tie moves the output by several steps: XNNPACK agrees
    exactly where dense layers and convolutions follow each other or meet, but Conv2DTranspose, EinsumDense and layers
    that are called more than once may differ, and so may TFLite's reference kernels, which round twice.

    Weight tensors that arrive clustered get one scale for the whole tensor, so that shared values stay shared.

    Args:
        bits: width of the weights' integers. Those of fewer than 8 are stored in 8, as they are, and take about their
            width in a packed file. Dense layers then have one scale for the whole kernel.
        activation_bits: width of the activations between the model's inputs and its outputs, which have 8.
        momentum: of the moving average of the activations' ranges.
        include, exclude, preserve: see `Compressor`; a layer left out is computed in float.
    """

    def __init__(
        self,
        *,
        bits: int = 8,
        activation_bits: int = 8,
        momentum: float = 0.99,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        checks.integer("bits", bits, 2, 8)
        checks.integer("activation_bits", activation_bits, 1, 8)
        if not 0 <= momentum < 1:
            raise ValueError(f"Argument `momentum` must be in [0, 1). Received: {momentum}.")
        self.bits: Any = bits
        self.activation_bits = activation_bits
        self.momentum = momentum
        self._rows: list[QuantizationRow] = []
        self._origins: dict[str, str] = {}  # Of the parts of separable convolutions, by name.

    def _names(self, layer: keras.Layer) -> tuple[str, ...]:
        return tuple(dict.fromkeys((layer.name, self._origins.get(layer.name, layer.name))))

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        if not isinstance(layer, WEIGHTED):
            return []
        per_channel = has_channel_scales(layer, self.bits) and not (self.preserve and is_clustered(value))
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        return [FakeQuantizeWeight(self.bits, depthwise, per_channel)]

    def quantizer(self, name: str, role: Role) -> keras.Layer:
        """Returns the layer that quantizes one activation; a method with quantizers of its own overrides this.

        Args:
            name: of the new layer.
            role: what the activation is to the model.

        Returns:
            A layer called as `FakeQuantize` is, with a method `freeze()` that gives the `FakeQuantize` of fixed range
            to put in its place at `finalize`.
        """
        bits = self.activation_bits if role == "hidden" else 8
        return FakeQuantize(bits, self.momentum, name=name)

    def prepare(self, model: keras.Model) -> keras.Model:
        self._check_patterns(model)
        rewriter = _Rewriter(self, split_separable(model, self))
        prepared = surgery.rebuild(rewriter.model, rewriter.replace, rewriter.call)
        self._rows = list(rewriter.rows.values())
        self._warn_if_unchanged(model, any(row.status == "int8" for row in self._rows))
        return prepared

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns the model that an int8 file will compute: weights on their grids, normalizations folded.

        Plain layers, with `FakeQuantize` layers of fixed range at the activations: export it with
        `tfkit.export.convert(..., quantization="int8-qat")`.

        Raises:
            ValueError: if an activation's range was never observed, because the prepared model was not trained.
        """
        plain = super().finalize(model)
        frozen = surgery.rebuild(plain, lambda layer: layer.freeze() if hasattr(layer, "freeze") else None)
        folded = folding.fold_batch_normalization(frozen)
        # A step of few bits is wide enough for the rounding of a bias to show.
        widths = self.bits.values() if isinstance(self.bits, Mapping) else [self.bits]  # Subclasses take a mapping.
        return whole_biases(folded) if min(*widths, self.activation_bits) < 8 else folded

    def report(self) -> list[QuantizationRow]:
        """Returns, for the last model prepared, what was quantized, what stays in float, and why."""
        return list(self._rows)


def split_separable(model: keras.Model, compressor: QuantizationAware) -> keras.Model:
    """Returns a flat copy of a model, each selected SeparableConv2D as two convolutions."""
    split = _SeparableSplitter(compressor)
    return surgery.rebuild(model, split.replace, split.call, inline=True)


class _SeparableSplitter:
    """Writes a SeparableConv2D as the depthwise and the pointwise convolution that it is, each to be quantized."""

    def __init__(self, compressor: QuantizationAware) -> None:
        self.compressor = compressor
        self.pointwise: dict[int, keras.layers.Conv2D] = {}

    def replace(self, layer: keras.Layer) -> keras.Layer | None:
        if not isinstance(layer, keras.layers.SeparableConv2D) or not self.compressor.selects(layer):
            return None
        channels = layer.depthwise_kernel.shape[2] * layer.depth_multiplier
        depthwise = keras.layers.DepthwiseConv2D(
            layer.kernel_size,
            strides=layer.strides,
            padding=layer.padding,
            depth_multiplier=layer.depth_multiplier,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
            use_bias=False,
            depthwise_regularizer=layer.depthwise_regularizer,
            depthwise_constraint=layer.depthwise_constraint,
            trainable=layer.trainable,
            dtype=layer.dtype_policy,
            name=f"{layer.name}_depthwise",
        )
        depthwise.build_from_config(layer.get_build_config())
        depthwise.kernel.assign(layer.depthwise_kernel)
        pointwise = keras.layers.Conv2D(
            layer.filters,
            1,
            data_format=layer.data_format,
            use_bias=layer.use_bias,
            activation=layer.activation,
            kernel_regularizer=layer.pointwise_regularizer,
            kernel_constraint=layer.pointwise_constraint,
            bias_regularizer=layer.bias_regularizer,
            bias_constraint=layer.bias_constraint,
            trainable=layer.trainable,
            dtype=layer.dtype_policy,
            name=f"{layer.name}_pointwise",
        )
        pointwise.build((None, None, None, channels))
        pointwise.kernel.assign(layer.pointwise_kernel)
        if layer.use_bias:
            pointwise.bias.assign(layer.bias)
        self.pointwise[id(layer)] = pointwise
        self.compressor._origins |= {depthwise.name: layer.name, pointwise.name: layer.name}
        return depthwise

    def call(self, original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = new(*args, **kwargs)
        return self.pointwise[id(original)](outputs) if id(original) in self.pointwise else outputs


class _Rewriter:
    """The rules by which `QuantizationAware.prepare` rewrites one flat graph, and what it remembers on the way."""

    def __init__(self, compressor: QuantizationAware, model: keras.Model) -> None:
        self.compressor = compressor
        self.model = model
        self.consumers = surgery.sole_consumers(model)
        self.folded = {id(norm) for norm in folding.foldable_pairs(model).values()}
        # Symbolic tensors are kept beside their ids, which would otherwise be used again.
        self.on_grid: dict[int, Any] = {}  # Tensors that carry int8 values, with the quantizer whose grid they are on.
        self.deferred: dict[int, Any] = {}  # Outputs of linear layers whose normalization or ReLU is still to come.
        self.quantizers: dict[int, Any] = {}
        self.rows: dict[str, QuantizationRow] = {}
        self.names = {layer.name for layer in model.layers}
        self.ends = {id(tensor._keras_history.operation) for tensor in model.outputs}

    def replace(self, layer: keras.Layer) -> keras.Layer | None:
        source = surgery.source(layer)
        if not isinstance(source, WEIGHTED) or not self.compressor.selects(source):
            return None
        if source is layer and not _fuses(source):
            layer = surgery.copy_layer(source, activation="linear")
        return self.compressor._wrap(layer)

    def call(self, original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        source = surgery.source(original)
        kind = type(source).__name__
        inputs = keras.tree.flatten((args, kwargs))
        if isinstance(source, WEIGHTED) and self.compressor.selects(source):
            return self.weighted(original, source, new, args[0])
        if id(source) in self.folded and id(args[0]) in self.deferred:
            self.note(source, "folded", "into the layer before it")
            return self.finish(original, new(*args, **kwargs), source.name)
        if _is_relu(source) and id(args[0]) in self.deferred:
            self.note(source, "folded", "fused into the layer before it")
            return self.quantized(new(*args, **kwargs), source.name, self.role(original))
        if _quantizes(source):
            self.note(source, "int8", "on a grid of its own")
            x = args[0]
            if id(x) in self.on_grid and getattr(source, "bits", 8) > 1:
                # From one grid to another takes an integer operation: the converter refuses the clipping without it.
                x = keras.layers.ReLU(name=self.unique(f"{source.name}_requantize"))(x)
            return self.quantized_by(new, x)
        if kind in SAME_GRID or (kind == "UpSampling2D" and source.interpolation == "nearest"):
            outputs = new(*args, **kwargs)
            if id(args[0]) in self.on_grid:
                self.on_grid[id(outputs)] = (outputs, self.on_grid[id(args[0])][1])
                self.note(source, "same grid", "")
            return outputs
        if not self.compressor.selects(source):
            self.note(source, "float", "left out")
            return new(*args, **kwargs)
        if kind in ROUNDED_TO_INPUT:
            x = self.to_grid(args[0])
            self.note(source, "int8", "on the grid of its input")
            return self.quantized_by(self.on_grid[id(x)][1], new(x), update=False)
        if isinstance(source, keras.layers.Activation) and not _is_relu(source):
            return self.activation(source.activation, source, new, args[0])
        if isinstance(source, keras.layers.Softmax):
            return self.activation(keras.activations.softmax, source, new, args[0])
        if (kind in REQUANTIZED or _is_relu(source)) and all(_is_tensor(x) for x in inputs):
            arguments = keras.tree.map_structure(self.to_grid, (args, kwargs))
            self.note(source, "int8", "")
            return self.finish(original, new(*arguments[0], **arguments[1]), source.name)
        self.note(source, "float", REASONS.get(kind, "no integer form of it here"))
        return new(*args, **kwargs)

    def weighted(self, original: Any, source: Any, new: Any, x: Any) -> Any:
        outputs = new(self.to_grid(x))
        grids = "per channel"
        if any(not getattr(t, "per_channel", True) for t in new.transforms.get("kernel", ())):
            grids = "one scale"
        bits = min((t.bits for t in new.transforms.get("kernel", ()) if hasattr(t, "bits")), default=8)
        self.note(source, "int8", grids if bits == 8 else f"{grids}, weights of {bits} bits")
        if _fuses(source):
            return self.finish(original, outputs, source.name)
        on_grid = self.quantized(outputs, source.name, "output")  # The activation's kernel prescribes 8 bits.
        split = keras.layers.Activation(source.activation, name=self.unique(f"{source.name}_activation"))
        return self.activation(source.activation, split, split, on_grid)

    def activation(self, function: Any, source: Any, new: Any, x: Any) -> Any:
        name = surgery.function_name(function)
        if name not in FIXED_RANGES:
            self.note(source, "float", f"activation {name} has no integer kernel")
            return new(x)
        self.note(source, "int8", "on the grid that the kernel prescribes")
        low, high = FIXED_RANGES[name]
        fixed = FakeQuantize(minimum=low, maximum=high, name=self.unique(f"{source.name}_quantize"))
        return self.quantized_by(fixed, new(self.to_grid(x)))

    def finish(self, original: Any, outputs: Any, name: str) -> Any:
        """Quantizes an output, unless what reads it will be merged with what made it."""
        follower = self.consumers.get(id(original))
        linear = surgery.activation_name(surgery.source(original)) == "linear"
        if id(follower) in self.folded or (linear and (_is_relu(follower) or _quantizes(follower))):
            self.deferred[id(outputs)] = outputs
            return outputs
        if type(follower).__name__ == "Concatenate" and self.compressor.selects(follower):
            # Rounding after joining is rounding before it, with one grid for all parts.
            self.on_grid[id(outputs)] = (outputs, None)
            return outputs
        return self.quantized(outputs, name, self.role(original))

    def role(self, original: Any) -> Role:
        """Whether what a layer gives leaves the model, or only an activation away from leaving it."""
        while original is not None:
            if id(original) in self.ends:
                return "output"
            original = self.consumers.get(id(original))
            kind = type(original).__name__
            if kind not in SAME_GRID | {"Softmax", "Activation", "BatchNormalization", "ReLU", "Relu"}:
                break
        return "hidden"

    def to_grid(self, x: Any) -> Any:
        if not _is_tensor(x) or id(x) in self.on_grid or not keras.backend.is_float_dtype(x.dtype):
            return x
        if id(x) not in self.quantizers:
            self.quantizers[id(x)] = (x, self.quantized(x, x.name, "input"))
        return self.quantizers[id(x)][1]

    def quantized(self, x: Any, name: str, role: Role) -> Any:
        return self.quantized_by(self.compressor.quantizer(self.unique(f"{name}_quantize"), role), x)

    def quantized_by(self, layer: keras.Layer, x: Any, **options: Any) -> Any:
        outputs = layer(x, **options)
        self.on_grid[id(outputs)] = (outputs, layer)
        return outputs

    def unique(self, name: str) -> str:
        base, number = name.replace("/", "_"), 1
        name = base
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name

    def note(self, layer: Any, status: str, note: str) -> None:
        self.rows[layer.name] = QuantizationRow(layer.name, type(layer).__name__, status, note)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, keras.KerasTensor)


def _is_relu(layer: Any) -> bool:
    if isinstance(layer, keras.layers.ReLU):
        return layer.max_value in (None, 6.0) and not layer.negative_slope and not layer.threshold
    if isinstance(layer, keras.layers.Activation):
        return surgery.activation_name(layer) in ("relu", "relu6")
    return type(layer).__name__ == "Relu"


def _quantizes(layer: Any) -> bool:
    """Whether a layer is the quantizer of what it gives, put there by a method."""
    return getattr(layer, "quantizes", False)


def _fuses(layer: Any) -> bool:
    return surgery.activation_name(layer) in FUSED_ACTIVATIONS
