"""Reproduces the MNIST row of Relaxed Quantization (Louizos et al., https://arxiv.org/abs/1810.01875, table 1).

    python benchmarks/papers/relaxed_quantization.py            # 3 seeds; about half an hour on one core
    python benchmarks/papers/relaxed_quantization.py --quick    # one seed, few epochs and digits: does it run?

LeNet-5 (32C5-MP2-64C5-MP2-512FC) on 10,000 training digits (the paper: 60,000), shifted at random. A float network is
trained, and from it the networks of 8, 4 and 2 bits, the last two for more epochs; beside each, the float network is
trained on for the same epochs, and the excess is over its error. Errors are those of the `.tflite` files (int8; float
for the float network) on the official test set. Temperature, variant, noise, grid and learning rate are, for each
width, those of `CANDIDATES` with the least cross-entropy on 2,000 held-out training digits, with one more seed and
fewer epochs; the test set takes no part in it. With `--cache`, what was trained is kept and not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
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
from tfkit.compression import RelaxedQuantization
from tfkit.export import convert, pack, verify
from tfkit.export.runner import Runner

CHOICE_SEED = 100
HELD_OUT = 0.2
BATCH = 100
RATE = 1e-3
SHIFT = 2
WIDTHS = (8, 4, 2)
#: Table 1 of the paper: test error in percent, by width of weights and activations.
PAPER = {"float": 0.64, "8": 0.55, "4": 0.58, "2": 0.76}


class Plan(NamedTuple):
    """Epochs of the float network, of the training after it (narrow: 4 and 2 bits), and of that for the choice."""

    float_epochs: int = 7
    epochs: int = 4
    narrow_epochs: int = 8
    choice_epochs: int = 4

    def after(self, bits: int) -> int:
        """Returns the epochs from the float network to that of so many bits."""
        return self.epochs if bits == 8 else self.narrow_epochs


class Candidate(NamedTuple):
    """Arguments of the compressor, and Adam's learning rate."""

    temperature: float
    straight_through: bool
    noise: float = 0.1
    neighbours: int = 1
    learning_rate: float = RATE

    def compressor(self, bits: int, seed: int) -> RelaxedQuantization:
        """Makes the compressor."""
        arguments = {key: value for key, value in self._asdict().items() if key != "learning_rate"}
        return RelaxedQuantization(bits=bits, activation_bits=bits, seed=seed, **arguments)


#: By width. Noise of a third of a step, the paper's, smooths the gradient, and at 2 bits drowns the signal. The fewer
#: points, the further a weight has to go to the next one: higher learning rates.
CANDIDATES = {
    8: (Candidate(1.0, False), Candidate(1.0, False, 1 / 3, 2), Candidate(1.0, True, 1 / 3, 2)),
    4: (
        Candidate(1.0, False),
        Candidate(1.0, False, learning_rate=2e-3),
        Candidate(1.0, False, 0.2, 1, 2e-3),
        Candidate(1.0, False, 0.2, 2, 2e-3),
        Candidate(1.0, True, 1 / 3, 2),
    ),
    2: (
        Candidate(1.0, False, learning_rate=2e-3),
        Candidate(1.0, True, learning_rate=2e-3),
        Candidate(2.0, True, learning_rate=2e-3),
    ),
}


class Shifted(keras.utils.PyDataset):
    """Batches in a random order, each digit shifted by up to `SHIFT` pixels."""

    def __init__(self, x: np.ndarray, y: np.ndarray, seed: int) -> None:
        super().__init__()
        self.x = np.pad(x[..., 0], ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
        self.y = y
        self.rng = np.random.default_rng(seed)
        self.order = self.rng.permutation(len(y))

    def __len__(self) -> int:
        return len(self.y) // BATCH

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = self.order[index * BATCH : (index + 1) * BATCH]
        top, left = self.rng.integers(0, 2 * SHIFT + 1, (2, len(chosen), 1))
        size = self.x.shape[1] - 2 * SHIFT
        rows, columns = top + np.arange(size), left + np.arange(size)
        return self.x[chosen[:, None, None], rows[:, :, None], columns[:, None, :], None], self.y[chosen]

    def on_epoch_end(self) -> None:
        self.order = self.rng.permutation(len(self.y))


def trainer(x: np.ndarray, y: np.ndarray, epochs: int, seed: int, rate: float = RATE) -> Callable[..., None]:
    """Returns `fit(model, callbacks)`: Adam with cosine decay."""

    def fit(model: keras.Model, callbacks: list[keras.callbacks.Callback]) -> None:
        keras.utils.set_random_seed(seed)
        batches = Shifted(x, y, seed)
        schedule = keras.optimizers.schedules.CosineDecay(rate, epochs * len(batches), alpha=0.01)
        model.compile(keras.optimizers.Adam(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(batches, epochs=epochs, verbose=0, shuffle=False, callbacks=callbacks)

    return fit


def float_start(x: np.ndarray, y: np.ndarray, plan: Plan, seed: int, cache: Path | None) -> keras.Model:
    """Trains the float network that everything else starts from."""

    def make() -> keras.Model:
        model = models.get("lenet5_wide")(seed=seed)
        trainer(x, y, plan.float_epochs, seed)(model, [])
        return model

    return kept(cache, f"start_{len(x)}_{plan.float_epochs}_{seed}", make)


def float_longer(start: keras.Model, x: np.ndarray, y: np.ndarray, epochs: int, seed: int) -> keras.Model:
    """Trains the float network as much longer as a quantized one."""
    model = keras.models.clone_model(start)
    model.set_weights(start.get_weights())
    trainer(x, y, epochs, seed + 1)(model, [])
    return model


def quantized(
    start: keras.Model, bits: int, candidate: Candidate, x: np.ndarray, y: np.ndarray, epochs: int, seed: int
) -> keras.Model:
    """Trains with relaxed quantization of weights and activations."""
    return candidate.compressor(bits, seed).apply(start, trainer(x, y, epochs, seed + 1, candidate.learning_rate))


def measure_file(model: keras.Model, quantization: str, dataset: Any, folder: Path, name: str) -> dict[str, Any]:
    """Converts, compares file and model, runs the file over the test set, and counts the bytes of its packed form."""
    path = convert(model, folder / f"{name}.tflite", quantization=quantization, force=True)
    packed = pack(path, folder / f"{name}.tfk", force=True)
    # A near-tie that falls the other way moves an activation by a whole step, which at 2 bits is seen at the output.
    parity = verify(model, path, dataset.x_test[:500])
    wrong = np.asarray(Runner(path)(dataset.x_test)).argmax(-1) != dataset.y_test
    return {
        "test_error_percent": 100.0 * float(np.mean(wrong)),
        "tflite_bytes": path.stat().st_size,
        "packed_bytes": packed.size_bytes,
        "file_against_model_steps": parity.max_error_steps or 0.0,
        "file_against_model_same_answer": parity.argmax_agreement,
    }


def choose(dataset: Any, plan: Plan, cache: Path | None) -> dict[str, Any]:
    """Picks the candidate of each width by the cross-entropy on held-out training digits."""
    x, y = dataset.x_train, dataset.y_train
    cut = round(len(x) * (1 - HELD_OUT))
    start = float_start(x[:cut], y[:cut], plan, CHOICE_SEED, cache)
    epochs = plan.choice_epochs
    candidates, picked = {}, {}
    for bits in WIDTHS:
        rows = []
        for candidate in CANDIDATES[bits]:
            name = "_".join(map(str, ("choice", bits, cut, plan.float_epochs, epochs, *candidate)))
            begun = time.time()

            def make(bits: int = bits, candidate: Candidate = candidate) -> keras.Model:
                return quantized(start, bits, candidate, x[:cut], y[:cut], epochs, CHOICE_SEED)

            logits = kept(cache, name, make).predict(x[cut:], batch_size=500, verbose=0)
            loss = keras.losses.sparse_categorical_crossentropy(y[cut:], logits, from_logits=True)
            rows.append({
                **candidate._asdict(),
                "cross_entropy": float(np.mean(loss)),
                "error_percent": 100.0 * float(np.mean(logits.argmax(-1) != y[cut:])),
            })  # fmt: skip
            say(f"choice at {bits} bits {rows[-1]}, {time.time() - begun:.0f} s")
        candidates[bits] = rows
        picked[bits] = int(np.argmin([row["cross_entropy"] for row in rows]))
    return {"held_out_digits": len(x) - cut, "seed": CHOICE_SEED, "candidates": candidates, "picked": picked}


def run_seed(
    dataset: Any, plan: Plan, chosen: dict[int, Candidate], seed: int, cache: Path | None, folder: Path
) -> dict[str, Any]:
    """Trains and measures the float network and the three quantized ones."""
    x, y = dataset.x_train, dataset.y_train
    start = float_start(x, y, plan, seed, cache)
    run: dict[str, Any] = {"seed": seed}
    for bits in WIDTHS:
        epochs = plan.after(bits)
        for label, quantize in ((f"float_{epochs}_epochs", False), (str(bits), True)):
            if label in run:
                continue
            name = "_".join(
                map(str, (label, len(x), plan.float_epochs, epochs, seed, *(chosen[bits] if quantize else ())))
            )
            row = cache / f"{name}.json" if cache else None
            if row is not None and row.exists():
                run[label] = json.loads(row.read_text())
                continue
            begun = time.time()
            if quantize:
                final = quantized(start, bits, chosen[bits], x, y, epochs, seed)
            else:
                final = float_longer(start, x, y, epochs, seed)
            run[label] = measure_file(final, "int8-qat" if quantize else "float32", dataset, folder, name)
            if row is not None:
                common.write_json(row, run[label])
            say(f"seed {seed}, {label}: {run[label]['test_error_percent']:.2f} %, {time.time() - begun:.0f} s")
        run[f"excess_{bits}_points"] = (
            run[str(bits)]["test_error_percent"] - run[f"float_{epochs}_epochs"]["test_error_percent"]
        )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs and digits")
    parser.add_argument("--cache", type=Path, help="folder that keeps what was trained")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "relaxed_quantization.json")
    arguments = parser.parse_args()
    plan, dataset = Plan(), data.load("mnist", validation=0)
    if arguments.quick:
        plan, dataset = Plan(2, 1, 1, 1), dataset.subset(train=1000, test=500)
        arguments.seeds = arguments.seeds[:1]

    choice = choose(dataset, plan, arguments.cache)
    chosen = {bits: CANDIDATES[bits][picked] for bits, picked in choice["picked"].items()}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            runs.append(run_seed(dataset, plan, chosen, seed, arguments.cache, Path(folder)))
            tables = [label for label, row in runs[0].items() if isinstance(row, dict)]
            mean = {
                label: {key: float(np.mean([run[label][key] for run in runs])) for key in runs[0][label]}
                for label in tables
            }
            excess = {bits: float(np.mean([run[f"excess_{bits}_points"] for run in runs])) for bits in WIDTHS}
            figures = {f"excess_{bits}_{bits}_points": excess[bits] for bits in WIDTHS}
            common.write_result(
                arguments.out,
                {**figures, "float_error_percent": mean[f"float_{plan.epochs}_epochs"]["test_error_percent"]},
                data={"name": dataset.name, "train": len(dataset.x_train), "test": len(dataset.x_test)},
                seeds=[run["seed"] for run in runs],
                results={"paper": PAPER, "plan": plan._asdict(), "choice": choice, "runs": runs, "mean": mean},
                versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
            )
    say(f"\n{'weights/activations':<22}{'paper':>8}{'excess':>8}{'ours':>8}{'excess':>8}   (test error %, points)")
    for bits in WIDTHS:
        error, name = PAPER[str(bits)], f"{bits}/{bits}"
        ours = mean[str(bits)]["test_error_percent"]
        say(f"{name:<22}{error:>8.2f}{error - PAPER['float']:>+8.2f}{ours:>8.2f}{excess[bits]:>+8.2f}")
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
