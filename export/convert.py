"""Conversion of a Keras model to a `.tflite` file.

Whatever arrives (Keras 3, tf_keras, a SavedModel) is brought to one form: a traced function from named inputs of a
fixed batch size to named outputs. The names and their order survive in the file's signature.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfkit.export import tracing
from tfkit.export.runner import Runner, RunnerError
from tfkit.internal import checks
from tfkit.internal.files import write_atomically
from tfkit.internal.quiet import quiet_stderr

QUANTIZATIONS = ("float32", "float16", "dynamic", "int8", "int8-qat")
IO_TYPES = {"float": tf.float32, "int8": tf.int8, "uint8": tf.uint8}
CALIBRATION_SAMPLES = 300


class ConversionError(RuntimeError):
    """The converter refuses the model, or what it wrote does not load."""


def convert(
    model: Any,
    path: str | os.PathLike[str],
    *,
    quantization: str = "float32",
    calibration: Any = None,
    io: str = "float",
    batch_size: int = 1,
    sparse: bool = False,
    force: bool = False,
    signature: Any = None,
    calibration_samples: int = CALIBRATION_SAMPLES,
    seed: int = 0,
) -> Path:
    """Writes a model as a `.tflite` file.

    Args:
        model: a built Keras 3 model (functional, sequential or subclassed), a tf_keras model, the path of a `.keras`
            file, or of a SavedModel folder.
        path: the file to write; its folder must exist.
        quantization: `"float32"`; `"float16"` weights; `"dynamic"`: int8 weights, float activations; `"int8"`: weights
            and activations, ranges taken from `calibration`; `"int8-qat"`: weights and activations, ranges taken from
            the fake-quantisation the model was trained with.
        calibration: for `"int8"`, representative inputs as the model receives them: an array (samples, ...), a list or
            dictionary of arrays, or an iterable of batches such as a `tf.data.Dataset`; of `(x, y)` batches, x counts.
        io: type of the file's inputs and outputs, `"float"`, `"int8"` or `"uint8"`; integers need an int8 quantisation.
        batch_size: number of samples a run; fixed in the file.
        sparse: store zeros sparsely (TFLite's own sparse tensors). Only with `"float32"`: with the others this
            converter writes files that fail to load or give NaN. `tfkit.export.pack` stores zeros in any file.
        force: overwrite an existing file.
        signature: for a subclassed model, a `tf.TensorSpec` of its input, batch axis included, or a list or dictionary
            of them; for a SavedModel, the name of its signature.
        calibration_samples: most samples taken from `calibration`; of an array, a random choice.
        seed: of that choice.

    Returns:
        The path written.

    Raises:
        ValueError: an argument breaks its rule.
        FileExistsError: the file is there and `force` is False.
        ConversionError: the model uses operations that TFLite lacks, or the file does not load.
    """
    target = Path(path)
    _check_arguments(quantization, calibration, io, batch_size, sparse)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; pass force=True to overwrite it, or choose another path")
    if target.is_dir() or not target.name:
        raise IsADirectoryError(f"Argument `path` must name a file. Received: {str(path)!r}, a folder.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} of argument `path` does not exist; create it first")
    annotate, calibrate = quantization == "int8-qat", quantization == "int8"
    traced = tracing.trace(model, batch_size, signature, annotate=annotate, unroll=calibrate)
    samples = None
    if calibrate:
        if tracing.has_loop(traced.function):
            # TensorFlow's calibrator does not refuse such a model: it kills the process.
            raise ConversionError(
                "the model contains a loop, which cannot be calibrated for quantization='int8'. Use "
                "quantization='dynamic', or build its recurrent layers with unroll=True."
            )
        samples = collect_samples(calibration, traced.inputs, calibration_samples, seed)
    content = _run_converter(traced, quantization, io, samples, batch_size, sparse)
    content = in_order(content, list(traced.inputs), traced.outputs)
    try:
        runner = Runner(content)
    except RunnerError as error:
        raise ConversionError(f"the converted file does not load: {error}") from error
    _check_names(runner, traced)
    _check_types(runner, quantization, io)
    _warn_if_unchanged(runner, quantization)
    write_atomically(target, content)
    return target


def _check_arguments(quantization: str, calibration: Any, io: str, batch_size: int, sparse: bool) -> None:
    checks.choice("quantization", quantization, QUANTIZATIONS)
    checks.choice("io", io, tuple(IO_TYPES))
    checks.integer("batch_size", batch_size, 1)
    if quantization == "int8" and calibration is None:
        raise ValueError(
            "Argument `calibration` must hold representative inputs for quantization='int8'. Received: None. "
            "Pass a few hundred training inputs, or use quantization='dynamic', which needs none."
        )
    if quantization != "int8" and calibration is not None:
        raise ValueError(
            f"Argument `calibration` must be None for quantization='{quantization}', which takes no ranges from data. "
            "Received: data. Drop it, or use quantization='int8'."
        )
    if io != "float" and not quantization.startswith("int8"):
        raise ValueError(
            f"Argument `io` must be 'float' for quantization='{quantization}', whose activations are floats. "
            f"Received: '{io}'. Use quantization='int8' or 'int8-qat'."
        )
    if sparse and quantization != "float32":
        raise ValueError(
            f"Argument `sparse` must be False for quantization='{quantization}': this pair gives files that fail to "
            "load, or that silently give wrong outputs. Received: True. Use quantization='float32', or leave sparse "
            "out and shrink the file with tfkit.export.pack."
        )


def collect_samples(
    calibration: Any, inputs: Mapping[str, tf.TensorSpec], limit: int, seed: int
) -> dict[str, np.ndarray]:
    """Brings calibration data into arrays by input name.

    Args:
        calibration: see `convert`.
        inputs: the model's inputs by name, in order.
        limit: most samples to take; from arrays a random choice, from an iterable the first ones.
        seed: of the choice.

    Returns:
        Arrays (samples, ...) by name, all of the same length.

    Raises:
        ValueError: the data do not fit the inputs, are empty, or are not finite.
    """
    checks.integer("calibration_samples", limit, 1)
    names = list(inputs)
    if _is_batches(calibration, len(names)):
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        count = 0
        for batch in calibration:
            arrays = _by_name(batch[0] if isinstance(batch, tuple) else batch, names)
            for name, array in arrays.items():
                parts[name].append(array)
            count += len(arrays[names[0]])
            if count >= limit:
                break
        if not count:
            raise ValueError("Argument `calibration` must yield at least one batch. Received: an empty iterable.")
        arrays = {name: np.concatenate(pieces)[:limit] for name, pieces in parts.items()}
    else:
        arrays = _by_name(calibration, names)
        count = len(arrays[names[0]])
        if any(len(array) != count for array in arrays.values()):
            lengths = {name: len(array) for name, array in arrays.items()}
            raise ValueError(f"Argument `calibration` must hold as many samples for each input. Received: {lengths}.")
        if count > limit:
            chosen = np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))
            arrays = {name: array[chosen] for name, array in arrays.items()}
    for name, array in arrays.items():
        shape = tuple(inputs[name].shape)
        if array.shape[1:] != shape[1:] or not len(array):
            raise ValueError(
                f"Argument `calibration` must hold inputs of shape (samples, {', '.join(map(str, shape[1:]))}) "
                f"for '{name}'. Received: shape {array.shape}."
            )
        if array.dtype.kind not in "fiub":
            raise ValueError(f"Argument `calibration` must be numbers. Received: dtype {array.dtype} for '{name}'.")
    with np.errstate(over="ignore"):
        arrays = {name: array.astype(inputs[name].dtype.as_numpy_dtype) for name, array in arrays.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():  # After the cast, in which a float64 may have become infinite.
            raise ValueError(f"Argument `calibration` must be finite. Received: NaN or infinity in '{name}'.")
    return arrays


def _is_batches(data: Any, input_count: int) -> bool:
    if isinstance(data, (list, tuple)):
        return len(data) != input_count
    return not isinstance(data, (np.ndarray, tf.Tensor, Mapping)) and isinstance(data, Iterable)


def _by_name(data: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    if isinstance(data, Mapping):
        if set(data) != set(names):
            raise ValueError(f"Argument `calibration` must name the inputs {list(names)}. Received: {sorted(data)}.")
        return {name: np.asarray(data[name]) for name in names}
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    if any(np.ndim(item) == 0 for item in items):
        raise ValueError(
            "Argument `calibration` must be arrays of samples, or an iterable of batches. "
            f"Received: {type(data).__name__}."
        )
    if len(items) != len(names):
        raise ValueError(
            f"Argument `calibration` must hold an array for each of the inputs {list(names)}. "
            f"Received: {len(items)} array(s)."
        )
    return {name: np.asarray(item) for name, item in zip(names, items, strict=True)}


def _run_converter(
    traced: tracing.Traced,
    quantization: str,
    io: str,
    samples: dict[str, np.ndarray] | None,
    batch_size: int,
    sparse: bool,
) -> bytes:
    converter = tf.lite.TFLiteConverter.from_concrete_functions([traced.function], traced.holder)
    converter.optimizations = [tf.lite.Optimize.DEFAULT] if quantization != "float32" else []
    if sparse:
        converter.optimizations.append(tf.lite.Optimize.EXPERIMENTAL_SPARSITY)
    if quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if samples is not None:
        converter.representative_dataset = lambda: _batches(samples, batch_size)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    if io != "float":
        converter.inference_input_type = converter.inference_output_type = IO_TYPES[io]
    with tempfile.TemporaryFile() as log, quiet_stderr(log), _quiet_logger(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")
        try:
            return bytes(converter.convert())
        except Exception as error:  # the converter raises its own, RuntimeError, ValueError and TypeError alike
            log.seek(0)
            text = f"{error}\n{log.read().decode('utf-8', 'replace')}"
            raise ConversionError(explain(text, quantization)) from error


def in_order(content: bytes, inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    """Puts the inputs and outputs of a file in the model's order; the converter leaves them in an order of its own.

    Args:
        content: a file with one signature, whose names these are.
        inputs, outputs: the names in the order that is wanted.

    Returns:
        The file, of the same length.
    """
    from ai_edge_litert.schema_py_generated import Model

    patched = bytearray(content)
    model = Model.GetRootAs(content, 0)
    if model.SignatureDefsLength() != 1:
        return content
    signature, graph = model.SignatureDefs(0), model.Subgraphs(0)
    for names, count, item, slot in (
        (inputs, signature.InputsLength(), signature.Inputs, 1),
        (outputs, signature.OutputsLength(), signature.Outputs, 2),
    ):
        tensors = {item(i).Name().decode(): item(i).TensorIndex() for i in range(count)}
        wanted = [tensors[name] for name in names if name in tensors]
        table = graph._tab
        field = table.Offset(4 + 2 * slot)  # `inputs` and `outputs` are the subgraph's second and third field.
        # A tensor listed twice, or a name the converter has changed, leaves the order as it is.
        if field and sorted(wanted) == sorted(graph.InputsAsNumpy() if slot == 1 else graph.OutputsAsNumpy()):
            start = table.Vector(field)
            patched[start : start + 4 * len(wanted)] = np.asarray(wanted, "<i4").tobytes()
    return bytes(patched)


def _batches(samples: dict[str, np.ndarray], batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    count = len(next(iter(samples.values())))
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size) % count  # wraps, since a short last batch does not fit the file
        yield {name: array[rows] for name, array in samples.items()}


def explain(text: str, quantization: str) -> str:
    """Turns the converter's output into one message that names the operations and the remedy."""
    missing: set[str] = set()
    for found in re.findall(r"(?:TF Select|Flex|Custom) ops: ([^\n]+)", text):
        missing |= {name.strip() for name in found.split(",")}
    missing |= set(re.findall(r"'tf\.(\w+)' op is neither a custom op nor a flex op", text))
    if missing:
        return (
            f"TFLite has no built-in operation for {', '.join(sorted(missing))}. Replace what uses it in the model by "
            "operations TFLite has (for example gelu(approximate=True) for the exact one), or move it out of the model."
        )
    if "inference_input_type and inference_output_type must be" in text:
        return (
            "the model's inputs and outputs are not quantised, so the file's cannot be integers. Use io='float', or "
            "train the model with a fake-quantisation on every input and output."
        )
    if quantization == "int8" and "failed to quantize" in text.lower():
        return (
            "an operation of the model has no int8 form: "
            + _last_line(text)
            + " Use quantization='dynamic' or 'float16' for this model."
        )
    return f"the converter refuses the model: {_last_line(text)}"


def _last_line(text: str) -> str:
    errors = re.findall(r"error: ([^\n]+)", text) or [line for line in text.splitlines() if line.strip()]
    return (errors[0] if errors else "it gave no reason").strip()[:400]


def _check_names(runner: Runner, traced: tracing.Traced) -> None:
    """Sees that inputs and outputs of which there are several can be told apart.

    Raises:
        ConversionError: the converter has dropped their names.
    """
    for kind, wanted, found in (("input", traced.inputs, runner.inputs), ("output", traced.outputs, runner.outputs)):
        if len(wanted) > 1 and set(wanted) != set(found):
            raise ConversionError(
                f"the file names its {kind}s {list(found)}, where the model has {list(wanted)}, and so their order is "
                f"not known. Give the model's inputs and outputs plain names, of letters, digits and underscores."
            )


def _check_types(runner: Runner, quantization: str, io: str) -> None:
    """Sees that the file has the types that were asked for.

    Raises:
        ConversionError: it has not; typically an input or output of a QAT model that no fake-quantisation touches.
    """
    if io == "float":
        return
    for kind, tensors in (("input", runner.inputs), ("output", runner.outputs)):
        for name, detail in tensors.items():
            dtype, scale = np.dtype(detail["dtype"]), detail["quantization"][0]
            if dtype.name == io and not scale:
                remedy = (
                    "train it with a fake-quantisation on every input and output, or use io='float'"
                    if quantization == "int8-qat"
                    else "use io='float'"
                )
                raise ConversionError(f"{kind} {name!r} of the file is {io} but has no scale; {remedy}")


def _warn_if_unchanged(runner: Runner, quantization: str) -> None:
    from tfkit.compression.base import NoEffectWarning

    stored = {np.dtype(d["dtype"]).name for d in runner.interpreter.get_tensor_details()}
    small = {"float16"} if quantization == "float16" else {"int8", "uint8", "int16"}
    if quantization != "float32" and not stored & small:
        remedy = {
            "dynamic": "weights of fewer than 1,024 elements stay as they are; use 'int8' for so small a model",
            "int8-qat": "train the model with tfkit.compression.QuantizationAware first",
        }.get(quantization, "the model has no weights of its own")
        warnings.warn(
            f"quantization='{quantization}' changed nothing: the file holds floats only; {remedy}.",
            NoEffectWarning,
            stacklevel=3,
        )


@contextlib.contextmanager
def _quiet_logger() -> Iterator[None]:
    """Keeps TensorFlow from announcing the temporary folders that the converter writes."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
