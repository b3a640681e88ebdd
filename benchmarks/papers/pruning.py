"""Pruning that makes a file faster: structured pruning of two networks, and block pruning of a dense layer.

    python benchmarks/papers/pruning.py                # structured and blocks; about an hour and a half on one core
    python benchmarks/papers/pruning.py --quick        # few images and epochs: does it run?
    python benchmarks/papers/pruning.py --block-only   # measures the blocks anew, keeps the structured part

Structured: filters leave until half of the multiply-adds or more are gone, importance by the first-order Taylor
expansion (Molchanov et al., https://arxiv.org/abs/1906.10771), then fine-tuning with the recipe of the float network:
Adam, cosine decay, the same augmentation. As in Li et al. (https://arxiv.org/abs/1608.08710), the first convolution of
a residual block loses more than what the shortcut ties together. Which layers lose how much was set by multiply-adds
and latency of untrained networks: widths that are multiples of 16 (8 in the first stage) suit the runtime's kernels. No
accuracy took part in that, and there is one setting for each network, so nothing was chosen on test data. Accuracy and
latency are those of the float32 `.tflite` files; latency is p50 of one thread, both files in interleaved rounds.
The drop is below the float network that was pruned, as the papers count it; `drop_over_trained_on` is below that
network trained on for as many epochs as the pruned one was fine-tuned, which tells what pruning itself costs where the
float network was not done learning. The figures are the worse of the two networks.

Blocks: see block_pruning.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from tfkit import data, models
from tfkit.compression import StructuredPruning
from tfkit.compression.searching.finetuning import Augmentation, FineTuning
from tfkit.export import compare_latency, convert
from tfkit.export.runner import Runner

TAYLOR_EXAMPLES = 512
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Plan(NamedTuple):
    """How one network is trained and pruned. `validation`: share of the training images left out, as elsewhere."""

    data: str
    validation: float
    seeds: tuple[int, ...]
    epochs: int
    finetune_epochs: int
    rate: float
    finetune_rate: float
    batch_size: int
    augment: Augmentation | None
    sparsity: dict[str, float]


PLANS = {
    "resnet8": Plan(
        "cifar10", 0.1, (0, 1, 2), epochs=30, finetune_epochs=15, rate=2e-3, finetune_rate=2e-3, batch_size=64,
        augment=Augmentation(flip=True, shift=3),  # The float network is that of benchmarks/search.py.
        sparsity={"stem": 0.5, "stage1_block1_conv1": 0.5, "stage2_block1_conv1": 0.5, "stage3_block1_conv1": 0.25},
    ),
    "convnet_bn": Plan(
        "fashion_mnist", 0.0, (0, 1, 2), epochs=5, finetune_epochs=5, rate=2e-3, finetune_rate=2e-3, batch_size=128,
        augment=None, sparsity={"conv2": 0.5, "pointwise3": 0.25, "conv4": 1 / 3},
    ),
}  # fmt: skip
#: Li et al., table 1: what they prune, multiply-adds that left, change of the test error in points.
PAPER = {
    "VGG-16-pruned-A": {"macs_gone_percent": 34.2, "error_change_points": -0.15},
    "ResNet-56-pruned-B": {"macs_gone_percent": 27.6, "error_change_points": -0.02},
    "ResNet-110-pruned-B": {"macs_gone_percent": 38.6, "error_change_points": 0.23},
}


def train(model: keras.Model, dataset: Any, plan: Plan, epochs: int, rate: float, seed: int) -> keras.Model:
    """Adam with cosine decay; the same for the float network and for fine-tuning."""
    tuning = FineTuning(
        dataset, epochs=epochs, learning_rate=rate, batch_size=plan.batch_size, seed=seed, augment=plan.augment
    )
    tuning(model)
    return model


def accuracy_percent(path: Path, dataset: Any) -> float:
    """Returns the share of right answers of a file on the test set."""
    return 100.0 * float(np.mean(np.asarray(Runner(path)(dataset.x_test)).argmax(-1) == dataset.y_test))


def run_seed(network: str, plan: Plan, dataset: Any, seed: int, cache: Path | None) -> dict[str, Any]:
    """Trains, prunes, fine-tunes and measures one network with one seed."""
    started = time.time()
    epochs, more = plan.epochs, plan.finetune_epochs
    tag = f"{network}_{len(dataset.x_train)}_{seed}_{epochs}"
    float_model = kept(
        cache, tag, lambda: train(models.get(network)(seed=seed), dataset, plan, epochs, plan.rate, seed)
    )
    chosen = np.random.default_rng(seed).permutation(len(dataset.x_train))[:TAYLOR_EXAMPLES]
    pruning = StructuredPruning(
        plan.sparsity, importance="taylor", data=(dataset.x_train[chosen], dataset.y_train[chosen]), loss=LOSS
    )
    pruned = pruning.prepare(float_model)
    report = pruning.report()
    small = kept(
        cache, f"{tag}_pruned_{more}",
        lambda: train(copied(pruned), dataset, plan, more, plan.finetune_rate, seed),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        longer = kept(
            cache, f"{tag}_on_{more}",
            lambda: train(copied(float_model), dataset, plan, more, plan.finetune_rate, seed),
        )  # fmt: skip
        named = {
            "float": float_model,
            "float_trained_on": longer,
            "pruned_before_finetuning": pruned,
            "pruned": small,
        }
        paths = {name: convert(model, Path(folder) / f"{name}.tflite") for name, model in named.items()}
        accuracy = {name: accuracy_percent(path, dataset) for name, path in paths.items()}
        first, second = compare_latency(
            [paths["float"], paths["pruned"]], dataset.x_test[:32], threads=1, runs=500, min_seconds=4.0
        )
    row = {
        "seed": seed,
        "accuracy_percent": accuracy,
        "accuracy_drop_points": accuracy["float"] - accuracy["pruned"],
        "drop_over_trained_on_points": accuracy["float_trained_on"] - accuracy["pruned"],
        "latency_over_float": second.ratio,
        "latency_over_float_rounds": [second.low, second.high],
        "p50_ms": {"float": first.measurement.p50_ms, "pruned": second.measurement.p50_ms},
        "tflite_bytes": {"float": first.measurement.size_bytes, "pruned": second.measurement.size_bytes},
        "macs": {"float": report.macs_before, "pruned": report.macs_after},
        "macs_gone_percent": 100 * (1 - report.macs_after / report.macs_before),
        "parameters": {"float": report.parameters_before, "pruned": report.parameters_after},
        "channels": {", ".join(g.layers): [g.before, g.after] for g in report.groups},
        "seconds": round(time.time() - started),
    }
    say(f"{network} seed {seed}: {accuracy['float']:.2f} ({accuracy['float_trained_on']:.2f} trained on) -> "
        f"{accuracy['pruned']:.2f} % "
        f"({accuracy['pruned_before_finetuning']:.2f} % before fine-tuning), {row['macs_gone_percent']:.1f} % of the "
        f"multiply-adds gone, latency {second.ratio:.3f} of float ({second.low:.3f} to {second.high:.3f}), "
        f"{row['seconds']} s")  # fmt: skip
    return row


def copied(model: keras.Model) -> keras.Model:
    """Returns a copy to train, so that the model itself stays for measuring."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def summarize(rows: dict[str, list[dict[str, Any]]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the figures (the worse of the networks, each the mean over its seeds) and the means."""
    keys = ("accuracy_drop_points", "drop_over_trained_on_points", "latency_over_float", "macs_gone_percent")
    mean = {name: {key: float(np.mean([row[key] for row in runs])) for key in keys} for name, runs in rows.items()}
    figures = {
        "structured_latency_over_float": max(m["latency_over_float"] for m in mean.values()),
        "structured_accuracy_drop_points": max(m["accuracy_drop_points"] for m in mean.values()),
        "structured_drop_over_trained_on_points": max(m["drop_over_trained_on_points"] for m in mean.values()),
    }
    return figures, mean


def structured(plans: dict[str, Plan], quick: bool, arguments: argparse.Namespace, part: dict[str, Any]) -> None:
    """Runs the networks and writes the result after each seed."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for network, plan in plans.items():
        dataset = data.load(plan.data, validation=plan.validation, seed=0)
        if quick:
            dataset = dataset.subset(train=640, test=200)
        for seed in plan.seeds:
            row = run_seed(network, plan, dataset, seed, arguments.cache)
            rows.setdefault(network, []).append(row)
            figures, mean = summarize(rows)
            part["figures"] |= figures
            part["data"][plan.data] = {"train": len(dataset.x_train), "test": len(dataset.x_test)}
            part["results"]["structured"] = {
                "paper": PAPER,
                "plans": {name: {**used._asdict(), "augment": repr(used.augment)} for name, used in plans.items()},
                "runs": rows,
                "mean": mean,
            }
            write(arguments.out, part)


def block_part(measured: Path | None, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns figures and tables of block pruning, measured now or read from the result file of block_pruning.py."""
    if measured is not None:
        content = json.loads(measured.read_text())
        return content["figures"], content["results"]
    from benchmarks.papers import block_pruning

    return block_pruning.run(quick=quick)


def write(path: Path, part: dict[str, Any]) -> None:
    rest = {key: value for key, value in part.items() if key != "figures"}
    common.write_result(path, part["figures"], **rest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--quick", action="store_true", help="few images and epochs")
    parser.add_argument("--block-only", action="store_true", help="keep the structured part of the result file")
    parser.add_argument("--structured-only", action="store_true", help="keep the block part of the result file")
    parser.add_argument("--block-file", type=Path, help="take the blocks from this result file of block_pruning.py")
    parser.add_argument("--cache", type=Path, help="folder that keeps the trained networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "pruning.json")
    arguments = parser.parse_args()

    part: dict[str, Any] = {"figures": {}, "data": {}, "results": {}}
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        part = {key: before.get(key, {}) for key in part}
    part["seeds"] = {name: plan.seeds for name, plan in PLANS.items()}
    part["versions"] = common.versions("tensorflow", "keras", "numpy", "ai-edge-litert")
    plans = {name: PLANS[name] for name in arguments.networks}
    if arguments.quick:
        plans = {name: p._replace(epochs=1, finetune_epochs=1, seeds=p.seeds[:1]) for name, p in plans.items()}
    if not arguments.block_only:
        structured(plans, arguments.quick, arguments, part)
    if not arguments.structured_only:
        figures, rows = block_part(arguments.block_file, arguments.quick)
        part["figures"] |= figures
        part["results"]["block"] = rows
        write(arguments.out, part)
    for name, value in part["figures"].items():
        say(f"{name}: {value:.3f}")
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
