"""Compares every quantization method on one network: error of the file against bits a weight.

    python benchmarks/compare_quantization.py            # 2 seeds; about an hour on one core
    python benchmarks/compare_quantization.py --quick    # one seed, one epoch: does it run?

One float network is trained for each seed; every method starts from it and has the same data, optimizer and epochs
(calibrated ones have none). Each result is a `.tflite` file, packed; its error is that of the file over the official
test set, its bits are eight times the packed bytes over the number of weights, everything in the file counted. Each
method runs with its defaults, and with the learning rate of `RATES` that gives its family, at one width, the least
cross-entropy on 2,000 held-out training digits, with one more seed. The test set picks nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import common
from benchmarks.papers.qnn import network
from tfkit import compression, data
from tfkit.export import convert, pack
from tfkit.export.runner import Runner, accuracy
from tfkit.internal import folding, surgery

#: Of Adam. Methods that move latent weights across a threshold want high ones, shared values low ones.
RATES = (1e-4, 5e-4, 2e-3, 1e-2)
CHOICE_SEED = 100
HELD_OUT = 0.2

#: Of the plot's axis, in percent.
MOST_ERROR = 12.0
PLOT = Path(__file__).resolve().parents[1] / "docs" / "compare_quantization.png"


class Method(NamedTuple):
    """A row of the comparison.

    Attributes:
        family: methods of one family are joined by a line in the plot.
        label: what is set: widths of weights and activations, or the calibration.
        make: `make(x, y)` gives the compressor; None converts the float network as it is.
        trained: whether it is trained; otherwise it only sees data.
        quantization: of `tfkit.export.convert`.
    """

    family: str
    label: str
    make: Callable[[np.ndarray, np.ndarray], compression.Compressor] | None
    trained: bool = True
    quantization: str = "int8-qat"


def post_training(bits: int, calibration: str) -> Method:
    return Method(
        f"post-training, {calibration}",
        f"W{bits}A8",
        lambda x, y: compression.PostTrainingQuantization(x[:500], bits=bits, calibration=calibration),
        trained=False,
    )


METHODS = (
    Method("float32", "W32A32", None, trained=False, quantization="float32"),
    Method("float16", "W16A32", None, trained=False, quantization="float16"),
    Method("dynamic range", "W8A32", None, trained=False, quantization="dynamic"),
    *(post_training(bits, how) for how in ("minmax", "percentile", "mse", "kl") for bits in (8, 4, 3)),
    *(
        Method(
            "QAT",
            f"W{bits}A{wide}",
            lambda x, y, b=bits, a=wide: compression.QuantizationAware(bits=b, activation_bits=a),
        )
        for bits, wide in ((8, 8), (4, 8), (3, 8), (2, 8), (4, 4), (2, 2))
    ),
    *(
        Method(
            "relaxed quantization",
            f"W{b}A{b}",
            lambda x, y, b=b: compression.RelaxedQuantization(bits=b, activation_bits=b),
        )
        for b in (8, 4, 2)
    ),
    *(
        Method(
            "QNN", f"W{b}A{b}", lambda x, y, b=b: compression.QuantizedNeuralNetwork(weight_bits=b, activation_bits=b)
        )
        for b in (4, 2, 1)
    ),
    *(
        Method("ProxQuant", f"W{b}A32", lambda x, y, b=b: compression.ProxQuant(bits=b), quantization="float32")
        for b in (3, 2, 1)
    ),
    Method("BinaryConnect", "W1A32", lambda x, y: compression.BinaryConnect(bits=1), quantization="float32"),
    *(
        Method(
            "weight clustering", f"W{b}A32", lambda x, y, b=b: compression.WeightClustering(b), quantization="float32"
        )
        for b in (5, 4, 3, 2, 1)
    ),
    Method("adaptive quantization", "mixed", lambda x, y: compression.AdaptiveQuantization(), quantization="float32"),
    Method(
        "Deep Compression",
        "90 % zeros, 4-bit",
        lambda x, y: compression.DeepCompression(0.9, 4),
        quantization="float32",
    ),
)


def trainer(dataset: data.Dataset, epochs: int, learning_rate: float, seed: int) -> Any:
    """Returns `fit(model, callbacks)`: Adam with cosine decay, batches of 64."""

    def fit(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        keras.utils.set_random_seed(seed)
        steps = epochs * -(-len(dataset.x_train) // 64)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(dataset.x_train, dataset.y_train, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)

    return fit


def compressed(
    method: Method, model: keras.Model, dataset: data.Dataset, epochs: int, rate: float, seed: int
) -> keras.Model:
    """Applies the method."""
    if method.make is None:
        return model
    if method.quantization == "float32":
        # The conversion folds normalizations into kernels, which would spoil the values that these methods chose.
        model = folding.fold_batch_normalization(model)
    compressor = method.make(dataset.x_train, dataset.y_train)
    return compressor.apply(model, trainer(dataset, epochs, rate, seed) if method.trained else None)


def float_network(dataset: data.Dataset, epochs: int, seed: int, path: Path) -> keras.Model:
    """Trains the float network, or reads it."""
    if path.exists():
        return keras.saving.load_model(path)
    model = network(seed)
    trainer(dataset, epochs, 1e-3, seed)(model, [])
    model.save(path)
    return model


def choose_rates(dataset: data.Dataset, float_epochs: int, epochs: int, work: Path) -> dict[str, dict[str, Any]]:
    """Picks a learning rate for each family that trains, by its middle width; what was tried is kept."""
    kept = work / "rates.json"
    rates: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    cut = round(len(dataset.x_train) * (1 - HELD_OUT))
    x, y = dataset.x_train[cut:], dataset.y_train[cut:]
    part = dataclasses.replace(dataset, x_train=dataset.x_train[:cut], y_train=dataset.y_train[:cut])
    for family in dict.fromkeys(method.family for method in METHODS if method.trained):
        if family in rates:
            continue
        model = float_network(part, float_epochs, CHOICE_SEED, work / "float_choice.keras")
        members = [method for method in METHODS if method.family == family]
        method = members[len(members) // 2]
        losses = []
        for rate in RATES:
            logits = compressed(method, model, part, epochs, rate, CHOICE_SEED).predict(x, batch_size=500, verbose=0)
            losses.append(float(np.mean(keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True))))
        rates[family] = {"by": method.label, "cross_entropy": losses, "rate": RATES[int(np.argmin(losses))]}
        kept.write_text(json.dumps(rates))
        print(f"{family}: {rates[family]}", flush=True)
    return rates


def run(
    method: Method, model: keras.Model, dataset: data.Dataset, epochs: int, rate: float, seed: int, folder: Path
) -> dict[str, Any]:
    """Makes the method's file and measures it."""
    started = time.perf_counter()
    model = compressed(method, model, dataset, epochs, rate, seed)
    path = convert(model, folder / "candidate.tflite", quantization=method.quantization, force=True)
    packed = pack(path, force=True)
    right, _ = accuracy(Runner(path), dataset.x_test, dataset.y_test)
    weights = sum(
        int(np.prod(value.shape))
        for layer in surgery.leaf_layers(model)
        for value in surgery.compressible_weights(layer).values()
    )
    return {
        "family": method.family,
        "setting": method.label,
        "seed": seed,
        "learning_rate": rate,
        "test_error_percent": 100 * (1 - right),
        "file_bytes": path.stat().st_size,
        "packed_bytes": packed.size_bytes,
        "bits_a_weight": 8 * packed.size_bytes / weights,
        "seconds": time.perf_counter() - started,
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, a row for each method, in the order of METHODS."""
    table = []
    for method in METHODS:
        found = [row for row in rows if (row["family"], row["setting"]) == (method.family, method.label)]
        if found:
            mean = {key: float(np.mean([row[key] for row in found])) for key in ("test_error_percent", "bits_a_weight")}
            table.append(
                {
                    "method": method.family,
                    "setting": method.label,
                    "bits a weight, packed": mean["bits_a_weight"],
                    "packed bytes": round(float(np.mean([row["packed_bytes"] for row in found]))),
                    "test error %": mean["test_error_percent"],
                    "lowest - highest": "{:.2f} - {:.2f}".format(
                        min(row["test_error_percent"] for row in found), max(row["test_error_percent"] for row in found)
                    ),
                    "seeds": len(found),
                }
            )
    return table


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Draws error against bits; a line for each family."""
    figure, axis = plt.subplots(figsize=(9, 5.5))
    colours = plt.get_cmap("tab20")
    families: dict[str, list[dict[str, Any]]] = {}
    for row in table:
        narrow = row["method"] == "QAT" and not row["setting"].endswith("A8")
        families.setdefault(row["method"] + (", narrow activations" if narrow else ""), []).append(row)
    for number, (family, rows) in enumerate(families.items()):
        bits = [row["bits a weight, packed"] for row in rows]
        error = [row["test error %"] for row in rows]
        axis.plot(bits, error, marker="osD^v"[number % 5], color=colours(number % 20), label=family, linewidth=1)
    baseline = next(row["test error %"] for row in table if row["method"] == "float32")
    axis.axhline(baseline, color="0.6", linewidth=0.8, linestyle="--")
    axis.set(xscale="log", yscale="log", xlabel="bits a weight in the packed file (all of it counted)")
    axis.set_ylabel("error of the file on the test set, %")
    axis.set_ylim(top=MOST_ERROR)
    beyond = [f"{row['method']} {row['setting']}" for row in table if row["test error %"] > MOST_ERROR]
    if beyond:
        axis.set_title(f"above {MOST_ERROR:g} %, not shown: {', '.join(beyond)}", fontsize=8)
    axis.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 32], labels=["¼", "½", "1", "2", "4", "8", "16", "32"])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if value < 10 else "")
    axis.legend(fontsize=8, ncols=2)
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=4, help="of each method, after the float network's own")
    parser.add_argument("--float-epochs", type=int, default=8)
    parser.add_argument("--only", nargs="+", help="families to run")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, nothing written")
    parser.add_argument("--work", type=Path, default=Path("build/compare_quantization"), help="rows already measured")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "compare_quantization.json")
    arguments = parser.parse_args()
    seeds, epochs, float_epochs = arguments.seeds, arguments.epochs, arguments.float_epochs
    if arguments.quick:
        seeds, epochs, float_epochs = [0], 1, 1
        arguments.work = arguments.work / "quick"
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "rows.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    dataset = data.load("mnist", validation=0)
    if arguments.quick:
        dataset = dataset.subset(train=600, test=300)
    rates = choose_rates(dataset, float_epochs, epochs, arguments.work)
    for seed in seeds:
        model = float_network(dataset, float_epochs, seed, arguments.work / f"float_{seed}.keras")
        for method in METHODS:
            done = any((r["family"], r["setting"], r["seed"]) == (method.family, method.label, seed) for r in rows)
            if done or (arguments.only and method.family not in arguments.only):
                continue
            rate = rates[method.family]["rate"] if method.trained else 0.0
            row = run(method, model, dataset, epochs, rate, seed, arguments.work)
            rows.append(row)
            kept.write_text(json.dumps(rows))
            print(
                f"seed {seed}  {method.family:<24} {method.label:<18} error {row['test_error_percent']:5.2f} %  "
                f"{row['bits_a_weight']:6.2f} bits  {row['seconds']:5.0f} s",
                flush=True,
            )
    table = summarize(rows)
    if arguments.quick or arguments.only:
        return
    plot(table, PLOT)
    baseline = next(row["test error %"] for row in table if row["method"] == "float32")
    within = [row for row in table if row["test error %"] <= baseline + 0.2]
    common.write_result(
        arguments.out,
        {
            "methods": len({row["method"] for row in table}),
            "float_error_percent": baseline,
            "fewest_bits_within_0.2_points": min(row["bits a weight, packed"] for row in within),
        },
        title="Quantization methods compared",
        about=(
            f"LeNet-5 with batch normalization on {dataset.name}, {len(dataset.x_train):,} training and "
            f"{len(dataset.x_test):,} test digits, mean over {len(seeds)} seeds; {float_epochs} epochs in float, then "
            f"{epochs} of each method that trains, from the same float network. Every method has its default settings, "
            f"and the learning rate that served its family best on {round(HELD_OUT * len(dataset.x_train)):,} held-out "
            "training digits: QNN leaves 8 bits to the first and the last layer, the others quantize all. Methods that "
            "quantize weights only start from the network with its normalizations folded, since its file would fold "
            "them afterwards."
        ),
        plot=PLOT.name,
        table=table,
        data={"name": dataset.name, "train": len(dataset.x_train), "test": len(dataset.x_test)},
        seeds=seeds,
        rates=rates,
        rows=rows,
        versions=common.versions("tensorflow", "keras", "ai-edge-litert", "numpy"),
    )


if __name__ == "__main__":
    main()
