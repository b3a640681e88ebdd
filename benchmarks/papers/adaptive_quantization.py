"""Reproduces the MNIST row of Adaptive Quantization (Khoram, Li, https://openreview.net/forum?id=SyOK1Sg0W).

    python benchmarks/papers/adaptive_quantization.py            # LeNet-5, 3 seeds; about half an hour on one core
    python benchmarks/papers/adaptive_quantization.py --quick    # one seed, few epochs, embedded digits: does it run?

A trained LeNet-5 is quantized with a precision of its own for each weight, converted to `.tflite`, packed, unpacked,
and the unpacked file is run over the official test set; its error is compared with that of the float network trained on
for as many epochs. `ratio` is 32 bits a parameter, biases included, over the bytes of the packed file, graph and all.
Beside it stand the count of bits with side information (`storage`), and the one without, which is what the paper
counts. Both networks are trained on the same digits, shifted by up to two pixels. The bound on the training loss is the
largest of `CANDIDATES` that costs nothing on held-out training digits, in the mean of two more seeds; the test set
takes no part in that choice.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import Shifted, kept
from tfkit import data, models
from tfkit.compression import AdaptiveQuantization
from tfkit.compression.adaptive_quantization import storage
from tfkit.export import convert, pack, unpack
from tfkit.export.runner import Runner
from tfkit.internal import surgery

CHOICE_SEEDS = (100, 101)
HELD_OUT = 0.2
CANDIDATES = (0.07, 0.05)
FLOAT_EPOCHS = 12
EPOCHS = 26
#: Epochs of these that end with new tolerances; the rest is trained with the last ones.
ROUNDS = 16
FIGURES = ("ratio", "error_change_points", "error_change_over_start_points")
#: The MNIST row of the paper's table: 60,000 digits.
PAPER = {"network": "LeNet-5", "ratio": 64, "baseline_error_percent": 0.65, "error_percent": 0.77}


def train(
    model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, seed: int, callbacks: Any = ()
) -> dict[str, list[float]]:
    """Adam with cosine decay, batches of 64; returns what was logged, by epoch."""
    keras.utils.set_random_seed(seed)
    batches = Shifted(x, y, seed)
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, epochs * len(batches))
    model.compile(keras.optimizers.Adam(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    logged = model.fit(batches, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks)).history
    return {name: [round(float(value), 5) for value in values] for name, values in logged.items()}


def baseline(x: np.ndarray, y: np.ndarray, epochs: int, seed: int, cache: Path | None) -> keras.Model:
    """Trains the float network, or takes it from the cache."""

    def make() -> keras.Model:
        model = models.get("lenet5")(seed=seed)
        train(model, x, y, epochs, seed)
        return model

    return kept(cache, f"lenet5_shifted_{len(x)}_{epochs}_{seed}", make)


def trained_on(model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> keras.Model:
    """Trains a copy of the float network for as many epochs more as the quantized one has."""
    longer = keras.models.clone_model(model)
    longer.set_weights(model.get_weights())
    train(longer, x, y, epochs, seed)
    return longer


def compress(
    model: keras.Model, x: np.ndarray, y: np.ndarray, bound: float, epochs: int, seed: int
) -> tuple[keras.Model, dict[str, list[float]]]:
    """Quantizes; returns the model, every weight of it on a dyadic grid, and the rounds: loss, zeros, radius."""
    rounds: dict[str, list[float]] = {}
    final = AdaptiveQuantization(bound, end=ROUNDS).apply(
        model, lambda prepared, callbacks: rounds.update(train(prepared, x, y, epochs, seed, callbacks))
    )
    return final, rounds


def error_percent(outputs: Any, y: np.ndarray) -> float:
    """Returns the share of wrong answers."""
    return 100.0 * float(np.mean(np.asarray(outputs).argmax(-1) != y))


def measure_file(model: keras.Model, x: np.ndarray, y: np.ndarray, folder: Path) -> dict[str, Any]:
    """Converts, packs, unpacks, runs the unpacked file, and counts bytes."""
    path = convert(model, folder / "model.tflite", force=True)
    packed = pack(path, folder / "model.tfk", force=True)
    restored = unpack(packed.path, folder / "restored.tflite", force=True)
    if Path(restored).read_bytes() != path.read_bytes():
        raise RuntimeError("unpacking did not give the packed file back")
    size = Path(packed.path).stat().st_size
    return {
        "packed_bytes": size,
        "ratio": 4 * model.count_params() / size,
        "test_error_percent": error_percent(Runner(restored)(x), y),
    }


def widths(model: keras.Model) -> dict[str, dict[str, float]]:
    """Returns, by layer, the share of weights without bits and the distinct values."""
    rows = {}
    for layer in surgery.leaf_layers(model):
        for weight in surgery.compressible_weights(layer).values():
            value = keras.ops.convert_to_numpy(weight)
            rows[layer.name] = {
                "weights": int(value.size),
                "zeros_percent": 100.0 * float(np.mean(value == 0)),
                "distinct_values": len(np.unique(value)),
            }
    return rows


def choose(
    x: np.ndarray, y: np.ndarray, candidates: tuple[float, ...], float_epochs: int, epochs: int, cache: Path | None
) -> dict[str, Any]:
    """Picks the largest bound that loses nothing on held-out digits; the smallest if all do."""
    cut = round(len(x) * (1 - HELD_OUT))
    starts = [baseline(x[:cut], y[:cut], float_epochs, seed, cache) for seed in CHOICE_SEEDS]
    errors = [error_percent(model.predict(x[cut:], verbose=0), y[cut:]) for model in starts]
    rows: list[dict[str, Any]] = []
    for bound in candidates:  # From large to small: those after the first good one need no training.
        row: dict[str, Any] = {"loss_bound": bound, "error_percent": [], "storage_ratio": [], "rounds": []}
        for model, seed in zip(starts, CHOICE_SEEDS, strict=True):
            small, rounds = compress(model, x[:cut], y[:cut], bound, epochs, seed)
            row["error_percent"].append(error_percent(small.predict(x[cut:], verbose=0), y[cut:]))
            row["storage_ratio"].append(storage(small).ratio)
            row["rounds"].append(rounds)
        rows.append(row)
        say(f"choice, loss bound {bound}: {row['error_percent']} % held-out error (float {errors} %), "
            f"{row['storage_ratio']}x by count; zeros {[rounds['zeros'][-1] for rounds in row['rounds']]}")  # fmt: skip
        if np.mean(row["error_percent"]) <= np.mean(errors) + 1e-9:
            break
    return {
        "held_out_digits": len(x) - cut,
        "seeds": list(CHOICE_SEEDS),
        "baseline_error_percent": errors,
        "candidates": rows,
        "picked": rows[-1]["loss_bound"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", default="mnist", help="mnist (needs $TFKIT_DATA or a download) or mnist5k")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, embedded digits")
    parser.add_argument("--cache", type=Path, help="folder that keeps the trained float networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "adaptive_quantization.json")
    arguments = parser.parse_args()
    candidates, float_epochs, epochs = CANDIDATES, FLOAT_EPOCHS, EPOCHS
    if arguments.quick:
        arguments.dataset, arguments.seeds = "mnist5k", arguments.seeds[:1]
        candidates, float_epochs, epochs = (10.0,), 1, 3

    dataset = data.load(arguments.dataset, validation=0)
    x, y = dataset.x_train, dataset.y_train
    choice = choose(x, y, candidates, float_epochs, epochs, arguments.cache)
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        started = time.time()
        model = baseline(x, y, float_epochs, seed, arguments.cache)
        small, rounds = compress(model, x, y, choice["picked"], epochs, seed)
        counted = storage(small)
        with tempfile.TemporaryDirectory() as folder:
            before = measure_file(model, dataset.x_test, dataset.y_test, Path(folder))
            longer = measure_file(trained_on(model, x, y, epochs, seed), dataset.x_test, dataset.y_test, Path(folder))
            after = measure_file(small, dataset.x_test, dataset.y_test, Path(folder))
        runs.append({
            "seed": seed,
            "float": before,
            "float_trained_on": longer,
            **after,
            "error_change_points": after["test_error_percent"] - longer["test_error_percent"],
            "error_change_over_start_points": after["test_error_percent"] - before["test_error_percent"],
            "storage": {**counted._asdict(), "ratio": counted.ratio, "ratio_without_map": counted.ratio_without_map},
            "layers": widths(small),
            "rounds": rounds,
            "seconds": round(time.time() - started),
        })  # fmt: skip
        say(f"seed {seed}: {after['packed_bytes']} bytes, {after['ratio']:.1f}x ({counted.ratio:.1f}x by count, "
            f"{counted.ratio_without_map:.1f}x without the map of widths), error {before['test_error_percent']:.2f} -> "
            f"{after['test_error_percent']:.2f} % (float trained on {longer['test_error_percent']:.2f} %)")  # fmt: skip
        figures = {key: float(np.mean([run[key] for run in runs])) for key in FIGURES}
        common.write_result(
            arguments.out,
            figures,
            data={"name": dataset.name, "train": len(x), "test": len(dataset.x_test)},
            seeds=[run["seed"] for run in runs],
            results={"paper": PAPER, "choice": choice, "epochs": epochs, "runs": runs},
            versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
        )
    say(f"\npaper: {PAPER['ratio']}x, error {PAPER['baseline_error_percent']} -> {PAPER['error_percent']} % "
        f"(60,000 digits); ours: {figures['ratio']:.1f}x, {figures['error_change_points']:+.2f} points")  # fmt: skip
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
