"""tfkit beside tensorflow-model-optimization: bytes, accuracy, latency and seconds a training step.

    python benchmarks/peers/compression.py --peer-python PEERVENV/bin/python --seeds 0 1 2

The float networks (LeNet-5 on MNIST, a ConvNet with batch normalization on Fashion-MNIST) are trained once a seed, in
Keras 3. Both sides start from those very floats, with the same data, batch size, epochs, rates and schedules: tfkit in
this process; tfmot, which needs Keras 2, in a child of another virtual environment
(requirements-compression.txt). Every resulting `.tflite` file is then measured here, by one program: its bytes raw,
under gzip, xz, zstd and tfkit's pack; its accuracy over the whole test set; its latency in interleaved rounds.

Without --peer-python only tfkit's side runs, and the result says so.
"""

from __future__ import annotations

import os

# Before TensorFlow is imported, here and in the child: both sides train on the processor, where both are compared.
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common
from benchmarks.peers import summary
from benchmarks.peers.plan import FULL, METHODS, QUICK, Plan

PACKAGES = ("tensorflow", "keras", "numpy", "ai-edge-litert", "zstandard")
GENERAL = ("gzip", "xz", "zstd")


def run_seed(
    plans: tuple[Plan, ...], methods: tuple[str, ...], seed: int, peer_python: str | None, folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Train, compress and measure every network with one seed.

    Args:
        plans: the networks.
        methods: names of `plan.METHODS`.
        seed: of the float training, the fine-tuning and the split.
        peer_python: interpreter that has tfmot, or None.
        folder: an empty folder for weights, data and files.

    Returns:
        Network name to `data`, `rows` (side, method, figures of the file) and `timing` (side to method to step); and
        the versions on either side.
    """
    import keras
    import numpy as np

    from benchmarks.peers import twin
    from benchmarks.peers.compression_tfkit import Ours, train
    from tfkit import data, models

    job: dict[str, Any] = {"seed": seed, "methods": methods, "models": []}
    sides: dict[str, dict[str, Any]] = {}
    results: dict[str, Any] = {}
    versions = {"tfkit": common.versions(*PACKAGES)}
    for plan in plans:
        loaded = data.load(plan.data, validation=0.0, seed=seed)
        loaded = loaded.subset(train=plan.train_limit, test=plan.test_limit, seed=seed)
        arrays = {"x_train": loaded.x_train, "y_train": loaded.y_train}
        print(f"seed {seed}, {plan.network}: {len(loaded.x_train)} training examples of {plan.data}", flush=True)
        keras.utils.set_random_seed(seed)
        model = models.get(plan.network)(loaded.input_shape, loaded.num_classes, seed=seed)
        train(model, arrays, plan, plan.float_rate, plan.float_epochs, seed, [])
        every, end = plan.prune_pace(len(loaded.x_train))
        np.savez(folder / f"{plan.network}-weights.npz", **twin.weights_by_order(model))
        np.savez(folder / f"{plan.network}-data.npz", **arrays)
        np.savez(folder / f"{plan.network}-test.npz", x=loaded.x_test, y=loaded.y_test)
        job["models"].append(
            {
                "name": plan.network,
                "spec": twin.describe(model),
                "weights": f"{plan.network}-weights.npz",
                "data": f"{plan.network}-data.npz",
                "plan": {**dataclasses.asdict(plan), "prune_every_steps": every, "prune_end_step": end},
            }
        )
        ours = Ours(model, arrays, plan, seed)
        (folder / "tfkit").mkdir(exist_ok=True)
        sides[plan.network] = {"tfkit": ours.write(folder / "tfkit", methods)}
        results[plan.network] = {
            "data": {
                "name": plan.data,
                "source": loaded.source.split(":")[0],
                "train": len(loaded.x_train),
                "test": len(loaded.x_test),
            },
            "timing": {"tfkit": ours.timings()},
        }
    if peer_python:
        common.write_json(folder / "job.json", job)
        peer, versions["tfmot"] = run_peer(peer_python, folder)
        for name, found in peer.items():
            sides[name]["tfmot"] = found["methods"]
            results[name]["timing"]["tfmot"] = found["timing"]
    for plan in plans:
        results[plan.network]["rows"] = measure(sides[plan.network], folder, plan.network)
    return results, versions


def run_peer(python: str, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Run compression_tfmot.py on the job in `folder`; returns its results, with full paths, and its versions."""
    program = Path(__file__).with_name("compression_tfmot.py")
    command = [python, str(program), "--in", str(folder), "--out", str(folder / "tfmot")]
    with open(folder / "tfmot.log", "w", encoding="utf-8") as log:
        child = subprocess.run(command, stdout=None, stderr=log, check=False)
    if child.returncode:
        tail = "\n".join((folder / "tfmot.log").read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"the peer ended with exit code {child.returncode}:\n{tail}")
    found = json.loads((folder / "tfmot" / "peer.json").read_text())
    for entry in found["models"].values():
        for row in entry["methods"].values():
            if "file" in row:
                row["file"] = str(folder / "tfmot" / row["file"])
    return dict(found["models"]), dict(found["versions"])


def measure(sides: dict[str, Any], folder: Path, network: str) -> list[dict[str, Any]]:
    """Measure all files of a network together; returns one row a side and method, failures with their `error`."""
    from benchmarks.peers import files

    rows = [{"side": side, "method": m, **found} for side, methods in sides.items() for m, found in methods.items()]
    kept = [row for row in rows if "file" in row]
    print(f"  {network}: measuring {len(kept)} files", flush=True)
    timed = run_runner([row["file"] for row in kept], folder / f"{network}-test.npz", folder)
    rounds = {(row["side"], row["method"]): found["round_p50_ms"] for row, found in zip(kept, timed, strict=True)}
    for row, found in zip(kept, timed, strict=True):
        reference = rounds[row["side"], "float"]
        path = Path(row.pop("file"))
        row["train_seconds"] = row.pop("seconds")
        row["accuracy"] = found["accuracy"]
        row["p50_ms"] = found["p50_ms"]
        row["latency_over_float"] = statistics.median(
            mine / base for mine, base in zip(rounds[row["side"], row["method"]], reference, strict=True)
        )
        row["bytes"] = files.sizes(path, folder)
        row["packed_over_best_general"] = row["bytes"]["packed"] / min(row["bytes"][name] for name in GENERAL)
        row.update(files.structure(path))
    return rows


def run_runner(paths: list[str], test: Path, folder: Path) -> list[dict[str, Any]]:
    """tfkit's device runner on all files at once: accuracy over `test` (x, y), interleaved latency on its images."""
    import numpy as np

    from tfkit.export import runner

    inputs = folder / "inputs.npy"
    with np.load(test, allow_pickle=False) as archive:
        np.save(inputs, archive["x"][:64])
    command = [sys.executable, runner.__file__, *paths, "--inputs", str(inputs), "--accuracy", str(test), "--json"]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise SystemExit(f"the runner failed: {child.stderr.strip().splitlines()[-1]}")
    return list(json.loads(child.stdout.strip().splitlines()[-1])["files"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", metavar="PYTHON", help="interpreter of the environment that has tfmot")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default: 0 1 2")
    parser.add_argument("--networks", nargs="+", choices=[plan.network for plan in FULL], help="default: both")
    parser.add_argument("--methods", nargs="+", choices=METHODS[1:], help="default: all; the float network always")
    parser.add_argument("--quick", action="store_true", help="a few steps on the embedded digits: does it run at all?")
    parser.add_argument("--append", action="store_true", help="keep the seeds and networks that the result file has")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the weights, files and logs here")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "compression_peers.json", help="result file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run every seed; the result file is written after each, so that an interrupted run leaves the finished ones."""
    options = parse(argv)
    if options.quick and options.out == common.RESULTS / "compression_peers.json":
        raise SystemExit("--quick measures nothing worth keeping: give it another --out.")
    if not options.peer_python:
        print("No --peer-python: tfkit's side only, nothing to compare it with.", file=sys.stderr)
    wanted = options.networks or [plan.network for plan in FULL]
    plans = tuple(plan for plan in (QUICK if options.quick else FULL) if plan.network in wanted)
    methods = tuple(name for name in METHODS if name == "float" or name in (options.methods or METHODS))
    described = {plan.network: dataclasses.asdict(plan) for plan in plans}
    seeds: dict[str, dict[str, Any]] = earlier(options.out, described) if options.append else {}
    started = time.perf_counter()
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = options.keep / f"seed{seed}" if options.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            results, versions = run_seed(plans, methods, seed, options.peer_python, folder)
        seeds[str(seed)] = {**seeds.get(str(seed), {}), **results}
        table = summary.summarize(seeds)
        common.write_result(
            options.out,
            summary.figures(table, seeds),
            note="quick run: reduced data and training" if options.quick else note(seeds),
            peer="tensorflow-model-optimization" if options.peer_python else None,
            versions=versions,
            plans=described,
            seconds=time.perf_counter() - started,
            table=table,
            seeds=seeds,
        )
    summary.show(table)
    print(f"Wrote {options.out} after {time.perf_counter() - started:.0f} s.")


def earlier(path: Path, described: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The seeds of an existing result file; their plans are added to `described`.

    Raises:
        SystemExit: If the file was made with other settings.
    """
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    for network, plan in found["plans"].items():
        if described.setdefault(network, plan) != plan:
            raise SystemExit(f"--append: {path} was made with other settings of {network}; give another --out.")
    return dict(found["seeds"])


def note(seeds: dict[str, dict[str, Any]]) -> str:
    """Which data, and how much of them."""
    used = {name: found for results in seeds.values() for name, found in results.items()}
    parts = [f"{name}: {r['data']['name']}, {r['data']['train']} training and {r['data']['test']} test examples"
             for name, r in used.items()]  # fmt: skip
    return "; ".join(parts) + ". Accuracies are those of the .tflite files."


if __name__ == "__main__":
    main()
