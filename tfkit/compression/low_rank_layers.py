"""How each kind of layer is split into smaller plain ones: what a split costs, what it gives up, and the new layers."""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tfkit.compression.low_rank_attention import AttentionSplit
from tfkit.compression.low_rank_factors import MatrixFactors, TuckerFactors, output_error
from tfkit.compression.low_rank_sites import (
    Rank,
    Shape,
    Site,
    Split,
    as_array,
    einsum_labels,
    inner_shape,
    pixels,
    product,
    spatial_shape,
)

L = keras.layers


class MatrixSplit(Split):
    """A split in two along one rank.

    Args:
        method: its name.
        matrix: (m, n), of which the layer's weight is a view.
        gram: of what multiplies it from the left.
        costs: parameters and multiply-adds of one rank.
        rest: what the split does not touch: parameters.
        make: the layers from the two factors.
        error: the relative error of the two factors; by default that of their product on the same Gram matrix.
    """

    def __init__(
        self,
        method: str,
        matrix: np.ndarray,
        gram: np.ndarray | None,
        ridge: float,
        costs: tuple[int, int],
        rest: int,
        make: Callable[[np.ndarray, np.ndarray], list[keras.Layer]],
        error: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        self.method = method
        self.solver = MatrixFactors(matrix, gram, ridge)
        self.options = self.solver.options()
        self.parameters = rest + costs[0] * self.options.ranks[:, 0]
        self.multiply_adds = costs[1] * self.options.ranks[:, 0]
        self.make = make
        self.error = error or (lambda found: output_error(self.solver.matrix, found, gram))

    def layers(self, ranks: Sequence[int]) -> tuple[list[keras.Layer], float]:
        a, b = self.solver.factors(ranks[0])
        return self.make(a, b), self.error(a @ b)


class TuckerSplit(Split):
    """A convolution as 1x1, k x k and 1x1."""

    method = "tucker2"

    def __init__(self, site: Site, gram: np.ndarray | None, ridge: float, wanted: Rank = ()) -> None:
        self.layer, self.gram = site.layer, gram
        self.kernel = _kernel4(site.layer)
        self.solver = TuckerFactors(self.kernel, gram, ridge)
        self.options = self.solver.options(wanted)
        area, channels, filters = math.prod(self.kernel.shape[:2]), *self.kernel.shape[2:]
        inner, outer = self.options.ranks.T
        self.parameters = _bias(site.layer) + channels * inner + area * inner * outer + outer * filters
        before, after = pixels(site, "inputs"), pixels(site, "outputs")
        self.multiply_adds = before * channels * inner + after * (area * inner * outer + outer * filters)

    def layers(self, ranks: Sequence[int]) -> tuple[list[keras.Layer], float]:
        first, core, last = self.solver.factors(*ranks)
        one = (1,) * len(self.layer.kernel_size)
        layers = [
            _conv(self.layer, "reduce", first.reshape(1, 1, *first.shape), kernel_size=one),
            _conv(self.layer, "core", core, **_window(self.layer)),
            _conv(self.layer, None, last.reshape(1, 1, *last.shape), kernel_size=one),
        ]
        found = TuckerFactors.product(first, core, last)
        flat = (-1, self.kernel.shape[-1])
        return layers, output_error(self.kernel.reshape(flat), found.reshape(flat), self.gram)


def splits(site: Site, method: str, gram: Any, ridge: float, wanted: Rank = ()) -> list[Split]:
    """Returns the ways to split a layer.

    Args:
        site: the layer.
        method: for convolutions, `"auto"` for all, or one of them; ignored for others.
        gram: of its inputs, as `gram_of` gives it, or None.
        ridge: see `tfkit.compression.low_rank_factors.gram_root`.
        wanted: ranks that must be on offer, also where not all are.
    """
    layer = site.layer
    if isinstance(layer, L.MultiHeadAttention):
        return [AttentionSplit(site, gram, ridge)]
    if isinstance(layer, L.Embedding):
        return [_embedding(site, gram, ridge)]
    if isinstance(layer, L.Dense):
        return [_dense(site, gram, ridge)]
    if isinstance(layer, L.EinsumDense):
        return [_einsum_dense(site, gram, ridge)]
    if math.prod(layer.kernel_size) == 1:
        return [_channel(site, gram, ridge)]
    makers: dict[str, Callable[..., Split]] = {
        "channel": _channel,
        "tucker2": functools.partial(TuckerSplit, wanted=wanted),
    }
    if isinstance(layer, L.Conv2D):
        makers["spatial"] = _spatial
    if method in ("svd", "spatial") and method not in makers:
        method = "channel"
    chosen = list(makers) if method == "auto" else [method]
    return [makers[name](site, gram, ridge) for name in chosen]


def _dense(site: Site, gram: np.ndarray | None, ridge: float) -> MatrixSplit:
    layer = site.layer
    matrix = as_array(layer.kernel)

    def make(a: np.ndarray, b: np.ndarray) -> list[keras.Layer]:
        first = _built(L.Dense(a.shape[1], use_bias=False, **_first(layer)), (None, a.shape[0]), a)
        last = L.Dense(layer.units, use_bias=layer.use_bias, activation=layer.activation, **_last(layer))
        return [first, _built(last, (None, a.shape[1]), b, layer)]

    each = sum(matrix.shape)
    calls = sum(product(inner_shape(inputs[0])[:-1]) for inputs in site.inputs)
    return MatrixSplit("svd", matrix, gram, ridge, (each, calls * each), _bias(layer), make)


def _embedding(site: Site, gram: np.ndarray | None, ridge: float) -> MatrixSplit:
    layer = site.layer
    matrix = as_array(layer.embeddings)

    def make(a: np.ndarray, b: np.ndarray) -> list[keras.Layer]:
        options = _common(layer) | {
            "name": f"{layer.name}_reduce",
            "mask_zero": layer.mask_zero,
            "embeddings_regularizer": layer.embeddings_regularizer,
        }
        first = L.Embedding(layer.input_dim, a.shape[1], **options)
        regularizers = {
            "kernel_regularizer": layer.embeddings_regularizer,
            "activity_regularizer": layer.activity_regularizer,
        }
        last = L.Dense(layer.output_dim, use_bias=False, name=layer.name, **_common(layer), **regularizers)
        return [_built(first, (None,), a), _built(last, (None, a.shape[1]), b)]

    tokens = sum(product(inner_shape(inputs[0])) for inputs in site.inputs)
    return MatrixSplit("svd", matrix, gram, ridge, (sum(matrix.shape), tokens * matrix.shape[1]), 0, make)


def _einsum_dense(site: Site, gram: np.ndarray | None, ridge: float) -> MatrixSplit:
    layer = site.layer
    labels = einsum_labels(layer)
    assert labels is not None
    spec, kernel, output, shared = labels
    made = [label for label in kernel if label not in shared]
    order = [kernel.index(label) for label in (*shared, *made)]
    array = as_array(layer.kernel).transpose(order)
    rows, columns = array.shape[: len(shared)], array.shape[len(shared) :]
    matrix = array.reshape(math.prod(rows), -1)
    dots = ("..." if layer.equation.startswith("...") else "", "..." if layer.equation.endswith("...") else "")
    rank = next(letter for letter in string.ascii_letters if letter not in layer.equation)
    between = [label for label in spec if label not in shared] + [rank]

    def equation(left: Sequence[str], weight: Sequence[str], right: Sequence[str]) -> str:
        return f"{dots[0]}{''.join(left)}{dots[1]},{''.join(weight)}->{dots[0]}{''.join(right)}{dots[1]}"

    def make(a: np.ndarray, b: np.ndarray) -> list[keras.Layer]:
        size = a.shape[1]
        # Keras takes the batch axis for granted, unless an ellipsis stands for it.
        shown = between if dots[0] else between[1:]
        shape = tuple(size if label == rank else None for label in shown)
        first = L.EinsumDense(equation(spec, [*shared, rank], between), shape, **_first(layer))
        last = L.EinsumDense(
            equation(between, [rank, *made], output),
            layer.partial_output_shape,
            bias_axes=layer.bias_axes,
            activation=layer.activation,
            **_last(layer),
        )
        first.build(layer.get_build_config()["input_shape"])
        last.build(first.compute_output_shape(layer.get_build_config()["input_shape"]))
        _assign(first, a.reshape(*rows, size))
        _assign(last, b.reshape(size, *columns), layer)
        return [first, last]

    calls = sum(product(inner_shape(inputs[0])) // math.prod(rows) for inputs in site.inputs)
    each = sum(matrix.shape)
    return MatrixSplit("svd", matrix, gram, ridge, (each, calls * each), _bias(layer), make)


def _channel(site: Site, gram: np.ndarray | None, ridge: float) -> MatrixSplit:
    layer = site.layer
    kernel = _kernel4(layer)
    matrix = kernel.reshape(-1, kernel.shape[-1])

    def make(a: np.ndarray, b: np.ndarray) -> list[keras.Layer]:
        first = _conv(layer, "reduce", a.reshape(*kernel.shape[:3], -1), **_window(layer))
        one = (1,) * len(layer.kernel_size)
        return [first, _conv(layer, None, b.reshape(1, 1, *b.shape), kernel_size=one)]

    each = sum(matrix.shape)
    costs = (each, pixels(site, "outputs") * each)
    name = "svd" if math.prod(layer.kernel_size) == 1 else "channel"
    return MatrixSplit(name, matrix, gram, ridge, costs, _bias(layer), make)


def _spatial(site: Site, gram: np.ndarray | None, ridge: float) -> MatrixSplit:
    layer = site.layer
    kernel = _kernel4(layer)
    height, width, channels, filters = kernel.shape
    matrix = kernel.transpose(0, 2, 1, 3).reshape(height * channels, width * filters)
    column_gram = None
    if gram is not None:
        # Of one column of a patch; that neighbouring columns are alike as well has no closed form, and is left out.
        blocks = gram.reshape(height, width, channels, height, width, channels)
        column_gram = np.einsum("hwckwd->hckd", blocks).reshape(height * channels, -1)

    def axis(values: Sequence[int], position: int) -> tuple[int, int]:
        return (values[0], 1) if position == 0 else (1, values[1])

    def make(a: np.ndarray, b: np.ndarray) -> list[keras.Layer]:
        factors = (
            a.reshape(height, 1, channels, -1),
            b.reshape(1, b.shape[0], width, filters).transpose(0, 2, 1, 3),
        )
        return [
            _conv(
                layer,
                "reduce" if position == 0 else None,
                factor,
                kernel_size=axis(layer.kernel_size, position),
                strides=axis(layer.strides, position),
                padding=layer.padding,
                dilation_rate=axis(layer.dilation_rate, position),
            )
            for position, factor in enumerate(factors)
        ]

    def error(found: np.ndarray) -> float:
        approximation = found.reshape(height, channels, width, filters).transpose(0, 2, 1, 3)
        return output_error(kernel.reshape(-1, filters), approximation.reshape(-1, filters), gram)

    between = 0
    for inputs, output in zip(site.inputs, site.outputs, strict=True):
        (_, before), (rows, _) = spatial_shape(layer, inputs[0]), spatial_shape(layer, output)
        between += (rows or 1) * (before or 1)
    costs = (
        height * channels + width * filters,
        between * height * channels + pixels(site, "outputs") * width * filters,
    )
    return MatrixSplit("spatial", matrix, column_gram, ridge, costs, _bias(layer), make, error)


def _conv(layer: Any, part: str | None, kernel: np.ndarray, **window: Any) -> keras.Layer:
    """Returns a convolution of the layer's kind with a kernel (height, width, in, out); the last part has no name."""
    options = _first(layer, part) if part else {**_last(layer), "activation": layer.activation}
    bias = layer.use_bias and not part
    new = type(layer)(kernel.shape[-1], use_bias=bias, data_format=layer.data_format, **window, **options)
    channels = kernel.shape[2]
    if isinstance(layer, L.Conv1D):
        kernel = kernel[:, 0]
    unknown = (None,) * len(layer.kernel_size)
    shape = (None, channels, *unknown) if layer.data_format == "channels_first" else (None, *unknown, channels)
    return _built(new, shape, kernel, None if part else layer)


def _window(layer: Any) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in ("kernel_size", "strides", "padding", "dilation_rate")}


def _built(new: Any, shape: Shape, value: np.ndarray, old: Any = None) -> keras.Layer:
    new.build(shape)
    return _assign(new, value, old)


def _assign(new: Any, value: np.ndarray, old: Any = None) -> keras.Layer:
    weight = new.embeddings if isinstance(new, L.Embedding) else new.kernel
    weight.assign(value.astype(np.float32))
    if old is not None and getattr(old, "bias", None) is not None:
        new.bias.assign(old.bias)
    return new


def _common(layer: Any) -> dict[str, Any]:
    return {"trainable": layer.trainable, "dtype": layer.dtype_policy}


def _first(layer: Any, part: str = "reduce") -> dict[str, Any]:
    return {**_common(layer), "name": f"{layer.name}_{part}", "kernel_regularizer": layer.kernel_regularizer}


def _last(layer: Any) -> dict[str, Any]:
    """What the last of the new layers takes over: it keeps the name, so that outputs keep theirs."""
    names = ("kernel_regularizer", "bias_regularizer", "bias_constraint", "activity_regularizer")
    return {**_common(layer), "name": layer.name, **{name: getattr(layer, name) for name in names}}


def _kernel4(layer: Any) -> np.ndarray:
    """Returns a convolution's kernel as (height, width, input channels, filters)."""
    kernel = as_array(layer.kernel)
    return kernel[:, None] if kernel.ndim == 3 else kernel


def _bias(layer: Any) -> int:
    return math.prod(layer.bias.shape) if getattr(layer, "bias", None) is not None else 0
