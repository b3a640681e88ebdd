"""Sparse storage of block-pruned fully-connected layers, in float files and in int8 ones.

TensorFlow's converter stores sparse weights in float files only. With int8 its files give wrong answers: it leaves
the version of the operation as it was, and XNNPACK, which knows nothing of sparse weights, takes it over and
reads the short buffer as a dense one. Version 8 is the one that says "sparse"; operations that carry it run with
TFLite's own kernels, which handle blocks of 1 output x 4 inputs of float32 and of 1 x 16 of int8.
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/lite/kernels/fully_connected.cc
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkit.export.runner import Runner, RunnerError, check_file
from tfkit.internal import checks
from tfkit.internal.files import write_atomically

#: Inputs in a block, by the type of the weights.
BLOCKS = {"float32": 4, "int8": 16}
SPARSE_VERSION = 8
_SCHEMAS = ("ai_edge_litert.schema_py_generated", "tensorflow.lite.python.schema_py_generated")


class SparsifyError(RuntimeError):
    """A file cannot be read, or does not compute the same once its weights are sparse."""


class SparsifyResult(NamedTuple):
    """What `sparsify` did.

    Attributes:
        path: the file written.
        size_bytes: its size.
        dense_bytes: size of the file it was made from.
        tensors: (name, share of zero blocks) of each weight that is now stored sparsely.
    """

    path: Path
    size_bytes: int
    dense_bytes: int
    tensors: tuple[tuple[str, float], ...]


def sparsify(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    min_sparsity: float = 0.5,
    force: bool = False,
    seed: int = 0,
) -> SparsifyResult:
    """Stores the block-pruned weights of fully-connected operations sparsely.

    Weights are float32 in blocks of 1 x 4, or int8 in blocks of 1 x 16, of a file converted with `"float32"`,
    `"dynamic"`, `"int8"` or `"int8-qat"`; prune with `tfkit.compression.BlockPruning`. Before anything is written, the
    old and the new file run on the same random inputs.

    Args:
        source: a `.tflite` file with dense weights.
        target: the file to write; its folder must exist.
        min_sparsity: weights with a smaller share of zero blocks stay dense.
        force: overwrite an existing file.
        seed: of the random inputs.

    Returns:
        A `SparsifyResult`; `tensors` is empty if no weight qualified, and the file is then a copy.

    Raises:
        FileExistsError: `target` is there and `force` is False.
        SparsifyError: the file is damaged, or the two files disagree.
    """
    checks.number("min_sparsity", min_sparsity, 0, 1)
    goal = Path(target)
    if goal.exists() and not force:
        raise FileExistsError(f"{goal} exists; pass force=True to overwrite it, or choose another path")
    dense = check_file(source)
    try:
        content, tensors = sparsify_bytes(dense, min_sparsity)
    except Exception as error:  # The generated reader meets damage with whatever its bytes lead it to.
        raise SparsifyError(f"{source}: damaged .tflite file ({type(error).__name__}: {error})") from error
    if tensors:
        _check_same(dense, content, str(source), seed)
    write_atomically(goal, content)
    return SparsifyResult(goal, len(content), len(dense), tensors)


def schema() -> Any:
    """Returns the module with the file format's classes, of whichever runtime is there."""
    for name in _SCHEMAS:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise SparsifyError("no TFLite schema found: pip install ai-edge-litert (or tensorflow)")


def fully_connected_weights(model: Any) -> list[tuple[Any, Any, np.ndarray | None]]:
    """Returns (operation, tensor, dense values) of each fully-connected operation with constant weights.

    Args:
        model: a `ModelT` of the schema.

    Returns:
        Values are (outputs, inputs), float32 or int8; None where they are stored sparsely or in another type.
    """
    fb = schema()
    kinds = {fb.TensorType.FLOAT32: np.float32, fb.TensorType.INT8: np.int8}
    found = []
    for graph in model.subgraphs:
        for operation in graph.operators:
            code = model.operatorCodes[operation.opcodeIndex]
            if max(code.builtinCode, code.deprecatedBuiltinCode) != fb.BuiltinOperator.FULLY_CONNECTED:
                continue
            tensor = graph.tensors[operation.inputs[1]]
            data = model.buffers[tensor.buffer].data
            if data is None or len(data) == 0:
                continue
            values = None
            if tensor.sparsity is None and tensor.type in kinds:
                values = np.frombuffer(bytes(bytearray(data)), kinds[tensor.type]).reshape(tensor.shape)
            found.append((operation, tensor, values))
    return found


def zero_blocks(values: np.ndarray, block: int) -> float:
    """Returns the share of zero blocks of 1 x `block` in weights (outputs, inputs); 0 if the inputs do not divide."""
    if values.ndim != 2 or values.shape[1] % block:
        return 0.0
    return 1.0 - float(values.reshape(values.shape[0], -1, block).any(axis=-1).mean())


def sparsify_bytes(content: bytes, min_sparsity: float = 0.5) -> tuple[bytes, tuple[tuple[str, float], ...]]:
    """Does the work of `sparsify` on the bytes of a file, without its comparison.

    Returns:
        The new content, and (name, share of zero blocks) of each weight that was changed.
    """
    import flatbuffers

    fb = schema()
    model = fb.ModelT.InitFromPackedBuf(bytearray(content), 0)
    found = fully_connected_weights(model)
    readers = [index for graph in model.subgraphs for operation in graph.operators for index in operation.inputs]
    buffers = [tensor.buffer for graph in model.subgraphs for tensor in graph.tensors]
    changed = []
    for operation, tensor, values in found:
        if values is None or not _symmetric(tensor):
            continue
        block = BLOCKS[values.dtype.name]
        share = zero_blocks(values, block)
        shared = readers.count(operation.inputs[1]) > 1 or buffers.count(tensor.buffer) > 1
        if share < min_sparsity or share in (0.0, 1.0) or shared or len(model.subgraphs) > 1:
            continue
        blocks = values.reshape(values.shape[0], -1, block)
        kept = np.asarray(blocks.any(axis=-1))  # (outputs, blocks)
        tensor.sparsity = _sparsity(fb, kept, block)
        model.buffers[tensor.buffer].data = np.frombuffer(blocks[kept].tobytes(), np.uint8)
        operation.opcodeIndex = _sparse_code(fb, model, operation.opcodeIndex)
        name = tensor.name.decode("utf-8", "replace") if isinstance(tensor.name, bytes) else str(tensor.name)
        changed.append((name, share))
    if not changed:
        return content, ()
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output()), tuple(changed)


def _symmetric(tensor: Any) -> bool:
    zero_points = tensor.quantization.zeroPoint if tensor.quantization is not None else None
    return zero_points is None or not np.any(zero_points)


def _sparse_code(fb: Any, model: Any, index: int) -> int:
    """Returns the index of the operator code that says "sparse fully-connected"; adds it if it is missing."""
    old = model.operatorCodes[index]
    for position, code in enumerate(model.operatorCodes):
        if code.builtinCode == old.builtinCode and code.version == SPARSE_VERSION:
            return position
    new = fb.OperatorCodeT()
    new.builtinCode, new.deprecatedBuiltinCode = old.builtinCode, old.deprecatedBuiltinCode
    new.customCode, new.version = old.customCode, SPARSE_VERSION
    model.operatorCodes.append(new)
    return len(model.operatorCodes) - 1


def _sparsity(fb: Any, kept: np.ndarray, block: int) -> Any:
    """Describes blocks (outputs, blocks) in compressed rows: outputs dense, blocks listed, a block's inputs dense."""
    outputs, rows, inner = (fb.DimensionMetadataT() for _ in range(3))
    outputs.format, outputs.denseSize = fb.DimensionType.DENSE, kept.shape[0]
    inner.format, inner.denseSize = fb.DimensionType.DENSE, block
    rows.format = fb.DimensionType.SPARSE_CSR
    starts = np.concatenate([[0], np.cumsum(kept.sum(axis=1))])
    rows.arraySegments, rows.arraySegmentsType = _index_vector(fb, starts)
    rows.arrayIndices, rows.arrayIndicesType = _index_vector(fb, np.nonzero(kept)[1])
    described = fb.SparsityParametersT()
    described.traversalOrder, described.blockMap = [0, 1, 2], [1]
    described.dimMetadata = [outputs, rows, inner]
    return described


def _index_vector(fb: Any, values: np.ndarray) -> tuple[Any, int]:
    """Returns whole numbers in the narrowest vector of the schema, and its tag."""
    for name, dtype in (("Uint8Vector", np.uint8), ("Uint16Vector", np.uint16), ("Int32Vector", np.int32)):
        if values.max() <= np.iinfo(dtype).max:
            vector = getattr(fb, f"{name}T")()
            vector.values = values.astype(dtype)
            return vector, getattr(fb.SparseIndexVector, name)
    raise SparsifyError(f"a weight with {values.max()} blocks is too large for the format")


def _check_same(dense: bytes, sparse: bytes, name: str, seed: int) -> None:
    """Runs both files on random inputs.

    Raises:
        SparsifyError: the new file does not load, or the outputs differ by more than rounding.
    """
    rng = np.random.default_rng(seed)
    try:
        # The yardstick runs TFLite's own kernels, whose arithmetic the sparse ones share.
        old, new = Runner(dense, xnnpack=False), Runner(sparse)
        shapes = {key: (2, *(int(n) for n in detail["shape"][1:])) for key, detail in old.inputs.items()}
        inputs = {
            key: rng.normal(size=shape).astype(np.float32)
            if np.dtype(old.inputs[key]["dtype"]).kind == "f"
            else rng.integers(0, 2, shape).astype(old.inputs[key]["dtype"])
            for key, shape in shapes.items()
        }
        before, after = old.run(inputs), new.run(inputs)
    except RunnerError as error:
        raise SparsifyError(f"{name}: cannot be run once its weights are sparse: {error}") from error
    integer = any(np.dtype(detail["dtype"]).kind in "iu" for detail in old.interpreter.get_tensor_details())
    for key, expected in before.items():
        scale = float(np.abs(expected).max()) or 1.0
        # Between int8 operations a rounding apart may grow a little from layer to layer.
        worst = float(np.abs(after[key].astype(np.float64) - expected).max()) / scale
        if not worst <= (0.1 if integer else 1e-4):
            raise SparsifyError(f"{name}: output {key!r} changes by {worst:.2g} of its range; this runtime is at fault")
