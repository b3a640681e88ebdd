"""GCN on Cora and Citeseer as Kipf, Welling train it (https://arxiv.org/abs/1609.02907, table 2), and its kin.

    python benchmarks/papers/gcn.py              # 50 seeds; a quarter of an hour on one core
    python benchmarks/papers/gcn.py --quick      # one seed, few epochs: does it run?

The public split, and the paper's settings: 16 hidden units, Glorot initialization, dropout 0.5, weight decay 5e-4 on
the first layer, Adam with 0.01, at most 200 epochs, features divided by their row sums. The weights
of the lowest validation loss are tested, where the paper stops after 10 epochs that do not lower it: of 100 runs on
Citeseer two would stop so at the start, where the loss may rise for ten epochs. GAT, SGC and APPNP have their own
papers' settings, and the weights of the best validation accuracy. Needs $TFKIT_DATA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras

from benchmarks import common
from benchmarks.common import say
from tfkit import graphs

PAPER = {"cora": {"GCN": 81.5, "GAT": 83.0, "SGC": 81.0, "APPNP": 83.3}, "citeseer": {"GCN": 70.3, "GAT": 72.5}}


class Method(NamedTuple):
    """A model by classes and seed, and how it is trained."""

    make: Callable[[int, int], keras.Model]
    training: dict[str, Any]
    normalize: Callable[..., Any] = graphs.gcn_normalize


METHODS = {
    "GCN": Method(lambda classes, seed: graphs.GCN(classes, seed=seed), {"restore": "val_loss"}),
    "GCN, best validation accuracy": Method(
        lambda classes, seed: graphs.GCN(classes, seed=seed), {"restore": "val_accuracy"}
    ),
    "GAT": Method(
        lambda classes, seed: graphs.GAT(classes, seed=seed),
        {"epochs": 600, "patience": 100, "learning_rate": 0.005, "restore": "val_accuracy"},
        graphs.add_self_loops,
    ),
    "SGC": Method(
        lambda classes, seed: graphs.SGC(classes, seed=seed, l2=5e-6),
        {"epochs": 100, "learning_rate": 0.2, "restore": "last"},
    ),
    "APPNP": Method(
        lambda classes, seed: graphs.APPNP(classes, seed=seed),
        {"epochs": 600, "patience": 100, "restore": "val_accuracy"},
    ),
}


def measure(name: str, method: Method, graph: graphs.Graph, seeds: range, quick: bool) -> dict[str, Any]:
    """Trains with every seed; accuracies in percent."""
    inputs = graphs.inputs_of(graph, method.normalize)
    found, epochs = [], []
    for seed in seeds:
        keras.utils.set_random_seed(seed)
        model = method.make(graph.num_classes, seed)
        settings = {**method.training, "epochs": 3} if quick else method.training
        history = graphs.train_nodes(model, graph, inputs=inputs, **settings)
        found.append(100 * graphs.accuracy(model, graph, "test", inputs))
        epochs.append(len(history.loss))
    row: dict[str, Any] = {
        "accuracy": round(statistics.mean(found), 2),
        "deviation": round(statistics.pstdev(found), 2),
        "epochs": statistics.mean(epochs),
        "runs": len(found),
    }
    paper = PAPER[graph.name].get(name)
    say(f"{graph.name:>9} {name:<16} {row['accuracy']:.2f} ± {row['deviation']:.2f} (paper: {paper or '-'})")
    return {**row, "paper": paper} if paper else row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--kin-seeds", type=int, default=3, help="seeds of the methods besides GCN")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for name in ("cora", "citeseer"):
        graph = graphs.load(name)
        graph = graph.with_(features=graphs.row_normalize(graph.features))
        results[name] = {}
        for key in dict.fromkeys(["GCN", *options.methods]):
            method = METHODS[key]
            count = 1 if options.quick else options.seeds if key == "GCN" else options.kin_seeds
            results[name][key] = measure(key, method, graph, range(count), options.quick)
    if options.quick:
        return
    figures = {f"{name}_accuracy": results[name]["GCN"]["accuracy"] for name in results}
    common.write_result(
        common.RESULTS / "gcn.json",
        figures,
        title="Graph convolution on citation networks",
        about="Kipf, Welling, <https://arxiv.org/abs/1609.02907>, table 2: test accuracy in percent on the public "
        "splits of Cora (2,708 papers) and Citeseer (3,327), the paper's settings.",
        results=results,
        seeds=list(range(options.seeds)),
        versions=common.versions("tensorflow", "keras", "numpy", "scipy"),
    )


if __name__ == "__main__":
    main()
