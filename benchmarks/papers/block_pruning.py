"""Block pruning of fully-connected layers: latency and size of the files, where the sparse kernels pay and where not.

    python benchmarks/papers/block_pruning.py [--seeds 0 1 2] [--quick] [--out FILE]

Paper: Narang, Undersander, Diamos. Block-sparse recurrent neural networks. 2017, https://arxiv.org/abs/1711.02782, and
what TFLite's kernels ask for: blocks of 1 output x 4 inputs in float32, 1 x 16 in int8.

A network 784-1024-1024-10 learns digits, and is pruned to 90 % while it goes on training. The 1024 x 1024 layer in the
middle is then exported by itself, with its trained weights, and timed on the activations it meets on test digits,
beside the same layer dense, pruned without a pattern, and in int8; the errors are those of the files of the whole
networks; the dense one is where pruning started, and has seen fewer epochs. A sweep over the share of zero blocks shows
where each sparse kernel overtakes the dense one, and a network of 1x1 convolutions that sparse convolution is not
faster here. Settings are fixed, nothing is chosen on test data.

`run` gives the figures and tables to benchmarks/papers/pruning.py, which writes them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import data
from tfkit.compression.block_pruning import BlockPruning, block_mask
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.sparse_speed import sparsity_speed
from tfkit.export import compare_latency, convert
from tfkit.export.runner import Runner
from tfkit.export.sparse_storage import sparsify

SPARSITY = 0.9
EPOCHS, PRUNING_EPOCHS, BATCH = 6, 10, 128
SWEEP = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LAYER = "fc2"
HEADLINE = ("dense float32", "1x4 blocks, float32, stored sparsely")

Save = Callable[[dict[str, float], dict[str, Any]], None]


def network(seed: int) -> keras.Model:
    """Returns the untrained network."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Flatten()(inputs)
    for name in ("fc1", LAYER):
        x = keras.layers.Dense(1024, activation="relu", name=name)(x)
    return keras.Model(inputs, keras.layers.Dense(10, name="logits")(x))


def trainer(x: np.ndarray, y: np.ndarray, epochs: int, learning_rate: float, seed: int) -> Any:
    """Returns `fit(model, callbacks)`: Adam with cosine decay."""

    def fit(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        keras.utils.set_random_seed(seed)
        steps = epochs * -(-len(x) // BATCH)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=callbacks)

    return fit


def pruners() -> dict[str, Any]:
    """Returns the compressors; the last layer is small and stays dense."""
    return {
        "block_1x4": BlockPruning(SPARSITY, (1, 4), exclude=["logits"]),
        "block_1x16": BlockPruning(SPARSITY, (1, 16), exclude=["logits"]),
        "unstructured": MagnitudePruning(SPARSITY, exclude=["logits"]),
    }


def write_files(models: dict[str, keras.Model], folder: Path, calibration: np.ndarray) -> dict[str, Path]:
    """Writes each model in the forms that are compared.

    Args:
        models: "dense" and those of `pruners`.
        folder: where.
        calibration: inputs of the models.
    """

    def write(model: str, name: str, **settings: Any) -> Path:
        return convert(models[model], folder / f"{name}.tflite", force=True, **settings)

    def stored_sparsely(model: str, name: str, **settings: Any) -> Path:
        source = write(model, "temporary", **settings)
        return sparsify(source, folder / f"{name}.tflite", force=True).path

    int8 = {"quantization": "int8", "calibration": calibration}
    return {
        "dense float32": write("dense", "dense"),
        "1x4 blocks, float32, stored sparsely": write("block_1x4", "block", sparse=True),
        "1x4 blocks, float32, stored densely": write("block_1x4", "block_dense"),
        "unstructured, float32, stored sparsely": write("unstructured", "unstructured", sparse=True),
        "unstructured, float32, stored densely": write("unstructured", "unstructured_dense"),
        "dense dynamic": write("dense", "dynamic", quantization="dynamic"),
        "1x16 blocks, dynamic, stored sparsely": stored_sparsely("block_1x16", "dyn16", quantization="dynamic"),
        "dense int8": write("dense", "int8", **int8),
        "1x16 blocks, int8, stored sparsely": stored_sparsely("block_1x16", "int16", **int8),
    }


def layer_models(models: dict[str, keras.Model]) -> dict[str, keras.Model]:
    """Returns the middle layer of each network as a model of its own."""
    alone = {}
    for name, model in models.items():
        inputs = keras.Input((1024,))
        layer = keras.layers.Dense(1024, activation="relu", name=LAYER)
        alone[name] = keras.Model(inputs, layer(inputs))
        layer.set_weights(model.get_layer(LAYER).get_weights())
    return alone


def timed(paths: Sequence[Path], inputs: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Times files in this process, one thread, in interleaved rounds of 50 runs.

    Returns:
        Least median of a round in ms, and the median over the rounds of the ratio to the first file, (files,) each.
    """
    runners = [Runner(path) for path in paths]
    for runner in runners:
        pieces, _ = next(iter(runner.batches(runner.named_inputs(inputs[:1]))))
        runner.set_inputs(pieces)
    times = np.zeros((rounds, len(runners)))
    for row in times:
        for column, runner in enumerate(runners):
            laps = []
            for _ in range(50):
                start = time.perf_counter()
                runner.invoke()
                laps.append(time.perf_counter() - start)
            row[column] = 1e3 * np.median(laps)
    return times.min(axis=0), np.median(times / times[:, :1], axis=0)


def table(files: dict[str, Path], inputs: np.ndarray, rounds: int) -> list[dict[str, Any]]:
    """Times the files and gives their sizes; ratios are over the first one."""
    latencies, ratios = timed(list(files.values()), inputs, rounds)
    first = next(iter(files.values())).stat().st_size
    return [
        {
            "file": name,
            "p50_ms": float(latency),
            "latency_over_dense": float(ratio),
            "size_bytes": path.stat().st_size,
            "size_ratio": first / path.stat().st_size,
            "faster_by_report": sparsity_speed(path).faster,
        }
        for (name, path), latency, ratio in zip(files.items(), latencies, ratios, strict=True)
    ]


def headline(files: dict[str, Path], inputs: np.ndarray, seconds: float) -> dict[str, Any]:
    """Measures the 1x4 float32 file against the dense one in a fresh process, interleaved, one thread."""
    compared = compare_latency([files[name] for name in HEADLINE], inputs, threads=1, runs=200, min_seconds=seconds)
    dense, block = (result.measurement for result in compared)
    return {
        "dense_p50_ms": dense.p50_ms,
        "block_p50_ms": block.p50_ms,
        "latency_over_dense": compared[1].ratio,
        "latency_over_dense_range": [compared[1].low, compared[1].high],
        "dense_bytes": dense.size_bytes,
        "block_bytes": block.size_bytes,
        "block_packed_bytes": block.packed_bytes,
        "size_ratio": dense.size_bytes / block.size_bytes,
        "packed_ratio": dense.size_bytes / block.packed_bytes,
    }


def sweep(layer: keras.Model, folder: Path, calibration: np.ndarray, rounds: int) -> dict[str, dict[str, float]]:
    """Returns latency over the dense file of the same type, by type and share of zero blocks; nothing is trained."""
    kernel = np.asarray(layer.get_layer(LAYER).kernel)
    found = {}
    shares = SWEEP if rounds > 3 else SWEEP[-1:]
    for quantization, block in (("float32", 4), ("dynamic", 16), ("int8", 16)):
        settings: dict[str, Any] = {"quantization": quantization, "force": True}
        if quantization == "int8":
            settings["calibration"] = calibration
        paths = [convert(layer, folder / "sweep.tflite", **settings)]
        for share in shares:
            layer.get_layer(LAYER).kernel.assign(np.where(block_mask(kernel, share, (1, block)) > 0, kernel, 0))
            source = convert(layer, folder / "temporary.tflite", **settings)
            target = folder / f"sweep_{share}.tflite"
            paths.append(sparsify(source, target, min_sparsity=0.3, force=True).path)
        layer.get_layer(LAYER).kernel.assign(kernel)
        found[quantization] = dict(
            zip(map(str, shares), map(float, timed(paths, calibration, rounds)[1][1:]), strict=True)
        )
    return found


def pointwise(folder: Path, rounds: int) -> dict[str, float]:
    """Returns latency over dense of 1x1 convolutions with 90 % zeros, in a graph that suits XNNPACK."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((28, 28, 3))
    x = keras.layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", name="first")(inputs)
    for position in range(4):
        x = keras.layers.Conv2D(128, 1, activation="relu", name=f"pointwise{position}")(x)
        x = keras.layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    pruned = MagnitudePruning(SPARSITY, schedule="constant", include=["pointwise*"]).apply(model)
    paths = [
        convert(model, folder / "conv.tflite", force=True),
        convert(pruned, folder / "conv_zeros.tflite", force=True),
        convert(pruned, folder / "conv_sparse.tflite", sparse=True, force=True),
    ]
    _, ratios = timed(paths, np.random.default_rng(0).normal(size=(1, 28, 28, 3)), rounds)
    return {"zeros_stored_densely": float(ratios[1]), "zeros_stored_sparsely": float(ratios[2])}


def run(
    seeds: Sequence[int] = (0, 1, 2), quick: bool = False, save: Save | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """Trains, prunes, exports and measures.

    Args:
        seeds: trainings; latency and size are measured on the first, errors on all.
        quick: few epochs and short timing.
        save: receives figures and rows after each seed.

    Returns:
        Figures: `block_fc_latency_over_dense` and `block_fc_size_ratio`, of the .tflite files of the 1024 x 1024 layer,
        1x4 blocks stored sparsely against dense float32; `block_fc_packed_ratio`: dense .tflite over the packed block
        file; `block_fc_error_change_points`. Rows: tables and settings, ready for JSON.
    """
    digits = data.load("mnist5k" if quick else "mnist", validation=0)
    seeds = tuple(seeds)[:1] if quick else tuple(seeds)
    epochs, pruning_epochs, rounds = (1, 1, 3) if quick else (EPOCHS, PRUNING_EPOCHS, 15)
    x, y = digits.x_train, digits.y_train
    errors: dict[str, list[float]] = {}
    rows: dict[str, Any] = {
        "data": {"name": digits.name, "train": len(x), "test": len(digits.x_test)},
        "seeds": [],
        "network": "784-1024-1024-10",
        "sparsity": SPARSITY,
        "epochs": [epochs, pruning_epochs],
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed in seeds:
            models = {"dense": network(seed)}
            trainer(x, y, epochs, 1e-3, seed)(models["dense"], [])
            for method, pruner in pruners().items():
                models[method] = pruner.apply(models["dense"], trainer(x, y, pruning_epochs, 1e-3, seed))
            files = write_files(models, folder, x[:300])
            for label, path in files.items():
                wrong = np.asarray(Runner(path)(digits.x_test)).argmax(-1) != digits.y_test
                errors.setdefault(label, []).append(100 * float(np.mean(wrong)))
            say(f"seed {seed}: " + ", ".join(f"{label} {values[-1]:.2f} %" for label, values in errors.items()))
            if seed == seeds[0]:
                rows["network_files"] = table(files, digits.x_test, rounds)
                layers = layer_models(models)
                hidden = keras.Model(models["dense"].input, models["dense"].get_layer("fc1").output)
                activations, seen = (hidden.predict(images, verbose=0) for images in (x[:300], digits.x_test[:20]))
                files = write_files(layers, folder, activations)
                rows["layer_files"] = table(files, seen, rounds)
                rows["headline"] = headline(files, seen, 0.2 if quick else 1.0)
                rows["sweep_latency_over_dense_of_the_type"] = sweep(layers["dense"], folder, activations, rounds)
                rows["pointwise_convolution_latency_over_dense"] = pointwise(folder, rounds)
            rows["seeds"].append(seed)
            rows["error_percent"] = errors
            if save is not None:
                save(figures_of(rows), rows)
    return figures_of(rows), rows


def figures_of(rows: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of the tables; see `run`."""
    headline_, errors = rows["headline"], rows["error_percent"]
    dense, block = (np.mean(errors[name]) for name in HEADLINE)
    return {
        "block_fc_latency_over_dense": headline_["latency_over_dense"],
        "block_fc_size_ratio": headline_["size_ratio"],
        "block_fc_packed_ratio": headline_["packed_ratio"],
        "block_fc_error_change_points": float(block - dense),
    }


def print_tables(figures: dict[str, float], rows: dict[str, Any]) -> None:
    """Prints the tables."""
    for title, key in (("1024 x 1024 layer", "layer_files"), ("whole network", "network_files")):
        say(f"\n{title}: latency over dense, size ratio")
        for row in rows[key]:
            say(f"  {row['file']:<40} {row['p50_ms']:.4f} ms {row['latency_over_dense']:>6.3f} "
                f"{row['size_ratio']:>6.1f}")  # fmt: skip
    for kind, ratios in rows["sweep_latency_over_dense_of_the_type"].items():
        say(f"{kind}: " + ", ".join(f"{share}: {ratio:.2f}" for share, ratio in ratios.items()))
    say(f"1x1 convolutions: {rows['pointwise_convolution_latency_over_dense']}")
    say(json.dumps(figures, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, embedded digits")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "block_pruning.json")
    arguments = parser.parse_args()

    def save(figures: dict[str, float], rows: dict[str, Any]) -> None:
        versions = common.versions("tensorflow", "keras", "numpy", "ai-edge-litert")
        common.write_result(
            arguments.out, figures, data=rows["data"], seeds=rows["seeds"], results=rows, versions=versions
        )

    print_tables(*run(arguments.seeds, arguments.quick, save))
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
