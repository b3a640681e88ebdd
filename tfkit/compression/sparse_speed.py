"""Says which layers of a pruned model TFLite can run faster, and why the others not.

TFLite has one kernel for sparse weights that pays: the fully-connected layer with zeros in blocks, of 1 output x 4
inputs in float32 files, or of 1 output x 16 inputs in files with int8 weights and float activations (`"dynamic"`).
Everything else gains size only:

- Zeros in no pattern, and N:M patterns, have no kernel: a file that stores them sparsely is unpacked when it is loaded.
- Convolutions have no sparse kernel in TFLite. XNNPACK has one for 1x1 convolutions in float32; it is switched off on
  x86 processors with AVX, and chosen elsewhere only if nearly all of the
  graph fits it.
- An int8 sparse convolution does not exist.
- With int8 activations too, the 1x16 kernel runs, but a processor with XNNPACK's int8 kernels is faster on the dense
  layer.

The thresholds are where the sparse kernel overtook XNNPACK's dense one at 1024 x 1024, batch 1, one thread, on an x86
with AVX-512 (benchmarks/papers/block_pruning.py measures them again); other machines differ somewhat. Batches larger
than 1 favour the dense kernel.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import keras
import numpy as np

from tfkit.internal import surgery

#: Share of zero blocks above which the sparse kernel is the faster one, by the file's quantization.
FASTER_ABOVE = {"float32": 0.75, "dynamic": 0.87}
_BLOCK = {"float32": 4, "dynamic": 16, "int8": 16}


@dataclasses.dataclass(frozen=True)
class LayerSpeed:
    """What the zeros of one weight are worth.

    Attributes:
        name: of the layer, or of the tensor in a file.
        operation: the TFLite operation that uses the weight.
        weights: their number.
        zeros: share of zeros, in [0, 1].
        zero_blocks: share of zero blocks of the size that `quantization` would need; 0 where no kernel uses blocks.
        stored_sparsely: whether the file stores the zeros sparsely; always False of a Keras model.
        faster: whether the zeros make the layer faster: of a file as it is, of a Keras model when exported as `remedy`
            says.
        reason: why, or why not.
        remedy: what to do; empty if there is nothing to do.
    """

    name: str
    operation: str
    weights: int
    zeros: float
    zero_blocks: float
    stored_sparsely: bool
    faster: bool
    reason: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class SparsitySpeed:
    """The verdict for each layer of a model or a file; prints as a table.

    Attributes:
        source: the model's name, or the file's.
        quantization: `"float32"`, `"dynamic"` or `"int8"`; of a file "as stored".
        layers: a row for each weight.
    """

    source: str
    quantization: str
    layers: tuple[LayerSpeed, ...]

    @property
    def faster(self) -> bool:
        """Whether any layer gains."""
        return any(layer.faster for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{self.source} ({self.quantization})"]
        for layer in self.layers:
            verdict = "faster" if layer.faster else "not faster"
            lines.append(
                f"  {layer.name:<24} {layer.operation:<18} {layer.zeros:>4.0%} zeros, {layer.zero_blocks:>4.0%} of "
                f"blocks: {verdict}; {layer.reason} {layer.remedy}".rstrip()
            )
        return "\n".join(lines)


def sparsity_speed(model: Any, *, quantization: str = "float32") -> SparsitySpeed:
    """Says for each layer whether its zeros can make it faster in TFLite, and what it takes.

    Args:
        model: a Keras model, plain or prepared, or the path of a `.tflite` file.
        quantization: of a Keras model, how it will be exported: `"float32"`, `"dynamic"` or `"int8"` (which stands for
            `"int8-qat"` too). A file says it itself.

    Returns:
        A `SparsitySpeed`.

    Raises:
        ValueError: an argument breaks its rule, or the file is none.
    """
    from tfkit.internal import checks

    if isinstance(model, (str, os.PathLike)):
        return _of_file(model)
    checks.choice("quantization", quantization, tuple(_BLOCK))
    rows = []
    for layer in surgery.leaf_layers(model):
        plain = surgery.source(layer)
        effective = layer.effective_weights() if plain is not layer else {}
        for name, variable in surgery.compressible_weights(plain).items():
            value = keras.ops.convert_to_numpy(effective.get(name, variable))
            label = layer.name if name in surgery.WEIGHT_NAMES else f"{layer.name}/{name}"
            operation = _operation(plain)
            matrix = value.T if operation == "FULLY_CONNECTED" else None
            rows.append(_judge(label, operation, value, matrix, quantization, stored=None))
    return SparsitySpeed(model.name, quantization, tuple(rows))


def _operation(layer: keras.Layer) -> str:
    """Returns the name of the TFLite operation that a Keras layer becomes, where that is certain."""
    kinds = {
        keras.layers.Dense: "FULLY_CONNECTED",
        keras.layers.Conv2D: "CONV_2D",
        keras.layers.Conv1D: "CONV_2D",
        keras.layers.DepthwiseConv2D: "DEPTHWISE_CONV_2D",
        keras.layers.DepthwiseConv1D: "DEPTHWISE_CONV_2D",
        keras.layers.Conv2DTranspose: "TRANSPOSE_CONV",
        keras.layers.Conv1DTranspose: "TRANSPOSE_CONV",
        keras.layers.Embedding: "GATHER",
    }
    return kinds.get(type(layer), type(layer).__name__)


def _of_file(path: str | os.PathLike[str]) -> SparsitySpeed:
    from tfkit.export import runner, sparse_storage

    content = runner.check_file(path)
    fb = sparse_storage.schema()
    try:
        model = fb.ModelT.InitFromPackedBuf(bytearray(content), 0)
        rows = [row for graph in model.subgraphs for row in _rows(fb, model, graph)]
    except Exception as error:  # The generated reader meets damage with whatever its bytes lead it to.
        raise ValueError(f"{path}: damaged .tflite file ({type(error).__name__}: {error})") from error
    return SparsitySpeed(str(path), "as stored", tuple(rows))


def _rows(fb: Any, model: Any, graph: Any) -> list[LayerSpeed]:
    names = {value: name for name, value in vars(fb.BuiltinOperator).items() if isinstance(value, int)}
    types = {fb.TensorType.FLOAT32: np.float32, fb.TensorType.INT8: np.int8}
    unpacked = {}  # Output of a DENSIFY operation -> the sparse tensor it unpacks.
    rows = []
    for operation in graph.operators:
        code = model.operatorCodes[operation.opcodeIndex]
        kind = names.get(max(code.builtinCode, code.deprecatedBuiltinCode), "unknown")
        if kind == "DENSIFY":
            unpacked[operation.outputs[0]] = operation.inputs[0]
            continue
        if kind not in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "BATCH_MATMUL"):
            continue
        index = unpacked.get(operation.inputs[1], operation.inputs[1])
        tensor, data_input = graph.tensors[index], graph.tensors[operation.inputs[2 if kind == "TRANSPOSE_CONV" else 0]]
        data = model.buffers[tensor.buffer].data
        if data is None or not len(data) or tensor.type not in types:
            continue
        values = np.frombuffer(bytes(bytearray(data)), types[tensor.type])
        count = int(np.prod(tensor.shape))
        if tensor.sparsity is not None:
            # What is stored, zeros inside of blocks included; the rest of the weight is zero.
            values = np.concatenate([values[:count], np.zeros(max(count - values.size, 0), values.dtype)])
        values = values.reshape(tensor.shape)
        integer_inputs = data_input.type == fb.TensorType.INT8
        quantization = "float32" if values.dtype == np.float32 else "int8" if integer_inputs else "dynamic"
        name = tensor.name.decode("utf-8", "replace") if isinstance(tensor.name, bytes) else str(tensor.name)
        stored = "dense"
        block_share = None
        if tensor.sparsity is not None:
            stored = "unpacked" if index != operation.inputs[1] else "sparse"
            kept = len(model.buffers[tensor.buffer].data) // (values.itemsize * _BLOCK[quantization])
            block_share = 1.0 - kept * _BLOCK[quantization] / count
        matrix = values if kind == "FULLY_CONNECTED" else None
        rows.append(_judge(name, kind, values, matrix, quantization, stored, block_share))
    return rows


def _judge(
    name: str,
    operation: str,
    value: np.ndarray,
    matrix: np.ndarray | None,
    quantization: str,
    stored: str | None,
    block_share: float | None = None,
) -> LayerSpeed:
    """Gives the verdict on one weight.

    Args:
        name, operation, quantization: see `LayerSpeed` and `sparsity_speed`.
        value: the weight.
        matrix: (outputs, inputs) of a fully-connected operation, else None.
        stored: of a file, "dense", "sparse", or "unpacked" where it is unpacked at load; None of a Keras model.
        block_share: share of zero blocks, where it is known.
    """
    from tfkit.export.sparse_storage import zero_blocks

    block = _BLOCK[quantization]
    zeros = 1.0 - float(np.count_nonzero(value)) / value.size
    blocks = 0.0
    if matrix is not None:
        blocks = zero_blocks(matrix, block) if block_share is None else block_share
    faster, reason, remedy = False, "", ""
    wanted = FASTER_ABOVE.get(quantization, 1.0)
    store = (
        "Export with tfkit.export.convert(..., sparse=True)."
        if quantization == "float32"
        else f"Export with quantization='{quantization}', then call tfkit.export.sparsify."
    )
    prune = f"Prune it with BlockPruning({max(wanted, 0.9)}, block=(1, {block}))."
    if zeros < 0.3:
        reason = "it has few zeros."
    elif stored == "unpacked" and operation != "FULLY_CONNECTED":
        reason = (
            "the sparse weights are unpacked when the file is loaded: TFLite has no sparse kernel for this operation."
        )
    elif operation in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        reason = (
            "int8 sparse convolution does not exist."
            if quantization == "int8"
            else "sparse convolution is off on x86 with AVX, and TFLite itself has none."
        )
        remedy = "Remove whole filters instead (structured pruning)."
    elif operation != "FULLY_CONNECTED" or matrix is None:
        reason = f"TFLite has no sparse kernel for {operation}."
    elif matrix.shape[-1] % block:
        reason = f"its {matrix.shape[-1]} inputs are not a multiple of {block}, the size of a block."
        remedy = f"Choose a width that is a multiple of {block}."
    elif blocks < wanted and blocks < zeros**block + 0.05:  # No more than chance would make.
        reason = f"its zeros form no blocks of 1x{block}: unstructured zeros give no speed."
        remedy = prune if quantization in FASTER_ABOVE else ""
    elif quantization == "int8":
        reason = (
            "the 1x16 kernel for int8 activations exists, but XNNPACK's dense int8 one is faster on x86 with AVX-512."
        )
        remedy = "Take quantization='dynamic', or keep the file dense; tfkit.export.sparsify makes it smaller."
    elif blocks < wanted:
        reason = f"below about {wanted:.0%} of zero blocks the dense kernel is the faster one."
        remedy = f"Prune to 90 % with BlockPruning(0.9, block=(1, {block}))."
    elif stored == "dense":
        reason = f"its blocks of 1x{block} are zero, but the file stores them densely."
        remedy = store
    elif stored == "unpacked":
        reason = "the sparse weights are unpacked when the file is loaded."
        remedy = "Convert densely, then call tfkit.export.sparsify."
    else:
        faster = True
        reason = f"the sparse kernel for blocks of 1x{block} skips {blocks:.0%} of them."
        remedy = store if stored is None else ""
    sparsely = stored in ("sparse", "unpacked")
    return LayerSpeed(name, operation, value.size, zeros, blocks, sparsely, faster, reason, remedy)
