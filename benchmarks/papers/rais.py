"""RAIS beside uniform sampling and the oracle, by epochs to the same loss (Johnson, Guestrin, NeurIPS 2018).

    python benchmarks/papers/rais.py            # Fashion-MNIST and MNIST, 3 seeds; about forty minutes on one core
    python benchmarks/papers/rais.py --quick    # embedded digits, one seed: does it run?

Uniform SGD trains for a number of epochs and reaches a training loss. RAIS and O-SGD train from the same weights with
the same schedule until they have the same loss, or have done as many epochs; the figure is the ratio of their real
epochs. The loss is measured on the whole training set after each epoch, and interpolated between.
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

from benchmarks import common
from benchmarks.common import say
from benchmarks.training_runs import LOSS, arrays, evaluated, network
from tfkit.training import RAIS

SEEDS = (0, 1, 2)
DATA = ("fashion_mnist", "mnist", "fashion_mnist:imbalanced")
BATCH, RATE = 64, 0.05


class Curve(keras.callbacks.Callback):
    """The training loss after each real epoch."""

    def __init__(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
        super().__init__()
        self.net, self.x, self.y = model, x, y
        self.steps, self.losses = [0.0], [evaluated(model, x, y)[0]]
        self.count = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.count += 1

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.steps.append(float(self.count))
        self.losses.append(evaluated(self.net, self.x, self.y)[0])


def run(name: str, method: str, seed: int, epochs: int, count: int) -> dict[str, Any]:
    """Trains one method; returns its curve and test error."""
    x, y, x_test, y_test = arrays(name, count)
    keras.utils.set_random_seed(seed)
    model = network(x.shape[1:], seed)
    steps = len(x) // BATCH
    schedule = keras.optimizers.schedules.PolynomialDecay(RATE, epochs * steps, RATE / 20)
    curve = Curve(model, x, y)
    if method == "uniform":
        model.compile(keras.optimizers.SGD(schedule), LOSS)
        model.fit(x[: steps * BATCH], y[: steps * BATCH], batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[curve])
        gain = 1.0
    else:
        rais = RAIS(model, oracle=method == "oracle", seed=seed)
        rais.compile(keras.optimizers.SGD(rais.schedule(schedule)), LOSS)
        rais.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[curve])
        gain = rais.effective_steps / max(curve.count, 1)
    return {
        "data": name, "method": method, "seed": seed, "epochs": curve.count / steps, "mean_gain": gain,
        "train_loss": curve.losses[-1], "test_error_percent": evaluated(model, x_test, y_test)[1],
        "curve": [[step / steps, loss] for step, loss in zip(curve.steps, curve.losses, strict=True)],
    }  # fmt: skip


def epochs_to(row: dict[str, Any], loss: float) -> float:
    """Real epochs until the curve is at a loss; infinite if it never is."""
    previous = row["curve"][0]
    for point in row["curve"][1:]:
        if point[1] <= loss:
            share = (previous[1] - loss) / max(previous[1] - point[1], 1e-12)
            return previous[0] + share * (point[0] - previous[0])
        previous = point
    return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--no-oracle", action="store_true", help="leave O-SGD out: it scores all examples each step")
    parser.add_argument("--count", type=int, default=5000, help="training examples")
    arguments = parser.parse_args()
    names, seeds, epochs, count = DATA, SEEDS, arguments.epochs, arguments.count
    if arguments.quick:
        names, seeds, epochs, count = ("mnist5k",), (0,), 3, 400
    methods = ["uniform", "rais"] + ["oracle"] * (not arguments.no_oracle)
    rows, ratios = [], []
    for name in names:
        for seed in seeds:
            mine = {method: run(name, method, seed, epochs, count) for method in methods}
            # A loss that all reach: the worst of the last ones, which uniform reaches in at most all its epochs.
            target = max(row["train_loss"] for row in mine.values())
            uniform = epochs_to(mine["uniform"], target)
            for row in mine.values():
                row |= {"target_loss": target, "epochs_to_target": epochs_to(row, target)}
                row["epochs_over_uniform"] = row["epochs_to_target"] / uniform
                rows.append(row)
                say(str({key: value for key, value in row.items() if key != "curve"}))
            ratios.append(mine["rais"]["epochs_over_uniform"])
    if arguments.quick:
        return
    figures = {
        "epochs_over_uniform": float(np.mean(ratios)), "epochs_over_uniform_least": min(ratios),
        "epochs_over_uniform_most": max(ratios),
    }  # fmt: skip
    keys = ("epochs_over_uniform", "mean_gain", "train_loss", "test_error_percent")
    table = []
    for name in names:
        for method in methods:
            mine_rows = [row for row in rows if row["data"] == name and row["method"] == method]
            means = {key.replace("_", " "): float(np.mean([row[key] for row in mine_rows])) for key in keys}
            table.append({"data": name, "method": method, **means})
    common.write_result(
        common.RESULTS / "rais.json", figures, title="RAIS", seeds=list(seeds),
        about="Johnson, Guestrin, NeurIPS 2018: real epochs to the same training loss, over those of uniform sampling. "
        f"LeNet-300-100, {count:,} training examples, batches of {BATCH}; the spread is over data sets and seeds.",
        data=[{"name": name, "train": count, "test": "the whole test set"} for name in names],
        table=table, runs=rows, versions=common.versions("tensorflow", "keras", "numpy", "scipy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
