"""VR-GCN beside plain sampling and exact propagation, as Chen, Zhu, Song do (https://arxiv.org/abs/1710.10568).

    python benchmarks/papers/vr_gcn.py              # 3 seeds; a quarter of an hour on one core
    python benchmarks/papers/vr_gcn.py --quick      # one seed, few epochs: does it run?

A GCN of two layers with the first propagation done beforehand, 2 sampled neighbours, on two graphs: Cora with the
public split in batches of 20, and a random graph of 10,000 nodes with 20 neighbours each whose labels are quantiles of
an average over all neighbours (`two_hop_quantiles`), in batches of 1,000. Every estimator trains from the same weights
for the same epochs on the same batches, by Adam with a rate of 0.01; accuracies are exact ones on the test nodes, after
the epoch of the best validation accuracy among those looked at. Without dropout CV and CVD are
the same, so that the second graph has no CV. Variance and bias of the gradient are measured early in training without
dropout: of one batch, over many draws of its neighbours, beside the exact gradient; an unbiased estimator's mean is off
by about its standard error. On Cora the variance is measured with dropout too, whose own part "exact" shows. Needs
$TFKIT_DATA.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
import keras
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import graphs

ESTIMATORS = ("exact", "cvd", "cv", "sampling")
FANOUT = 2
#: Epochs between looks at the accuracy.
LOOK = 4
PLOT = Path(__file__).resolve().parents[2] / "docs" / "vr_gcn.png"


class Setting(NamedTuple):
    """A graph and how it is trained on."""

    graph: graphs.Graph
    hidden: int
    batch_size: int
    epochs: int
    dropout: float
    l2: float


def settings(quick: bool) -> dict[str, Setting]:
    cora = graphs.load("cora")
    cora = cora.with_(features=graphs.row_normalize(cora.features))
    quantiles = graphs.two_hop_quantiles(1000 if quick else 10_000, 3, 20, seed=0)
    return {
        "Cora": Setting(cora, 16, 20, 60, 0.5, 5e-4),
        "quantiles": Setting(quantiles, 32, 1000, 300, 0.0, 0.0),
    }


def train(setting: Setting, estimator: str, seed: int, epochs: int) -> dict[str, Any]:
    """Trains once; accuracies in percent after every epoch."""
    graph = setting.graph
    keras.utils.set_random_seed(seed)
    model = graphs.GCN(graph.num_classes, setting.hidden, dropout=setting.dropout, l2=setting.l2, seed=seed)
    trainer = graphs.VRGCN(model, graph, estimator=estimator, fanout=FANOUT, batch_size=setting.batch_size, seed=seed)
    val: list[float] = []
    test: list[float] = []

    def note(epoch: int, _: float) -> None:
        if (epoch + 1) % LOOK:
            return
        right = trainer.predict().argmax(axis=1) == graph.labels
        val.append(100 * float(right[graph.splits["val"]].mean()))
        test.append(100 * float(right[graph.splits["test"]].mean()))

    losses = trainer.fit(epochs, after=note)
    best = int(np.argmax(val))
    return {"test": test[best], "val": val, "loss": losses}


def gradient_errors(
    setting: Setting, estimator: str, seed: int, draws: int, epochs: int, dropout: float = 0.0
) -> dict[str, float]:
    """Variance and bias of a batch's gradient over draws of neighbours and of dropout, early in training."""
    graph = setting.graph
    keras.utils.set_random_seed(seed)
    model = graphs.GCN(graph.num_classes, setting.hidden, dropout=dropout, l2=0.0, seed=seed)
    common_settings: dict[str, Any] = {"batch_size": setting.batch_size, "seed": seed}
    # All are measured at the same weights, which plain sampling would not have reached.
    trainer = graphs.VRGCN(
        model, graph, estimator="cv" if estimator == "cv" else "cvd", fanout=FANOUT, **common_settings
    )
    trainer.fit(epochs)
    source = trainer
    if estimator in ("sampling", "exact"):
        source = graphs.VRGCN(
            model, graph, estimator=estimator, fanout=FANOUT, propagated=trainer.inputs, **common_settings
        )
    exact = graphs.VRGCN(model, graph, estimator="exact", propagated=trainer.inputs, **common_settings)
    targets = graph.splits["train"][: setting.batch_size]

    def gradient(source: graphs.VRGCN, *counters: int) -> np.ndarray:
        found = source._gradients(*source.batch(targets, *counters))[1]
        return np.concatenate([np.ravel(part) for part in found]).astype(np.float64)

    sample = np.stack([gradient(source, 1, draw) for draw in range(draws)])
    if dropout:
        scale = float((np.mean([gradient(exact, 0) for _ in range(draws)], axis=0) ** 2).sum())
        return {"variance_with_dropout": float(sample.var(axis=0, ddof=1).sum()) / scale}
    truth = gradient(exact, 0)
    scale = float(truth @ truth)
    return {
        "variance": float(sample.var(axis=0, ddof=1).sum()) / scale,
        "bias": float(np.linalg.norm(sample.mean(axis=0) - truth)) / scale**0.5,
        "standard_error": float((sample.var(axis=0, ddof=1).sum() / draws) ** 0.5) / scale**0.5,
    }


def epochs_to(curves: list[list[float]], wanted: float) -> int | None:
    """Epochs until the mean validation accuracy reaches `wanted`; None if never."""
    mean = np.mean(curves, axis=0)
    reached = np.flatnonzero(mean >= wanted)
    return LOOK * (int(reached[0]) + 1) if len(reached) else None


def plot(curves: dict[str, dict[str, list[list[float]]]]) -> None:
    figure, axes = plt.subplots(1, len(curves), figsize=(9, 3.4))
    for axis, (name, found) in zip(axes, curves.items(), strict=True):
        for estimator, rows in found.items():
            colour = f"C{ESTIMATORS.index(estimator)}"
            axis.plot(LOOK * np.arange(1, len(rows[0]) + 1), np.mean(rows, axis=0), colour, label=estimator)
        axis.set(title=name, xlabel="epochs", ylabel="validation accuracy, %")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    seeds, draws = (1, 5) if options.quick else (options.seeds, options.draws)
    results: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for name, setting in settings(options.quick).items():
        epochs = LOOK if options.quick else setting.epochs
        estimators = [e for e in ESTIMATORS if setting.dropout or e != "cv"]
        runs = {e: [train(setting, e, seed, epochs) for seed in range(seeds)] for e in estimators}
        curves[name] = {e: [run["val"] for run in found] for e, found in runs.items()}
        wanted = float(np.mean(curves[name]["exact"], axis=0).max()) - 0.5
        results[name] = {}
        for estimator, found in runs.items():
            tests = [run["test"] for run in found]
            row: dict[str, Any] = {
                "accuracy": round(statistics.mean(tests), 2),
                "deviation": round(statistics.pstdev(tests), 2),
                "epochs_to_exact_less_half_a_point": epochs_to(curves[name][estimator], wanted),
            }
            errors: dict[str, float] = {}
            if estimator != "exact":
                errors |= gradient_errors(setting, estimator, 0, draws, max(1, epochs // 4))
            if setting.dropout:
                errors |= gradient_errors(setting, estimator, 0, draws, max(1, epochs // 4), setting.dropout)
            if errors:
                row |= {f"gradient_{key}": round(value, 5) for key, value in errors.items()}
            results[name][estimator] = row
            say(f"{name:>12} {estimator:<9} {row}")
    if options.quick:
        return
    plot(curves)
    figures: dict[str, float] = {}
    # The figures proper are those of the graph where neighbours matter; Cora's are beside them.
    for name, prefix in (("quantiles", ""), ("Cora", "cora_")):
        row = results[name]
        exact = row["exact"]["accuracy"]
        figures[f"{prefix}accuracy_minus_full_batch_points"] = round(row["cvd"]["accuracy"] - exact, 2)
        figures[f"{prefix}sampling_minus_full_batch_points"] = round(row["sampling"]["accuracy"] - exact, 2)
        ratio = row["cvd"]["gradient_variance"] / row["sampling"]["gradient_variance"]
        figures[f"{prefix}variance_over_sampling"] = round(ratio, 4)
        for estimator in ("cvd", "sampling"):
            off = row[estimator]["gradient_bias"] / row[estimator]["gradient_standard_error"]
            figures[f"{prefix}{estimator}_bias_over_standard_error"] = round(off, 2)
    common.write_result(
        common.RESULTS / "vr_gcn.json",
        figures,
        title="VR-GCN",
        about="Chen, Zhu, Song, <https://arxiv.org/abs/1710.10568>: a GCN trained with 2 sampled neighbours by control "
        "variates (CV, CVD), by plain sampling, and with all neighbours. Variance, bias and standard error of the "
        "gradient are relative to the exact gradient's norm. A random graph (10,000 nodes, 20 neighbours each) whose "
        "labels are quantiles of an average over all neighbours, and Cora's public split.",
        results=results,
        plot="vr_gcn.png",
        seeds=list(range(seeds)),
        versions=common.versions("tensorflow", "keras", "numpy", "scipy", "numba"),
    )


if __name__ == "__main__":
    main()
