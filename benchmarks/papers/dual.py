"""The dual approach beside intervals, CROWN and the linear program (https://arxiv.org/abs/1803.06567).

    python benchmarks/papers/dual.py            # two small networks on MNIST; some minutes on one core
    python benchmarks/papers/dual.py --quick

The paper optimises its dual by subgradients, which may stop at any time, and compares with the same problem given to a
solver. Here: networks of 2 and 3 layers of 20 units, as in Fast-Lin's comparison with LPs, trained on 10,000 digits;
margins of test digits against all other classes, at a radius between what CROWN proves and twice that, where bounds are
loose. `gap_to_lp` is the mean of (LP - dual) / (LP - interval) over all margins: 0 is the LP, 1 interval bounds.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.peers.certification import network
from tfkit import data
from tfkit.robustness.certification import Dual, Network, certified_radius, exact_margin
from tfkit.robustness.certification.base import as_method
from tfkit.robustness.certification.margins import margin_rows


def measure(ready: Network, x: np.ndarray, steps: int) -> dict[str, Any]:
    """Bounds of all margins at 1.5 times the radii that CROWN certifies."""
    labels = ready.forward(x).argmax(1)
    epsilon = 1.5 * certified_radius(ready, x, labels, clip=(0, 1)).radius
    rows = margin_rows(labels, 10)
    problem = ready.problem(x, epsilon, np.inf, (0.0, 1.0), "real")
    interval = as_method("interval").lower(ready, problem, rows, {})
    crown = as_method("crown").lower(ready, problem, rows, {})
    trace = Dual(steps=steps).trace(ready, problem, rows)
    solved = [
        [exact_margin(ready, x[i], epsilon[i], row, clip=(0, 1), relaxed=True) for row in rows[i]]
        for i in range(len(x))
    ]
    lp = np.array(solved)
    span = np.maximum(lp - interval, 1e-9)
    return {
        "examples": len(x),
        "mean_epsilon": float(epsilon.mean()),
        "margin_interval": float(interval.mean()),
        "margin_crown": float(crown.mean()),
        "margin_dual": float(trace[-1].mean()),
        "margin_lp": float(lp.mean()),
        "gap_to_lp": float(((lp - trace[-1]) / span).mean()),
        "largest_gap_to_lp": float(((lp - trace[-1]) / span).max()),
        "crown_gap_to_lp": float(((lp - crown) / span).mean()),
        "above_lp": int((trace > lp + 1e-5).sum()),  # None may be: HiGHS's tolerance allowed for.
        "below_interval": int((trace < interval - 1e-9).sum()),
        "gap_by_step": {str(step): float(((lp - trace[step]) / span).mean()) for step in (0, steps // 10, steps // 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder that keeps networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "dual.json")
    arguments = parser.parse_args()
    names = ["mlp2_20"] if arguments.quick else ["mlp2_20", "mlp3_20"]
    digits, epochs = data.load("mnist5k" if arguments.quick else "mnist", validation=0), 1 if arguments.quick else 6
    count, steps = (2, 20) if arguments.quick else (arguments.examples, arguments.steps)
    results = {}
    for name in names:
        model = network(name, digits, epochs, arguments.cache)
        results[name] = measure(Network(model), digits.x_test[:count], steps)
        say(f"{name}: {results[name]}")
    if not arguments.quick:
        common.write_result(
            arguments.out,
            {"gap_to_lp": max(row["gap_to_lp"] for row in results.values())},
            data={"name": digits.name, "train": len(digits.x_train), "test": count}, seeds=[0], results=results,
            settings={"steps": steps, "clip": [0, 1], "norm": "linf", "epochs": epochs},
            versions=common.versions("tensorflow", "keras", "numpy", "scipy"),
        )  # fmt: skip


if __name__ == "__main__":
    main()
