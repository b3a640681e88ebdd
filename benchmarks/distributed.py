"""Distributed training: parity with one process, overhead of a step, throughput, and what a killed worker costs.

    python benchmarks/distributed.py            # a quarter of an hour on two cores
    python benchmarks/distributed.py --quick    # parity of one case with two workers: does it run?

Workers are real processes on this machine, started by `tfkit launch`; they share its cores, so that the throughput of
two says what the machine gives, not what a cluster would. The calculator's plan stands beside it, up to 1,000 workers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
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
from benchmarks.training_runs import LOSS, interleaved
from tests.training import parity
from tests.training.test_distribute import CASES, KILLED
from tfkit import models
from tfkit.training import distribute

ROOT = Path(__file__).resolve().parents[1]


def launch(arguments: list[str], **environment: str) -> str:
    """Runs `tfkit launch`; returns what the workers printed."""
    code = f"import sys; sys.argv[1:] = {['launch', *arguments]!r}; from tfkit.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.stdout


def parity_table(cases: list[str], workers: int) -> list[dict[str, Any]]:
    """The largest difference of a weight, for each case, from one process."""
    with tempfile.TemporaryDirectory() as folder:
        launch(["--workers", str(workers), "tests/training/parity.py", *cases], PARITY_OUT=folder)
        rows = []
        for case in cases:
            weights, _ = parity.trained(case)
            with np.load(Path(folder) / f"{case}.npz", allow_pickle=False) as found:
                differences = [np.abs(found[f"w{index}"] - each).max() for index, each in enumerate(weights)]
            rows.append({"case": case, "workers": workers, "largest difference": float(max(differences))})
            say(str(rows[-1]))
    return rows


def overhead() -> float:
    """An epoch of `distribute.fit` in one process over one of Keras' `fit`, interleaved."""
    rng = np.random.default_rng(0)
    x, y = rng.random((2048, 28, 28, 1), np.float32), rng.integers(0, 10, 2048)
    made = []
    for _ in range(2):
        model = models.get("lenet5")((28, 28, 1), seed=0)
        model.compile(keras.optimizers.SGD(0.01), LOSS)
        made.append(model)
    spent = interleaved(
        {
            "keras": lambda: made[0].fit(x, y, batch_size=64, verbose=0),
            "tfkit": lambda: distribute.fit(made[1], x, y, batch_size=64, verbose=0),
        },
        7,
    )
    return spent["tfkit"] / spent["keras"]


SPEED = """
import os, sys, time
sys.path.insert(0, {root!r})
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
import keras, numpy as np
from tfkit import models
from tfkit.training import distribute
strategy = distribute.strategy()
with strategy.scope():
    model = models.get("lenet5")((28, 28, 1), seed=0)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
x, y = np.zeros((4096, 28, 28, 1), "float32"), np.zeros(4096, int)
distribute.fit(model, x[:512], y[:512], batch_size=128, verbose=0)
start = time.perf_counter()
distribute.fit(model, x, y, batch_size=128, verbose=0)
print("speed", 4096 / (time.perf_counter() - start), flush=True)
"""


def throughput(workers: int) -> float:
    """Images a second of so many workers together."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "speed.py"
        script.write_text(SPEED.format(root=str(ROOT)))
        return float(re.findall(r"\[0\] speed ([\d.]+)", launch(["--workers", str(workers), str(script)]))[0])


def lost_steps() -> float:
    """Steps done twice after a worker was killed, over the interval of the checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(KILLED.format(root=str(ROOT), folder=folder, kill=True))
        printed = launch(["--workers", "2", "--restarts", "1", str(script)])
    # Of the worker that died, after a step that no checkpoint holds.
    steps = [int(step) for step in re.findall(r"\[1\] step (\d+)", printed)]
    return (len(steps) - len(set(steps))) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        parity_table(["accumulation"], 2)
        return
    cases = [case for case in CASES if case != "importance"]
    table = parity_table(cases, 2) + parity_table(cases, 4)
    speeds = {workers: throughput(workers) for workers in (1, 2)}
    plan = distribute.scaling(25_600_000, 100.0, 32, overlap=0.5)
    figures = {
        "weights_difference_2_workers": max(row["largest difference"] for row in table if row["workers"] == 2),
        "weights_difference_4_workers": max(row["largest difference"] for row in table if row["workers"] == 4),
        "step_over_fit_1_worker": overhead(), "lost_steps_after_kill_over_checkpoint_interval": lost_steps(),
        "images_per_second_1_worker": speeds[1], "images_per_second_2_workers": speeds[2],
    }  # fmt: skip
    say(json.dumps(figures, indent=2))
    common.write_result(
        common.RESULTS / "distributed.json", figures, title="Distributed training",
        about="Weights after two epochs with an odd last batch, weights of examples, a regularizer and validation: the "
        "largest difference between real worker processes and one process. The plan is that of the calculator for "
        "ResNet-50's 25.6 million weights, 100 ms and 32 images a step, 100 Gbit/s.",
        data=[{"name": "random numbers", "train": 47, "test": 47}],
        results={"parity": table, "plan": [point._asdict() for point in plan]},
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
