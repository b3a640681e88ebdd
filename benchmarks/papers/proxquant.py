"""Compares ProxQuant with BinaryConnect, as Bai, Wang, Liberty do (https://arxiv.org/abs/1810.00861, section 4.1).

    python benchmarks/papers/proxquant.py              # ResNet-8, 3 seeds; about an hour on one core
    python benchmarks/papers/proxquant.py --size 32    # the same on images of full size: five times as long
    python benchmarks/papers/proxquant.py --quick      # one seed, few epochs and images: does it run?

The paper trains ResNet-20 to 56 for 300 epochs on the 50,000 images of CIFAR-10. Here it is ResNet-8, 20 epochs after
30 in float, and 5,000 images, averaged to 16x16 pixels unless `--size` says otherwise. The same float network is the
start of both methods, both train for the same epochs on the same batches with Adam, both are quantized hard at the same
epoch, and the first convolution and the last layer stay in float. Images are shifted and flipped at random. Each method
takes the best of the same grid of scales and learning rates, chosen by the cross-entropy on training images that are
held out, with one more seed; the test set takes no part in that. Every weight of a result is checked to be in its set,
and the accuracy is that of the `.tflite` file. With `--cache`, trained networks are kept and not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from tfkit.compression import BinaryConnect, ProxQuant
from tfkit.compression.quantized_sets import SetQuantizer
from tfkit.export import convert, pack
from tfkit.export.runner import Runner

CHOICE_SEED = 100
HELD_OUT = 0.2
BATCH = 64
IN_FLOAT = ("stem", "logits")
#: Table 1 of the paper: test error in percent of ResNet-20 on CIFAR-10 with binary weights, mean of 4 runs.
PAPER = {"network": "ResNet-20", "float": 8.06, "BinaryConnect": 9.54, "ProxQuant": 9.35}


class Plan(NamedTuple):
    """Epochs of the float network, of quantized training, and of that before the hard quantization."""

    float_epochs: int = 30
    epochs: int = 20
    hard_epoch: int = 16


class Candidate(NamedTuple):
    """One setting of a method: arguments of the compressor, and Adam's learning rate."""

    arguments: dict[str, Any]
    learning_rate: float


#: The same grid of scale and learning rate for both methods; ProxQuant's regularizer and pull were fixed before.
SHARED = tuple(
    ({"bits": 1, "scale": scale}, rate) for scale in (0.03, "fit") for rate in (2e-3, 5e-3, 1e-2, 2e-2, 4e-2)
)
CANDIDATES: dict[str, tuple[Candidate, ...]] = {
    "BinaryConnect": tuple(Candidate(arguments, rate) for arguments, rate in SHARED),
    "ProxQuant": tuple(Candidate({**arguments, "regularizer": "l2", "pull": 3.0}, rate) for arguments, rate in SHARED),
}
METHODS: dict[str, type[SetQuantizer]] = {"BinaryConnect": BinaryConnect, "ProxQuant": ProxQuant}


class Augmented(keras.utils.PyDataset):
    """Batches in a random order; each image shifted by up to an eighth of it and mirrored half of the time."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        super().__init__()
        self.shift = x.shape[1] // 8
        around = (self.shift, self.shift)
        self.x = np.pad(x, ((0, 0), around, around, (0, 0)))
        self.y = y
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(len(y))

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        size = self.x.shape[1] - 2 * self.shift
        top, left = self.rng.integers(0, 2 * self.shift + 1, (2, len(chosen), 1))
        rows, columns = top + np.arange(size), left + np.arange(size)
        columns = np.where(self.rng.integers(0, 2, (len(chosen), 1)), columns, columns[:, ::-1])
        return self.x[chosen[:, None, None], rows[:, :, None], columns[:, None, :]], self.y[chosen]

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.y))


def train(
    model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, rate: float, seed: int, callbacks: Any = ()
) -> None:
    """Adam with cosine decay."""
    keras.utils.set_random_seed(seed)
    batches = Augmented(x, y, seed)
    schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(batches), alpha=0.01)
    model.compile(keras.optimizers.Adam(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(batches, epochs=epochs, verbose=0, shuffle=False, callbacks=list(callbacks))


def float_network(x: np.ndarray, y: np.ndarray, plan: Plan, seed: int, cache: Path | None) -> keras.Model:
    """Trains the network that both methods start from."""

    def make() -> keras.Model:
        model = models.get("resnet8")(x.shape[1:], seed=seed)
        train(model, x, y, plan.float_epochs, 3e-3, seed)
        return model

    return kept(cache, f"float_{x.shape[1]}_{len(x)}_{plan.float_epochs}_{seed}", make)


def quantize(
    method: str,
    candidate: Candidate,
    model: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    plan: Plan,
    seed: int,
    cache: Path | None = None,
) -> keras.Model:
    """Trains one method from the float network, or takes the result from the cache."""
    settings = "_".join(map(str, [*candidate.arguments.values(), candidate.learning_rate, *plan]))
    compressor = METHODS[method](**candidate.arguments, hard_epoch=plan.hard_epoch, exclude=IN_FLOAT)

    def fit(prepared: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        train(prepared, x, y, plan.epochs, candidate.learning_rate, seed, callbacks)

    final = kept(cache, f"{method}_{settings}_{x.shape[1]}_{len(x)}_{seed}", lambda: compressor.apply(model, fit))
    check_in_set(final, candidate.arguments["bits"])
    return final


def check_in_set(model: keras.Model, bits: int) -> None:
    """Sees that every convolution but the first has as few values as its set, evenly spaced."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D) and layer.name not in IN_FLOAT:
            values = np.unique(np.asarray(layer.kernel))
            scale = values.max()
            allowed = np.array([-scale, scale] if bits == 1 else np.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1)) * scale
                               / (2 ** (bits - 1) - 1), np.float32)  # fmt: skip
            if not np.isin(values, allowed).all():
                raise RuntimeError(f"{layer.name}: {len(values)} values, not all in the set {allowed}")


def held_out(model: keras.Model, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Returns the share of right answers in percent, and the mean cross-entropy."""
    logits = model.predict(x, batch_size=500, verbose=0)
    loss = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
    return {
        "accuracy_percent": 100.0 * float(np.mean(logits.argmax(-1) == y)),
        "cross_entropy": float(np.mean(loss)),
    }


def measure_file(model: keras.Model, x: np.ndarray, y: np.ndarray, folder: Path) -> dict[str, float]:
    """Converts to a float `.tflite` file, runs it over the test set, and counts the bytes of its packed form."""
    path = convert(model, folder / "model.tflite", force=True)
    packed = pack(path, folder / "model.tfk", force=True)
    right = np.asarray(Runner(path)(x)).argmax(-1) == y
    return {
        "test_accuracy_percent": 100.0 * float(np.mean(right)),
        "tflite_bytes": path.stat().st_size,
        "packed_bytes": packed.size_bytes,
    }


def choose(dataset: Any, plan: Plan, cache: Path | None) -> dict[str, Any]:
    """Picks each method's candidate by the cross-entropy on held-out training images."""
    x, y = dataset.x_train, dataset.y_train
    cut = round(len(x) * (1 - HELD_OUT))
    model = float_network(x[:cut], y[:cut], plan, CHOICE_SEED, cache)
    report: dict[str, Any] = {
        "held_out_images": len(x) - cut,
        "float": held_out(model, x[cut:], y[cut:]),
        "methods": {},
    }
    for method, candidates in CANDIDATES.items():
        rows = []
        for candidate in candidates:
            started = time.time()
            final = quantize(method, candidate, model, x[:cut], y[:cut], plan, CHOICE_SEED, cache)
            rows.append({**candidate._asdict(), **held_out(final, x[cut:], y[cut:])})
            say(f"choice {method} {rows[-1]} (float {report['float']}), {time.time() - started:.0f} s")
        report["methods"][method] = {
            "candidates": rows,
            "picked": int(np.argmin([row["cross_entropy"] for row in rows])),
        }
    return report


def averaged(x: np.ndarray, size: int) -> np.ndarray:
    """Returns images of size x size pixels, each the mean of a square of pixels."""
    factor = x.shape[1] // size
    return np.ascontiguousarray(x.reshape(len(x), size, factor, size, factor, x.shape[-1]).mean(axis=(2, 4)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs and images")
    parser.add_argument("--size", type=int, default=16, choices=(8, 16, 32), help="pixels of an image's side")
    parser.add_argument("--cache", type=Path, help="folder that keeps trained networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "proxquant.json")
    arguments = parser.parse_args()
    plan, dataset = Plan(), data.load("cifar10", validation=0)
    small = {name: averaged(getattr(dataset, name), arguments.size) for name in ("x_train", "x_test")}
    dataset = dataclasses.replace(dataset, **small)
    if arguments.quick:
        plan, dataset = Plan(2, 3, 2), dataset.subset(train=640, validation=0, test=200)
        arguments.seeds = arguments.seeds[:1]

    choice = choose(dataset, plan, arguments.cache)
    picked = {method: CANDIDATES[method][choice["methods"][method]["picked"]] for method in CANDIDATES}
    runs: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        started = time.time()
        x, y = dataset.x_train, dataset.y_train
        model = float_network(x, y, plan, seed, arguments.cache)
        with tempfile.TemporaryDirectory() as folder:
            run: dict[str, Any] = {
                "seed": seed,
                "float": measure_file(model, dataset.x_test, dataset.y_test, Path(folder)),
            }
            for method, candidate in picked.items():
                final = quantize(method, candidate, model, x, y, plan, seed, arguments.cache)
                run[method] = measure_file(final, dataset.x_test, dataset.y_test, Path(folder))
        run["seconds"] = round(time.time() - started)
        runs.append(run)
        say(f"seed {seed}: " + ", ".join(f"{k} {run[k]['test_accuracy_percent']:.1f} %" for k in ("float", *picked)))
        mean = {
            name: {key: float(np.mean([r[name][key] for r in runs])) for key in runs[0]["float"]}
            for name in ("float", *picked)
        }
        accuracy = {name: row["test_accuracy_percent"] for name, row in mean.items()}
        figures = {
            "proxquant_minus_binaryconnect_points": accuracy["ProxQuant"] - accuracy["BinaryConnect"],
            "proxquant_drop_points": accuracy["float"] - accuracy["ProxQuant"],
        }
        common.write_result(
            arguments.out,
            figures,
            data={"name": dataset.name, "train": len(x), "test": len(dataset.x_test), "pixels": arguments.size},
            seeds=[r["seed"] for r in runs],
            results={"paper": PAPER, "plan": plan._asdict(), "choice": choice, "runs": runs, "mean": mean},
            versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
        )
    say(f"\npaper ({PAPER['network']}): test error {PAPER['float']} % float, {PAPER['BinaryConnect']} % BinaryConnect, "
        f"{PAPER['ProxQuant']} % ProxQuant")  # fmt: skip
    say(f"ours (ResNet-8, {len(x)} images): " + ", ".join(f"{100 - a:.1f} % {name}" for name, a in accuracy.items()))
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
