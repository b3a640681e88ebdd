"""Which layers have kernels for int4 (and int2) weights in the TFLite runtime, whether they are right, and how fast.

    python benchmarks/int4_kernels.py            # about a minute
    python benchmarks/int4_kernels.py --quick    # short timings: does it run?

One layer a file, in the forms that exist: int8 activations with narrow weights (quantized by tfkit, stored narrow by
`tfkit.export.narrow_weights`), activations rounded to int8 as the kernel runs ("dynamic"), and weights widened to float
("weights only"; both by ai-edge-quantizer). Each form is timed against the same form with int8 weights, in turn, in one
process. The error is against the Keras model on the same grid, or for the last two forms against the file computed in
float from the file's own weights by the reference kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from benchmarks import common
from tfkit.compression import QuantizationAware
from tfkit.export import RunnerError, compare_latency, convert, mixed_precision, narrow_weights, pack_bytes
from tfkit.export.runner import Runner

L = keras.layers
SAMPLES = 16

#: Layers and input shapes; each takes some ten microseconds or more, so that the call itself does not count.
CASES: dict[str, tuple[Callable[[], keras.Layer], tuple[int, ...]]] = {
    "fully_connected": (lambda: L.Dense(1024), (1024,)),
    "conv": (lambda: L.Conv2D(64, 3, padding="same"), (28, 28, 64)),
    "conv_1x1": (lambda: L.Conv2D(128, 1), (28, 28, 128)),
    "depthwise": (lambda: L.DepthwiseConv2D(3, padding="same"), (28, 28, 128)),
}


def one_layer(case: str) -> tuple[keras.Model, np.ndarray]:
    """Returns a model of a single layer, and inputs for it."""
    make, shape = CASES[case]
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    model = keras.Model(inputs, make()(inputs))
    return model, np.random.default_rng(0).normal(size=(SAMPLES, *shape)).astype("float32")


def static_files(case: str, bits: int, folder: Path) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    """Returns (int8 file, narrow file, inputs, outputs of the Keras model) with int8 activations."""
    model, x = one_layer(case)
    compressor = QuantizationAware(bits=bits)
    prepared = compressor.prepare(model)
    prepared(x, training=True)
    final = compressor.finalize(prepared)
    wide = convert(final, folder / f"{case}_int8.tflite", quantization="int8-qat", io="int8", force=True)
    narrow = folder / f"{case}_int{bits}.tflite"
    rows = narrow_weights(wide, narrow, fast_only=False, force=True)
    if rows[0].bits != bits:
        raise RunnerError(rows[0].note)
    return wide, narrow, x, np.asarray(final(x))


def float_files(case: str, form: str, folder: Path) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    """Returns (file of int8 weights, of int4 weights, inputs, outputs of the reference kernels) of a form."""
    model, x = one_layer(case)
    source = convert(model, folder / f"{case}_float.tflite", force=True)
    files = []
    for bits in (8, 4):
        path = folder / f"{case}_int{bits}_{form}.tflite"
        (row,) = (row for row in mixed_precision(source, path, f"int{bits}-{form}", force=True) if row.weight_bytes)
        if row.given != f"int{bits}-{form}":
            raise RunnerError(f"ai-edge-quantizer has no such form of {row.operation}; it gave {row.given}")
        files.append(path)
    widened = folder / f"{case}_reference.tflite"
    mixed_precision(source, widened, "int4-weights", force=True)
    return files[0], files[1], x, np.asarray(Runner(widened, reference=True)(x))


def measured(files: tuple[Path, Path, np.ndarray, np.ndarray], seconds: float) -> dict[str, Any]:
    """Runs and times a pair of files."""
    wide, narrow, x, expected = files
    runner = Runner(narrow)
    outputs = np.asarray(runner(x))
    step = next(iter(runner.outputs.values()))["quantization"][0]
    packed = [len(pack_bytes(path.read_bytes())) for path in (wide, narrow)]
    ratio = compare_latency([wide, narrow], x[:4], min_seconds=seconds, packed_bytes=packed)
    plain = compare_latency([wide, narrow], x[:4], min_seconds=seconds, packed_bytes=packed, xnnpack=False)
    sizes = [entry.measurement for entry in ratio]
    return {
        "loads": True,
        "largest_error_steps": float(np.abs(outputs - expected).max() / step) if step else None,
        "largest_error_of_range": float(np.abs(outputs - expected).max() / np.ptp(expected)),
        "xnnpack": computed_by_xnnpack(narrow),
        "latency_over_int8": ratio[1].ratio,
        "latency_over_int8_low": ratio[1].low,
        "latency_over_int8_high": ratio[1].high,
        "latency_over_int8_builtin_kernels": plain[1].ratio,
        "int8_p50_ms": sizes[0].p50_ms,
        "p50_ms": sizes[1].p50_ms,
        "int8_bytes": sizes[0].size_bytes,
        "bytes": sizes[1].size_bytes,
        "int8_packed_bytes": sizes[0].packed_bytes,
        "packed_bytes": sizes[1].packed_bytes,
    }


def computed_by_xnnpack(path: Path) -> bool:
    """Whether the delegate took the layer itself: its operation's output is then not computed by the plan."""
    operations = Runner(path).interpreter._get_ops_details()
    layer = next(op for op in operations if op["op_name"] in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"))
    made = {int(index) for op in operations if op["op_name"] == "DELEGATE" for index in op["outputs"]}
    read = {int(index) for op in operations if op["op_name"] == "DELEGATE" for index in op["inputs"]}
    return int(layer["outputs"][0]) in made or int(layer["inputs"][1]) in read


def ratios(row: dict[str, Any]) -> dict[str, float]:
    """Returns what a narrow file needs, over the file of int8 weights of the same form."""
    return {
        "latency_over_int8": row["latency_over_int8"],
        "bytes_over_int8": row["bytes"] / row["int8_bytes"],
        "packed_bytes_over_int8": row["packed_bytes"] / row["int8_packed_bytes"],
    }


def describe(row: dict[str, Any]) -> str:
    if not row["loads"]:
        return f"none: {row['reason']}"
    latency, size, packed = ratios(row).values()
    steps = "" if row["largest_error_steps"] is None else f", {row['largest_error_steps']:.2f} steps"
    return (
        f"XNNPACK {row['xnnpack']!s:<5} of int8: latency {latency:5.2f}, bytes {size:.2f}, packed {packed:.2f}; "
        f"error {row['largest_error_of_range']:.4f} of the range{steps}"
    )


def write(path: Path, results: dict[str, dict[str, Any]]) -> None:
    rows = {f"{case}_{form}": row for case, forms in results.items() for form, row in forms.items() if row["loads"]}
    common.write_result(
        path,
        {f"{name}_{key}": value for name, row in rows.items() for key, value in ratios(row).items()},
        data={"name": "random inputs and weights", "samples": SAMPLES},
        seeds=[0],
        command="python benchmarks/int4_kernels.py",
        results=results,
        versions=common.versions("ai-edge-litert", "ai-edge-quantizer", "tensorflow", "keras", "numpy"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short timings")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="keep the others' rows")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "int4_kernels.json")
    arguments = parser.parse_args()
    seconds = 0.02 if arguments.quick else 0.2
    results: dict[str, dict[str, Any]] = {}
    if arguments.out.exists() and set(arguments.cases) != set(CASES):
        results = json.loads(arguments.out.read_text())["results"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in arguments.cases:
            makers: dict[str, Callable[[], Any]] = {
                "int4": lambda case=case: static_files(case, 4, folder),
                "int2": lambda case=case: static_files(case, 2, folder),
                "int4_dynamic": lambda case=case: float_files(case, "dynamic", folder),
                "int4_weights_only": lambda case=case: float_files(case, "weights", folder),
            }
            results[case] = {}
            for form, make in makers.items():
                try:
                    row = measured(make(), seconds)
                except RunnerError as error:
                    row = {"loads": False, "reason": str(error)}
                results[case][form] = row
                print(f"{case:<16} {form:<18} {describe(row)}", flush=True)
            write(arguments.out, results)
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
