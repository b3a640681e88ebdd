"""Certificates for exported int8 `.tflite` files: the file's own integers, and every rounding on the way.

A tensor of integers q with scale s and zero point z stands for the numbers s (q - z). With these numbers an int8
network is a float network, up to roundings that are known from the file:

    input        clipped to the range of its integers, then rounded: half a step
    weights      the file's integers times its scales, exactly; so is the sum in 32 bits, biases included
    activations  sum times M = s_in s_w / s_out is rounded to a step of the output and clamped. A kernel may round twice
                 (TFLite's own rounds at 31 bits, then by a shift) or compute the product in float32 (XNNPACK): the
                 error stays below (1 + min(1, 2 M)) / 2 + 1/1000 steps.

Each rounding is one more perturbation of known size, as float rounding is elsewhere, and each clamp a pair of ReLUs. So
all methods apply, and what they prove holds for the integers that any of these kernels computes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tfkit.export.runner import check_file
from tfkit.export.sparse_storage import schema
from tfkit.robustness.certification.builder import Builder, Graph, UnsupportedLayerError, add_padding, max_pool
from tfkit.robustness.certification.nodes import AveragePool, Dense, Mean, Sum, weight
from tfkit.robustness.certification.rounding import UNIT32

#: Of a step: roundings in float32 of a number of 8 bits.
FLOAT_SLACK = 1e-3
#: Additions and means are rounded several times; TFLite's kernels stay within one step.
SEVERAL_ROUNDINGS = 1.0 + FLOAT_SLACK
LOWEST, HIGHEST = -128, 127
_ACTIVATIONS = {0: (-np.inf, np.inf), 1: (0.0, np.inf), 2: (-1.0, 1.0), 3: (0.0, 6.0)}


def read_tflite(path: str | os.PathLike[str]) -> Graph:
    """Reads an int8 file into a graph, whose bounds hold for what the file computes.

    Args:
        path: of a file with int8 weights and activations; inputs and outputs may be float.

    Returns:
        The graph: pass it to `bounds`, `certified_radius` or `certify` in place of a model.

    Raises:
        UnsupportedLayerError: the file has an operation or a type that cannot be bounded.
        RunnerError: it is no such file.
    """
    content = check_file(path)
    fb = schema()
    try:
        model = fb.ModelT.InitFromObj(fb.Model.GetRootAs(bytearray(content), 0))
        if len(model.subgraphs) != 1:
            raise UnsupportedLayerError(f"{path}: has {len(model.subgraphs)} graphs; only one can be bounded.")
        return _Reader(fb, model, Path(path).name).read()
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: damaged .tflite file ({type(error).__name__}: {error})") from None
    except Exception as error:
        if type(error).__module__.startswith("struct"):
            raise ValueError(f"{path}: damaged .tflite file ({error})") from None
        raise


class _Reader:
    """Turns the operations of a file into nodes."""

    def __init__(self, fb: Any, model: Any, name: str) -> None:
        self.fb, self.model, self.name = fb, model, name
        self.graph = model.subgraphs[0]
        self.places: dict[int, int] = {}
        self.operations = {value: key for key, value in vars(fb.BuiltinOperator).items() if not key.startswith("_")}

    def read(self) -> Graph:
        if len(self.graph.inputs) != 1 or len(self.graph.outputs) != 1:
            raise UnsupportedLayerError(f"{self.name}: must have one input and one output.")
        first = int(self.graph.inputs[0])
        self.build = Builder(self.name, self.shape(first))
        self.places[first] = 0
        if self.tensor(first).type == self.fb.TensorType.INT8:  # Quantized before it comes in.
            self.places[first] = self.rounded("input", 0, first, self.scale(first)[0] * (0.5 + FLOAT_SLACK))
        for number, operation in enumerate(self.graph.operators):
            code = self.model.operatorCodes[operation.opcodeIndex]
            kind = self.operations.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")
            add = getattr(self, f"add_{kind.lower()}", None)
            if add is None:
                raise UnsupportedLayerError(f"{self.name}: operation {number}, {kind}, cannot be bounded.")
            self.places[int(operation.outputs[0])] = add(f"{number}_{kind.lower()}", operation)
        last = int(self.graph.outputs[0])
        output = self.places[last]
        if self.tensor(last).type == self.fb.TensorType.INT8 and self.build.softmax is None:
            output = self.as_float("output", output, last)
        graph = self.build.finish(output)
        return graph._replace(arithmetic="int8")

    # What a file says of a tensor.

    def tensor(self, index: int) -> Any:
        return self.graph.tensors[index]

    def shape(self, index: int) -> tuple[int, ...]:
        shape = tuple(int(length) for length in self.tensor(index).shape)
        if len(shape) < 2 or min(shape[1:]) < 1 or np.prod(shape[1:], dtype=float) > 1e8:
            raise UnsupportedLayerError(f"{self.name}: a tensor has the shape {shape}.")
        return shape[1:]

    def scale(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zero points, arrays of one number or one for each channel."""
        found = self.tensor(index).quantization
        if found is None or found.scale is None or not len(found.scale):
            raise UnsupportedLayerError(
                f"{self.name}: tensor {index} has no scale. Only fully integer files can be bounded: export with int8 "
                "activations."
            )
        scale = np.asarray(found.scale, np.float64)
        zero = np.asarray(found.zeroPoint if found.zeroPoint is not None else [0] * len(scale), np.int64)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{self.name}: tensor {index} has a scale that is not positive.")
        return scale, zero

    def constant(self, index: int, kinds: dict[int, Any]) -> np.ndarray:
        tensor = self.tensor(index)
        if tensor.type not in kinds or tensor.sparsity is not None:
            raise UnsupportedLayerError(f"{self.name}: constant {index} has a type or a form that cannot be bounded.")
        data = self.model.buffers[tensor.buffer].data
        if data is None:
            raise UnsupportedLayerError(f"{self.name}: tensor {index} is not constant.")
        return np.frombuffer(bytes(bytearray(data)), kinds[tensor.type]).reshape(tensor.shape)

    def weights(self, operation: Any, channel_axis: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Kernel and bias as real numbers, and M for each channel."""
        data, kernel = int(operation.inputs[0]), int(operation.inputs[1])
        types = self.fb.TensorType
        integers = self.constant(kernel, {types.INT8: np.int8}).astype(np.float64)
        scale, zero = self.scale(kernel)
        if zero.any():
            raise UnsupportedLayerError(f"{self.name}: weights have zero points.")
        each = [1] * integers.ndim
        each[channel_axis] = len(scale)
        bias = None
        source = self.scale(data)[0][0]
        if len(operation.inputs) > 2 and int(operation.inputs[2]) >= 0:
            bias = self.constant(int(operation.inputs[2]), {types.INT32: np.int32}).astype(np.float64) * source * scale
        ratio = source * scale / self.scale(int(operation.outputs[0]))[0][0]
        return integers * scale.reshape(each), bias, ratio

    # Pieces.

    def source(self, operation: Any, number: int = 0) -> int:
        return self.places[int(operation.inputs[number])]

    def clamped(self, name: str, position: int, index: int, activation: int = 0) -> int:
        """Clamps to the range of a tensor's integers, and to that of a fused activation."""
        (scale, *_), (zero, *_) = self.scale(index)
        if activation not in _ACTIVATIONS:
            raise UnsupportedLayerError(f"{self.name}: {name} has a fused activation that cannot be bounded.")
        low, high = _ACTIVATIONS[activation]
        # The ends of an activation are rounded to integers.
        first = max(LOWEST, -np.inf if np.isinf(low) else np.round(low / scale) + zero)
        last = min(HIGHEST, np.inf if np.isinf(high) else np.round(high / scale) + zero)
        return self.build.clip(name, position, float(scale * (first - zero)), float(scale * (last - zero)))

    def rounded(self, name: str, position: int, index: int, noise: Any, activation: int = 0) -> int:
        """An error of known size, then the clamp."""
        return self.clamped(name, self.build.scale(name, position, None, noise=noise, terms=0), index, activation)

    def requantized(self, name: str, made: Any, operation: Any, ratio: np.ndarray) -> int:
        """A sum in 32 bits, rounded to the output's steps and clamped."""
        index = int(operation.outputs[0])
        made.noise = self.scale(index)[0][0] * (0.5 + 0.5 * np.minimum(1.0, 2 * ratio) + FLOAT_SLACK)
        activation = int(operation.builtinOptions.fusedActivationFunction)
        return self.clamped(name, self.build.add(made), index, activation)

    # Operations, by TFLite's names.

    def add_quantize(self, name: str, operation: Any) -> int:
        given, index = int(operation.inputs[0]), int(operation.outputs[0])
        step = self.scale(index)[0][0]
        ratio = 0.0
        if self.tensor(given).type == self.fb.TensorType.INT8:
            ratio = self.scale(given)[0][0] / step
        return self.rounded(name, self.source(operation), index, step * (0.5 + 0.5 * min(1, 2 * ratio) + FLOAT_SLACK))

    def add_dequantize(self, name: str, operation: Any) -> int:
        return self.as_float(name, self.source(operation), int(operation.inputs[0]))

    def as_float(self, name: str, position: int, index: int) -> int:
        """Integers times their scale, in float32; behind a softmax, nothing that changes the order of classes."""
        if self.build.softmax is not None:
            return position
        noise = 512 * UNIT32 * self.scale(index)[0][0]
        return self.build.scale(name, position, None, noise=noise, terms=0)

    def add_reshape(self, name: str, operation: Any) -> int:
        return self.build.reshape(name, self.source(operation), self.shape(int(operation.outputs[0])))

    def add_softmax(self, name: str, operation: Any) -> int:
        return self.build.activation(name, self.source(operation), "softmax")

    def add_fully_connected(self, name: str, operation: Any) -> int:
        kernel, bias, ratio = self.weights(operation, 0)
        position = self.build.reshape(name, self.source(operation), (kernel.shape[1],))
        made = Dense(name, position, (kernel.shape[0],), weight(kernel.T), _weight(bias), kernel.shape[1])
        return self.requantized(name, made, operation, ratio)

    def add_conv_2d(self, name: str, operation: Any) -> int:
        kernel, bias, ratio = self.weights(operation, 0)  # (filters, height, width, channels)
        return self._convolution(name, operation, kernel.transpose(1, 2, 3, 0), bias, ratio, depthwise=False)

    def add_depthwise_conv_2d(self, name: str, operation: Any) -> int:
        kernel, bias, ratio = self.weights(operation, 3)  # (1, height, width, channels * multiplier)
        channels = self.build.shape(self.source(operation))[2]
        return self._convolution(
            name, operation, kernel[0].reshape(*kernel.shape[1:3], channels, -1), bias, ratio, depthwise=True
        )

    def _convolution(
        self, name: str, operation: Any, kernel: np.ndarray, bias: Any, ratio: np.ndarray, depthwise: bool
    ) -> int:
        options = operation.builtinOptions
        rates = (options.dilationHFactor, options.dilationWFactor)
        spread = np.zeros([(n - 1) * r + 1 for n, r in zip(kernel.shape, rates, strict=False)] + list(kernel.shape[2:]))
        spread[:: rates[0], :: rates[1]] = kernel
        strides = (options.strideH, options.strideW)
        position = self.build.convolution(
            name, self.source(operation), weight(spread), spread.shape, _weight(bias), strides, _padding(options),
            depthwise=depthwise,
        )  # fmt: skip
        made = self.build.nodes.pop(position)
        return self.requantized(name, made, operation, ratio)

    def add_max_pool_2d(self, name: str, operation: Any) -> int:
        size, strides, padding = _pool(operation)
        made = max_pool(self.build, name, self.source(operation), size, strides, padding)
        return self.clamped(name, made, int(operation.outputs[0]), operation.builtinOptions.fusedActivationFunction)

    def add_average_pool_2d(self, name: str, operation: Any) -> int:
        size, strides, padding = _pool(operation)
        index = int(operation.outputs[0])
        source = self.source(operation)
        made = self.build.add(
            AveragePool(name, source, self.shape(index), size, strides, padding, self.build.shape(source))
        )
        return self.rounded(
            name,
            made,
            index,
            self.scale(index)[0][0] * SEVERAL_ROUNDINGS,
            operation.builtinOptions.fusedActivationFunction,
        )

    def add_mean(self, name: str, operation: Any) -> int:
        source = self.source(operation)
        axes = self.constant(int(operation.inputs[1]), {self.fb.TensorType.INT32: np.int32}).ravel().tolist()
        if sorted(axis % 4 for axis in axes) != [1, 2] or len(self.build.shape(source)) != 3:
            raise UnsupportedLayerError(f"{self.name}: {name} is not over the places of an image.")
        index = int(operation.outputs[0])
        made = self.build.add(Mean(name, source, self.shape(index), self.build.shape(source)))
        return self.rounded(name, made, index, self.scale(index)[0][0] * SEVERAL_ROUNDINGS)

    def add_add(self, name: str, operation: Any) -> int:
        index = int(operation.outputs[0])
        sources = [self.source(operation, number) for number in (0, 1)]
        shapes = {self.build.shape(source) for source in sources}
        if len(shapes) > 1:
            raise UnsupportedLayerError(f"{self.name}: {name} adds shapes {sorted(shapes)}.")
        made = self.build.add(Sum(name, sources, shapes.pop(), (1, 1)))
        return self.rounded(
            name,
            made,
            index,
            self.scale(index)[0][0] * SEVERAL_ROUNDINGS,
            operation.builtinOptions.fusedActivationFunction,
        )

    def add_pad(self, name: str, operation: Any) -> int:
        kinds = {self.fb.TensorType.INT32: np.int32}
        around = self.constant(int(operation.inputs[1]), kinds).tolist()
        if around[0] != [0, 0] or around[-1] != [0, 0] or len(around) != 4:
            raise UnsupportedLayerError(f"{self.name}: {name} pads the batch or the channels.")
        return add_padding(self.build, name, self.source(operation), around[1:-1])


def _weight(values: np.ndarray | None) -> Any:
    return None if values is None else weight(values)


def _fused(operation: Any) -> int:
    return int(operation.builtinOptions.fusedActivationFunction)


def _padding(options: Any) -> str:
    return "SAME" if options.padding == 0 else "VALID"


def _pool(operation: Any) -> tuple[tuple[int, int], tuple[int, int], str]:
    options = operation.builtinOptions
    return (options.filterHeight, options.filterWidth), (options.strideH, options.strideW), _padding(options)
