"""VR-GCN on synthetic graphs of growing size: seconds an epoch and peak memory, each size in a process of its own.

    python benchmarks/graph_scale.py              # up to 1,000,000 nodes and 10,000,000 edges; some minutes
    python benchmarks/graph_scale.py --quick      # 2,000 nodes: does it run?

Stochastic block models of 20 neighbours a node, 32 features and 10 classes; half of the nodes train, in batches of
2,000, with 2 sampled neighbours, 32 hidden units, histories of all nodes, and the estimator with dropout. The first
epoch, which compiles, is not timed. Memory is the largest resident set of the whole process, the making of the graph
included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common
from benchmarks.common import say

SIZES = (10_000, 100_000, 1_000_000)
PLOT = Path(__file__).resolve().parents[1] / "docs" / "graph_scale.png"


def work(nodes: int) -> dict[str, Any]:
    """Makes the graph, trains two epochs, and times the second."""
    import resource

    from tfkit import graphs

    started = time.perf_counter()
    graph = graphs.stochastic_block_model(nodes, 10, 20, homophily=0.5, features=32, noise=4.0, seed=0)
    made = time.perf_counter() - started
    model = graphs.GCN(10, 32, dropout=0.2, l2=0.0, seed=0)
    trainer = graphs.VRGCN(model, graph, fanout=2, batch_size=2000, seed=0)
    trainer.fit(1)
    started, cpu = time.perf_counter(), time.process_time()
    trainer.fit(1)
    return {
        "nodes": nodes,
        "edges": graph.adjacency.nnz // 2,
        "epoch_s": round(time.perf_counter() - started, 2),
        "epoch_cpu_s": round(time.process_time() - cpu, 2),
        "graph_s": round(made, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "accuracy": round(100 * trainer.accuracy("test"), 2),
    }


def plot(table: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2))
    for axis, key, label in zip(axes, ("epoch_s", "peak_gb"), ("seconds an epoch", "peak memory, GB"), strict=True):
        axis.loglog([row["nodes"] for row in table], [row[key] for row in table], marker="o")
        axis.set(xlabel="nodes", ylabel=label)
        axis.grid(True, which="both", alpha=0.3)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    if options.work or options.quick:
        print(json.dumps(work(options.work or 2000)))
        return
    table = []
    for nodes in SIZES:
        command = [sys.executable, __file__, "--work", str(nodes)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{nodes} nodes: {done.stderr[-2000:]}")
        table.append(json.loads(done.stdout.splitlines()[-1]))
        say(str(table[-1]))
    plot(table)
    figures = {f"{key}_1m_nodes": table[-1][key] for key in ("epoch_s", "epoch_cpu_s", "peak_gb")}
    common.write_result(
        common.RESULTS / "graph_scale.json",
        figures,
        title="Graphs of growing size",
        about="VR-GCN with 2 sampled neighbours on stochastic block models of 20 neighbours a node, 32 features; an "
        "epoch covers half of the nodes. Peak memory is that of the whole process.",
        table=table,
        plot="graph_scale.png",
        versions=common.versions("tensorflow", "keras", "numpy", "scipy", "numba"),
    )


if __name__ == "__main__":
    main()
