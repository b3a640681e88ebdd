"""Finds the weight buffers of a .tflite file, trusting nothing in it.

Only five tables of TensorFlow Lite's schema are read (Model, SubGraph, Tensor, Buffer and the vectors between them), by
their field numbers. https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

from __future__ import annotations

import struct
from typing import NamedTuple

_MODEL_SUBGRAPHS, _MODEL_BUFFERS = 2, 4
_SUBGRAPH_TENSORS = 0
_TENSOR_SHAPE, _TENSOR_TYPE, _TENSOR_BUFFER, _TENSOR_NAME = 0, 1, 2, 3
_BUFFER_DATA, _BUFFER_OFFSET, _BUFFER_SIZE = 0, 1, 2

# tflite::TensorType -> bits of an element; types not listed are coded as bytes.
_WIDTHS = {0: 32, 1: 16, 2: 32, 7: 16, 10: 32, 15: 32, 16: 16, 17: 4, 18: 16, 20: 4}
TYPE_NAMES = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 5: "string", 6: "bool", 7: "int16",
    8: "complex64", 9: "int8", 10: "float64", 15: "uint32", 16: "uint16", 17: "int4", 18: "bfloat16", 19: "int2",
}  # fmt: skip


class WeightBuffer(NamedTuple):
    """A buffer that a tensor uses.

    Attributes:
        start: offset in the file.
        size: bytes.
        width: bits of an element: 4, 8, 16 or 32.
        shape: the first tensor's shape.
        name: the first tensor's name.
        dtype: the first tensor's type.
    """

    start: int
    size: int
    width: int
    shape: tuple[int, ...]
    name: str
    dtype: str


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def number(self, kind: str, at: int) -> int:
        if at < 0:
            raise struct.error("negative offset")
        return int(struct.unpack_from(kind, self.data, at)[0])

    def field(self, table: int, index: int) -> int:
        """Where a table's field lies, 0 when it is absent."""
        vtable = table - self.number("<i", table)
        slot = 4 + 2 * index
        if slot + 2 > self.number("<H", vtable):
            return 0
        offset = self.number("<H", vtable + slot)
        return table + offset if offset else 0

    def vector(self, table: int, index: int, item_size: int) -> tuple[int, int]:
        """(first item, items) of a vector field; (0, 0) when absent."""
        at = self.field(table, index)
        if not at:
            return 0, 0
        at += self.number("<I", at)
        count = self.number("<I", at)
        if at + 4 + count * item_size > len(self.data):
            raise struct.error("a vector runs past the end")
        return at + 4, count

    def tables(self, table: int, index: int) -> list[int]:
        first, count = self.vector(table, index, 4)
        return [at + self.number("<I", at) for at in range(first, first + 4 * count, 4)]

    def scalar(self, table: int, index: int, kind: str) -> int:
        at = self.field(table, index)
        return self.number(kind, at) if at else 0


def weight_buffers(data: bytes, smallest: int = 64) -> list[WeightBuffer]:
    """The buffers that tensors use, in file order, none overlapping another.

    Args:
        data: a file, .tflite or not.
        smallest: buffers of fewer bytes are left out.

    Returns:
        The buffers; none when the file is no sound .tflite.
    """
    try:
        return _weight_buffers(_Reader(data), smallest)
    except (struct.error, OverflowError):
        return []


def _weight_buffers(reader: _Reader, smallest: int) -> list[WeightBuffer]:
    data = reader.data
    if data[4:8] != b"TFL3":
        return []
    model = reader.number("<I", 0)
    regions = [_region(reader, buffer) for buffer in reader.tables(model, _MODEL_BUFFERS)]
    found: dict[int, WeightBuffer] = {}
    for subgraph in reader.tables(model, _MODEL_SUBGRAPHS):
        for tensor in reader.tables(subgraph, _SUBGRAPH_TENSORS):
            index = reader.scalar(tensor, _TENSOR_BUFFER, "<I")
            if index in found or index >= len(regions) or regions[index][1] < smallest:
                continue
            kind = reader.scalar(tensor, _TENSOR_TYPE, "<b")
            first, count = reader.vector(tensor, _TENSOR_SHAPE, 4)
            shape = struct.unpack_from(f"<{count}i", data, first) if count <= 16 else ()
            first, count = reader.vector(tensor, _TENSOR_NAME, 1)
            name = data[first : first + count].decode("utf-8", "replace")
            start, size = regions[index]
            width = _WIDTHS.get(kind, 8)
            if 8 * size % width:
                width = 8
            found[index] = WeightBuffer(start, size, width, shape, name, TYPE_NAMES.get(kind, f"type {kind}"))
    separate: list[WeightBuffer] = []
    for buffer in sorted(found.values()):
        if not separate or buffer.start >= separate[-1].start + separate[-1].size:
            separate.append(buffer)
    return separate


def _region(reader: _Reader, buffer: int) -> tuple[int, int]:
    first, count = reader.vector(buffer, _BUFFER_DATA, 1)
    if count:
        return first, count
    # Files beyond 2 GB keep their data behind the flatbuffer.
    start, size = (reader.scalar(buffer, index, "<Q") for index in (_BUFFER_OFFSET, _BUFFER_SIZE))
    return (start, size) if start > 1 and start + size <= len(reader.data) else (0, 0)
