"""The weights as they lie in a `.tflite` file: zeros, distinct values and bit widths, layer by layer."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import keras
import numpy as np

from tfkit.export.runner import Runner
from tfkit.internal import surgery

#: Smaller constants are shapes, paddings and the like.
LEAST_ELEMENTS = 16


class FileWeight(NamedTuple):
    """One weight tensor of a file.

    Attributes:
        layer: the Keras layer it belongs to, or the file's operation where none fits.
        shape: as stored.
        elements: how many.
        zeros: share of them that are zero, in 0..1.
        distinct: number of distinct values, zero included.
        stored_bits: width of an element in the file.
        index_bits: least width of an index into the distinct values.
    """

    layer: str
    shape: tuple[int, ...]
    elements: int
    zeros: float
    distinct: int
    stored_bits: int
    index_bits: int


def file_weights(path: str | os.PathLike[str], model: keras.Model | None = None) -> list[FileWeight]:
    """Reads the weight tensors of a file, in the order in which its operations use them.

    Args:
        path: the `.tflite` file.
        model: the Keras model it was made from, whose layers give the names.
    """
    interpreter = Runner(path, xnnpack=False).interpreter
    details = {int(d["index"]): d for d in interpreter.get_tensor_details()}
    operations = interpreter._get_ops_details()
    sources = {int(op["outputs"][0]): op for op in operations if len(op["outputs"])}
    computed = {int(index) for op in operations for index in op["outputs"]}
    computed |= {int(d["index"]) for d in interpreter.get_input_details()}
    unnamed = _layer_sizes(model) if model is not None else []
    found: dict[int, FileWeight] = {}
    for operation in operations:
        for index in map(int, operation["inputs"]):
            if index in computed and sources.get(index, {}).get("op_name") == "DEQUANTIZE":
                index = int(sources[index]["inputs"][0])  # Half-precision weights are widened before use.
            detail = details.get(index)
            if detail is None or index in computed or index in found or len(detail["shape"]) < 2:
                continue
            if int(np.prod(detail["shape"])) < LEAST_ELEMENTS or operation["op_name"] == "DEQUANTIZE":
                continue
            value = np.asarray(interpreter.get_tensor(index))
            found[index] = _describe(_take_name(unnamed, value.size, operation["op_name"]), value, detail)
    return list(found.values())


def total_sparsity(weights: list[FileWeight]) -> float:
    """Returns the share of zeros over all the weights, in 0..1."""
    return sum(item.zeros * item.elements for item in weights) / max(sum(item.elements for item in weights), 1)


def _describe(name: str, value: np.ndarray, detail: Any) -> FileWeight:
    zero_points = detail["quantization_parameters"]["zero_points"]
    zero = int(zero_points[0]) if len(zero_points) else 0
    distinct = len(np.unique(value))
    return FileWeight(
        layer=name,
        shape=tuple(int(n) for n in value.shape),
        elements=int(value.size),
        zeros=float(np.mean(value == zero)),
        distinct=distinct,
        stored_bits=value.dtype.itemsize * 8,
        index_bits=max(1, math.ceil(math.log2(distinct))) if distinct > 1 else 0,
    )


def _layer_sizes(model: keras.Model) -> list[tuple[str, int]]:
    return [
        (layer.name, int(math.prod(variable.shape)))
        for layer in surgery.leaf_layers(model)
        for variable in surgery.compressible_weights(surgery.source(layer)).values()
    ]


def _take_name(unnamed: list[tuple[str, int]], size: int, operation: str) -> str:
    """Takes the first layer of this size off the list: both lists are in the order of computation."""
    for position, (name, count) in enumerate(unnamed):
        if count == size:
            del unnamed[position]
            return name
    return operation.lower()
