"""Small .tflite files for the tests of packing, built straight from the schema: TensorFlow is not needed."""

from __future__ import annotations

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int32): 2, np.dtype(np.int8): 9}


def tflite(*arrays: np.ndarray) -> bytes:
    """A file whose tensors hold the arrays; it has no operators."""
    model, graph = schema.ModelT(), schema.SubGraphT()
    model.version = 3
    model.buffers = [schema.BufferT()]
    graph.tensors, graph.inputs, graph.outputs, graph.operators = [], [], [], []
    for i, array in enumerate(arrays):
        buffer, tensor = schema.BufferT(), schema.TensorT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        tensor.shape, tensor.type, tensor.buffer = list(array.shape), _TYPES[array.dtype], i + 1
        tensor.name = f"weights{i}"
        model.buffers.append(buffer)
        graph.tensors.append(tensor)
    model.subgraphs = [graph]
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def deep_compressed(rows: int, columns: int, *, density: float = 0.05, values: int = 16, seed: int = 0) -> np.ndarray:
    """A pruned and clustered float32 matrix; its columns differ in density, as pixels do."""
    draw = np.random.default_rng(seed)
    share = draw.beta(0.6, 6.0, columns)
    keep = draw.random((rows, columns)) < share * density / share.mean()
    codebook = np.sort(draw.normal(0, 0.1, values)).astype(np.float32)
    index = np.clip(draw.normal(values / 2, values / 5, (rows, columns)), 0, values - 1).astype(int)
    return np.where(keep, codebook[index], np.float32(0))
