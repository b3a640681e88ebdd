"""tfkit's graph layers beside PyG, Spektral and k3-node: a step of a GCN on Cora, layer parity, walks and skip-gram.

    python benchmarks/peers/graphs.py --torch-python TORCHENV/bin/python --keras2-python KERAS2ENV/bin/python
    python benchmarks/peers/graphs.py ... --quick      # few steps: does it run?

Each library runs in a process of its own (graphs_worker.py), one thread, in turns, so that a change of the machine's
speed falls on all: a round times every one, and a ratio is the median over the rounds of the ratios of processor time.
The model is the same everywhere: 16 hidden units, dropout 0.5 on both inputs, weight decay, Adam, a whole-graph step.
PyG runs with dense and with sparse features and the faster one counts; the others take dense ones. Walks are uniform,
80 nodes long, one from each node. Skip-gram reads the same walks: 128 dimensions, window 10, 5 negatives, one pass.
Parity: each library's layers with the same weights on Cora's edges. A library that is not installed is left out, by
name. Needs $TFKIT_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import graphs

WORKER = Path(__file__).with_name("graphs_worker.py")
#: (label, peer, interpreter, sparse features)
RUNS = (
    ("tfkit", "tfkit", "here", True),
    ("PyG", "PyG", "torch", False),
    ("PyG, sparse features", "PyG", "torch", True),
    ("Spektral", "Spektral", "keras2", False),
    ("k3-node", "k3-node", "torch", False),
    ("tfkit walks", "tfkit walks", "here", False),
    ("torch walks", "torch walks", "torch", False),
    ("Python walks", "Python walks", "here", False),
    ("tfkit skip-gram", "tfkit skip-gram", "here", False),
    ("gensim skip-gram", "gensim skip-gram", "torch", False),
)


class Process:
    """A library in its process."""

    def __init__(self, python: str, peer: str, data: Path, sparse: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [python, str(WORKER)], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.ask("start", peer=peer, data=str(data), sparse=sparse)

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                if "error" in answer:
                    raise RuntimeError(answer["error"])
                return answer
        raise RuntimeError("its process ended")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def parity_data(
    rng: np.random.Generator, nodes: int, width: int = 12, units: int = 8, heads: int = 2
) -> dict[str, Any]:
    """Features and weights that every library's layers get."""

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype("float32")

    return {
        "parity_x": normal(nodes, width),
        "kernel": normal(width, units),
        "other_kernel": normal(width, units),
        "square_kernel": normal(units, units),
        "bias": normal(units),
        "other_bias": normal(units),
        "heads_kernel": normal(width, heads * units),
        "heads_bias": normal(heads * units),
        "own_attention": normal(heads, units),
        "other_attention": normal(heads, units),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with PyG, k3-node and gensim")
    parser.add_argument("--keras2-python", help="interpreter with Spektral")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    rounds, steps = (2, 2) if options.quick else (options.rounds, options.steps)
    pythons = {"here": sys.executable, "torch": options.torch_python, "keras2": options.keras2_python}
    cora = graphs.load("cora")
    cora = cora.with_(features=graphs.row_normalize(cora.features))
    arrays = graphs.to_pyg_arrays(cora)
    rng = np.random.default_rng(0)
    running: dict[str, Process] = {}
    times: dict[str, list[dict[str, float]]] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(
            data,
            x=arrays["x"],
            edge_index=arrays["edge_index"],
            y=arrays["y"],
            train=cora.splits["train"],
            walks=graphs.embeddings.random_walks(cora, 1, 80),
            **parity_data(rng, cora.num_nodes),
        )
        for label, peer, where, sparse in RUNS:
            if pythons[where] is None:
                skipped[label] = f"no --{where}-python"
                continue
            try:
                running[label] = Process(str(pythons[where]), peer, data, sparse)
            except RuntimeError as error:
                skipped[label] = str(error)[:200]
        for label, why in skipped.items():
            say(f"left out: {label} ({why})")
        for _ in range(rounds):
            for label, process in running.items():
                count = 3 if "walks" in label else 1 if "skip-gram" in label else steps
                found = process.ask("time", steps=count)
                times.setdefault(label, []).append({key: value / count for key, value in found.items()})
        outputs = {}
        for label in ("tfkit", "PyG", "Spektral"):
            if label in running:
                path = Path(folder) / f"{label}.npz"
                running[label].ask("parity", path=str(path))
                with np.load(path, allow_pickle=False) as file:
                    outputs[label] = {name: file[name] for name in file.files}
    for process in running.values():
        process.close()
    table = [
        {
            "library": label,
            "cpu_ms": round(1000 * statistics.median(row["cpu"] for row in rows), 3),
            "wall_ms": round(1000 * statistics.median(row["wall"] for row in rows), 3),
        }
        for label, rows in times.items()
    ]
    for row in table:
        say(str(row))

    def ratio(ours: str, *theirs: str) -> float | None:
        present = [label for label in theirs if label in times]
        if not present or ours not in times:
            return None
        medians = {label: statistics.median(row["cpu"] for row in times[label]) for label in present}
        fastest = min(medians, key=lambda label: medians[label])
        pairs = zip(times[ours], times[fastest], strict=True)
        return round(statistics.median(a["cpu"] / b["cpu"] for a, b in pairs), 4)

    walks = ratio("tfkit walks", "torch walks", "Python walks")
    # The largest difference over the largest output: sums over 168 neighbours are no small numbers.
    parity = {
        label: {
            layer: float(np.abs(outputs["tfkit"][layer] - found).max() / np.abs(found).max())
            for layer, found in layers.items()
        }
        for label, layers in outputs.items()
        if label != "tfkit"
    }
    for label, row in parity.items():
        say(f"parity with {label}: {row}")
    differences = [value for row in parity.values() for value in row.values()]
    candidates = {
        "gcn_epoch_over_pyg": ratio("tfkit", "PyG", "PyG, sparse features"),
        "gcn_epoch_over_spektral": ratio("tfkit", "Spektral"),
        "gcn_epoch_over_k3_node": ratio("tfkit", "k3-node"),
        "walks_over_fastest": None if walks is None else round(1 / walks, 2),
        "skip_gram_over_gensim": ratio("tfkit skip-gram", "gensim skip-gram"),
        "layer_parity_max_difference": max(differences) if differences else None,
    }
    figures = {key: value for key, value in candidates.items() if value is not None}
    say(str(figures))
    if options.quick:
        return
    common.write_result(
        common.RESULTS / "graphs_peers.json",
        figures,
        title="Graph layers beside other libraries",
        about="A training step of a GCN on Cora, the whole graph, one thread, processes in turns; processor time. "
        "Walks: 80 nodes from each of Cora's nodes; skip-gram: a pass over them. Layer parity: outputs with the same "
        "weights on Cora's edges, the largest difference over the largest output. Ratios below 1 are in tfkit's favour "
        "for steps and skip-gram, above 1 for walks.",
        table=table,
        layer_parity=parity,
        left_out=skipped,
        rounds=rounds,
        versions=common.versions("tensorflow", "keras", "numpy", "scipy", "numba"),
    )


if __name__ == "__main__":
    main()
