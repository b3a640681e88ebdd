"""Quantized neural networks: weights and activations of one to a few bits, trained with the straight-through estimator.

Paper: Hubara, Courbariaux, Soudry, El-Yaniv, Bengio. Quantized neural networks: training neural networks with low
precision weights and activations. JMLR 18, 2017, https://arxiv.org/abs/1609.07061.

Differs: each kernel may have a scale, fitted to the weights it starts from, so that a trained float network can be
fine-tuned (`scale="none"` is the paper's ±1); the scale goes into the thresholds at `finalize`. Activations of more
than one bit are those of a ReLU, unsigned, on the range that suits a normalized input, not of a hard tanh. The input
and the first and last layers have 8 bits by default. A max pooling behind an activation is trained before it, as in the
paper's networks, and put back at the end: the same function, with a better gradient. Gradients are not quantized. At
`finalize` batch normalization and sign become integer thresholds, so the file runs on integer kernels of 8 bits, which
is what phones have: it is as fast as an int8 file, and the weights take their 1 to 7 bits in the packed file and in
transmission.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from tfkit.compression.base import copy_wrapped
from tfkit.compression.clustering import is_clustered
from tfkit.compression.fake_quantize import FakeQuantize, FakeQuantizeWeight
from tfkit.compression.integer_sums import SIGNED, integer_sums, readers
from tfkit.compression.low_precision import LowPrecisionActivation, LowPrecisionWeight
from tfkit.compression.pruning import is_sparse
from tfkit.compression.quantization_aware import QuantizationAware, Role, split_separable
from tfkit.compression.quantized_layers import WEIGHTED, has_channel_scales
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.compression.shift_based import ShiftBatchNormalization
from tfkit.internal import checks, folding, surgery

#: Nonlinearities that a sign replaces, and those that a quantized ReLU replaces.
REPLACED = {True: ("relu", "relu6", "tanh", "hard_tanh"), False: ("relu", "relu6")}
#: A sum that must be odd needs even weights, of which 8 bits hold {-63 … 63}, doubled.
WIDEST_BEFORE_SIGN = 7
#: They keep the largest value, and so may come before or after any activation that never falls.
POOLINGS = (keras.layers.MaxPooling1D, keras.layers.MaxPooling2D)
SCALES = ("channel", "tensor", "none")
Scale = Literal["channel", "tensor", "none"]


@keras.saving.register_keras_serializable(package="tfkit")
class QuantizedNeuralNetwork(QuantizationAware):
    """Prepares a model to be trained with weights and activations of a few bits, and stores them as such.

    The latent weights stay in float and are clipped to their range after each update, by a constraint that any
    optimizer applies. With `activation_bits=1` a sign takes the place of each ReLU, ReLU6, tanh and hard tanh that
    follows a layer with weights (and its batch normalization); with 2 to 7 bits, a ReLU of that many bits takes the
    place of each ReLU. What stands elsewhere (residual sums, averages, the model's inputs and outputs) has 8 bits. Put
    a batch normalization before each activation: at one bit it is what makes training work.

    `finalize` makes the thresholds of the signs integers, every sum before a sign odd, and every bias a whole number of
    the file's steps. Keras and the file, run by XNNPACK, then agree exactly, as a rule. TFLite's reference kernels do
    so where the hidden activations are signs; with 2 to 7 bits they round a hidden value now and then the other way,
    as they round twice, and a step of few bits moves the output by some. Where branches meet, a step of their sum may
    flip a sign behind it. Export with `quantization="int8-qat"`.

    Args:
        weight_bits: width of the weights' integers, 1 to 8. One bit: -1 and +1 times the scale. In a Dense or Conv1D
            layer with a normalization behind it, those of 3 to 7 bits are moved by at most 1 / 254 of the largest one
            at `finalize`: a file has 8-bit integers there, and its own scale for each channel.
        activation_bits: width of the activations, 1 to 8.
        stochastic: with `activation_bits=1`, draw the sign in training, +1 with the probability hard sigmoid.
        first_layer_bits, last_layer_bits: width of the weights of the layers that read the model's inputs, and of those
            that give its outputs. None: `weight_bits`. A layer before a sign has 7 bits at most.
        scale: `"channel"`: weights in units of a scale for each output channel (for the whole kernel where a file
            cannot hold them: narrow Dense layers); `"tensor"`: of one for the kernel; fitted to the weights at hand.
            `"none"`: in units of 1, as in the paper, for training from weights that fill [-1, 1].
        activation_limit: upper end of the range of activations of 2 to 7 bits, in units of their root mean square
            before the ReLU; None: the best for normal inputs.
        shift_batch_norm: compute batch normalization with shifts in place of products, see `ShiftBatchNormalization`.
        momentum: of the moving averages of the activations' ranges.
        seed: of the stochastic sign.
        include, exclude, preserve: see `Compressor`; a layer left out is computed in float.
    """

    def __init__(
        self,
        weight_bits: int = 1,
        activation_bits: int = 1,
        *,
        stochastic: bool = False,
        first_layer_bits: int | None = 8,
        last_layer_bits: int | None = 8,
        scale: Scale = "channel",
        activation_limit: float | None = None,
        shift_batch_norm: bool = False,
        momentum: float = 0.99,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(momentum=momentum, include=include, exclude=exclude, preserve=preserve)
        for name, width in (
            ("weight_bits", weight_bits),
            ("activation_bits", activation_bits),
            ("first_layer_bits", first_layer_bits),
            ("last_layer_bits", last_layer_bits),
        ):
            if width is not None or name in ("weight_bits", "activation_bits"):
                checks.integer(name, width, 1, 8)
        checks.choice("scale", scale, SCALES)
        if scale == "none" and weight_bits >= WIDEST_BEFORE_SIGN:
            raise checks.error(
                "scale",
                '"channel" or "tensor" with weight_bits of 7 or 8',
                scale,
                "Their range is fitted to the weights.",
            )
        if activation_limit is not None:
            checks.number("activation_limit", activation_limit, 1e-3)
            if not 1 < activation_bits < 8:
                raise checks.error(
                    "activation_limit", f"None with activation_bits={activation_bits}", activation_limit,
                    "Only activations of 2 to 7 bits have a limit to set.",
                )  # fmt: skip
        if stochastic and activation_bits != 1:
            raise ValueError(
                f"Argument `stochastic` must be False with activation_bits={activation_bits}: only the sign of "
                "activation_bits=1 is drawn by chance. Received: True."
            )
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.stochastic = stochastic
        self.first_layer_bits = first_layer_bits
        self.last_layer_bits = last_layer_bits
        self.scale = scale
        self.activation_limit = activation_limit
        self.shift_batch_norm = shift_batch_norm
        self.seed = checks.integer("seed", seed, 0)
        self._bits: dict[str, int] = {}  # Of the layers of the model being prepared, by name.

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        if not isinstance(layer, WEIGHTED):
            return []
        bits = self._bits.get(layer.name, self.weight_bits)
        depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
        shared = self.preserve and is_clustered(value)
        per_channel = has_channel_scales(layer, bits) and not shared
        if bits >= WIDEST_BEFORE_SIGN:
            return [FakeQuantizeWeight(bits, depthwise, per_channel)]
        scale = "tensor" if self.scale == "channel" and not per_channel else self.scale
        return [LowPrecisionWeight(bits, depthwise, scale, keep_zeros=self.preserve and is_sparse(value))]

    def quantizer(self, name: str, role: Role) -> keras.Layer:
        return FakeQuantize(8, self.momentum, name=name)

    def prepare(self, model: keras.Model) -> keras.Model:
        planned, self._bits = _plan(split_separable(model, self), self)
        prepared = super().prepare(planned)
        folded = {id(norm) for norm in folding.foldable_pairs(prepared).values()} if self.shift_batch_norm else set()
        pooled = {
            id(layer): reader
            for layer, reader in _sole_readers(prepared)
            if isinstance(layer, LowPrecisionActivation) and isinstance(reader, POOLINGS)
        }
        return _swap(
            prepared, pooled, lambda layer: ShiftBatchNormalization.replacing(layer) if id(layer) in folded else None
        )

    def finalize(self, model: keras.Model) -> keras.Model:
        # Back to where the sum is, whose scale and bias a file's kernel rounds in one go.
        pooling = {
            id(layer): reader
            for layer, reader in _sole_readers(model)
            if isinstance(layer, POOLINGS) and isinstance(reader, LowPrecisionActivation)
        }
        return integer_sums(super().finalize(_swap(model, pooling)))

    def _wrap(self, layer: keras.Layer) -> Reparameterized | None:
        wrapped = super()._wrap(layer)
        if wrapped is not None:
            for name, chain in wrapped.transforms.items():
                for transform in chain:
                    if isinstance(transform, LowPrecisionWeight):
                        constraint = transform.latent_constraint()
                        setattr(wrapped.layer, surgery.constraint_name(wrapped.layer, name), constraint)
                        surgery.compressible_weights(wrapped.layer)[name].constraint = constraint
        return wrapped


def _plan(model: keras.Model, method: QuantizedNeuralNetwork) -> tuple[keras.Model, dict[str, int]]:
    """Puts quantizing activations in the place of the model's own, and chooses the bits of each layer.

    Args:
        model: flat, without separable convolutions.
        method: the settings.

    Returns:
        The new model, and the bits of the weights by the layers' names.
    """
    narrow, sign = method.activation_bits < 8, method.activation_bits == 1
    first, last, _ = _ends(model)
    if narrow:
        model = _activations_apart(model, lambda layer: layer.name not in last and method.selects(layer))
    replaced = _replaceable(model, method) if narrow else {}

    bits = {}
    for layer, reader in readers(model).items():
        bits[layer.name] = method.weight_bits
        for ends, width in ((first, method.first_layer_bits), (last, method.last_layer_bits)):
            if layer.name in ends and width is not None:
                bits[layer.name] = width
        if sign and id(reader) in replaced:
            bits[layer.name] = min(bits[layer.name], WIDEST_BEFORE_SIGN)

    def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        return replaced[id(original)](args[0]) if id(original) in replaced else new(*args, **kwargs)

    return surgery.rebuild(model, copy_wrapped, call), bits


def _activations_apart(model: keras.Model, chosen: Callable[[Any], bool]) -> keras.Model:
    """Returns a model in which the activations inside the chosen layers are layers of their own."""

    apart: dict[int, keras.layers.Layer] = {}  # A layer that is called twice has one activation.

    def inner(layer: Any) -> str:
        source = surgery.source(layer)
        name = surgery.activation_name(source)
        return name if isinstance(source, WEIGHTED) and chosen(source) and name in REPLACED[True] else "linear"

    def replace(layer: keras.Layer) -> keras.Layer | None:
        copy: Any = copy_wrapped(layer)
        if inner(layer) == "linear":
            return copy
        if copy is None:
            return surgery.copy_layer(layer, activation="linear")
        copy.layer.activation = keras.activations.linear
        return copy

    def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = new(*args, **kwargs)
        if inner(original) == "linear":
            return outputs
        if id(original) not in apart:
            apart[id(original)] = keras.layers.Activation(inner(original), name=f"{new.name}_{inner(original)}")
        return apart[id(original)](outputs)

    return surgery.rebuild(model, replace, call)


def _replaceable(model: keras.Model, method: QuantizedNeuralNetwork) -> dict[int, LowPrecisionActivation]:
    """Returns, by `id` of each activation to be replaced, the quantizing activation for its place."""
    sign = method.activation_bits == 1
    signable = {
        id(reader)
        for layer, reader in readers(model).items()
        if isinstance(layer, SIGNED) and method.selects(layer) and surgery.activation_name(layer) == "linear"
    }
    leaving = _ends(model)[2]
    left_out = {id(reader) for layer, reader in readers(model).items() if not method.selects(layer)}
    replaced: dict[int, LowPrecisionActivation] = {}
    for node in _nodes(model):
        activation = node.operation
        if _nonlinearity(activation) not in REPLACED[sign] or id(node.outputs[0]) in leaving:
            continue
        if id(activation) in left_out or not method.selects(activation):
            continue
        if (sign and id(activation) not in signable) or id(activation) in replaced:
            continue
        replaced[id(activation)] = LowPrecisionActivation(
            method.activation_bits,
            method.stochastic,
            method.activation_limit,
            momentum=method.momentum,
            seed=method.seed + len(replaced),
            name=activation.name,
        )
    return replaced


def _swap(model: keras.Model, pairs: Mapping[int, Any], replace: surgery.Replace | None = None) -> keras.Model:
    """Returns a copy of a model in which each layer of `pairs`, by `id`, comes after what alone reads it now.

    In training a pooling comes before its activation: of equal values, and after rounding most are, its gradient would
    reach the first one and not the one that was the largest.
    """
    behind = {id(reader): layer for layer, reader in pairs.items()}
    waiting: dict[int, Any] = {}

    def call(original: Any, new: Any, *args: Any, **kwargs: Any) -> Any:
        if id(original) in pairs:
            waiting[id(original)] = new
            return args[0]
        outputs = new(*args, **kwargs)
        return waiting[behind[id(original)]](outputs) if id(original) in behind else outputs

    return surgery.rebuild(model, replace, call)


def _sole_readers(model: keras.Model) -> list[tuple[Any, Any]]:
    """Returns each layer with the operation that alone reads its output, or None."""
    consumers = surgery.sole_consumers(model)
    return [(layer, consumers.get(id(layer))) for layer in surgery.leaf_layers(model)]


def _nodes(model: keras.Model) -> list[Any]:
    """Returns the calls of a flat model, those that give before those that read."""
    by_depth = surgery.as_functional(model)._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def _ends(model: keras.Model) -> tuple[set[str], set[str], set[int]]:
    """Returns the names of the first and of the last layers with weights, and the tensors after the last ones."""
    first, last = set(), set()
    arriving, leaving = ({id(tensor) for tensor in tensors} for tensors in (model.inputs, model.outputs))
    for node in _nodes(model):
        if any(id(tensor) in arriving for tensor in node.input_tensors):
            if isinstance(surgery.source(node.operation), WEIGHTED):
                first.add(node.operation.name)
            else:
                arriving.update(id(tensor) for tensor in node.outputs)
    for node in reversed(_nodes(model)):
        if any(id(tensor) in leaving for tensor in node.outputs):
            if isinstance(surgery.source(node.operation), WEIGHTED):
                last.add(node.operation.name)
            else:
                leaving.update(id(tensor) for tensor in node.input_tensors)
    return first, last, leaving


def _nonlinearity(operation: Any) -> str:
    """Returns the name of an activation that stands by itself; empty for anything else."""
    if isinstance(operation, keras.layers.ReLU):
        if operation.negative_slope or operation.threshold or operation.max_value not in (None, 6.0):
            return ""
        return "relu" if operation.max_value is None else "relu6"
    if isinstance(operation, keras.layers.Activation):
        return surgery.activation_name(operation)
    return {"Relu": "relu", "Relu6": "relu6", "Tanh": "tanh", "HardTanh": "hard_tanh"}.get(type(operation).__name__, "")
