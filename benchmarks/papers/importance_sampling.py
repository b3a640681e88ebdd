"""Importance sampling beside uniform at equal time, as in Katharopoulos, Fleuret (https://arxiv.org/abs/1803.00942).

    python benchmarks/papers/importance_sampling.py            # six data sets, 3 seeds; about two hours on one core
    python benchmarks/papers/importance_sampling.py --quick    # a few seconds each: does it run?

Every method trains the same network from the same weights for the same processor time of training steps (measuring does
not count), with SGD, momentum and one learning rate. "gradient norm" is the paper's method with its threshold, "from
the start" the same without one, "systematic" ours: the same probabilities, drawn with less variance. Steps and gradient
evaluations are counted beside the time. The learning rate was fixed beforehand for all.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.training_runs import LOSS, Clock, arrays, evaluated, network
from tfkit.training import ImportanceSampling

SEEDS = (0, 1, 2)
BATCH, PRESAMPLE = 64, 3
DATA = ("cifar10", "fashion_mnist", "mnist", "fashion_mnist:imbalanced", "fashion_mnist:noisy", "mnist:noisy")
METHODS: dict[str, dict[str, Any]] = {
    "uniform": {"score": "uniform", "threshold": 1e9},
    "gradient norm": {},
    "from the start": {"threshold": 0.0},
    "loss": {"score": "loss"},
    "systematic": {"resampling": "systematic"},
}


def run(name: str, method: str, seed: int, seconds: float, count: int) -> dict[str, Any]:
    """Trains one method on one data set for so many seconds; returns its last measurement and its counts."""
    x, y, x_test, y_test = arrays(name, count)
    keras.utils.set_random_seed(seed)
    model = network(x.shape[1:], seed)
    wrapped = ImportanceSampling(model, BATCH, PRESAMPLE, seed=seed, **METHODS[method])
    # Uniform sampling gets batches of its own size, as it would without the wrapper.
    trained: keras.Model = model if method == "uniform" else wrapped
    trained.compile(keras.optimizers.SGD(0.02, momentum=0.9), LOSS)

    def measure() -> tuple[float, float]:
        return evaluated(model, x[:2000], y[:2000])[0], evaluated(model, x_test[:2000], y_test[:2000])[1]

    clock = Clock(measure, seconds / 4, seconds)
    size = BATCH if method == "uniform" else BATCH * PRESAMPLE
    usable = len(x) // size * size
    trained.fit(x[:usable], y[:usable], batch_size=size, epochs=100_000, verbose=0, callbacks=[clock])
    train_loss, error = measure()
    sampled = float(wrapped._sampled)
    row = {
        "data": name, "method": method, "seed": seed, "seconds": clock.spent, "steps": clock.steps,
        "gradient_evaluations": clock.steps * BATCH, "sampled_share": sampled / clock.steps, "train_loss": train_loss,
        "test_error_percent": error, "curve": clock.points,
    }  # fmt: skip
    if method == "gradient norm":
        wrapped.compile(keras.optimizers.SGD(0.02), LOSS) if not wrapped.compiled else None
        report = wrapped.report(x, y, repeats=3)
        row |= {"variance_ratio": report.variance_ratio, "time_ratio": report.time_ratio, "tau": report.tau}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training steps, for each run")
    parser.add_argument("--cache", type=Path, default=Path("build/importance_sampling"))
    parser.add_argument("--data", nargs="+", default=list(DATA))
    arguments = parser.parse_args()
    rows = []
    for name in ["mnist5k"] if arguments.quick else arguments.data:
        for seed in SEEDS[:1] if arguments.quick else SEEDS:
            for method in METHODS:
                kept = arguments.cache / f"{name.replace(':', '_')}_{method}_{seed}_{arguments.seconds:g}.json"
                if not arguments.quick and kept.exists():
                    rows.append(json.loads(kept.read_text(encoding="utf-8")))
                    continue
                seconds, count = (0.3, 600) if arguments.quick else (arguments.seconds, 10_000)
                rows.append(run(name, method, seed, seconds, count))
                say(str({key: value for key, value in rows[-1].items() if key != "curve"}))
                if not arguments.quick:
                    common.write_json(kept, rows[-1])
    if arguments.quick:
        return

    def mean(name: str, method: str, key: str) -> float:
        return float(np.mean([row[key] for row in rows if row["data"] == name and row["method"] == method]))

    first = arguments.data[0]
    figures = {
        "loss_over_uniform_at_equal_time": mean(first, "gradient norm", "train_loss")
        / mean(first, "uniform", "train_loss"),
        "systematic_over_uniform_at_equal_time": mean(first, "systematic", "train_loss")
        / mean(first, "uniform", "train_loss"),
        "scoring_time_ratio": mean(first, "gradient norm", "time_ratio"),
        "variance_ratio": mean(first, "gradient norm", "variance_ratio"),
    }
    keys = ("train_loss", "test_error_percent", "steps", "gradient_evaluations", "sampled_share")
    table = [
        {"data": name, "method": method, **{key.replace("_", " "): mean(name, method, key) for key in keys}}
        for name in arguments.data
        for method in METHODS
    ]
    common.write_result(
        common.RESULTS / "importance_sampling.json", figures, title="Importance sampling", seeds=list(SEEDS),
        about=f"Katharopoulos, Fleuret, <https://arxiv.org/abs/1803.00942>: b = {BATCH} of B = {BATCH * PRESAMPLE}, "
        f"{arguments.seconds:g} seconds of processor time for each run. The figures are those of {first}.",
        data=[{"name": name, "train": "10,000 at most", "test": "2,000"} for name in arguments.data],
        table=table, runs=rows, versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
