"""tfkit's attacks beside foolbox's and ART's: on the same weights and examples, in one run.

    python benchmarks/peers/attacks.py --peer-python PEERS/bin/python --cache build/attacks_peers
    python benchmarks/peers/attacks.py --peer-python PEERS/bin/python --quick    # does it run?

Peers run in an environment of their own (requirements-attacks.txt), on one thread as tfkit does; times are of the
processor. One that is not installed is skipped by name. With `--cache`, what is finished is kept, label attacks of
peers example by example, and a run that was stopped goes on. The examples are test digits that the network gets right.

- PGD with 40 steps of 2.5/40 of the radius from the example itself, tfkit's with `early_stop`, as `evaluate` has it;
  with all steps for every example, as peers take them, it stands beside it. All are asked twice: the second time is
  compared, the first one, with what is made once, stands beside it.
- Carlini-Wagner L2, 9 values of c with 1000 iterations. Adam's rate, of tfkit and of foolbox, is the one of RATES with
  the least median distance on validation digits. ART's has its own default budget: it is shown and not compared.
- Label attacks on a `.tflite` file: the nearest adversarial point at each number of queries, every query counted.
  tfkit's are run anew for each budget; peers, example by example, are stopped at the last one.
- ZOO and NES: success and queries, tfkit's alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1", OMP_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from tfkit import data, export
from tfkit.robustness.attacks import (
    NES,
    PGD,
    ZOO,
    Boundary,
    CarliniWagnerL2,
    HopSkipJump,
    OPTAttack,
    Oracle,
    SignOPT,
)

OURS: dict[str, Any] = {"Boundary": Boundary, "OPT": OPTAttack, "SignOPT": SignOPT, "HopSkipJump": HopSkipJump}
PEERS = (
    ("foolbox", "Boundary"),
    ("foolbox", "HopSkipJump"),
    ("art", "Boundary"),
    ("art", "HopSkipJump"),
    ("art", "SignOPT"),
)
LIBRARIES = ("foolbox", "art")
RATES = (0.01, 0.02, 0.05)
EPSILONS = (0.1, 0.3)
STEP = 2.5 / 40
WORKER = Path(__file__).with_name("attacks_worker.py")
FAILED = 1e9


def network(digits: data.Dataset, epochs: int) -> keras.Model:
    """A small convolutional network, to logits."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(16, 5, strides=2, activation="relu")(inputs)
    x = layers.Dense(64, activation="relu")(layers.Flatten()(layers.MaxPooling2D(2)(x)))
    model = keras.Model(inputs, layers.Dense(10)(x))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(digits.x_train, digits.y_train, epochs=epochs, verbose=0)
    return model


class Bench:
    """Runs what the cache does not hold.

    Args:
        folder: keeps answers, the model's files and examples.
        peer_python: of the peers' environment; None to skip them.
    """

    def __init__(self, folder: Path, peer_python: Path | None) -> None:
        self.folder, self.peer_python = folder, peer_python
        self.skipped: dict[str, str] = {}
        self.versions: dict[str, str] = {}

    def ours(self, name: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what `run` gives, or gave."""
        path = self.folder / f"tfkit_{name}.json"
        if not path.exists():
            common.write_json(path, run())
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def peer(self, row: str, /, count: int | None = None, **task: Any) -> dict[str, Any] | None:
        """Returns a peer's answer, or None if it cannot run; `count` examples make a label attack's whole."""
        label = f"{task['library']}_{row}"
        answer = self.folder / f"{label}.json"
        whole = answer.exists() and (count is None or len(json.loads(answer.read_text())["examples"]) == count)
        if not whole:
            if self.peer_python is None:
                self.skipped[label] = "no --peer-python"
                return None
            given = common.write_json(self.folder / f"{label}.task.json", task)
            environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}
            command = [str(self.peer_python.absolute()), str(WORKER), str(given), str(answer)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                self.skipped[label] = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
                say(f"{label}: skipped: {self.skipped[label]}")
                return None
        found: dict[str, Any] = json.loads(answer.read_text())
        self.versions |= {name: version for name, version in found.pop("versions").items() if version != "absent"}
        return found


def median(distances: Any) -> float:
    return float(np.median(np.asarray(distances)))


def pgd(bench: Bench, model: keras.Model, x: np.ndarray, y: np.ndarray, files: dict[str, str]) -> dict[str, Any]:
    """Robust accuracy and times of all, by radius."""

    def run(early_stop: bool) -> dict[str, Any]:
        # One for both radii, as one would use it.
        attack = PGD(40, STEP, random_start=False, early_stop=early_stop)
        rows: dict[str, Any] = {}
        for epsilon in EPSILONS:
            times = []
            for _ in range(2):
                start = time.process_time()
                found = attack(model, x, y, epsilon=epsilon)
                times.append(time.process_time() - start)
            left = float(1 - found.success.mean())
            rows[str(epsilon)] = {"robust_accuracy": left, "first_cpu_s": times[0], "cpu_s": times[1]}
        return rows

    rows = {
        "tfkit": bench.ours("pgd", lambda: run(early_stop=True)),
        "tfkit, all steps": bench.ours("pgd_all_steps", lambda: run(early_stop=False)),
    }
    for library in LIBRARIES:
        task: dict[str, Any] = {
            "kind": "pgd",
            "library": library,
            "steps": 40,
            "relative_step": STEP,
            "epsilons": EPSILONS,
            **files,
        }
        if (found := bench.peer("pgd", **task)) is not None:
            rows[library] = found
    return rows


def carlini_wagner(
    bench: Bench,
    model: keras.Model,
    parts: dict[str, tuple[np.ndarray, np.ndarray, dict[str, str]]],
    steps: int,
    rates: tuple[float, ...],
) -> dict[str, Any]:
    """Distances and times; the rate of Adam is chosen on the validation part."""

    def ours(part: str, rate: float) -> dict[str, Any]:
        x, y, _ = parts[part]

        def run() -> dict[str, Any]:
            start = time.process_time()
            found = CarliniWagnerL2(iterations=steps, learning_rate=rate)(model, x, y, epsilon=None)
            spent = time.process_time() - start
            distances = np.where(found.success, found.distance, FAILED)
            return {"distances": distances.tolist(), "cpu_s": spent, "evaluations": int(np.median(found.queries))}

        return bench.ours(f"cw_{part}_{rate}", run)

    def foolbox(part: str, rate: float) -> dict[str, Any] | None:
        task: dict[str, Any] = {
            "kind": "cw",
            "library": "foolbox",
            "search_steps": 9,
            "steps": steps,
            "rate": rate,
            **parts[part][2],
        }
        return bench.peer(f"cw_{part}_{rate}", **task)

    rows: dict[str, Any] = {}
    for label, attack in (("tfkit", ours), ("foolbox", foolbox)):
        tried = {rate: attack("validation", rate) for rate in rates}
        if any(found is None for found in tried.values()):
            continue
        by_rate = {rate: median(found["distances"]) for rate, found in tried.items() if found is not None}
        best = min(by_rate, key=lambda rate: by_rate[rate])
        if (found := attack("test", best)) is not None:
            chosen = {"rate": best, "validation_median_l2": {str(rate): value for rate, value in by_rate.items()}}
            rows[label] = {**found, **chosen, "median_l2": median(found["distances"])}
    defaults: dict[str, Any] = {"kind": "cw", "library": "art", **parts["test"][2]}
    found = bench.peer("cw_defaults", **defaults)
    if found is not None:
        rows["art, defaults of 10 x 10"] = {**found, "median_l2": median(found["distances"])}
    return rows


def asked_alone(path: Path, x: np.ndarray) -> dict[str, Any]:
    """What queries cost with no attack around them: the floor of an attack's time."""
    oracle, numbers, queries = Oracle(path, "labels"), np.arange(len(x)), 0
    oracle.start(len(x))
    start = time.process_time()
    while queries < 100_000:
        oracle(x, numbers)
        queries += len(x)
    return {"cpu_s": time.process_time() - start, "queries": [queries]}


def label_attacks(
    bench: Bench, path: Path, x: np.ndarray, y: np.ndarray, files: dict[str, str], checkpoints: list[int], limit: int
) -> dict[str, Any]:
    """Distances at each number of queries, queries and times, by library and attack."""
    rows: dict[str, Any] = {}
    for name, kind in OURS.items():

        def run(kind: Any = kind) -> dict[str, Any]:
            distances = []
            for queries in checkpoints:
                start = time.process_time()
                found = kind(max_queries=queries)(Oracle(path, "labels", budget=queries), x, y, epsilon=None)
                spent = time.process_time() - start
                distances.append(np.where(found.success, found.distance, FAILED))
            return {"distances": np.transpose(distances).tolist(), "cpu_s": spent, "queries": found.queries.tolist()}

        rows[f"tfkit {name}"] = bench.ours(f"labels_{name}", run)
    rows["the file alone"] = bench.ours("file_alone", lambda: asked_alone(path, x))
    for library, name in PEERS:
        task: dict[str, Any] = {"kind": "labels", "library": library, "name": name, "checkpoints": checkpoints, **files}
        answer = bench.peer(f"labels_{name}", count=len(x), seconds_an_example=limit, **task)
        if answer is not None:
            each = answer["examples"]
            rows[f"{library} {name}"] = {key: [row[key] for row in each] for key in ("distances", "queries")} | {
                "cpu_s": sum(row["cpu_s"] for row in each),
                "out_of_time": sum(row["out_of_time"] for row in each),
            }
    for label, row in rows.items():
        if "distances" not in row:
            continue
        row["median_l2"] = dict(zip(map(str, checkpoints), np.median(row["distances"], axis=0).tolist(), strict=True))
        say(f"{label}: median L2 {row['median_l2']}, {row['cpu_s']:.1f} CPU s")
    return rows


def score_attacks(bench: Bench, model: keras.Model, x: np.ndarray, y: np.ndarray, queries: int) -> dict[str, Any]:
    """Success and queries of ZOO without a radius, and of NES within 0.3 in L-infinity."""

    def run(attack: Any, epsilon: float | None) -> dict[str, Any]:
        start = time.process_time()
        found = attack(Oracle(model, budget=queries), x, y, epsilon=epsilon)
        spent = time.process_time() - start
        success = found.success
        return {
            "success": float(success.mean()),
            "median_queries": median(found.queries),
            "median_distance": median(np.where(success, found.distance, FAILED)),
            "cpu_s": spent,
        }

    return {
        "ZOO": bench.ours("zoo", lambda: run(ZOO(max_queries=queries), None)),
        "NES": bench.ours("nes", lambda: run(NES(norm="linf", max_queries=queries), 0.3)),
    }


def cpu_per_query(row: dict[str, Any]) -> float:
    return float(row["cpu_s"] / sum(row["queries"]))


def figures_of(results: dict[str, Any]) -> dict[str, float]:
    """The figures that these results allow."""
    figures = {
        "zoo_success": results["scores"]["ZOO"]["success"],
        "nes_success": results["scores"]["NES"]["success"],
        "nes_median_queries": results["scores"]["NES"]["median_queries"],
    }
    rows = results["pgd"]
    peers = [rows[library] for library in LIBRARIES if library in rows]
    if "foolbox" in rows:
        differences = [
            100 * (rows["tfkit"][e]["robust_accuracy"] - rows["foolbox"][e]["robust_accuracy"])
            for e in map(str, EPSILONS)
        ]
        # Of the two radii, the difference that is farther from none, with its sign.
        figures["pgd_robust_accuracy_difference_points"] = max(differences, key=abs)
    if peers:
        for ours, key, figure in (
            ("tfkit", "cpu_s", "pgd_time_over_fastest"),
            ("tfkit", "first_cpu_s", "pgd_first_time_over_fastest"),
            ("tfkit, all steps", "cpu_s", "pgd_all_steps_time_over_fastest"),
        ):
            total = [sum(row[e][key] for e in map(str, EPSILONS)) for row in (rows[ours], *peers)]
            figures[figure] = total[0] / min(total[1:])
    rows = results["carlini_wagner"]
    if "foolbox" in rows:
        figures["cw_distance_over_best"] = rows["tfkit"]["median_l2"] / rows["foolbox"]["median_l2"]
        figures["cw_time_over_fastest"] = rows["tfkit"]["cpu_s"] / rows["foolbox"]["cpu_s"]
    rows = results["labels"]
    times, floors = [], []
    for name in OURS:
        mine = rows[f"tfkit {name}"]
        others = [rows[f"{library} {name}"] for library in LIBRARIES if f"{library} {name}" in rows]
        if not others:
            continue
        for queries, value in mine["median_l2"].items():
            best = min(other["median_l2"][queries] for other in others)
            short = f"{int(queries) // 1000}k" if int(queries) >= 1000 else queries
            figures[f"{name.lower()}_distance_over_best_{short}"] = value / best
        # Time a query: an attack that ended early asked fewer.
        fastest = min(map(cpu_per_query, others))
        times.append(cpu_per_query(mine) / fastest)
        floors.append(cpu_per_query(rows["the file alone"]) / fastest)
    if times:
        figures["hard_label_time_over_fastest"] = max(times)
        figures["hard_label_floor_over_fastest"] = max(floors)
    last = max(rows["tfkit OPT"]["median_l2"], key=int)
    if last == "20000":
        figures["opt_over_boundary_distance_20k"] = (
            rows["tfkit OPT"]["median_l2"][last] / rows["tfkit Boundary"]["median_l2"][last]
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="of the environment of requirements-attacks.txt")
    parser.add_argument("--cache", type=Path, help="folder that keeps what is finished")
    parser.add_argument("--quick", action="store_true", help="few examples and queries; writes no result")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "attacks_peers.json")
    arguments = parser.parse_args()
    quick = arguments.quick
    sizes = {"pgd": 20, "cw": 3, "validation": 2, "labels": 2, "scores": 3} if quick else {
        "pgd": 1000, "cw": 100, "validation": 16, "labels": 20, "scores": 100}  # fmt: skip
    checkpoints = [100, 300] if quick else [1000, 5000, 20_000]
    digits = data.load("mnist5k" if quick else "mnist")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if quick or arguments.cache is None else arguments.cache
        folder.mkdir(parents=True, exist_ok=True)
        model = kept(folder, "network", lambda: network(digits, 1 if quick else 8))
        path = folder / "network.tflite"
        if not path.exists():
            export.convert(model, path)
        parts: dict[str, tuple[np.ndarray, np.ndarray, dict[str, str]]] = {}
        for name, count in sizes.items():
            x, y = (
                (digits.x_validation, digits.y_validation) if name == "validation" else (digits.x_test, digits.y_test)
            )
            # Label attacks see the file, the others the network, and a digit near a boundary may lie between the two.
            right = Oracle(path).inspect(x).argmax(axis=1) == y
            right &= np.asarray(model.predict(x, verbose=0)).argmax(axis=1) == y
            chosen = np.flatnonzero(right)[:count]
            examples = (folder / f"{name}.npz").absolute()
            np.savez(examples, x=x[chosen], y=y[chosen])
            file = path if name == "labels" else folder / "network.keras"
            parts[name] = (x[chosen], y[chosen], {"model": str(file.absolute()), "examples": str(examples)})
        bench = Bench(folder, arguments.peer_python)
        results: dict[str, Any] = {"pgd": pgd(bench, model, *parts["pgd"])}
        say(f"PGD: {json.dumps(results['pgd'])}")
        cw_parts = {"test": parts["cw"], "validation": parts["validation"]}
        results["carlini_wagner"] = carlini_wagner(
            bench, model, cw_parts, 10 if quick else 1000, RATES[:1] if quick else RATES
        )
        for label, row in results["carlini_wagner"].items():
            say(f"Carlini-Wagner, {label}: median L2 {row['median_l2']:.3f}, {row['cpu_s']:.1f} CPU s")
        results["scores"] = score_attacks(bench, model, *parts["scores"][:2], 500 if quick else 20_000)
        say(f"scores: {json.dumps(results['scores'])}")
        limit = 60 if quick else 1200
        results["labels"] = label_attacks(bench, path, *parts["labels"], checkpoints, limit)
    figures = figures_of(results)
    for key, value in figures.items():
        say(f"{key}: {value:.3g}")
    if quick:
        return
    common.write_result(
        arguments.out, figures, data={"name": digits.name, "train": len(digits.y_train), "examples": sizes},
        seeds=[0], results=results, skipped=bench.skipped,
        settings={"rates": RATES, "epsilons": EPSILONS, "checkpoints": checkpoints, "pgd_steps": 40,
                  "cw": "9 x 1000", "score_queries": 20_000, "seconds_an_example": limit},
        versions={**common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
                  "peers": ", ".join(f"{name} {version}" for name, version in bench.versions.items())},
    )  # fmt: skip


if __name__ == "__main__":
    main()
