"""Large batches with LARS, and with linear scaling alone (You et al., https://arxiv.org/abs/1709.05011).

    python benchmarks/papers/lars.py            # MNIST and Fashion-MNIST, 3 seeds; half an hour on one core
    python benchmarks/papers/lars.py --quick    # embedded digits, one seed: does it run?

The baseline is SGD with momentum at a batch of 64. At a batch of 4,096 (micro-batches of 512), SGD gets the linearly
scaled rate with a gradual warm-up, LARS its polynomial decay with a warm-up; all train for as many epochs. A batch of
8,192 joins for LARS. The learning rates are chosen with one more seed on training images that are held out; a linearly
scaled rate follows from the baseline's. Then the step of LARS is timed beside that of SGD, interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
from benchmarks.common import say
from benchmarks.training_runs import LOSS, arrays, evaluated, interleaved
from tfkit import models
from tfkit.training import LAMB, LARC, LARS, LinearScaling, MicroBatched, PolynomialWarmup

SEEDS, CHOICE_SEED = (0, 1, 2), 100
SMALL, LARGE, LARGER, MICRO = 64, 4096, 8192, 512
#: Batch size and method of each row.
ROWS = {
    "baseline": (SMALL, "SGD"), "linear scaling": (LARGE, "linear scaling"), "LARS": (LARGE, "LARS"),
    "LARS, twice the batch": (LARGER, "LARS"), "LARC": (LARGE, "LARC"), "LAMB": (LARGE, "LAMB"),
}  # fmt: skip
RATES = {"SGD": (0.01, 0.03, 0.1), "LARS": (8.0, 16.0, 32.0), "LARC": (0.3, 1.0, 3.0), "LAMB": (0.01, 0.03, 0.1)}


def optimizer(method: str, rate: float, steps: int, batch: int) -> keras.optimizers.Optimizer:
    """The optimizer of a method, with its schedule over so many steps."""
    warm = max(steps // 5, 1)
    decay = PolynomialWarmup(rate, steps, min(warm, steps - 1))
    if method == "SGD":
        return keras.optimizers.SGD(PolynomialWarmup(rate, steps), momentum=0.9)
    if method == "linear scaling":
        scaled = LinearScaling(PolynomialWarmup(rate, steps), batch, SMALL, warm)
        return keras.optimizers.SGD(scaled, momentum=0.9)
    make: dict[str, Any] = {"LARS": LARS, "LARC": LARC, "LAMB": LAMB}
    return make[method](decay, weight_decay=1e-4)


class Runs:
    """Trains LeNet-300-100 on one data set; what is in the cache is not trained again."""

    def __init__(self, name: str, count: int, epochs: int, cache: Path | None) -> None:
        self.name, self.epochs, self.cache = name, epochs, cache
        self.x, self.y, self.x_test, self.y_test = arrays(name, count)

    def run(self, row: str, rate: float, seed: int, choosing: bool) -> dict[str, float]:
        """Returns loss and error: on the last fifth of the training images, held out, or on the test images."""
        kept = self.cache / f"{self.name}_{row}_{rate:g}_{self.epochs}_{seed}.json" if self.cache else None
        if kept is not None and kept.exists():
            return json.loads(kept.read_text(encoding="utf-8"))
        cut = len(self.x) * 4 // 5 if choosing else len(self.x)
        x, y = self.x[:cut], self.y[:cut]
        batch, method = ROWS[row]
        batch = min(batch, len(x))
        keras.utils.set_random_seed(seed)
        model = models.get("lenet_300_100")(x.shape[1:], seed=seed)
        trained = model if method == "SGD" else MicroBatched(model, MICRO)
        trained.compile(optimizer(method, rate, -(-len(x) // batch) * self.epochs, batch), LOSS)
        trained.fit(x, y, batch_size=batch, epochs=self.epochs, verbose=0)
        x, y = (self.x[cut:], self.y[cut:]) if choosing else (self.x_test, self.y_test)
        loss, error = evaluated(model, x, y)
        found = {"loss": loss if np.isfinite(loss) else 1e9, "error": error}
        say(f"{self.name}, {row}, rate {rate:g}, seed {seed}: {found}")
        if kept is not None:
            common.write_json(kept, found)
        return found

    def choose(self, row: str) -> float:
        """Picks the learning rate by the loss on held-out training images."""
        rates = RATES[ROWS[row][1]]
        return min(rates, key=lambda rate: self.run(row, rate, CHOICE_SEED, True)["loss"])


def step_over_sgd(name: str) -> float:
    """The step of LARS over that of SGD with momentum, the same network and batch of 256."""
    rng, shape = np.random.default_rng(0), (28, 28, 1)
    x, y = tf.constant(rng.random((256, *shape), np.float32)), tf.constant(rng.integers(0, 10, 256))

    def runner(chosen: keras.optimizers.Optimizer) -> Any:
        model = models.get(name)(shape, seed=0)
        chosen.build(model.trainable_variables)

        @tf.function
        def step() -> None:
            with tf.GradientTape() as tape:
                loss = LOSS(y, model(x, training=True))
            weights = model.trainable_variables
            chosen.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))

        return step

    runs = {"sgd": runner(keras.optimizers.SGD(0.01, momentum=0.9)), "lars": runner(LARS(0.01, weight_decay=1e-4))}
    spent = interleaved(runs, 25)
    return spent["lars"] / spent["sgd"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    names, seeds, rows = arguments.data, SEEDS, list(ROWS)
    if arguments.quick:
        names, seeds, rows = ["mnist5k"], (0,), ["baseline", "linear scaling", "LARS"]
    table: list[dict[str, Any]] = []
    counts = {}
    for name in names:
        runs = Runs(name, 300, 1, None) if arguments.quick else Runs(name, 10_000, arguments.epochs, arguments.cache)
        counts[name] = len(runs.x)
        rates = {row: RATES[ROWS[row][1]][1] if arguments.quick else runs.choose(row)
                 for row in rows if row != "linear scaling"}  # fmt: skip
        rates["linear scaling"] = rates["baseline"]
        for row in rows:
            errors = [runs.run(row, rates[row], seed, False)["error"] for seed in seeds]
            table.append({
                "data": name, "method": row, "batch": ROWS[row][0], "epochs": runs.epochs,
                "learning rate": rates[row], "test error %": float(np.mean(errors)),
                "by seed": ", ".join(f"{error:.2f}" for error in errors),
            })  # fmt: skip
            say(str(table[-1]))
    # A step of LeNet-300-100 is little more than its passes over the weights, that of LeNet-5 is mostly convolutions.
    steps = {name: step_over_sgd(name) for name in ("lenet5", "lenet_300_100")}
    say(f"step of LARS over that of SGD: {steps}")
    if arguments.quick:
        return

    def drop(method: str) -> float:
        """The largest over the data sets."""
        error = {(row["data"], row["method"]): row["test error %"] for row in table}
        return max(error[name, method] - error[name, "baseline"] for name in names)

    figures = {
        "lars_drop_points": drop("LARS"), "linear_scaling_drop_points": drop("linear scaling"),
        "lars_twice_the_batch_drop_points": drop("LARS, twice the batch"), "lars_step_over_sgd": steps["lenet5"],
        "lars_step_over_sgd_lenet_300_100": steps["lenet_300_100"],
    }  # fmt: skip
    common.write_result(
        common.RESULTS / "large_batch.json", figures, title="Large batches", seeds=list(seeds), table=table,
        about=f"You et al., <https://arxiv.org/abs/1709.05011>: LeNet-300-100, batches of {LARGE:,} and {LARGER:,} in "
        f"micro-batches of {MICRO} beside batches of {SMALL}, as many epochs each. A drop is below the baseline, the "
        "largest of the data sets'. Learning rates were chosen on held-out training images.",
        data=[{"name": name, "train": counts[name], "test": 10_000} for name in names],
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
