"""Proof that a `.tflite` file computes what the model computes, on real data, with more than one set of kernels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from tfkit.export import tracing
from tfkit.export.runner import KERNELS, Runner
from tfkit.internal import checks

ROUNDING_STEPS = 1e-3  # float32 noise of a difference of two dequantised values, in steps


class ParityError(AssertionError):
    """The file and the model differ by more than is allowed."""


@dataclasses.dataclass(frozen=True)
class OutputParity:
    """Agreement of one output of the file, run with one set of kernels, with the model.

    Attributes:
        kernels: `"xnnpack"`, `"builtin"` or `"reference"`.
        output: name of the output.
        samples: number of samples compared.
        max_abs_error, mean_abs_error: over all samples and elements; infinite if either side is NaN or infinite.
        max_error_steps: the largest error in steps of the output's quantisation; None for an output that has none.
        step: size of that step; for a float output that of the tensor it was dequantised from.
        argmax_agreement: fraction of samples (or positions) with the same largest element; None for width 1.
        nonfinite_count: number of NaN or infinite elements on either side.
        reference_max: largest magnitude of the model's own output.
    """

    kernels: str
    output: str
    samples: int
    max_abs_error: float
    mean_abs_error: float
    max_error_steps: float | None
    step: float | None
    argmax_agreement: float | None
    nonfinite_count: int
    reference_max: float

    def complaints(self, max_steps: float, atol: float, min_agreement: float) -> list[str]:
        """Returns what is wrong with this output; see `ParityReport.ok`."""
        where = f"{self.output} with {self.kernels} kernels"
        found = []
        if self.nonfinite_count:
            found.append(f"{where}: {self.nonfinite_count} elements are NaN or infinite")
        elif self.max_error_steps is not None:
            if not self.max_error_steps <= max_steps + ROUNDING_STEPS:
                found.append(
                    f"{where}: off by {self.max_error_steps:.2f} steps of {self.step:.3g}, allowed {max_steps:g}"
                )
        elif not self.max_abs_error <= atol * max(1.0, self.reference_max):
            allowed = atol * max(1.0, self.reference_max)
            found.append(f"{where}: off by {self.max_abs_error:.3g}, allowed {allowed:.3g}")
        if self.argmax_agreement is not None and not self.argmax_agreement >= min_agreement:
            found.append(
                f"{where}: the largest element agrees on {self.argmax_agreement:.4f}, at least {min_agreement:g}"
            )
        return found


@dataclasses.dataclass(frozen=True)
class ParityReport:
    """Agreement of a file with a model: one `OutputParity` for each set of kernels and output."""

    path: str
    samples: int
    results: tuple[OutputParity, ...]

    def of(self, kernels: str) -> ParityReport:
        """Returns the part that belongs to one set of kernels."""
        return dataclasses.replace(self, results=tuple(r for r in self.results if r.kernels == kernels))

    @property
    def max_abs_error(self) -> float:
        """Largest error of any output."""
        return max(r.max_abs_error for r in self.results)

    @property
    def max_error_steps(self) -> float | None:
        """Largest error in steps of any quantised output; None if none is quantised."""
        return max((r.max_error_steps for r in self.results if r.max_error_steps is not None), default=None)

    @property
    def argmax_agreement(self) -> float | None:
        """Smallest agreement of any output; None if all have width 1."""
        return min((r.argmax_agreement for r in self.results if r.argmax_agreement is not None), default=None)

    @property
    def nonfinite_count(self) -> int:
        """Number of NaN or infinite elements met."""
        return sum(r.nonfinite_count for r in self.results)

    def ok(self, *, max_steps: float = 1.0, atol: float = 1e-4, min_agreement: float = 0.99) -> bool:
        """Whether file and model agree.

        Args:
            max_steps: largest error of a quantised output, in its steps.
            atol: largest error of any other output, times the larger of 1 and the model's largest output.
            min_agreement: least fraction of samples whose largest element is the same.

        Returns:
            False also if anything is NaN or infinite.
        """
        return not any(r.complaints(max_steps, atol, min_agreement) for r in self.results)

    def raise_if_different(self, *, max_steps: float = 1.0, atol: float = 1e-4, min_agreement: float = 0.99) -> None:
        """Raises `ParityError` where `ok` would be False; the message lists every output and by how much it is off."""
        found = [text for r in self.results for text in r.complaints(max_steps, atol, min_agreement)]
        if found:
            raise ParityError(f"{self.path} differs from the model on {self.samples} samples: " + "; ".join(found))

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        return dataclasses.asdict(self)


def verify(
    model: Callable[..., Any],
    path: str | os.PathLike[str],
    data: Any,
    *,
    kernels: Sequence[str] = ("xnnpack", "reference"),
    batch_size: int = 256,
    threads: int = 1,
) -> ParityReport:
    """Runs model and file on the same data and compares them.

    Args:
        model: a Keras model, a tf_keras model, or any callable from a batch to its output(s).
        path: the `.tflite` file.
        data: inputs as the model takes them: an array (samples, ...), or a list or dictionary of arrays.
        kernels: which of the runtime's kernels to run: `"xnnpack"`, `"builtin"`, `"reference"`.
        batch_size: samples the model sees at once; the file runs with its own batch size.
        threads: number of threads of the file's runtime.

    Returns:
        The report; `raise_if_different` turns it into an assertion.

    Raises:
        ValueError: the data do not fit, or outputs of model and file cannot be matched.
        RunnerError: the file cannot be run.
    """
    checks.integer("batch_size", batch_size, 1)
    for kind in kernels:
        checks.choice("kernels", kind, KERNELS)
    if not kernels:
        raise checks.error("kernels", "at least one of " + ", ".join(KERNELS), kernels)
    data = keras.tree.map_structure(np.asarray, data)
    flat = keras.tree.flatten(data)
    if not flat or any(array.ndim == 0 or array.dtype == object for array in flat):
        raise ValueError(
            "Argument `data` must be an array of samples, or a list or dictionary of arrays. "
            f"Received: {[f'{array.dtype} of shape {array.shape}' for array in flat]}. Of a tf.data.Dataset, take "
            "batches first: np.concatenate([x for x, y in dataset])."
        )
    samples = len(flat[0])
    if not samples or any(len(array) != samples for array in flat):
        raise ValueError(
            "Argument `data` must hold at least one sample, and as many for each input. "
            f"Received: {[array.shape for array in flat]}."
        )
    expected = [tuple(tensor.shape) for tensor in getattr(model, "inputs", None) or ()]
    for shape, array in zip(expected, flat, strict=False):
        if len(shape) != array.ndim or any(a not in (None, b) for a, b in zip(shape[1:], array.shape[1:], strict=True)):
            raise ValueError(
                f"Argument `data` must have the shape that the model takes, {shape}. Received: {array.shape}."
            )
    wanted = _run_model(model, data, samples, batch_size)
    results = []
    for kind in kernels:
        runner = Runner(path, threads, xnnpack=kind == "xnnpack", reference=kind == "reference")
        by_name = isinstance(data, Mapping) and set(data) == set(runner.inputs)
        got = runner.run(data if by_name else (flat if len(flat) > 1 else flat[0]))
        steps = output_steps(runner)
        for name, reference in _match(wanted, list(got)).items():
            results.append(compare(reference, got[name], kernels=kind, output=name, step=steps[name]))
    return ParityReport(str(Path(path)), samples, tuple(results))


def compare(
    reference: np.ndarray, got: np.ndarray, *, kernels: str = "", output: str = "", step: float | None = None
) -> OutputParity:
    """Compares one output.

    Args:
        reference: the model's output, (samples, ...).
        got: the file's output, of the same shape.
        kernels, output: labels for the result.
        step: size of the output's quantisation step, or None.

    Raises:
        ValueError: the shapes differ.
    """
    if reference.shape != got.shape:
        raise ValueError(f"output {output!r} of the file has shape {got.shape}, of the model {reference.shape}")
    a, b = reference.astype(np.float64), got.astype(np.float64)
    bad = ~(np.isfinite(a) & np.isfinite(b))
    error = np.where(bad, np.inf, np.abs(np.where(bad, 0.0, a) - np.where(bad, 0.0, b)))
    agreement = None
    if a.ndim > 1 and a.shape[-1] > 1:
        same = (a.argmax(axis=-1) == b.argmax(axis=-1)) & ~bad.any(axis=-1)
        agreement = float(same.mean())
    largest = float(error.max())
    return OutputParity(
        kernels=kernels,
        output=output,
        samples=len(a),
        max_abs_error=largest,
        mean_abs_error=float(error.mean()),
        max_error_steps=largest / step if step else None,
        step=step,
        argmax_agreement=agreement,
        nonfinite_count=int(bad.sum()),
        reference_max=float(np.abs(np.where(np.isfinite(a), a, 0.0)).max()),
    )


def output_steps(runner: Runner) -> dict[str, float | None]:
    """Returns the quantisation step of each output; for a float output that of the tensor it is dequantised from."""
    interpreter = runner.interpreter
    scales = {int(d["index"]): float(d["quantization"][0]) for d in interpreter.get_tensor_details()}
    sources = {
        int(op["outputs"][0]): int(op["inputs"][0])
        for op in interpreter._get_ops_details()
        if op["op_name"] == "DEQUANTIZE" and len(op["outputs"])
    }
    steps: dict[str, float | None] = {}
    for name, detail in runner.outputs.items():
        index = int(detail["index"])
        steps[name] = scales.get(index) or scales.get(sources.get(index, -1)) or None
    return steps


def _run_model(model: Callable[..., Any], data: Any, samples: int, batch_size: int) -> dict[str, np.ndarray]:
    is_keras = isinstance(model, keras.Model) or tracing.is_tf_keras(model)
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, samples, batch_size):
        batch = keras.tree.map_structure(lambda array, start=start: array[start : start + batch_size], data)
        result = model(batch, training=False) if is_keras else model(batch)
        for name, value in tracing.name_outputs(model, result).items():
            parts.setdefault(name, []).append(np.asarray(value))
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def _match(wanted: Mapping[str, np.ndarray], names: Sequence[str]) -> dict[str, np.ndarray]:
    if set(wanted) == set(names):
        return {name: wanted[name] for name in names}
    if len(wanted) == len(names):
        return dict(zip(names, wanted.values(), strict=True))
    raise ValueError(f"the file has outputs {list(names)}, the model {list(wanted)}; they cannot be matched")
