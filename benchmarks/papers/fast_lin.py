"""Certified radii as Fast-Lin's tables have them, by method, norm and target (https://arxiv.org/abs/1804.09699).

    python benchmarks/papers/fast_lin.py                       # the small networks of the first table; minutes
    python benchmarks/papers/fast_lin.py --networks mlp2_1024  # of the second; longer
    python benchmarks/papers/fast_lin.py --quick

Averages over 100 test digits that are classified right, each kept away from one target class: drawn at random, the
least likely one, and the runner-up. m x [n] is a network of m layers with n units in each but the last, trained here
on 10,000 digits, where the paper has 60,000: radii depend on the weights, so that what compares with the paper is the
order and the ratio of methods, not a radius. Inputs are not clipped, as in the paper.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.peers.certification import network
from tfkit import data
from tfkit.robustness.certification import Network, certified_radius
from tfkit.robustness.certification.region import NORMS

METHODS = ("interval", "fast_lip", "fast_lin", "crown")
NETWORKS = ("mlp2_20", "mlp3_20", "mlp2_1024", "mlp3_1024")


def targets_of(logits: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """A random class, the least likely and the runner-up, none of them the label."""
    classes = logits.shape[1]
    drawn = (labels + np.random.default_rng(seed).integers(1, classes, len(labels))) % classes
    order = np.argsort(np.where(np.eye(classes)[labels] > 0, -np.inf, logits), axis=1)
    return {"random": drawn, "least": order[:, 1], "runner-up": order[:, -1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["mlp2_20", "mlp3_20"])
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cache", type=Path, help="folder that keeps networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "fast_lin.json")
    arguments = parser.parse_args()
    digits, epochs = data.load("mnist5k" if arguments.quick else "mnist", validation=0), 1 if arguments.quick else 6
    if arguments.quick:
        arguments.networks, arguments.examples = ["mlp2_20"], 3
    table: list[dict[str, Any]] = []
    order = {"interval_above_fast_lin": 0, "fast_lin_above_crown": 0, "radii": 0}
    for name in arguments.networks:
        model = network(name, digits, epochs, arguments.cache)
        ready = Network(model)
        logits = ready.forward(digits.x_test[: 2 * arguments.examples])
        labels = digits.y_test[: 2 * arguments.examples]
        right = np.flatnonzero(logits.argmax(1) == labels)[: arguments.examples]
        x, logits, labels = digits.x_test[right], logits[right], labels[right]
        for norm in NORMS:
            for kind, targets in targets_of(logits, labels, 0).items():
                row: dict[str, Any] = {"network": f"{name[3]} x [{name[5:]}]", "norm": norm, "target": kind}
                found, spent = {}, {}
                for method in METHODS:
                    started = time.process_time()
                    found[method] = certified_radius(ready, x, labels, norm, method, targets=targets).radius
                    spent[method] = (time.process_time() - started) / len(x)
                row |= {method: float(radii.mean()) for method, radii in found.items()}
                row |= {f"{method} cpu ms": 1000 * seconds for method, seconds in spent.items()}
                room = 1 + 2e-3  # Twice the tolerance of a radius.
                order["radii"] += len(x)
                order["interval_above_fast_lin"] += int((found["interval"] > found["fast_lin"] * room).sum())
                order["fast_lin_above_crown"] += int((found["fast_lin"] > found["crown"] * room).sum())
                table.append(row)
                say(str(row))
    if not arguments.quick:
        ratio = np.exp(np.mean([np.log(row["crown"] / row["fast_lin"]) for row in table]))
        common.write_result(
            arguments.out,
            {"crown_over_fast_lin": float(ratio), **order}, table=table,
            data={"name": digits.name, "train": len(digits.x_train), "test": arguments.examples, "epochs": epochs},
            seeds=[0], settings={"clip": None, "arithmetic": "float32", "tolerance": 1e-3},
            versions=common.versions("tensorflow", "keras", "numpy"),
        )  # fmt: skip


if __name__ == "__main__":
    main()
