"""Large batches with LARS, and with linear scaling alone (You et al., https://arxiv.org/abs/1709.05011).

    python benchmarks/papers/lars.py            # MNIST and Fashion-MNIST, 3 seeds; about an hour on one core
    python benchmarks/papers/lars.py --quick    # embedded digits, one seed: does it run?

The baseline is SGD with momentum at a batch of 64. At a batch of 4,096 (micro-batches of 512), SGD gets the linearly
scaled rate with a gradual warm-up, LARS its polynomial decay with a warm-up; all train for as many epochs. The learning
rate of LARS, and that of the baseline, are chosen with one more seed on training images that are held out; a linearly
scaled rate follows from the baseline's. Then the step of LARS is timed beside that of SGD, interleaved.
"""

from __future__ import annotations

import argparse
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
SMALL, LARGE, MICRO = 64, 4096, 512
RATES = {"baseline": (0.01, 0.03, 0.1), "LARS": (2.0, 8.0, 32.0), "LARC": (0.3, 1.0, 3.0), "LAMB": (0.01, 0.03, 0.1)}


def optimizer(method: str, rate: float, steps: int, batch: int) -> keras.optimizers.Optimizer:
    """The optimizer of a method, with its schedule over so many steps."""
    warm = max(steps // 5, 1)
    decay = PolynomialWarmup(rate, steps, min(warm, steps - 1))
    if method == "baseline":
        return keras.optimizers.SGD(PolynomialWarmup(rate, steps), momentum=0.9)
    if method == "linear scaling":
        scaled = LinearScaling(PolynomialWarmup(rate, steps), batch, SMALL, warm)
        return keras.optimizers.SGD(scaled, momentum=0.9)
    make: dict[str, Any] = {"LARS": LARS, "LARC": LARC, "LAMB": LAMB}
    return make[method](decay, weight_decay=1e-4)


def train(x: np.ndarray, y: np.ndarray, method: str, rate: float, epochs: int, seed: int) -> keras.Model:
    """Trains LeNet-5 with one method."""
    keras.utils.set_random_seed(seed)
    model = models.get("lenet5")(x.shape[1:], seed=seed)
    batch = SMALL if method == "baseline" else min(LARGE, len(x))
    steps = -(-len(x) // batch) * epochs
    trained = model if method == "baseline" else MicroBatched(model, MICRO)
    trained.compile(optimizer(method, rate, steps, batch), LOSS)
    trained.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    return model


def choose(x: np.ndarray, y: np.ndarray, method: str, epochs: int) -> float:
    """Picks the learning rate by the loss on the last fifth of the training images."""
    cut = len(x) * 4 // 5
    losses = {}
    for rate in RATES[method]:
        model = train(x[:cut], y[:cut], method, rate, epochs, CHOICE_SEED)
        loss = evaluated(model, x[cut:], y[cut:])[0]
        losses[rate] = loss if np.isfinite(loss) else np.inf
        say(f"choice {method} {rate}: {loss:.4f}")
    return min(losses, key=lambda rate: losses[rate])


def step_over_sgd(shape: tuple[int, ...]) -> float:
    """The step of LARS over that of SGD with momentum, the same network and batch of 256."""
    rng = np.random.default_rng(0)
    x, y = tf.constant(rng.random((256, *shape), np.float32)), tf.constant(rng.integers(0, 10, 256))

    def runner(chosen: keras.optimizers.Optimizer) -> Any:
        model = models.get("lenet5")(shape, seed=0)
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
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    arguments = parser.parse_args()
    methods = ("baseline", "linear scaling", "LARS", "LARC", "LAMB")
    names, seeds, epochs, count = arguments.data, SEEDS, arguments.epochs, None
    if arguments.quick:
        names, seeds, epochs, count, methods = ["mnist5k"], (0,), 1, 300, ("baseline", "linear scaling", "LARS")
    table = []
    for name in names:
        x, y, x_test, y_test = arrays(name, count or 20_000)
        rates = {method: RATES[method][1] if arguments.quick else choose(x, y, method, epochs)
                 for method in methods if method in RATES}  # fmt: skip
        rates["linear scaling"] = rates["baseline"]
        for method in methods:
            models_ = [train(x, y, method, rates[method], epochs, seed) for seed in seeds]
            errors = [evaluated(model, x_test, y_test)[1] for model in models_]
            table.append({
                "data": name, "method": method, "batch": SMALL if method == "baseline" else LARGE, "epochs": epochs,
                "learning rate": rates[method], "test error %": float(np.mean(errors)),
                "by seed": ", ".join(f"{error:.2f}" for error in errors),
            })  # fmt: skip
            say(str(table[-1]))
    step = step_over_sgd((28, 28, 1))
    say(f"step of LARS over that of SGD: {step:.3f}")
    if arguments.quick:
        return

    def drop(method: str) -> float:
        """The largest over the data sets."""
        error = {(row["data"], row["method"]): row["test error %"] for row in table}
        return max(error[name, method] - error[name, "baseline"] for name in names)

    figures = {
        "lars_drop_points": drop("LARS"), "linear_scaling_drop_points": drop("linear scaling"),
        "lars_step_over_sgd": step,
    }  # fmt: skip
    common.write_result(
        common.RESULTS / "large_batch.json", figures, title="Large batches", seeds=list(seeds), table=table,
        about=f"You et al., <https://arxiv.org/abs/1709.05011>: LeNet-5, batches of {LARGE:,} in micro-batches of "
        f"{MICRO} beside batches of {SMALL}, as many epochs each. A drop is below the baseline, the larger of the two "
        "data sets'. Learning rates were chosen on held-out training images.",
        data=[{"name": "mnist", "train": 9000, "test": 10_000}, {"name": "fashion_mnist", "train": 18_000,
              "test": 10_000}],
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
