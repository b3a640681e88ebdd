"""Fewer than 8 bits, and several widths, in one `.tflite` file: int4 and int2 weights, and precision by operation.

`narrow_weights` stores the weights of an int8 file in 4 or 2 bits where they fit and the runtime has the kernel: it is
for models that tfkit quantized to few bits. `mixed_precision` quantizes a float file operation by operation through the
package ai-edge-quantizer, https://github.com/google-ai-edge/ai-edge-quantizer, which writes forms that TensorFlow's
converter does not: int4 weights with float, with dynamically, or with statically quantized activations.

Which kernels the runtime has, and which are fast, is measured by `benchmarks/int4_kernels.py`.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import io
import os
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkit.export.runner import Runner, RunnerError, check_file
from tfkit.internal import checks
from tfkit.internal.files import write_atomically

#: Widths of weights that the runtime's kernels with int8 activations read, besides 8.
KERNELS = {"FULLY_CONNECTED": (2, 4), "CONV_2D": (4,), "DEPTHWISE_CONV_2D": (4,)}
#: Of these, what XNNPACK computes itself; the others fall back to the built-in kernels.
FAST_KERNELS = {"FULLY_CONNECTED": (4,)}
PRECISIONS = ("float32", "int8", "int4", "int8-dynamic", "int4-dynamic", "int8-weights", "int4-weights")
_DAMAGE = (AttributeError, IndexError, OverflowError, TypeError, ValueError, struct.error)


class NarrowRow(NamedTuple):
    """What `narrow_weights` did with the weights of one operation.

    Attributes:
        operation: its kind, as TFLite names it.
        name: of the weight tensor.
        shape: of the weight tensor.
        bits: width in the new file.
        least_bits: least width that holds the values.
        note: why it is wider than that; empty if it is not.
    """

    operation: str
    name: str
    shape: tuple[int, ...]
    bits: int
    least_bits: int
    note: str


class PrecisionRow(NamedTuple):
    """What `mixed_precision` did with one operation.

    Attributes:
        place: in the file, from 0.
        operation: its kind, as TFLite names it.
        name: of its output.
        asked: the precision that was asked for.
        given: the precision it got: the nearest that exists for its kind.
        weight_bytes: of its weights in the source.
    """

    place: int
    operation: str
    name: str
    asked: str
    given: str
    weight_bytes: int


def narrow_weights(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    fast_only: bool = True,
    force: bool = False,
) -> list[NarrowRow]:
    """Stores int8 weights that take few values as 4- or 2-bit integers.

    The weights keep their values exactly. The steps of biases become as coarse as those of the weights, so an output
    may move by a step. The packed size hardly changes, since `pack` codes narrow weights near their entropy anyway; the
    file itself, and the memory it takes when it is loaded, shrink.

    Args:
        source: an int8 `.tflite` file, as `convert(..., quantization="int8-qat")` writes it.
        path: the file to write.
        fast_only: only where XNNPACK has the kernel; other operations would run slower than in int8.
        force: overwrite an existing file.

    Returns:
        A row for the int8 weights of each operation that has kernels for narrow ones.

    Raises:
        FileExistsError: the file is there and `force` is False.
        RunnerError: the source is damaged.
    """
    target = _target(path, force)
    content = check_file(source)
    Runner(content)  # The runtime checks the file before it is parsed here.
    try:
        model = _parse(content)
        rows = [
            row
            for graph in model.subgraphs
            for operation in graph.operators
            if (row := _narrow(model, graph, operation, fast_only)) is not None
        ]
        narrowed = _serialize(model)
    except _DAMAGE as error:
        raise RunnerError(f"{source}: damaged .tflite file: {error}") from error
    if all(row.bits == 8 for row in rows):
        from tfkit.compression.base import NoEffectWarning

        reasons = "; ".join(sorted({row.note or "they need 8 bits" for row in rows})) or "it has no int8 weights"
        warnings.warn(f"{source}: no weights were narrowed: {reasons}.", NoEffectWarning, stacklevel=2)
    Runner(narrowed)
    write_atomically(target, narrowed)
    return rows


def pack_integers(values: np.ndarray, bits: int) -> np.ndarray:
    """Packs integers of 4 or 2 bits into bytes, the first in the lowest bits.

    >>> pack_integers(np.array([1, -2, 7]), 4).tolist()
    [225, 7]
    """
    each = 8 // bits
    padded = np.concatenate([values.ravel(), np.zeros(-values.size % each, values.dtype)])
    fields = (padded.astype(np.int64) & (2**bits - 1)).reshape(-1, each) << (bits * np.arange(each))
    return fields.sum(axis=1).astype(np.uint8)


def common_steps(integers: np.ndarray, bits: int = 8) -> np.ndarray:
    """Returns the least d for each channel with which `integers` / d are integers of at most `bits` bits.

    Args:
        integers: int8 weights, (weights of a channel, channels).
        bits: width; the integers are symmetric, so they reach 2**(bits - 1) - 1.

    Returns:
        (channels,); 0 where there is none.
    """
    values = np.abs(integers.astype(np.int64))
    divisor, largest = np.gcd.reduce(values, axis=0), values.max(axis=0)
    steps = np.arange(1, 129)[:, None]
    fits = (divisor % steps == 0) & (largest <= steps * (2 ** (bits - 1) - 1))
    return np.where(fits.any(axis=0), fits.argmax(axis=0) + 1, 0)


def _narrow(model: Any, graph: Any, operation: Any, fast_only: bool) -> NarrowRow | None:
    from ai_edge_litert.schema_py_generated import TensorType

    kind = _kind(model, operation)
    if kind not in KERNELS:
        return None
    index = int(operation.inputs[1])
    weight = graph.tensors[index]
    data = model.buffers[weight.buffer].data
    if weight.type != TensorType.INT8 or data is None or weight.quantization is None:
        return None
    shape, scales = tuple(map(int, weight.shape)), np.asarray(weight.quantization.scale, np.float32)
    integers = np.asarray(data, np.uint8).view(np.int8).reshape(shape)
    axis = int(weight.quantization.quantizedDimension) % len(shape)
    channels = np.moveaxis(integers, axis, -1).reshape(-1, shape[axis]) if scales.size > 1 else integers.reshape(-1, 1)
    least = next((bits for bits in range(2, 8) if common_steps(channels, bits).all()), 8)
    exact = [bits for bits in KERNELS[kind] if bits >= least]
    fast = [bits for bits in FAST_KERNELS.get(kind, ()) if bits >= least]
    chosen = min(fast if fast_only else exact, default=8)
    note = "" if chosen == least else f"{chosen} bits is the narrowest {'fast ' * fast_only}kernel that holds them"
    if chosen < 8 and (_is_shared(model, graph, index) or np.any(weight.quantization.zeroPoint)):
        chosen, note = 8, "other operations share the weights, or they have a zero point"
    if chosen < 8:
        steps = common_steps(channels, chosen)
        _rescale_bias(model, graph, operation, steps)
        spread = (
            steps.reshape([-1 if place == axis else 1 for place in range(len(shape))]) if scales.size > 1 else steps
        )
        model.buffers[weight.buffer].data = pack_integers(integers // spread, chosen)
        weight.type = TensorType.INT4 if chosen == 4 else TensorType.INT2
        weight.quantization.scale = (scales * steps).astype(np.float32)
    return NarrowRow(kind, weight.name.decode("utf-8", "replace"), shape, chosen, least, note)


def _rescale_bias(model: Any, graph: Any, operation: Any, steps: np.ndarray) -> None:
    """Gives the bias the scale that the kernels prescribe: that of the input times that of the weights."""
    if len(operation.inputs) < 3 or operation.inputs[2] < 0:
        return
    bias = graph.tensors[operation.inputs[2]]
    data = model.buffers[bias.buffer].data
    if bias.quantization is None or bias.quantization.scale is None or data is None:
        return  # A float bias: the activations are not quantized.
    if _is_shared(model, graph, int(operation.inputs[2])):
        bias = copy.deepcopy(bias)
        model.buffers.append(type(model.buffers[bias.buffer])())
        bias.buffer = len(model.buffers) - 1
        graph.tensors.append(bias)
        operation.inputs = np.array([*operation.inputs[:2], len(graph.tensors) - 1], np.int32)
    values = np.asarray(data, np.uint8).view(np.int32)
    model.buffers[bias.buffer].data = np.round(values / steps).astype(np.int32).view(np.uint8)
    bias.quantization.scale = (np.asarray(bias.quantization.scale) * steps).astype(np.float32)


def mixed_precision(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    precision: str | Mapping[str, str],
    *,
    calibration: Any = None,
    samples: int = 300,
    seed: int = 0,
    force: bool = False,
) -> list[PrecisionRow]:
    """Quantizes a float file, each operation to a precision of its own. Needs the package ai-edge-quantizer.

    Precisions: `"float32"`; `"int8"` and `"int4"`: weights of that width and int8 activations; `"…-dynamic"`: float
    activations that the kernel rounds to int8 as it runs; `"…-weights"`: weights only, computed in float.

    Args:
        source: a float32 `.tflite` file.
        path: the file to write.
        precision: one for all operations, or a mapping from patterns to precisions. A pattern, with shell wildcards, is
            matched against the operation's kind (`"CONV_2D"`), its place (`"#3"`) and each part of its output's name,
            where Keras puts the layer's name (`"conv1"`); the first that matches wins, and none means `"float32"`.
        calibration: representative inputs, for `"int8"` and `"int4"`; see `tfkit.export.convert`.
        samples: most of them to take.
        seed: of the choice.
        force: overwrite an existing file.

    Returns:
        A row for each operation; where its kind lacks the precision, it got the next one that exists.

    Raises:
        ValueError: an argument breaks its rule.
        FileExistsError: the file is there and `force` is False.
        ImportError: ai-edge-quantizer is not installed.
        RunnerError: the source is damaged, or it has several signatures.
    """
    rules = {"*": precision} if isinstance(precision, str) else dict(precision)
    for rule in rules.values():
        checks.choice("precision", rule, PRECISIONS)
    target = _target(path, force)
    content = check_file(source)
    runner = Runner(content)
    signatures = list(runner.interpreter.get_signature_list())
    if len(signatures) != 1:
        raise RunnerError(f"{source}: must have one signature to be quantized; it has {signatures}")
    try:
        from ai_edge_quantizer import quantizer as engine
    except ImportError:
        raise ImportError(
            "mixed_precision needs the package ai-edge-quantizer: pip install 'tfkit-keras[mixed]'"
        ) from None
    work = engine.Quantizer(bytearray(content))
    try:
        rows = _assign(work, _parse(content), rules)
    except _DAMAGE as error:
        raise RunnerError(f"{source}: damaged .tflite file: {error}") from error
    if all(row.given == "float32" for row in rows):
        from tfkit.compression.base import NoEffectWarning

        warnings.warn(f"{source}: precision={precision!r} quantizes no operation.", NoEffectWarning, stacklevel=2)
        write_atomically(target, content)
        return rows
    with _quiet():
        ranges = None
        if work.need_calibration:
            ranges = _ranges(work, content, {signatures[0]: _samples(runner, calibration, samples, seed)})
        quantized = bytes(work.quantize(ranges, enable_progress_report=False).quantized_model or b"")
    Runner(quantized)
    write_atomically(target, quantized)
    return rows


def _assign(work: Any, model: Any, rules: Mapping[str, str]) -> list[PrecisionRow]:
    """Writes the recipe, an entry for each operation, and tells what it says."""
    from ai_edge_litert.schema_py_generated import TensorType

    rows = []
    graph = model.subgraphs[0]
    for index, operation in enumerate(graph.operators):
        kind = _kind(model, operation)
        names = [graph.tensors[i].name.decode("utf-8", "replace") for i in operation.outputs]
        weights = [t for i in operation.inputs[1:2] if i >= 0 and (t := graph.tensors[i]).type == TensorType.FLOAT32]
        sizes = [0 if model.buffers[w.buffer].data is None else len(model.buffers[w.buffer].data) for w in weights]
        parts = {part for name in names for part in re.split(r"[/;]", name)}
        labels = {kind, f"#{index}", *parts, *(re.sub(r"_\d+$", "", part) for part in parts)}
        asked = next((rule for pattern, rule in rules.items() if fnmatch.filter(labels, pattern)), "float32")
        wanted = asked if sum(sizes) else asked.replace("int4", "int8")  # Without weights, only activations are left.
        given = _add(work, "^" + re.escape("".join(f"{name};" for name in names)) + "$", kind, wanted)
        rows.append(PrecisionRow(index, kind, ";".join(names), asked, given, sum(sizes)))
    return rows


def _add(work: Any, scope: str, kind: str, precision: str) -> str:
    """Adds an operation to the recipe in the precision, or in the next that its kind has; returns which."""
    from ai_edge_quantizer import qtyping

    if kind not in qtyping.TFLOperationName.__members__:
        return "float32"
    name = qtyping.TFLOperationName[kind]
    for candidate in (precision, precision.replace("int4", "int8")):
        bits = 4 if "int4" in candidate else 8
        with contextlib.suppress(ValueError):  # The package refuses a kind that lacks the form.
            if candidate in ("int8", "int4"):
                work.add_static_config(scope, name, activation_num_bits=8, weight_num_bits=bits)
            elif candidate.endswith("-dynamic"):
                work.add_dynamic_config(scope, name, num_bits=bits)
            elif candidate.endswith("-weights"):
                work.add_weight_only_config(scope, name, num_bits=bits)
            return candidate
    return "float32"


def _ranges(work: Any, content: bytes, data: Mapping[str, list[dict[str, np.ndarray]]]) -> Any:
    """Returns the extremes of each tensor over all the data.

    The quantizer itself takes a moving average of each batch's, which for batches of one clips much of the data.
    """
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    recipe = recipe_manager.RecipeManager()
    recipe.load_quantization_recipe(work.get_quantization_recipe())
    observer = calibrator.Calibrator(bytearray(content), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    observer.calibrate(data, recipe)
    return observer.get_model_qsvs()


def _samples(runner: Runner, calibration: Any, limit: int, seed: int) -> list[dict[str, np.ndarray]]:
    import tensorflow as tf

    from tfkit.export.convert import collect_samples

    if calibration is None:
        raise ValueError(
            "Argument `calibration` must hold representative inputs for the precisions 'int8' and 'int4'. "
            "Received: None. Pass a few hundred training inputs, or use a '-dynamic' or '-weights' precision."
        )
    specs = {name: tf.TensorSpec(detail["shape"], detail["dtype"]) for name, detail in runner.inputs.items()}
    arrays = collect_samples(calibration, specs, limit, seed)
    return [pieces for pieces, _ in runner.batches(arrays)]


def _target(path: str | os.PathLike[str], force: bool) -> Path:
    target = Path(path)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; pass force=True to overwrite it, or choose another path")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} of argument `path` does not exist; create it first")
    return target


def _kind(model: Any, operation: Any) -> str:
    from ai_edge_litert.schema_py_generated import BuiltinOperator

    code = model.operatorCodes[operation.opcodeIndex]
    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    return next((name for name, value in vars(BuiltinOperator).items() if value == number), "CUSTOM")


def _is_shared(model: Any, graph: Any, index: int) -> bool:
    buffer = graph.tensors[index].buffer
    readers = sum(int(i) == index for operation in graph.operators for i in operation.inputs)
    owners = sum(tensor.buffer == buffer for every in model.subgraphs for tensor in every.tensors)
    return readers > 1 or owners > 1


def _parse(content: bytes) -> Any:
    from ai_edge_litert.schema_py_generated import ModelT

    return ModelT.InitFromPackedBuf(content, 0)


def _serialize(model: Any) -> bytes:
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    class Aligned(schema.BufferT):
        """Puts the data at a multiple of 16 bytes, as the schema demands; the generated class does not."""

        def Pack(self, builder: Any) -> int:
            data = np.asarray(self.data, np.uint8).tobytes()
            builder.StartVector(1, len(data), 16)
            builder.head = builder.Head() - len(data)
            builder.Bytes[builder.Head() : builder.Head() + len(data)] = data
            vector = builder.EndVector()
            schema.BufferStart(builder)
            schema.BufferAddData(builder, vector)
            return int(schema.BufferEnd(builder))

    for buffer in model.buffers:
        if buffer.data is not None:
            buffer.__class__ = Aligned
    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the quantizer from drawing bars and warning of what it does on purpose."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
