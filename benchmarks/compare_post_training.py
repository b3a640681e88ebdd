"""Post-training quantization compared: calibration, equalization, bias correction, scales and widths on one network.

    python benchmarks/compare_post_training.py            # about six minutes on one core
    python benchmarks/compare_post_training.py --quick    # little training, few files: does it run?

`convnet_bn` (convolutions, a depthwise-separable block, batch normalization) is trained on 10,000 Fashion-MNIST images
and quantized from 300 of them, without labels or training. Every accuracy is that of the `.tflite` file over the
official test set; nothing is chosen by it.

Nagel et al. (https://arxiv.org/abs/1906.04721, tables 1 and 2) quantize MobileNetV2 to 8 bits with one scale for each
kernel, which fails until the layers are equalized. The rows "one scale" are that comparison, on a network whose
channels differ less; the rows "uneven" are it on a twin of the network, with the same function, whose channels were
made to differ by factors of up to 100.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import data, models
from tfkit.compression import PostTrainingQuantization, layer_sensitivity
from tfkit.compression.equalization import find_pairs
from tfkit.export import convert
from tfkit.export.runner import Runner
from tfkit.internal import folding, surgery

TRAIN = 10_000
SAMPLES = 300
WIDTHS = (8, 6, 4)
#: Top-1 accuracy on ImageNet of MobileNetV2 with 8-bit weights and activations.
PAPER = {
    "float": 71.72,
    "one scale": 0.12,
    "one scale, ReLU6 replaced, equalized": 69.91,
    "one scale, ReLU6 replaced, equalized, biases absorbed": 70.92,
    "one scale, ReLU6 replaced, equalized, biases absorbed and corrected": 71.19,
    "channel scales": 70.65,
}


def settings() -> dict[str, dict[str, Any]]:
    """Returns the arguments of each row, by its name."""
    rows: dict[str, dict[str, Any]] = {}
    for bits in WIDTHS:
        for calibration in ("minmax", "percentile", "mse", "kl"):
            rows[f"w{bits}a{bits} {calibration}"] = {
                "bits": bits,
                "activation_bits": bits,
                "calibration": calibration,
            }
    for bits, kind in ((8, "one scale"), (4, "one scale"), (4, "channel scales")):
        for equalize, correct in ((False, False), (True, False), (False, True), (True, True)):
            steps = " + ".join(["equalized"] * equalize + ["corrected"] * correct) or "plain"
            rows[f"w{bits}a8 {kind}, {steps}"] = {
                "bits": bits,
                "per_channel": kind == "channel scales",
                "equalize": equalize,
                "bias_correction": correct,
            }
    rows["w4a8 mse scales"] = {"bits": 4, "weight_scale": "mse"}
    return rows


def train(dataset: Any, images: int, epochs: int, seed: int) -> keras.Model:
    """Trains the float network: Adam with cosine decay, batches of 64."""
    keras.utils.set_random_seed(seed)
    model = models.get("convnet_bn")(seed=seed)
    steps = epochs * -(-images // 64)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(2e-3, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(dataset.x_train[:images], dataset.y_train[:images], batch_size=64, epochs=epochs, verbose=0)
    return model


def weight_bits(model: keras.Model) -> float:
    """Returns the mean width of the weights on grids."""
    widths = []
    for layer in model.layers:
        grid = getattr(layer, surgery.constraint_name(layer, "kernel"), None)
        if grid is not None:
            widths.append((grid.bits, math.prod(layer.kernel.shape)))
    return sum(bits * count for bits, count in widths) / sum(count for _, count in widths)


def accuracy_percent(path: Path, dataset: Any, limit: int | None) -> float:
    outputs = np.asarray(Runner(path)(dataset.x_test[:limit]))
    return 100.0 * float(np.mean(outputs.argmax(-1) == dataset.y_test[:limit]))


def uneven(model: keras.Model, seed: int) -> keras.Model:
    """Returns a model of the same function in which the ranges of the channels between two layers differ."""
    twin = folding.fold_batch_normalization(model)
    rng = np.random.default_rng(seed)
    for first, second in find_pairs(twin):
        depthwise = isinstance(first, keras.layers.DepthwiseConv2D)
        channels = first.kernel.shape[-2] if depthwise else first.kernel.shape[-1]
        factors = 10 ** rng.uniform(-1, 1, channels).astype("float32")
        first.kernel.assign(first.kernel * (factors[:, None] if depthwise else factors))
        first.bias.assign(first.bias * factors)
        second.kernel.assign(second.kernel / factors[:, None])
    return twin


def measured(model: keras.Model, arguments: dict[str, Any], dataset: Any, folder: Path, limit: int | None) -> Any:
    """Quantizes, writes the file and measures it."""
    started = time.process_time()
    final = PostTrainingQuantization(dataset.x_train[:TRAIN], samples=SAMPLES, **arguments).apply(model)
    seconds = time.process_time() - started
    path = convert(final, folder / "model.tflite", quantization="int8-qat", force=True)
    return {
        "accuracy_percent": accuracy_percent(path, dataset, limit),
        "weight_bits": weight_bits(final),
        "quantization_cpu_seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="fashion_mnist")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="little training, few files")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "post_training.json")
    arguments = parser.parse_args()
    dataset = data.load(arguments.dataset, validation=0)
    images, epochs, limit = (500, 1, 500) if arguments.quick else (TRAIN, arguments.epochs, None)
    plans = settings()
    results: dict[str, Any] = {}
    figures: dict[str, float] = {}

    def save() -> None:
        common.write_result(
            arguments.out,
            figures,
            data={"name": dataset.name, "train": images, "calibration": SAMPLES, "test": len(dataset.x_test)},
            seeds=[arguments.seed],
            results=results,
            paper_mobilenet_v2_top1_percent=PAPER,
            versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = train(dataset, images, epochs, arguments.seed)
        path = convert(model, folder / "float.tflite")
        exact = accuracy_percent(path, dataset, limit)
        results["float"] = {"accuracy_percent": exact, "file_bytes": path.stat().st_size}
        figures["float_accuracy_percent"] = exact
        say(f"{'float':<45} {exact:.2f} %")

        x = dataset.x_train[:TRAIN]
        table = layer_sensitivity(model, x, bits=(8, 6, 4, 3, 2), metric="kl", weight_scale="mse", samples=SAMPLES)
        results["sensitivity"] = {"metric": "nats", "table": [row._asdict() for row in table.rows]}
        say(table.table())
        plans["mixed, 4 bits on average, mse scales"] = {"bits": table.assign(4), "weight_scale": "mse"}
        twin = uneven(model, arguments.seed)
        for kind in ("one scale", "channel scales"):
            for equalize in (False, True):
                label = f"uneven w8a8 {kind}, {'equalized' if equalize else 'plain'}"
                plans[label] = {"per_channel": kind == "channel scales", "equalize": equalize, "bias_correction": False}
        if arguments.quick:
            plans = {name: plans[name] for name in [*list(plans)[:2], *list(plans)[-2:]]}
        for label, plan in plans.items():
            row = measured(twin if label.startswith("uneven") else model, plan, dataset, folder, limit)
            row |= {"settings": plan, "drop_points": exact - row["accuracy_percent"]}
            results[label] = row
            figures[f"{label.replace(',', '').replace(' + ', '_').replace(' ', '_')}_drop_points"] = row["drop_points"]
            say(f"{label:<45} {row['accuracy_percent']:.2f} % ({-row['drop_points']:+.2f}), "
                f"{row['weight_bits']:.2f} bits a weight")  # fmt: skip
            save()
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
