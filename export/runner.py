#!/usr/bin/env python3
"""Run and time `.tflite` files on any machine: one file, no TensorFlow.

Copy this file beside a model and run it (Python >= 3.9, numpy, and one of ai-edge-litert, tflite-runtime, TensorFlow):

    python runner.py model.tflite --inputs x.npz --threads 1
    python runner.py float.tflite int8.tflite --inputs x.npz --accuracy test.npz --json

Load, allocation and first-run times and the memory peak come from a fresh process for each file, so nothing is warm and
a file that kills the interpreter is named instead of killing the measurement. Latency is then taken in one process in
interleaved rounds (A B C, B C A, ...), so that noise of the machine falls on all files alike; a run is timed around
`invoke` alone, its real input having been copied in before.

Exit codes: 0 measured, 2 a file, an input or an argument is bad.
"""

# ruff: noqa: B905  (zip has no `strict` in Python 3.9)

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

RUNTIMES = ("ai_edge_litert.interpreter", "tflite_runtime.interpreter", "tensorflow.lite.python.interpreter")
DISTRIBUTIONS = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime", "tensorflow": "tensorflow"}
KERNELS = ("xnnpack", "builtin", "reference")
ROUNDS = 10
WARMUP_RUNS = 5
WARMUP_SECONDS = 0.1
MAX_BATCH = 256
BAD_INPUT_EXIT = 2

if TYPE_CHECKING:  # Python 3.9 reads `|` between types only in annotations
    Arrays = np.ndarray | Sequence[np.ndarray] | Mapping[str, np.ndarray]


class RunnerError(ValueError):
    """A file or an input that cannot be run; the message says which and why."""


def import_runtime() -> tuple[Any, str, str]:
    """Finds a TFLite interpreter.

    Returns:
        The interpreter module, the package's name and its version.

    Raises:
        RunnerError: no runtime is installed.
    """
    for name in RUNTIMES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        package = name.split(".")[0]
        try:
            from importlib.metadata import version

            return module, package, version(DISTRIBUTIONS[package])
        except Exception:  # a runtime built from source has no metadata; its name is still worth reporting
            return module, package, "unknown"
    raise RunnerError("no TFLite runtime found: pip install ai-edge-litert (or tflite-runtime, or tensorflow)")


def check_file(path: str | os.PathLike[str]) -> bytes:
    """Reads a `.tflite` file and checks what can be checked before the interpreter sees it.

    Raises:
        RunnerError: the file is missing, too short, lacks the TFL3 identifier or its root lies outside.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise RunnerError(f"{path}: cannot be read ({error.strerror or error})") from None
    check_content(content, str(path))
    return content


def check_content(content: bytes, name: str = "model") -> None:
    """Checks the flatbuffer's identifier and root offset; see `check_file`."""
    if len(content) < 16:
        raise RunnerError(f"{name}: not a .tflite file: {len(content)} bytes is too short; was it truncated?")
    if content[4:8] != b"TFL3":
        raise RunnerError(f"{name}: not a .tflite file: bytes 4-8 are {content[4:8]!r}, expected b'TFL3'")
    root = int.from_bytes(content[:4], "little")
    if root + 4 > len(content):
        raise RunnerError(f"{name}: damaged .tflite file: its root is at byte {root} of {len(content)}")


def in_order(named: Mapping[str, Any], ordered: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sorts tensor details by the place of their index in `ordered`."""
    places = {int(d["index"]): place for place, d in enumerate(ordered.values())}
    return dict(sorted(named.items(), key=lambda item: places.get(int(item[1]["index"]), len(places))))


class Runner:
    """A `.tflite` file as a callable from float arrays to float arrays.

    Args:
        model: path of the file, or its bytes.
        threads: number of threads.
        xnnpack: use the XNNPACK delegate (the runtime's default); False runs the built-in kernels.
        reference: run the plain reference kernels instead; implies no XNNPACK.

    Integer inputs are quantised and integer outputs dequantised with the file's own scale and zero point. A file with a
    fixed batch size is fed in pieces, the last one padded; a dynamic batch is resized.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        threads: int = 1,
        xnnpack: bool = True,
        reference: bool = False,
    ) -> None:
        if threads < 1:
            raise RunnerError(f"threads must be at least 1, got {threads}")
        if isinstance(model, bytes):
            check_content(model)
            content, self.name = model, f"model of {len(model)} bytes"
        else:
            content, self.name = check_file(model), str(model)
        runtime, self.runtime, self.runtime_version = import_runtime()
        self.threads = threads
        self.kernels = "reference" if reference else ("xnnpack" if xnnpack else "builtin")
        resolver = runtime.OpResolverType
        kind = {
            "xnnpack": resolver.AUTO,
            "builtin": resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            "reference": resolver.BUILTIN_REF,
        }[self.kernels]
        self._content = content  # the interpreter reads this memory for as long as it lives
        start = time.perf_counter()
        try:
            self.interpreter = runtime.Interpreter(
                model_content=content, num_threads=threads, experimental_op_resolver_type=kind
            )
            loaded = time.perf_counter()
            self.interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise RunnerError(f"{self.name}: the {self.runtime} interpreter refuses it: {error}") from None
        self.load_ms = (loaded - start) * 1e3
        self.allocate_ms = (time.perf_counter() - loaded) * 1e3
        self._find_tensors()

    def _find_tensors(self) -> None:
        inputs = {d["name"]: d for d in self.interpreter.get_input_details()}
        outputs = {d["name"]: d for d in self.interpreter.get_output_details()}
        try:  # the signature's names are the model's own; tensor names are the converter's
            if len(self.interpreter.get_signature_list()) == 1:
                signature = self.interpreter.get_signature_runner()
                # A signature lists by name; the subgraph keeps the order in which the model was traced.
                inputs = in_order(signature.get_input_details(), inputs)
                outputs = in_order(signature.get_output_details(), outputs)
        except (AttributeError, ValueError, RuntimeError):
            pass
        self.inputs: dict[str, dict[str, Any]] = inputs
        self.outputs: dict[str, dict[str, Any]] = outputs

    @property
    def batch_size(self) -> int | None:
        """The file's batch size; None when it is dynamic or there is no batch axis."""
        signatures = [d.get("shape_signature", d["shape"]) for d in self.inputs.values()]
        sizes = {int(s[0]) for s in signatures if len(s)}
        return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None

    @property
    def delegated(self) -> bool | None:
        """Whether a delegate took any operation over; None when the runtime does not tell."""
        try:
            return any(op["op_name"] == "DELEGATE" for op in self.interpreter._get_ops_details())
        except Exception:  # a private method of the runtime: other versions may lack it
            return None

    def named_inputs(self, x: Arrays) -> dict[str, np.ndarray]:
        """Brings an array, a list or a dictionary of inputs into a dictionary by the file's input names.

        Raises:
            RunnerError: the count, a name, a shape or a value does not fit the file.
        """
        names = list(self.inputs)
        if isinstance(x, Mapping):
            if set(x) == set(names):
                arrays = {name: np.asarray(x[name]) for name in names}
            elif len(x) == len(names) == 1:
                arrays = {names[0]: np.asarray(next(iter(x.values())))}
            else:
                raise RunnerError(f"{self.name}: has inputs {names}, got {sorted(x)}")
        elif isinstance(x, (list, tuple)) and len(names) > 1:
            if len(x) != len(names):
                raise RunnerError(f"{self.name}: has {len(names)} inputs {names}, got {len(x)} arrays")
            arrays = {name: np.asarray(a) for name, a in zip(names, x)}
        elif len(names) == 1:
            arrays = {names[0]: np.asarray(x)}
        else:
            raise RunnerError(f"{self.name}: has inputs {names}; pass a list or a dictionary of arrays")
        for name, array in arrays.items():
            wanted = [int(n) for n in self.inputs[name].get("shape_signature", self.inputs[name]["shape"])]
            fits = array.ndim == len(wanted) and all(w in (-1, n) for w, n in zip(wanted[1:], array.shape[1:]))
            if not fits:
                expected = f"shape {wanted}, the first axis being the batch"
                raise RunnerError(f"{self.name}: input {name!r} must have {expected}; got {list(array.shape)}")
            if array.dtype.kind not in "fiub":
                raise RunnerError(f"{self.name}: input {name!r} must be numeric, got dtype {array.dtype}")
        counts = {a.shape[0] for a in arrays.values() if a.ndim}
        if len(counts) > 1:
            raise RunnerError(f"{self.name}: inputs differ in their number of samples: {sorted(counts)}")
        return arrays

    def quantize(self, name: str, x: np.ndarray) -> np.ndarray:
        """Gives the input in the file's own type: q = round(x / scale) + zero_point, clipped."""
        detail = self.inputs[name]
        dtype = np.dtype(detail["dtype"])
        scale, zero_point = detail["quantization"]
        if dtype.kind in "iu" and scale and x.dtype != dtype:
            limits = np.iinfo(dtype)
            q = np.round(np.asarray(x, np.float32) / np.float32(scale)) + zero_point
            return np.clip(q, limits.min, limits.max).astype(dtype)
        return np.asarray(x).astype(dtype, copy=False)

    def dequantize(self, name: str, q: np.ndarray) -> np.ndarray:
        """Gives an output as float32: (q - zero_point) * scale."""
        scale, zero_point = self.outputs[name]["quantization"]
        if q.dtype.kind in "iu" and scale:
            return (q.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
        return q

    def _resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        changed = False
        for name, shape in shapes.items():
            detail = self.inputs[name]
            if tuple(int(n) for n in detail["shape"]) != shape:
                self.interpreter.resize_tensor_input(detail["index"], list(shape))
                changed = True
        if changed:
            self.interpreter.allocate_tensors()
            self._find_tensors()

    def set_inputs(self, pieces: Mapping[str, np.ndarray]) -> None:
        """Copies one batch, already of the file's type and shape, into the interpreter."""
        for name, piece in pieces.items():
            self.interpreter.set_tensor(self.inputs[name]["index"], piece)

    def invoke(self) -> None:
        """Runs the model once on what `set_inputs` copied in."""
        self.interpreter.invoke()

    def batches(self, arrays: Mapping[str, np.ndarray]) -> Any:
        """Yields (pieces, count): batches in the file's type and shape, and how many of their rows are real."""
        count = next((a.shape[0] for a in arrays.values() if a.ndim), 1)
        step = self.batch_size or min(count, MAX_BATCH)
        for start in range(0, count, step):
            rows = min(step, count - start)
            pieces = {}
            for name, array in arrays.items():
                piece = self.quantize(name, array[start : start + rows]) if array.ndim else self.quantize(name, array)
                if self.batch_size and rows < step and array.ndim:
                    piece = np.concatenate([piece, np.repeat(piece[-1:], step - rows, axis=0)])
                pieces[name] = np.ascontiguousarray(piece)
            yield pieces, rows

    def run(self, x: Arrays) -> dict[str, np.ndarray]:
        """Runs all samples.

        Args:
            x: array (samples, ...), a list of arrays in the model's order, or a dictionary by input name.

        Returns:
            Outputs by name, each (samples, ...), dequantised.
        """
        arrays = self.named_inputs(x)
        collected: dict[str, list[np.ndarray]] = {}
        for pieces, rows in self.batches(arrays):
            self._resize({name: piece.shape for name, piece in pieces.items()})
            self.set_inputs(pieces)
            self.invoke()
            for name, detail in self.outputs.items():
                value = self.dequantize(name, self.interpreter.get_tensor(detail["index"]))
                batched = value.ndim and value.shape[0] == next(iter(pieces.values())).shape[0]
                collected.setdefault(name, []).append(value[:rows] if batched else value)
        if not collected:
            raise RunnerError(f"{self.name}: got no samples to run")
        return {name: np.concatenate(parts) if parts[0].ndim else np.stack(parts) for name, parts in collected.items()}

    def __call__(self, x: Arrays) -> Any:
        """Like `run`; a single output comes as an array, several as a dictionary by name."""
        outputs = self.run(x)
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def accuracy(runner: Runner, x: Arrays, y: np.ndarray) -> tuple[float, int]:
    """Fraction of samples whose largest output is the label.

    Args:
        runner, x, y: see `correct`.

    Returns:
        The fraction in 0..1, and the number of labels compared.
    """
    right = correct(runner, x, y)
    return float(np.mean(right)), int(right.size)


def correct(runner: Runner, x: Arrays, y: np.ndarray) -> np.ndarray:
    """Whether the largest output of each sample is its label.

    Args:
        runner: the file to judge; it must have one output.
        x: inputs, (samples, ...).
        y: labels, integer (samples,) or one-hot (samples, classes). An output of width 1 is compared with 0.5.

    Returns:
        Booleans of the shape of the labels.
    """
    outputs = runner.run(x)
    if len(outputs) != 1:
        raise RunnerError(f"{runner.name}: accuracy needs one output, the file has {list(outputs)}")
    scores = next(iter(outputs.values()))
    y = np.asarray(y)
    if np.isnan(scores).any():
        raise RunnerError(f"{runner.name}: {int(np.isnan(scores).any(axis=-1).sum())} outputs are NaN")
    if y.ndim == scores.ndim and y.shape[-1] == scores.shape[-1] and scores.shape[-1] > 1:
        y = np.argmax(y, axis=-1)
    if scores.shape[-1] == 1:
        labels = (scores[..., 0] > 0.5).astype(np.int64)
        y = y.reshape(labels.shape) if y.size == labels.size else y
    else:
        labels = np.argmax(scores, axis=-1)
        y = y[..., 0] if y.ndim == labels.ndim + 1 and y.shape[-1] == 1 else y
    if y.shape != labels.shape:
        raise RunnerError(f"{runner.name}: labels of shape {list(y.shape)} do not fit outputs {list(scores.shape)}")
    return labels == y


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:  # preferred: getrusage also remembers the parent's peak across fork and exec
        with open("/proc/self/status", encoding="ascii") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    except ImportError:
        return None


def cpu_name() -> str:
    """Name of the processor, and of the board where there is one (Raspberry Pi)."""
    names: list[str] = []
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            fields = dict(line.split(":", 1) for line in file if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        names = [fields[key] for key in ("model name", "Hardware", "Model") if fields.get(key)]
    except OSError:
        if sys.platform == "darwin":
            asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True)
            names = [asked.stdout.strip()]
    return ", ".join(n for n in names if n) or platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """Versions, processor and platform, as plain values."""
    _, runtime, runtime_version = import_runtime()
    return {
        "runtime": runtime,
        "runtime_version": runtime_version,
        "numpy_version": np.__version__,
        "python_version": platform.python_version(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "tensorflow_imported": "tensorflow" in sys.modules,
    }


def load_arrays(path: str) -> dict[str, np.ndarray]:
    """Reads a .npz (all arrays by name) or .npy file; never unpickles.

    Raises:
        RunnerError: the file is missing, damaged or holds pickled objects.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"x": loaded}
        with loaded:
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # zipfile, zlib, struct and numpy each raise their own kind on a damaged file
        raise RunnerError(f"{path}: cannot be read as .npz or .npy without pickles ({error})") from None


def fitting_inputs(runner: Runner, given: Mapping[str, np.ndarray] | None, seed: int) -> dict[str, np.ndarray]:
    """Takes the inputs given, or draws 16 random ones when none are."""
    if given is not None:
        if set(given) != set(runner.inputs) and all(n.startswith("arr_") for n in given):
            ordered = [given[n] for n in sorted(given, key=lambda n: int(n[4:]))]
            return runner.named_inputs(ordered if len(ordered) > 1 else ordered[0])
        return runner.named_inputs(given)
    rng = np.random.default_rng(seed)
    shapes = {n: [int(k) for k in d.get("shape_signature", d["shape"])] for n, d in runner.inputs.items()}
    drawn = {n: rng.uniform(0, 1, [16] + [abs(k) for k in s[1:]] if s else []) for n, s in shapes.items()}
    return runner.named_inputs({n: a.astype(np.float32) for n, a in drawn.items()})


def measure_cold(path: str, given: Mapping[str, np.ndarray] | None, options: argparse.Namespace) -> dict[str, Any]:
    """Load, allocation and first-run times and the memory peak; meant for a process that has done nothing else."""
    import_runtime()
    before = peak_memory_bytes()
    runner = Runner(path, options.threads, not options.no_xnnpack, options.reference)
    pieces, _ = next(iter(runner.batches(fitting_inputs(runner, given, options.seed))))
    if runner.batch_size is None:
        pieces = {n: p[:1] if p.ndim else p for n, p in pieces.items()}
        runner._resize({n: p.shape for n, p in pieces.items()})
    runner.set_inputs(pieces)
    start = time.perf_counter()
    runner.invoke()
    first_run_ms = (time.perf_counter() - start) * 1e3
    return {
        "load_ms": runner.load_ms,
        "allocate_ms": runner.allocate_ms,
        "first_run_ms": first_run_ms,
        "peak_memory_bytes": peak_memory_bytes(),
        "baseline_memory_bytes": before,
    }


def measure_cold_in_child(path: str, argv: Sequence[str]) -> dict[str, Any]:
    """Runs `measure_cold` in a fresh process, so that a file that kills the interpreter is named.

    Raises:
        RunnerError: the child refused the file or died.
    """
    isolate = ["-P"] if sys.version_info >= (3, 11) else []  # keeps files beside this one from shadowing modules
    command = [sys.executable, *isolate, os.path.abspath(__file__), path, *argv, "--cold"]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode < 0:
        try:
            name = signal.Signals(-child.returncode).name
        except ValueError:
            name = f"signal {-child.returncode}"
        raise RunnerError(f"{path}: the interpreter died on it ({name}); the file is damaged or not supported")
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [f"the interpreter ended with exit code {child.returncode}"]
        raise RunnerError(lines[-1].replace("error: ", "", 1) if path in lines[-1] else f"{path}: {lines[-1]}")
    return dict(json.loads(child.stdout.strip().splitlines()[-1]))


def time_interleaved(
    runners: Sequence[Runner],
    inputs: Sequence[Mapping[str, np.ndarray]],
    runs: int,
    min_seconds: float,
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Times several files in rounds whose order rotates.

    Args:
        runners: the files.
        inputs: for each file, samples by input name.
        runs: least number of timed runs of each file.
        min_seconds: least time spent in timed runs of each file.
        rounds: number of rounds.

    Returns:
        For each file its percentiles, in ms a run (one batch), and the median of each round.
    """
    queues: list[list[dict[str, np.ndarray]]] = []
    for runner, arrays in zip(runners, inputs):
        if runner.batch_size is None:
            count = next((a.shape[0] for a in arrays.values() if a.ndim), 1)
            queue = [
                {n: runner.quantize(n, a[i : i + 1] if a.ndim else a) for n, a in arrays.items()}
                for i in range(min(count, MAX_BATCH))
            ]
            runner._resize({n: p.shape for n, p in queue[0].items()})
        else:
            queue = [pieces for _, (pieces, _) in zip(range(MAX_BATCH), runner.batches(arrays))]
        queues.append(queue)
    positions = [0] * len(runners)
    samples: list[list[float]] = [[] for _ in runners]
    medians: list[list[float]] = [[] for _ in runners]
    warmups = [0] * len(runners)

    def one_run(k: int) -> float:
        runner, queue = runners[k], queues[k]
        runner.set_inputs(queue[positions[k] % len(queue)])
        positions[k] += 1
        start = time.perf_counter()
        runner.invoke()
        return time.perf_counter() - start

    for k in range(len(runners)):
        begun = time.perf_counter()
        while warmups[k] < WARMUP_RUNS or time.perf_counter() - begun < WARMUP_SECONDS:
            one_run(k)
            warmups[k] += 1
    for number in range(rounds):
        for place in range(len(runners)):
            k = (place + number) % len(runners)
            taken: list[float] = []
            spent = 0.0
            while len(taken) < math.ceil(runs / rounds) or spent < min_seconds / rounds:
                taken.append(one_run(k))
                spent += taken[-1]
            samples[k] += taken
            medians[k].append(float(np.median(taken)) * 1e3)
    results = []
    for k in range(len(runners)):
        times = np.array(samples[k]) * 1e3
        p50, p90, p99 = (float(p) for p in np.percentile(times, [50, 90, 99]))
        results.append(
            {
                "p50_ms": p50,
                "p90_ms": p90,
                "p99_ms": p99,
                "mean_ms": float(times.mean()),
                "min_ms": float(times.min()),
                "runs": int(times.size),
                "warmup_runs": warmups[k],
                "round_p50_ms": medians[k],
            }
        )
    return results


def describe_tensors(details: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Names, shapes, types and quantisation of a file's inputs or outputs."""
    return [
        {
            "name": name,
            "shape": [int(n) for n in d.get("shape_signature", d["shape"])],
            "dtype": np.dtype(d["dtype"]).name,
            "scale": float(d["quantization"][0]),
            "zero_point": int(d["quantization"][1]),
        }
        for name, d in details.items()
    ]


def measure_files(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measures all files of a command line; see the module's text.

    Returns:
        The machine's description, the settings, and one entry a file under "files".
    """
    given = load_arrays(options.inputs) if options.inputs else None
    labelled = load_arrays(options.accuracy) if options.accuracy else None
    if labelled is not None and "y" not in labelled:
        raise RunnerError(f"{options.accuracy}: must hold the labels as 'y', it holds {sorted(labelled)}")
    entries: list[dict[str, Any]] = []
    for path in options.files:
        content = check_file(path)
        entries.append({"path": path, "sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)})
        entries[-1].update(measure_cold_in_child(path, argv))
    runners = [Runner(path, options.threads, not options.no_xnnpack, options.reference) for path in options.files]
    inputs = [fitting_inputs(runner, given, options.seed) for runner in runners]
    timings = time_interleaved(runners, inputs, options.runs, options.min_seconds, options.rounds)
    for entry, runner, timing in zip(entries, runners, timings):
        entry.update(timing)
        entry["batch_size"] = runner.batch_size or 1
        entry["delegated"] = runner.delegated
        entry["inputs"] = describe_tensors(runner.inputs)
        entry["outputs"] = describe_tensors(runner.outputs)
        entry["accuracy"] = entry["accuracy_samples"] = None
        if labelled is not None:
            x = {name: a for name, a in labelled.items() if name != "y"}
            entry["accuracy"], entry["accuracy_samples"] = accuracy(
                runner, fitting_inputs(runner, x, options.seed), labelled["y"]
            )
    return {
        **describe_machine(),
        "threads": options.threads,
        "kernels": runners[0].kernels,
        "xnnpack": runners[0].kernels == "xnnpack",
        "rounds": options.rounds,
        "inputs_source": os.path.basename(options.inputs) if options.inputs else f"random (seed {options.seed})",
        "files": entries,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="runner.py", description="Run and time .tflite files without TensorFlow.")
    parser.add_argument("files", nargs="+", metavar="FILE", help=".tflite files; several are timed in turn")
    parser.add_argument("--inputs", help="real inputs: .npy, or .npz with an array for each input (default: random)")
    parser.add_argument("--accuracy", metavar="NPZ", help="inputs and labels 'y': accuracy over all of them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-xnnpack", action="store_true", help="run the built-in kernels without a delegate")
    parser.add_argument("--reference", action="store_true", help="run the plain reference kernels")
    parser.add_argument("--runs", type=int, default=50, help="least number of timed runs of each file (default 50)")
    parser.add_argument("--min-seconds", type=float, default=1.0, help="least timed seconds of each file (default 1)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"interleaved rounds (default {ROUNDS})")
    parser.add_argument("--seed", type=int, default=0, help="seed of random inputs")
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    return parser


def print_table(result: Mapping[str, Any]) -> None:
    """Prints a measurement for reading."""
    print(f"{result['cpu']}, {result['platform']}; {result['runtime']} {result['runtime_version']}")
    print(f"threads: {result['threads']}, kernels: {result['kernels']}, inputs: {result['inputs_source']}")
    heads = ("file", "bytes", "load ms", "first ms", "p50 ms", "p90 ms", "p99 ms", "runs", "peak MB", "accuracy")
    rows = [heads]
    for f in result["files"]:
        rows.append(
            (
                os.path.basename(f["path"]),
                f"{f['size_bytes']:,}",
                *(f"{f[key]:.4f}" for key in ("load_ms", "first_run_ms", "p50_ms", "p90_ms", "p99_ms")),
                str(f["runs"]),
                "-" if f["peak_memory_bytes"] is None else f"{f['peak_memory_bytes'] / 1e6:.1f}",
                "-" if f["accuracy"] is None else f"{f['accuracy']:.4f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        print("  ".join(cells))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = build_parser().parse_args(arguments)
    try:
        for name in ("threads", "runs", "rounds"):
            if getattr(options, name) < 1:
                raise RunnerError(f"--{name} must be at least 1, got {getattr(options, name)}")
        if options.cold:
            given = load_arrays(options.inputs) if options.inputs else None
            print(json.dumps(measure_cold(options.files[0], given, options)))
            return 0
        passed_on = ["--threads", str(options.threads), "--seed", str(options.seed)]
        passed_on += ["--inputs", options.inputs] if options.inputs else []
        passed_on += ["--no-xnnpack"] if options.no_xnnpack else []
        passed_on += ["--reference"] if options.reference else []
        result = measure_files(options, passed_on)
    except RunnerError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT_EXIT
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
