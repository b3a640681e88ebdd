"""GraphSAGE on nodes that training never saw, beside PyG with the same settings (https://arxiv.org/abs/1706.02216).

    python benchmarks/papers/graph_sage.py --torch-python TORCHENV/bin/python    # 10 seeds; 10 minutes on one core
    python benchmarks/papers/graph_sage.py --quick                               # few epochs: does it run?

Cora's public split without its test nodes and their edges trains; the whole graph is predicted. Two layers with means,
64 hidden units, dropout 0.5, Adam with 0.01, weight decay 5e-4 on everything but biases, 100 epochs, the weights of the
best validation accuracy, of equals those of the lower loss; the same for both. Another aggregator stands beside it.
Needs $TFKIT_DATA.
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

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import graphs

HIDDEN, DROPOUT, RATE, DECAY = 64, 0.5, 0.01, 5e-4
#: What PyG's interpreter runs; its answer is one line of JSON.
PEER = """
import json, sys
import numpy as np, torch
from torch_geometric.nn import SAGEConv
f = torch.nn.functional
data = np.load(sys.argv[1]); settings = json.loads(sys.argv[2])
part, whole = [torch.tensor(data[k]) for k in ("x_part", "edges_part")], [torch.tensor(data[k]) for k in ("x", "edges")]
labels, train, val = [torch.tensor(data[k]) for k in ("y_part", "train", "val")]
test, truth = torch.tensor(data["test"]), torch.tensor(data["y"])
found = []
for seed in range(settings["seeds"]):
    torch.manual_seed(seed)
    a, b = SAGEConv(part[0].shape[1], settings["hidden"]), SAGEConv(settings["hidden"], settings["classes"])
    kernels = [p for m in (a, b) for n, p in m.named_parameters() if "bias" not in n]
    biases = [p for m in (a, b) for n, p in m.named_parameters() if "bias" in n]
    optimizer = torch.optim.Adam(
        [{"params": kernels, "weight_decay": settings["decay"]}, {"params": biases}], lr=settings["rate"])
    def run(x, edges, training):
        x = f.relu(a(f.dropout(x, settings["dropout"], training), edges))
        return b(f.dropout(x, settings["dropout"], training), edges)
    best, kept = (-1.0, 0.0), 0.0
    for _ in range(settings["epochs"]):
        optimizer.zero_grad()
        f.cross_entropy(run(*part, True)[train], labels[train]).backward()
        optimizer.step()
        with torch.no_grad():
            logits = run(*part, False)[val]
            right = (logits.argmax(1) == labels[val]).float().mean()
            score = (float(right), -float(f.cross_entropy(logits, labels[val])))
            if score > best:
                best, kept = score, float((run(*whole, False)[test].argmax(1) == truth[test]).float().mean())
    found.append(100 * kept)
print(json.dumps(found))
"""


def ours(graph: graphs.Graph, part: graphs.Graph, aggregator: str, seed: int, epochs: int) -> float:
    keras.utils.set_random_seed(seed)
    model = graphs.GraphSAGE(graph.num_classes, HIDDEN, aggregator=aggregator, dropout=DROPOUT, l2=DECAY, seed=seed)
    inputs = graphs.inputs_of(part, None)
    graphs.train_nodes(
        model, part, epochs=epochs, learning_rate=RATE, restore="val_accuracy", penalized=False, inputs=inputs
    )
    return 100 * graphs.accuracy(model, graph, "test", graphs.inputs_of(graph, None))


def peer(python: str, graph: graphs.Graph, part: graphs.Graph, seeds: int, epochs: int) -> list[float]:
    whole, seen = graphs.to_pyg_arrays(graph), graphs.to_pyg_arrays(part)
    settings = {"seeds": seeds, "hidden": HIDDEN, "classes": graph.num_classes, "dropout": DROPOUT}
    settings |= {"decay": DECAY, "rate": RATE, "epochs": epochs}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.npz"
        np.savez(
            path,
            x=whole["x"],
            edges=whole["edge_index"],
            y=whole["y"],
            test=graph.splits["test"],
            x_part=seen["x"],
            edges_part=seen["edge_index"],
            y_part=seen["y"],
            train=part.splits["train"],
            val=part.splits["val"],
        )
        command = [python, "-c", PEER, str(path), json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"PyG: {done.stderr[-2000:]}")
    return list(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", help="interpreter with PyG; without it PyG is left out")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--aggregators", nargs="+", default=["mean", "max_pool"])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    seeds, epochs = (1, 2) if options.quick else (options.seeds, 100)
    graph = graphs.load("cora")
    graph = graph.with_(features=graphs.row_normalize(graph.features))
    part = graph.subgraph(np.setdiff1d(np.arange(graph.num_nodes), graph.splits["test"]))
    found: dict[str, list[float]] = {}
    for aggregator in options.aggregators:
        found[aggregator] = [ours(graph, part, aggregator, seed, epochs) for seed in range(seeds)]
        say(f"{aggregator:>9}: {statistics.mean(found[aggregator]):.2f}")
    if options.torch_python:
        found["PyG, mean"] = peer(options.torch_python, graph, part, seeds, epochs)
        say(f"PyG, mean: {statistics.mean(found['PyG, mean']):.2f}")
    if options.quick:
        return
    figures = {"cora_inductive_accuracy": round(statistics.mean(found["mean"]), 2)}
    if "PyG, mean" in found:
        figures["minus_pyg_points"] = round(statistics.mean(found["mean"]) - statistics.mean(found["PyG, mean"]), 2)
    table: list[dict[str, Any]] = [
        {"method": name, "accuracy": round(statistics.mean(row), 2), "deviation": round(statistics.pstdev(row), 2)}
        for name, row in found.items()
    ]
    common.write_result(
        common.RESULTS / "graph_sage.json",
        figures,
        title="GraphSAGE on unseen nodes",
        about="Cora without its test nodes trains, the whole graph is predicted; accuracy in percent on test nodes.",
        table=table,
        seeds=list(range(seeds)),
        versions=common.versions("tensorflow", "keras", "numpy", "scipy"),
    )


if __name__ == "__main__":
    main()
