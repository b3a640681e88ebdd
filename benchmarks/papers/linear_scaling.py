"""Warm-ups of a large batch compared, as in Goyal et al. (https://arxiv.org/abs/1706.02677, table 1).

    python benchmarks/papers/linear_scaling.py            # ResNet-8 on 5,000 images of CIFAR-10, 3 seeds; about an hour
    python benchmarks/papers/linear_scaling.py --quick    # few images, one seed: does it run?

A batch of 32 with the rate 0.05, and a batch of 1,024 with 32 times that rate: without warm-up, with a constant one and
with a gradual one of five epochs. Large batches go through as micro-batches of 32, whose statistics normalisation uses,
as each of the paper's workers does; momentum is corrected, and residual blocks start as the identity, for all.
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
from benchmarks.training_runs import LOSS, arrays, evaluated
from tfkit import models
from tfkit.training import LinearScaling, MicroBatched, MomentumCorrectedSGD, PolynomialWarmup, zero_gamma

SEEDS = (0, 1, 2)
SMALL, LARGE, RATE = 32, 1024, 0.05
#: Table 1 of the paper, validation error of ResNet-50 in percent: 256 and 8,192 images.
PAPER = {"small": 23.60, "none": 24.84, "constant": 25.88, "gradual": 23.74}


def train(x: np.ndarray, y: np.ndarray, warmup: str, epochs: int, seed: int) -> tuple[keras.Model, float]:
    """Returns the trained model and the last training loss that `fit` saw."""
    keras.utils.set_random_seed(seed)
    model = models.get("resnet8")(x.shape[1:], seed=seed)
    zero_gamma(model)
    batch = SMALL if warmup == "small" else min(LARGE, len(x))
    steps = -(-len(x) // batch)
    decay = PolynomialWarmup(RATE, epochs * steps, power=1.0)
    rate: Any = decay if warmup == "small" else LinearScaling(decay, batch, SMALL, 5 * steps, warmup)
    trained = MicroBatched(model, SMALL)
    trained.compile(MomentumCorrectedSGD(rate, weight_decay=None), LOSS)
    history = trained.fit(x, y, batch_size=batch, epochs=epochs, verbose=0)
    return model, history.history["loss"][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    seeds, epochs, count = ((0,), 1, 128) if arguments.quick else (SEEDS, arguments.epochs, 5000)
    x, y, x_test, y_test = arrays("cifar10", count)
    if arguments.quick:
        x_test, y_test = x_test[:100], y_test[:100]
    table = []
    for warmup in ("small", "none", "constant", "gradual"):
        found = [train(x, y, warmup, epochs, seed) for seed in seeds]
        errors = [evaluated(model, x_test, y_test)[1] for model, _ in found]
        table.append({
            "warm-up": warmup, "batch": SMALL if warmup == "small" else LARGE, "test error %": float(np.mean(errors)),
            "by seed": ", ".join(f"{error:.2f}" for error in errors),
            "train loss": float(np.mean([loss for _, loss in found])), "paper's error %": PAPER[warmup],
        })  # fmt: skip
        say(str(table[-1]))
    if arguments.quick:
        return
    error = {row["warm-up"]: row["test error %"] for row in table}
    common.write_result(
        common.RESULTS / "linear_scaling.json",
        {f"{kind}_drop_points": error[kind] - error["small"] for kind in ("none", "constant", "gradual")},
        title="Linear scaling and warm-up", seeds=list(seeds), table=table,
        about="Goyal et al., <https://arxiv.org/abs/1706.02677>, table 1: ResNet-8 on 5,000 images of CIFAR-10, "
        f"a batch of {LARGE:,} with {LARGE // SMALL} times the rate of a batch of {SMALL}, as many epochs each.",
        data=[{"name": "cifar10", "train": len(x), "test": len(x_test)}],
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
