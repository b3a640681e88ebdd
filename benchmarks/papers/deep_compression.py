"""Reproduces the MNIST tables of Deep Compression (Han, Mao, Dally, https://arxiv.org/abs/1510.00149, tables 1 to 3).

    python benchmarks/papers/deep_compression.py            # both networks, 3 seeds; about half an hour on two cores
    python benchmarks/papers/deep_compression.py --quick    # one seed, few epochs: does it run?

Each network is trained, pruned, clustered, converted to `.tflite`, packed, unpacked, and the unpacked file is run over
the official test set. Two settings are shown for each: the paper's densities and bits, and one of ours. Ours is the
smallest of `Plan.candidates` whose error on held-out training digits is no more than the baseline's, both measured on
the held-out digits in this same run (seeds `CHOICE_SEEDS`); the test set takes no part in that choice. The networks of
the table are then trained on all the training digits.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
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
import zstandard

from benchmarks import common
from benchmarks.common import say
from tfkit import data, models
from tfkit.compression import DeepCompression
from tfkit.export import convert, pack, unpack
from tfkit.export.runner import Runner
from tfkit.internal import surgery

CHOICE_SEEDS = (100,)
HELD_OUT = 0.2


class Setting(NamedTuple):
    """Shares of zeros and index widths, by layer."""

    sparsity: dict[str, float]
    bits: dict[str, int]


class Plan(NamedTuple):
    """How one network is trained and compressed."""

    epochs: int
    pruning_epochs: int
    clustering_epochs: int
    paper: Setting
    candidates: tuple[Setting, ...]


def setting(bits: int, conv_bits: int = 4, **density: float) -> Setting:
    """Makes a setting from the percentage of weights kept in each layer."""
    sparsity = {name: round(1 - kept / 100, 4) for name, kept in density.items()}
    return Setting(sparsity, {name: conv_bits if name.startswith("conv") else bits for name in density})


PLANS = {
    "lenet_300_100": Plan(
        epochs=20,
        pruning_epochs=32,
        clustering_epochs=6,
        paper=setting(6, fc1=8, fc2=9, logits=26),
        candidates=(
            setting(4, fc1=4, fc2=7, logits=30),
            setting(4, fc1=3, fc2=6, logits=30),
        ),
    ),
    "lenet5": Plan(
        epochs=12,
        pruning_epochs=16,
        clustering_epochs=4,
        paper=setting(5, 8, conv1=66, conv2=12, fc1=8, logits=19),
        candidates=(
            setting(4, conv1=60, conv2=10, fc1=2.5, logits=20),
            setting(4, conv1=60, conv2=8, fc1=1.5, logits=15),
        ),
    ),
}

#: The paper's tables 1, 2 and 3. Columns of a layer: weights kept %, weight bits, weight bits after Huffman coding,
#: index bits, index bits after Huffman coding, rate P+Q %, rate P+Q+H %.
PAPER: dict[str, Any] = {
    "lenet_300_100": {
        "baseline_error_percent": 1.64,
        "error_percent": 1.58,
        "size_kb": 27,
        "ratio": 40,
        "layers": {
            "fc1": (8, 6, 4.4, 5, 3.7, 3.1, 2.32),
            "fc2": (9, 6, 4.4, 5, 4.3, 3.8, 3.04),
            "logits": (26, 6, 4.3, 5, 3.2, 15.7, 12.70),
            "total": (8, 6, 5.1, 5, 3.7, 3.1, 2.49),
        },
    },
    "lenet5": {
        "baseline_error_percent": 0.80,
        "error_percent": 0.74,
        "size_kb": 44,
        "ratio": 39,
        "layers": {
            "conv1": (66, 8, 7.2, 5, 1.5, 78.5, 67.45),
            "conv2": (12, 8, 7.2, 5, 3.9, 6.0, 5.28),
            "fc1": (8, 5, 4.5, 5, 4.5, 2.7, 2.45),
            "logits": (19, 5, 5.2, 5, 3.7, 6.9, 6.13),
            "total": (8, 5.3, 4.1, 5, 4.4, 3.05, 2.55),
        },
    },
}


def trainer(x: np.ndarray, y: np.ndarray, epochs: int, learning_rate: float, seed: int) -> Any:
    """Returns `fit(model, callbacks)`: Adam with cosine decay, batches of 64."""

    def fit(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        keras.utils.set_random_seed(seed)
        steps = epochs * -(-len(x) // 64)
        model.compile(
            keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps)),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model.fit(x, y, batch_size=64, epochs=epochs, verbose=0, callbacks=callbacks)

    return fit


def baseline(network: str, x: np.ndarray, y: np.ndarray, plan: Plan, seed: int) -> keras.Model:
    """Trains the float network."""
    model = models.get(network)(seed=seed)
    trainer(x, y, plan.epochs, 1e-3, seed)(model, [])
    return model


def compress(model: keras.Model, x: np.ndarray, y: np.ndarray, plan: Plan, chosen: Setting, seed: int) -> keras.Model:
    """Prunes and clusters."""
    stages = DeepCompression(chosen.sparsity, chosen.bits)
    return stages.apply(
        model,
        [
            trainer(x, y, plan.pruning_epochs, 1e-3, seed),
            trainer(x, y, plan.clustering_epochs, 3e-4, seed),
        ],
    )


def error_percent(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Returns the share of wrong answers, in percent, of a Keras model or of a `.tflite` file."""
    if isinstance(model, keras.Model):
        outputs = model.predict(x, batch_size=1000, verbose=0)
    else:
        outputs = np.asarray(Runner(model)(x))
    return 100.0 * float(np.mean(outputs.argmax(-1) != y))


def estimated_bytes(model: keras.Model) -> float:
    """Returns the entropy of positions and values; it ranks the candidates before any file is made."""
    total = 0.0
    for layer in surgery.leaf_layers(model):
        for weight in surgery.compressible_weights(layer).values():
            values = keras.ops.convert_to_numpy(weight).ravel()
            for stream in (values != 0, values[values != 0]):
                counts = np.unique(stream, return_counts=True)[1]
                total -= float((counts * np.log2(counts / counts.sum())).sum()) / 8
    return total


def choose(network: str, dataset: Any, plan: Plan, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Picks the smallest candidate that loses nothing on held-out training digits."""
    x, y = dataset.x_train, dataset.y_train
    cut = round(len(x) * (1 - HELD_OUT))
    rows: list[dict[str, Any]] = [
        {"setting": candidate._asdict(), "error_percent": [], "estimated_bytes": []} for candidate in plan.candidates
    ]
    baselines = []
    for seed in seeds:
        model = baseline(network, x[:cut], y[:cut], plan, seed)
        baselines.append(error_percent(model, x[cut:], y[cut:]))
        for candidate, row in zip(plan.candidates, rows, strict=True):
            small = compress(model, x[:cut], y[:cut], plan, candidate, seed)
            row["error_percent"].append(error_percent(small, x[cut:], y[cut:]))
            row["estimated_bytes"].append(round(estimated_bytes(small)))
            say(f"{network} choice, seed {seed}: {row['error_percent'][-1]:.2f} % held-out error "
                f"(baseline {baselines[-1]:.2f} %), about {row['estimated_bytes'][-1]} bytes")  # fmt: skip
    good = [i for i, row in enumerate(rows) if np.mean(row["error_percent"]) <= np.mean(baselines)]
    picked = max(good, default=0)  # Candidates go from large to small.
    return {
        "held_out_digits": len(x) - cut,
        "seeds": list(seeds),
        "baseline_error_percent": baselines,
        "candidates": rows,
        "picked": picked,
    }


def measure_file(model: keras.Model, dataset: Any, folder: Path, name: str) -> dict[str, Any]:
    """Converts, packs, unpacks, runs the unpacked file over the test set, and counts bytes."""
    path = convert(model, folder / f"{name}.tflite", force=True)
    packed = pack(path, folder / f"{name}.tfk", force=True)
    restored = unpack(packed.path, folder / f"{name}.restored.tflite", force=True)
    raw = path.read_bytes()
    if Path(restored).read_bytes() != raw:
        raise RuntimeError(f"{name}: unpacking did not give the packed file back")
    general = {
        "gzip": len(gzip.compress(raw, 9)),
        "xz": len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
        "zstd": len(zstandard.ZstdCompressor(level=19).compress(raw)),
    }
    return {
        "tflite_bytes": len(raw),
        "packed_bytes": Path(packed.path).stat().st_size,
        "general_bytes": general,
        "packed_over_best_general": Path(packed.path).stat().st_size / min(general.values()),
        "test_error_percent": error_percent(restored, dataset.x_test, dataset.y_test),
        "pack": packed,
    }


def layer_table(model: keras.Model, packed: Any) -> dict[str, dict[str, Any]]:
    """Returns the paper's columns for each layer, from the file's own buffers.

    A layer so small that its weights are coded best with the rest of the file has no bytes of its own: None.
    """
    table: dict[str, dict[str, Any]] = {}
    remaining = [row for row in packed.buffers if len(row.shape) > 1]
    for layer in surgery.leaf_layers(model):
        for weight in surgery.compressible_weights(layer).values():
            values = keras.ops.convert_to_numpy(weight)
            kept = int(np.count_nonzero(values))
            row = next(row for row in remaining if row.elements == values.size)
            remaining.remove(row)
            alone = row.packed_bytes is not None
            pairs_bits = row.fixed_entries * (row.fixed_value_bits + row.fixed_index_bits)
            table[layer.name] = {
                "weights": int(values.size),
                "weights_kept_percent": 100 * kept / values.size,
                "distinct_values": len(np.unique(values[values != 0])),
                "coding": row.coding,
                "weight_bits": row.fixed_value_bits if alone else None,
                "weight_bits_huffman": row.value_bits if alone else None,
                "index_bits": row.fixed_index_bits if alone else None,
                "index_bits_huffman": row.index_bits if alone else None,
                "bytes": row.packed_bytes,
                "rate_p_percent": 100 * row.fixed_entries * (32 + row.fixed_index_bits) / (32 * values.size)
                if alone else None,
                "rate_pq_percent": 100 * pairs_bits / (32 * values.size) if alone else None,
                "rate_pqh_percent": 100 * row.packed_bytes / (4 * values.size) if alone else None,
            }  # fmt: skip
    return table


def run_network(network: str, dataset: Any, plan: Plan, seeds: list[int], choice: dict[str, Any]) -> dict[str, Any]:
    """Trains, compresses and measures one network for every seed, with both settings."""
    settings = {"paper": plan.paper, "ours": plan.candidates[choice["picked"]]}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            started = time.time()
            model = baseline(network, dataset.x_train, dataset.y_train, plan, seed)
            float_file = measure_file(model, dataset, Path(folder), "float")
            float_file.pop("pack")
            run: dict[str, Any] = {"seed": seed, "float": float_file}
            for name, chosen in settings.items():
                small = compress(model, dataset.x_train, dataset.y_train, plan, chosen, seed)
                measured = measure_file(small, dataset, Path(folder), name)
                measured["layers"] = layer_table(small, measured.pop("pack"))
                measured["ratio"] = float_file["tflite_bytes"] / measured["packed_bytes"]
                measured["error_change_points"] = measured["test_error_percent"] - float_file["test_error_percent"]
                run[name] = measured
                say(f"{network} seed {seed} {name}: {measured['packed_bytes']} bytes, {measured['ratio']:.1f}x, error "
                    f"{float_file['test_error_percent']:.2f} -> {measured['test_error_percent']:.2f} %")  # fmt: skip
            run["seconds"] = round(time.time() - started)
            runs.append(run)
    return {
        "paper": PAPER[network],
        "settings": {name: chosen._asdict() for name, chosen in settings.items()},
        "choice": choice,
        "runs": runs,
        "mean": {name: _means([run[name] for run in runs]) for name in settings},
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    keys = ("packed_bytes", "ratio", "test_error_percent", "error_change_points", "packed_over_best_general")
    return {key: float(np.mean([row[key] for row in rows])) for key in keys}


def print_tables(results: dict[str, Any]) -> None:
    """Prints the paper's figures beside ours."""
    for network, result in results.items():
        paper = result["paper"]
        say(f"\n{network}: paper {paper['baseline_error_percent']} -> {paper['error_percent']} % error, "
            f"{paper['size_kb']} KB, {paper['ratio']}x (60,000 digits)")  # fmt: skip
        for name, mean in result["mean"].items():
            say(f"  {name:>5} setting: {mean['packed_bytes'] / 1000:.1f} KB, {mean['ratio']:.1f}x, error change "
                f"{mean['error_change_points']:+.2f} points (mean of {len(result['runs'])} seeds)")  # fmt: skip
        say("  layer    kept %       weight bits   with H        index bits    with H        P+Q %         P+Q+H %")
        for layer, ours in result["runs"][0]["ours"]["layers"].items():
            keys = ("weights_kept_percent", "weight_bits", "weight_bits_huffman", "index_bits", "index_bits_huffman",
                    "rate_pq_percent", "rate_pqh_percent")  # fmt: skip
            cells = [f"{p:>5} / {_cell(ours[k])}" for p, k in zip(paper["layers"][layer], keys, strict=True)]
            say(f"  {layer:<8} " + " ".join(cells) + "   (paper / ours)")


def _cell(value: float | None) -> str:
    return f"{value:<5.2f}" if value is not None else "rest "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", default="mnist", help="mnist (needs $TFKIT_DATA or a download) or mnist5k")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, embedded digits")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "deep_compression.json")
    arguments = parser.parse_args()
    plans = PLANS
    if arguments.quick:
        arguments.dataset, arguments.seeds = "mnist5k", arguments.seeds[:1]
        plans = {k: p._replace(epochs=2, pruning_epochs=2, clustering_epochs=1) for k, p in PLANS.items()}

    dataset = data.load(arguments.dataset, validation=0)
    results, figures = {}, {}
    for network in arguments.networks:
        plan = plans[network]
        choice = choose(network, dataset, plan, CHOICE_SEEDS)
        results[network] = run_network(network, dataset, plan, arguments.seeds, choice)
        short = network.replace("_300_100", "300")
        figures[f"{short}_ratio"] = results[network]["mean"]["ours"]["ratio"]
        figures[f"{short}_error_change_points"] = results[network]["mean"]["ours"]["error_change_points"]
        common.write_result(
            arguments.out,
            figures,
            data={"name": dataset.name, "train": len(dataset.x_train), "test": len(dataset.x_test)},
            seeds=arguments.seeds,
            results=results,
            versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
        )
    print_tables(results)
    say(f"\nwritten: {arguments.out}")


if __name__ == "__main__":
    main()
