"""Every pruning method on one network: LeNet-300-100 on digits, test error at 90, 95 and 98 % zeros.

    python benchmarks/compare_pruning.py [--seeds 0 1 2] [--quick] [--out FILE]

Each method gets the same number of epochs in all: those that start from a trained network half for it and half for
pruning, those that start from an untrained one (RigL, SNIP) all at once; the lottery trains three times half. Settings
are the classes' defaults, and nothing is chosen on test data. Errors are those of the .tflite files.

The share of zeros is over all weights. Methods with one share for each layer leave the small last layer dense and prune
the others that much more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import data, models
from tfkit.compression.base import Compressor
from tfkit.compression.block_pruning import BlockPruning, NMPruning
from tfkit.compression.lottery_ticket import LotteryTicket
from tfkit.compression.movement_pruning import MovementPruning
from tfkit.compression.pruning import MagnitudePruning
from tfkit.compression.rigl import RigL
from tfkit.compression.saliency_pruning import SaliencyPruning
from tfkit.export import convert
from tfkit.export.runner import Runner
from tfkit.internal import surgery

NETWORK = "lenet_300_100"
SHARES = (0.90, 0.95, 0.98)
EPOCHS, BATCH, SALIENCY_EXAMPLES = 5, 64, 512
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

#: Method -> (starts from a trained network, epochs of each training over EPOCHS).
METHODS: dict[str, tuple[bool, int]] = {
    "magnitude, each layer": (True, 1),
    "magnitude, global": (True, 1),
    "movement": (True, 1),
    "Taylor": (True, 1),
    "OBD (Fisher)": (True, 1),
    "OBD (Hutchinson)": (True, 1),
    "1x4 blocks": (True, 1),
    "1:M along the inputs": (True, 1),
    "SNIP": (False, 2),
    "RigL": (False, 2),
    "lottery ticket": (False, 1),
}


def compressor(method: str, share: float, examples: tuple[np.ndarray, np.ndarray]) -> Compressor:
    """Returns the method with `share` of all weights zero."""
    total, dense = 784 * 300 + 300 * 100 + 100 * 10, 100 * 10
    each: dict[str, Any] = {"sparsity": share * total / (total - dense), "exclude": ["logits"]}
    if method == "magnitude, each layer":
        return MagnitudePruning(**each)
    if method == "magnitude, global":
        return MagnitudePruning(share, scope="global")
    if method == "movement":
        return MovementPruning(**each)
    if method == "1x4 blocks":
        return BlockPruning(**each)
    if method == "1:M along the inputs":
        return NMPruning(1, round(1 / (1 - share)), exclude=["logits"])
    if method == "RigL":
        return RigL(share)
    if method == "lottery ticket":
        return LotteryTicket(rounds=2, **each)
    criterion: Any = {"SNIP": "snip", "Taylor": "taylor", "OBD (Fisher)": "obd", "OBD (Hutchinson)": "hessian"}[method]
    return SaliencyPruning(share, criterion, data=examples, loss=LOSS)


def trainer(x: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> Any:
    """Returns `fit(model, callbacks)`: Adam with cosine decay."""

    def fit(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        keras.utils.set_random_seed(seed)
        steps = epochs * -(-len(x) // BATCH)
        # Compiling the step for so few of them takes longer than it saves.
        model.compile(keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(1e-3, steps)), LOSS,
                      jit_compile=False)  # fmt: skip
        model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=callbacks)

    return fit


def measured(model: keras.Model, digits: Any, path: Path) -> dict[str, float]:
    """Returns the error of the file, and the shares of zeros of the model."""
    runner = Runner(convert(model, path, force=True, batch_size=100))
    wrong = np.asarray(runner(digits.x_test)).argmax(-1) != digits.y_test
    values = {
        layer.name: keras.ops.convert_to_numpy(weight).ravel()
        for layer in surgery.leaf_layers(model)
        for weight in surgery.compressible_weights(layer).values()
    }
    zeros = {f"zeros_{name}": float(np.mean(value == 0)) for name, value in values.items()}
    return {"error_percent": 100 * float(np.mean(wrong)),
            "zeros": float(np.mean(np.concatenate(list(values.values())) == 0)), **zeros}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, embedded digits")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "compare_pruning.json")
    arguments = parser.parse_args()
    epochs = 1 if arguments.quick else EPOCHS
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    digits = data.load("mnist5k" if arguments.quick else "mnist", validation=0)
    x, y = digits.x_train, digits.y_train
    settings = {"network": NETWORK, "epochs": epochs, "batch": BATCH, "data": digits.name, "train": len(x)}
    runs: dict[str, Any] = {}
    if arguments.out.exists():  # Goes on where it stopped.
        earlier = json.loads(arguments.out.read_text())
        if earlier.get("settings") == settings:
            runs = earlier["runs"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.tflite"
        for seed in seeds:
            start = models.get(NETWORK)(seed=seed)
            trained = surgery.rebuild(start)
            trainer(x, y, epochs, seed)(trained, [])
            done = runs.setdefault(str(seed), {})
            done.setdefault("dense", measured(trained, digits, path))
            chosen = np.random.default_rng(seed).choice(len(x), SALIENCY_EXAMPLES, replace=False)
            for method, (from_trained, factor) in METHODS.items():
                for share in SHARES:
                    label = f"{method} {share:.0%}"
                    if label in done:
                        continue
                    method_ = compressor(method, share, (x[chosen], y[chosen]))
                    base = trained if from_trained else start
                    done[label] = measured(method_.apply(base, trainer(x, y, factor * epochs, seed)), digits, path)
                    say(f"seed {seed} {label}: {done[label]['error_percent']:.2f} %, zeros {done[label]['zeros']:.2%}")
                write(arguments.out, runs, digits, settings)
    print_table(runs)
    say(f"written: {arguments.out}")


def write(path: Path, runs: dict[str, Any], digits: Any, settings: dict[str, Any]) -> None:
    """Writes what there is so far."""
    errors = mean_errors(runs)
    figures = {f"{label} error_percent": value for label, value in errors.items()}
    common.write_result(
        path,
        figures,
        data={"name": digits.name, "train": len(digits.x_train), "test": len(digits.x_test)},
        seeds=[int(seed) for seed in runs],
        settings=settings,
        runs=runs,
        versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
    )


def mean_errors(runs: dict[str, Any]) -> dict[str, float]:
    """Returns the mean over the seeds of each row that all of them have."""
    shared = [label for label in next(iter(runs.values())) if all(label in run for run in runs.values())]
    return {label: float(np.mean([run[label]["error_percent"] for run in runs.values()])) for label in shared}


def print_table(runs: dict[str, Any]) -> None:
    """Prints methods by share of zeros."""
    errors = mean_errors(runs)
    say(f"dense: {errors['dense']:.2f} % error, mean of {len(runs)} seeds")
    for method in METHODS:
        cells = [errors.get(f"{method} {share:.0%}") for share in SHARES]
        say(f"  {method:<24}" + "".join(f"{cell:>8.2f}" if cell is not None else f"{'':>8}" for cell in cells))


if __name__ == "__main__":
    main()
