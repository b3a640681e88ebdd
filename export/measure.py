"""Measurement of `.tflite` files, in a fresh process without TensorFlow.

The process runs `runner.py`, the same file that goes onto a Raspberry Pi; see there for how times are taken.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from tfkit.export import runner
from tfkit.internal import checks

FilePath = str | os.PathLike[str]


class MeasureError(RuntimeError):
    """A file cannot be measured: it is damaged, does not fit the inputs, or kills the interpreter."""


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was measured of one file. Times are in milliseconds, of one run (one batch).

    Attributes:
        path: the file.
        sha256: its hash.
        size_bytes, gzip_bytes, packed_bytes: its size as it is, by gzip -9, and by `tfkit.export.pack`.
        load_ms, allocate_ms, first_run_ms: in a fresh process.
        p50_ms, p90_ms, p99_ms, mean_ms, min_ms: latency after warm-up.
        runs, warmup_runs: how many.
        round_p50_ms: the median of each interleaved round; those of files measured together belong together.
        peak_memory_bytes: most resident memory of the fresh process, the runtime's own included.
        baseline_memory_bytes: the same before the file was loaded.
        accuracy: fraction in 0..1 that the file itself gets right; None where no labels were given.
        accuracy_samples: number of labels compared.
        batch_size: samples a run.
        delegated: whether a delegate took operations over; None if unknown.
        kernels: `"xnnpack"`, `"builtin"` or `"reference"`.
        threads: number of threads.
        inputs, outputs: name, shape, dtype, scale and zero point of each.
        machine: runtime, versions, processor and platform.
    """

    path: str
    sha256: str
    size_bytes: int
    gzip_bytes: int
    packed_bytes: int
    load_ms: float
    allocate_ms: float
    first_run_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    runs: int
    warmup_runs: int
    round_p50_ms: tuple[float, ...]
    peak_memory_bytes: int | None
    baseline_memory_bytes: int | None
    accuracy: float | None
    accuracy_samples: int | None
    batch_size: int
    delegated: bool | None
    kernels: str
    threads: int
    inputs: tuple[Mapping[str, Any], ...]
    outputs: tuple[Mapping[str, Any], ...]
    machine: Mapping[str, Any]

    @property
    def xnnpack(self) -> bool:
        """Whether XNNPACK was on."""
        return self.kernels == "xnnpack"

    def to_dict(self) -> dict[str, Any]:
        """Returns the measurement as plain values, ready for JSON."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclasses.dataclass(frozen=True)
class LatencyRatio:
    """Latency of one file over that of the first, from rounds in which both ran.

    Attributes:
        measurement: of the file.
        ratio: median over the rounds of p50 / p50 of the first file.
        low, high: smallest and largest ratio of a round.
    """

    measurement: Measurement
    ratio: float
    low: float
    high: float


@overload
def measure(
    paths: FilePath,
    inputs: Any,
    *,
    threads: int = ...,
    xnnpack: bool = ...,
    reference: bool = ...,
    runs: int = ...,
    min_seconds: float = ...,
    accuracy_data: tuple[Any, Any] | None = ...,
    packed_bytes: Sequence[int] | None = ...,
    timeout_seconds: float = ...,
) -> Measurement: ...
@overload
def measure(
    paths: Sequence[FilePath],
    inputs: Any,
    *,
    threads: int = ...,
    xnnpack: bool = ...,
    reference: bool = ...,
    runs: int = ...,
    min_seconds: float = ...,
    accuracy_data: tuple[Any, Any] | None = ...,
    packed_bytes: Sequence[int] | None = ...,
    timeout_seconds: float = ...,
) -> list[Measurement]: ...
def measure(
    paths: FilePath | Sequence[FilePath],
    inputs: Any,
    *,
    threads: int = 1,
    xnnpack: bool = True,
    reference: bool = False,
    runs: int = 50,
    min_seconds: float = 1.0,
    accuracy_data: tuple[Any, Any] | None = None,
    packed_bytes: Sequence[int] | None = None,
    timeout_seconds: float = 1800.0,
) -> Measurement | list[Measurement]:
    """Measures one file, or several in interleaved rounds so that their ratios hold on a noisy machine.

    Args:
        paths: a `.tflite` file, or several that take the same inputs.
        inputs: real inputs: an array (samples, ...), or a list or dictionary of arrays.
        threads: number of threads.
        xnnpack: use the XNNPACK delegate.
        reference: use the reference kernels instead.
        runs: least number of timed runs of each file.
        min_seconds: least timed seconds of each file.
        accuracy_data: (x, y) to judge each file on, whole: inputs as above, labels integer or one-hot.
        packed_bytes: the size of each file as packed, where it has been packed already: packing takes seconds a file.
        timeout_seconds: give up after this long.

    Returns:
        A `Measurement`, or for several paths a list in the same order.

    Raises:
        ValueError: an argument breaks its rule.
        MeasureError: a file cannot be measured; the message names it and what went wrong.
    """
    single = isinstance(paths, (str, os.PathLike))
    files = [Path(paths)] if single else [Path(p) for p in paths]  # type: ignore[arg-type, union-attr]
    if not files:
        raise ValueError("Argument `paths` must name at least one file. Received: none.")
    checks.integer("threads", threads, 1)
    checks.integer("runs", runs, 1)
    checks.number("min_seconds", min_seconds, 0)
    packed = list(packed_bytes) if packed_bytes is not None else [None] * len(files)
    if len(packed) != len(files):
        raise ValueError(
            f"Argument `packed_bytes` must have a size for each of the {len(files)} files. Received: {len(packed)}."
        )
    with tempfile.TemporaryDirectory(prefix="tfkit-measure-") as folder:
        arguments = [os.path.abspath(file) for file in files]
        arguments += ["--json", "--threads", str(threads), "--runs", str(runs), "--min-seconds", str(min_seconds)]
        arguments += ["--inputs", _write_arrays(Path(folder) / "inputs.npz", inputs, "inputs")]
        if accuracy_data is not None:
            x, y = accuracy_data
            arguments += ["--accuracy", _write_arrays(Path(folder) / "labelled.npz", x, "accuracy_data", y)]
        arguments += ["--reference"] if reference else []
        arguments += [] if xnnpack else ["--no-xnnpack"]
        result = _run(arguments, timeout_seconds)
    machine = {key: value for key, value in result.items() if key not in ("files", "kernels", "threads")}
    measurements = []
    for file, entry, packed_size in zip(files, result["files"], packed, strict=True):
        entry |= {
            "path": str(file),
            "kernels": result["kernels"],
            "threads": result["threads"],
            "machine": machine,
            "round_p50_ms": tuple(entry["round_p50_ms"]),
            "inputs": tuple(entry["inputs"]),
            "outputs": tuple(entry["outputs"]),
            **_sizes(file, packed_size),
        }
        measurements.append(Measurement(**entry))
    return measurements[0] if single else measurements


def compare_latency(paths: Sequence[FilePath], inputs: Any, **settings: Any) -> list[LatencyRatio]:
    """Measures files together and gives each one's latency over the first one's.

    Args:
        paths: the files; the first is the yardstick.
        inputs: see `measure`.
        **settings: of `measure`.

    Returns:
        A ratio with its spread for each file, the first file's being 1.
    """
    measurements = measure(list(paths), inputs, **settings)
    first = np.array(measurements[0].round_p50_ms)
    ratios = []
    for measurement in measurements:
        rounds = np.array(measurement.round_p50_ms) / first
        ratios.append(LatencyRatio(measurement, float(np.median(rounds)), float(rounds.min()), float(rounds.max())))
    return ratios


def _sizes(file: Path, packed_bytes: int | None) -> dict[str, int]:
    from tfkit.export.pack import pack_bytes

    content = file.read_bytes()
    return {
        "gzip_bytes": len(gzip.compress(content, compresslevel=9, mtime=0)),
        "packed_bytes": len(pack_bytes(content)) if packed_bytes is None else packed_bytes,
    }


def _write_arrays(target: Path, x: Any, argument: str, y: Any = None) -> str:
    if isinstance(x, Mapping):
        arrays = {str(name): np.asarray(a) for name, a in x.items()}
    elif isinstance(x, (list, tuple)) and x and all(np.ndim(a) > 0 for a in x):
        arrays = {f"arr_{i}": np.asarray(a) for i, a in enumerate(x)}
    else:
        arrays = {"arr_0": np.asarray(x)}
    if taken := {"file", *(["y"] if y is not None else [])} & set(arrays):
        raise ValueError(
            f"Argument `{argument}` must not name an input {sorted(taken)}, which the file between the processes "
            "uses itself. Pass a list of arrays in the order of the model's inputs."
        )
    if y is not None:
        arrays["y"] = np.asarray(y)
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub" or not array.ndim or not len(array):
            raise ValueError(
                f"Argument `{argument}` must be numeric arrays with at least one sample. "
                f"Received: {name!r} of shape {array.shape}, dtype {array.dtype}."
            )
    with target.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return str(target)


def _run(arguments: Sequence[str], timeout_seconds: float) -> dict[str, Any]:
    # -P: the folder of runner.py holds modules of tfkit, which must not shadow anything the runtime imports.
    command = [sys.executable, "-P", os.path.abspath(runner.__file__), *arguments]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        raise MeasureError(f"measuring took longer than timeout_seconds={timeout_seconds:g}") from None
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        files = ", ".join(a for a in arguments if a.endswith(".tflite"))
        raise MeasureError(f"the interpreter died ({name}) while running {files}; a file is damaged or not supported")
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"runner.py ended with exit code {child.returncode}"]
        raise MeasureError(lines[-1].removeprefix("error: "))
    return dict(json.loads(child.stdout.strip().splitlines()[-1]))
