"""Quantized neural networks on MNIST (Hubara et al., https://arxiv.org/abs/1609.07061): LeNet-5 at 1, 2 and 4 bits.

    python benchmarks/papers/qnn.py            # 3 seeds; about half an hour on one core
    python benchmarks/papers/qnn.py --quick    # one seed, few epochs: does it run?

The network is LeNet-5 with batch normalization before each activation, which a binary network needs. For each seed it
is trained in float, then fine-tuned at each width of weights and activations; the float network that they are compared
with is trained on for as many epochs. All see the same digits, shifted by up to two pixels. The accuracies are those of
the files, of float32 and of int8, over the official test set. First and last layers have weights of 7 and 8 bits, the
others those of the row.

    python benchmarks/papers/qnn.py --choose   # what the learning rates were chosen by; prints a table, and no more

The learning rates are those that gave the best accuracy on held-out training digits, with a seed of its own, of the
three candidates (at 2 and 4 bits, of the first two); the test set took no part in that. What was trained is kept in
`build/`, so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import Shifted
from tfkit import data
from tfkit.compression import QuantizedNeuralNetwork
from tfkit.export import convert, pack, verify
from tfkit.export.runner import Runner

CACHE = common.RESULTS.parents[1] / "build" / "qnn"
CHOICE_SEED = 100
HELD_OUT = 0.2
FLOAT_RATE = 1e-3
#: Of the quantized networks, and of the float one that is trained on beside them.
CANDIDATES = (5e-4, 2e-3, 5e-3)
RATES = {"float": 2e-3, "w1a1": 5e-3, "w2a2": 2e-3, "w4a4": 2e-3}
#: Weight bits, activation bits, and the accuracy known elsewhere, trained on 60,000 digits.
ROWS = {"w1a1": (1, 1, 98.9), "w2a2": (2, 2, 99.45), "w4a4": (4, 4, 99.55)}
TARGETS = {"w1a1": 1.0, "w2a2": 0.3, "w4a4": 0.1}


class Plan(NamedTuple):
    """How long the networks are trained."""

    epochs: int
    tuning_epochs: int
    choice_epochs: int  # In place of `tuning_epochs`.
    digits: int | None = None


def network(seed: int) -> keras.Model:
    """LeNet-5 with batch normalization before each ReLU."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1), name="image")
    for name, filters in (("conv1", 20), ("conv2", 50)):
        x = layers.Conv2D(filters, 5, use_bias=False, name=name)(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"{name}_bn")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
        x = layers.MaxPooling2D(2, name=f"{name}_pool")(x)
    x = layers.Dense(500, use_bias=False, name="fc1")(layers.Flatten(name="flatten")(x))
    x = layers.BatchNormalization(momentum=0.9, name="fc1_bn")(x)
    x = layers.ReLU(name="fc1_relu")(x)
    return keras.Model(inputs, layers.Dense(10, name="logits")(x), name="lenet5_bn")


def train(model: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, rate: float, seed: int) -> keras.Model:
    """Trains with Adam and cosine decay."""
    batches = Shifted(x, y, seed)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, epochs * len(batches))),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(batches, epochs=epochs, verbose=0, shuffle=False)
    return model


def accuracy_percent(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Returns the share of right answers, in percent, of a Keras model or of a `.tflite` file."""
    if isinstance(model, keras.Model):
        outputs = model.predict(x, batch_size=500, verbose=0)
    else:
        outputs = np.asarray(Runner(model)(x))
    return 100.0 * float(np.mean(outputs.argmax(-1) == y))


class Runs:
    """Trains and measures, unless what is asked for is in the cache."""

    def __init__(self, dataset: Any, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.dataset = dataset
        order = np.random.default_rng(0).permutation(len(dataset.x_train))[: plan.digits]  # Some sets are sorted.
        self.x, self.y = dataset.x_train[order], dataset.y_train[order]
        folder.mkdir(parents=True, exist_ok=True)

    def digits(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Returns the digits to train on and those to measure on: held-out ones for the seed of the choice."""
        if seed != CHOICE_SEED:
            return self.x, self.y, self.dataset.x_test, self.dataset.y_test
        cut = round(len(self.x) * (1 - HELD_OUT))
        return self.x[:cut], self.y[:cut], self.x[cut:], self.y[cut:]

    def path(self, suffix: str, *key: Any) -> Path:
        key = (*key, self.dataset.name, len(self.x), self.plan.epochs, FLOAT_RATE)
        return self.folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}{suffix}"

    def start(self, seed: int) -> keras.Model:
        """Returns the float network from which all others go on."""
        path = self.path(".keras", "start", seed)
        if not path.exists():
            x, y = self.digits(seed)[:2]
            train(network(seed), x, y, self.plan.epochs, FLOAT_RATE, seed).save(path)
        return keras.saving.load_model(path, compile=False)

    def tuned(self, name: str, rate: float, seed: int, epochs: int) -> keras.Model:
        """Returns the network of a row, fine-tuned and finalized."""
        x, y = self.digits(seed)[:2]
        if name == "float":
            return train(self.start(seed), x, y, epochs, rate, seed + 1)
        method = QuantizedNeuralNetwork(*ROWS[name][:2])
        return method.finalize(train(method.prepare(self.start(seed)), x, y, epochs, rate, seed + 1))

    def held_out(self, name: str, rate: float) -> float:
        """Returns the accuracy in percent on held-out training digits, after a short fine-tuning."""
        path = self.path(".json", name, rate, CHOICE_SEED, self.plan.choice_epochs)
        if not path.exists():
            model = self.tuned(name, rate, CHOICE_SEED, self.plan.choice_epochs)
            common.write_json(path, {"accuracy": accuracy_percent(model, *self.digits(CHOICE_SEED)[2:])})
        accuracy: float = json.loads(path.read_text())["accuracy"]
        return accuracy

    def row(self, name: str, rate: float, seed: int) -> dict[str, Any]:
        """Fine-tunes the network of a row, writes its file, and measures the file."""
        path = self.path(".json", name, rate, seed, self.plan.tuning_epochs)
        if path.exists():
            return json.loads(path.read_text())
        started = time.time()
        x_test, y_test = self.digits(seed)[2:]
        file = path.with_suffix(".tflite")
        final = self.tuned(name, rate, seed, self.plan.tuning_epochs)
        convert(final, file, quantization="float32" if name == "float" else "int8-qat", force=True)
        packed = pack(file, file.with_suffix(".tfk"), force=True)
        parity = verify(final, file, x_test[:500])
        row = {
            "seed": seed,
            "learning_rate": rate,
            "accuracy_percent": accuracy_percent(file, x_test, y_test),
            "keras_accuracy_percent": accuracy_percent(final, x_test, y_test),
            "parity_steps": None if name == "float" else max(output.max_error_steps for output in parity.results),
            "tflite_bytes": file.stat().st_size,
            "packed_bytes": Path(packed.path).stat().st_size,
            "weight_buffers": [
                {"shape": list(b.shape), "weights": b.elements, "bytes": b.packed_bytes,
                 "bits_a_weight": None if b.packed_bytes is None else 8 * b.packed_bytes / b.elements}
                for b in packed.buffers if len(b.shape) > 1
            ],
            "seconds": round(time.time() - started),
        }  # fmt: skip
        common.write_json(path, row)
        say(f"{name} seed {seed}, rate {rate:g}: {row['accuracy_percent']:.2f} %, {row['packed_bytes']} bytes packed, "
            f"{row['seconds']} s")  # fmt: skip
        return row


def choose(runs: Runs, name: str) -> None:
    """Prints the accuracy on held-out digits with each learning rate."""
    for rate in CANDIDATES:
        say(f"{name}, rate {rate:g}: {runs.held_out(name, rate):.2f} % of held-out digits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", default="mnist", help="mnist (needs $TFKIT_DATA or a download) or mnist5k")
    parser.add_argument("--choose", action="store_true", help="compare learning rates on held-out digits, and stop")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, embedded digits")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "qnn.json")
    arguments = parser.parse_args()
    plan = Plan(epochs=6, tuning_epochs=8, choice_epochs=3)
    if arguments.quick:
        arguments.dataset, arguments.seeds = "mnist5k", arguments.seeds[:1]
        plan = Plan(epochs=1, tuning_epochs=1, choice_epochs=1, digits=1000)

    dataset = data.load(arguments.dataset, validation=0)
    runs = Runs(dataset, plan, CACHE)
    names = ("float", *ROWS)
    if arguments.choose:
        for name in names:
            choose(runs, name)
        return
    results: dict[str, Any] = {
        name: {"runs": [runs.row(name, RATES[name], seed) for seed in arguments.seeds]} for name in names
    }
    for result in results.values():
        for key in ("accuracy_percent", "packed_bytes", "tflite_bytes"):
            result[f"mean_{key}"] = float(np.mean([run[key] for run in result["runs"]]))
    figures = {}
    reference = results["float"]["mean_accuracy_percent"]
    say(f"float: {reference:.2f} %, {results['float']['mean_packed_bytes']:.0f} bytes packed")
    for name, (_, _, known) in ROWS.items():
        results[name]["known_accuracy_percent_60000_digits"] = known
        figures[f"{name}_drop_points"] = reference - results[name]["mean_accuracy_percent"]
        figures[f"{name}_packed_bytes"] = results[name]["mean_packed_bytes"]
        say(f"{name}: {results[name]['mean_accuracy_percent']:.2f} % ({known} % known on 60,000 digits), drop "
            f"{figures[f'{name}_drop_points']:+.2f} points (to reach: {TARGETS[name]}), "
            f"{figures[f'{name}_packed_bytes']:.0f} bytes packed")  # fmt: skip
    common.write_result(
        arguments.out,
        figures,
        data={"name": dataset.name, "train": len(runs.x), "test": len(dataset.x_test)},
        seeds=arguments.seeds,
        plan=plan._asdict(),
        learning_rates=RATES,
        targets=TARGETS,
        results=results,
        versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
    )
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
