"""Sharpness of small- and large-batch solutions, as in Keskar et al. (https://arxiv.org/abs/1609.04836, table 3).

    python benchmarks/papers/sharpness.py            # an F1-like network on MNIST, 3 seeds; about ten minutes
    python benchmarks/papers/sharpness.py --quick    # embedded digits, one seed: does it run?

F1 is the paper's fully connected network with batch normalisation, five layers of 512 units on TIMIT; here it is that
on MNIST with 10,000 digits. Batches of 256 beside a tenth of the training set, Adam, both trained until the training
loss is the same: the large batch gets more epochs. Sharpness with epsilon = 1e-3 and ten iterations of L-BFGS-B, on the
training data, in the full space and in a random subspace of 100 dimensions.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.training_runs import LOSS, arrays, evaluated
from tfkit.training import line, sharpness

SEEDS = (0, 1, 2)
#: Table 3 of the paper, F1, epsilon = 1e-3: full space, and 100 dimensions.
PAPER = {"small full": 1.23, "large full": 205.14, "small subspace": 0.11, "large subspace": 9.22}


def f1(shape: tuple[int, ...], seed: int, width: int = 512) -> keras.Model:
    """Five normalised hidden layers, of 512 units in the paper's F1."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(shape)
    x = keras.layers.Flatten()(inputs)
    for _ in range(5):
        x = keras.layers.Activation("relu")(keras.layers.BatchNormalization(momentum=0.9)(keras.layers.Dense(width)(x)))
    return keras.Model(inputs, keras.layers.Dense(10)(x))


class Until(keras.callbacks.Callback):
    """Stops when the training loss, in inference mode, is at most a target."""

    def __init__(self, x: np.ndarray, y: np.ndarray, target: float) -> None:
        super().__init__()
        self.x, self.y, self.target = x, y, target

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if evaluated(self.model, self.x, self.y)[0] <= self.target:
            self.model.stop_training = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--target", type=float, default=0.01, help="training loss at which both stop")
    parser.add_argument("--count", type=int, default=10_000)
    arguments = parser.parse_args()
    count, seeds, epochs = (400, SEEDS[:1], 2) if arguments.quick else (arguments.count, SEEDS, 60)
    x, y, x_test, y_test = arrays("mnist5k" if arguments.quick else "mnist", count)
    rows = []
    for seed in seeds:
        solutions = {}
        for name, batch, most in (("small", 256, epochs), ("large", len(x) // 10, 4 * epochs)):
            model = f1(x.shape[1:], seed, 32 if arguments.quick else 512)
            model.compile(keras.optimizers.Adam(1e-3), LOSS)
            until = Until(x, y, arguments.target)
            history = model.fit(x, y, batch_size=min(batch, len(x)), epochs=most, verbose=0, callbacks=[until])
            loss, error = evaluated(model, x, y)
            row = {
                "seed": seed, "batch": name, "batch_size": batch, "epochs": len(history.epoch), "train_loss": loss,
                "test_error_percent": evaluated(model, x_test, y_test)[1],
                "full": sharpness(model, (x, y), 1e-3), "subspace": sharpness(model, (x, y), 1e-3, 100, seed=seed),
            }  # fmt: skip
            rows.append(row)
            solutions[name] = model
            say(str(row))
        if seed == 0 and not arguments.quick:
            found = line(solutions["small"], solutions["large"], {"train": (x, y), "test": (x_test, y_test)})
            found.plot().savefig(common.RESULTS.parents[1] / "docs" / "sharpness.png", dpi=80)
    if arguments.quick:
        return

    def ratio(space: str) -> float:
        small, large = ([row[space] for row in rows if row["batch"] == batch] for batch in ("small", "large"))
        return float(np.mean(large) / np.mean(small))

    common.write_result(
        common.RESULTS / "sharpness.json",
        {"large_over_small_full": ratio("full"), "large_over_small_subspace": ratio("subspace")},
        title="Sharpness", seeds=list(seeds), plot="sharpness.png", paper=PAPER, table=rows,
        about="Keskar et al., <https://arxiv.org/abs/1609.04836>: the rise of the training loss in a box of 1e-3, in "
        f"percent, of solutions at a training loss of at most {arguments.target:g}. The paper's table 3 has 1.23 for "
        "small and 205 for large batches in the full space, on TIMIT. The plot is the loss on the line between the two "
        "solutions of the first seed, small at 0, large at 1.",
        data=[{"name": "mnist", "train": len(x), "test": len(x_test)}],
        versions=common.versions("tensorflow", "keras", "numpy", "scipy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
