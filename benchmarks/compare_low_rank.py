"""Low rank and distillation on digits: error and bytes against rank, and what a teacher adds to a small student.

    python benchmarks/compare_low_rank.py            # about 12 minutes on one core
    python benchmarks/compare_low_rank.py --quick    # a minute, embedded digits, figures of no meaning

LeNet-5 is split at several budgets of parameters (ranks from the weights alone, or weighted by the activations of 512
training digits) and of multiply-adds (one method for convolutions at a time), before and after fine-tuning. Every error
is of the official test digits through the `.tflite` file that the packed file unpacks to.

A narrow LeNet is trained from scratch on the labels, with LeNet-5 as teacher, and with a hint from its second
convolution as well. Temperature and alpha are chosen by held-out training digits, with another seed; everything else is
the same for all three. Low rank uses its defaults, and one setting of fine-tuning that was not searched.
"""

from __future__ import annotations

import argparse
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
from tfkit.compression import LowRank, distill
from tfkit.export import convert, pack, unpack
from tfkit.export.runner import Runner

CHOICE_SEED = 100
HELD_OUT = 0.2
BUDGETS = (0.5, 0.25, 0.1, 0.05)
MANY_SEEDS = (0.5, 0.1)  # With every seed; the other budgets with the first.
MULTIPLY_ADDS = (0.3,)
SETTINGS = ({"temperature": 4.0, "alpha": 0.5}, {"temperature": 4.0, "alpha": 0.9})


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


def student_network(seed: int) -> keras.Model:
    """A LeNet with 4 and 8 filters and 32 hidden units: 5,370 parameters."""

    def init(number: int) -> keras.Initializer:
        return keras.initializers.GlorotUniform(seed=10 * seed + number)

    inputs = keras.Input((28, 28, 1), name="image")
    x = keras.layers.Conv2D(4, 5, kernel_initializer=init(1), name="conv1")(inputs)
    x = keras.layers.MaxPooling2D(2, name="pool1")(x)
    x = keras.layers.Conv2D(8, 5, kernel_initializer=init(2), name="conv2")(x)
    x = keras.layers.Flatten(name="flatten")(keras.layers.MaxPooling2D(2, name="pool2")(x))
    x = keras.layers.Dense(32, activation="relu", kernel_initializer=init(3), name="fc1")(x)
    outputs = keras.layers.Dense(10, kernel_initializer=init(4), name="logits")(x)
    return keras.Model(inputs, outputs, name="narrow_lenet")


def measure(model: keras.Model, dataset: Any, folder: Path) -> dict[str, Any]:
    """Converts, packs, unpacks, and runs the unpacked file over the test digits."""
    path = convert(model, folder / "model.tflite", force=True)
    packed = pack(path, folder / "model.tfk", force=True)
    restored = unpack(packed.path, folder / "restored.tflite", force=True)
    answers = np.asarray(Runner(restored)(dataset.x_test)).argmax(-1)
    return {
        "parameters": model.count_params(),
        "tflite_bytes": path.stat().st_size,
        "packed_bytes": Path(packed.path).stat().st_size,
        "test_error_percent": 100.0 * float(np.mean(answers != dataset.y_test)),
    }


def held_out_error(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    return 100.0 * float(np.mean(model.predict(x, batch_size=1000, verbose=0).argmax(-1) != y))


class Experiment:
    """Runs all parts, and writes what there is after each.

    Args:
        dataset: the digits.
        seeds: of everything that is random; the first has the whole curve.
        epochs: of the networks, of fine-tuning, of the students.
        out: result file.
    """

    def __init__(self, dataset: Any, seeds: list[int], epochs: tuple[int, int, int], out: Path) -> None:
        self.dataset, self.seeds, self.out = dataset, seeds, out
        self.epochs, self.tuning_epochs, self.student_epochs = epochs
        self.results: dict[str, Any] = {"float": [], "low_rank": [], "distillation": {"runs": []}}
        self.figures: dict[str, float] = {}

    def run(self, folder: Path) -> None:
        x, y = self.dataset.x_train, self.dataset.y_train
        teachers = {}
        for seed in self.seeds:
            teachers[seed] = models.get("lenet5")(seed=seed)
            trainer(x, y, self.epochs, 1e-3, seed)(teachers[seed], [])
            self.results["float"].append({"seed": seed, **measure(teachers[seed], self.dataset, folder)})
            say(f"LeNet-5, seed {seed}: {self.results['float'][-1]['test_error_percent']:.2f} % error")
            for budget in BUDGETS:
                if seed != self.seeds[0] and budget not in MANY_SEEDS:
                    continue
                for aware in (False, True):
                    tune = seed == self.seeds[0] or (aware and budget in MANY_SEEDS)
                    self.split(teachers[seed], seed, folder, aware, tune, budget=budget)
            self.write()
        self.distillation(teachers, folder)
        for method in ("spatial", "channel", "tucker2"):
            for budget in MULTIPLY_ADDS:
                settings = {"budget": budget, "method": method, "cost": "multiply_adds"}
                self.split(teachers[self.seeds[0]], self.seeds[0], folder, True, True, **settings)
        self.write()

    def split(self, model: keras.Model, seed: int, folder: Path, aware: bool, tune: bool, **settings: Any) -> None:
        """Splits a trained network, and measures it before and after fine-tuning."""
        x, y = self.dataset.x_train, self.dataset.y_train
        compressor = LowRank(**settings, data=x[:512] if aware else None)
        small = compressor.prepare(model)
        row: dict[str, Any] = {"seed": seed, **settings, "data_aware": aware}
        row["layers"] = [r._asdict() for r in compressor.report()]
        row["multiply_adds_share"] = sum(r.multiply_adds_after for r in compressor.report()) / sum(
            r.multiply_adds_before for r in compressor.report()
        )
        row["untuned"] = measure(small, self.dataset, folder)
        if tune:
            trainer(x, y, self.tuning_epochs, 3e-4, seed)(small, compressor.callbacks())
            row["tuned"] = measure(compressor.finalize(small), self.dataset, folder)
        self.results["low_rank"].append(row)
        errors = [f"{row[k]['test_error_percent']:.2f}" for k in ("untuned", "tuned") if k in row]
        say(f"  {settings}, {'with' if aware else 'without'} data: {row['untuned']['packed_bytes']} bytes, error "
            f"{' -> '.join(errors)} %")  # fmt: skip

    def distillation(self, teachers: dict[int, keras.Model], folder: Path) -> None:
        x, y = self.dataset.x_train, self.dataset.y_train
        found = self.results["distillation"]
        found["choice"] = self.choose(x, y)
        setting = SETTINGS[found["choice"]["picked"]]
        for seed in self.seeds:
            fit = trainer(x, y, self.student_epochs, 2e-3, seed)
            hinted = {**setting, "feature_pairs": [("conv2", "conv2")], "feature_weight": 0.1}
            row: dict[str, Any] = {"seed": seed}
            for name, train in {
                "labels": fit,
                "teacher": distill(teachers[seed], fit, **setting),
                "teacher_and_hint": distill(teachers[seed], fit, **hinted),
            }.items():
                student = student_network(seed)
                started = time.time()
                train(student, [])
                row[name] = {**measure(student, self.dataset, folder), "seconds": round(time.time() - started, 1)}
            found["runs"].append(row)
            say(f"student, seed {seed}: " + ", ".join(f"{k} {v['test_error_percent']:.2f} %" for k, v in row.items()
                                                     if isinstance(v, dict)))  # fmt: skip
            self.write()

    def choose(self, x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        """Picks temperature and alpha by held-out training digits."""
        cut = round(len(x) * (1 - HELD_OUT))
        teacher = models.get("lenet5")(seed=CHOICE_SEED)
        trainer(x[:cut], y[:cut], self.epochs, 1e-3, CHOICE_SEED)(teacher, [])
        fit = trainer(x[:cut], y[:cut], self.student_epochs, 2e-3, CHOICE_SEED)
        errors = []
        for setting in SETTINGS:
            student = student_network(CHOICE_SEED)
            distill(teacher, fit, **setting)(student, [])
            errors.append(held_out_error(student, x[cut:], y[cut:]))
            say(f"choice {setting}: {errors[-1]:.2f} % held-out error")
        return {
            "held_out_digits": len(x) - cut,
            "seed": CHOICE_SEED,
            "settings": list(SETTINGS),
            "error_percent": errors,
            "picked": int(np.argmin(errors)),
        }

    def write(self) -> None:
        self.summarize()
        common.write_result(
            self.out,
            self.figures,
            data={"name": self.dataset.name, "train": len(self.dataset.x_train), "test": len(self.dataset.x_test)},
            seeds=self.seeds,
            epochs={"network": self.epochs, "fine_tuning": self.tuning_epochs, "student": self.student_epochs},
            results=self.results,
            versions=common.versions("tensorflow", "keras", "numpy", "ai-edge-litert"),
        )

    def summarize(self) -> None:
        base = {row["seed"]: row for row in self.results["float"]}

        def mean(budget: float, aware: bool, stage: str, key: str) -> float:
            rows = [r for r in self.results["low_rank"] if "cost" not in r and stage in r]
            rows = [r for r in rows if r["budget"] == budget and r["data_aware"] == aware]
            if key == "packed_ratio":
                return float(np.mean([base[r["seed"]]["tflite_bytes"] / r[stage]["packed_bytes"] for r in rows]))
            return float(np.mean([r[stage][key] - base[r["seed"]][key] for r in rows]))

        for name, budget in (("half", 0.5), ("tenth", 0.1)):
            prefix = f"lenet5_{name}_params"
            change = "test_error_percent"
            self.figures[f"{prefix}_error_change_points"] = mean(budget, True, "tuned", change)
            self.figures[f"{prefix}_untuned_error_change_points"] = mean(budget, True, "untuned", change)
            self.figures[f"{prefix}_untuned_plain_error_change_points"] = mean(budget, False, "untuned", change)
            self.figures[f"{prefix}_packed_ratio"] = mean(budget, True, "tuned", "packed_ratio")
        runs = self.results["distillation"]["runs"]
        if runs:
            for name, key in (("teacher", "distillation_gain_points"), ("teacher_and_hint", "hint_gain_points")):
                gains = [r["labels"]["test_error_percent"] - r[name]["test_error_percent"] for r in runs]
                self.figures[key] = float(np.mean(gains))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dataset", default="mnist", help="mnist (needs $TFKIT_DATA or a download) or mnist5k")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch, embedded digits")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "low_rank.json")
    arguments = parser.parse_args()
    epochs = (6, 2, 8)
    if arguments.quick:
        arguments.dataset, arguments.seeds, epochs = "mnist5k", arguments.seeds[:1], (1, 1, 1)
    dataset = data.load(arguments.dataset, validation=0)
    experiment = Experiment(dataset, arguments.seeds, epochs, arguments.out)
    with tempfile.TemporaryDirectory() as folder:
        experiment.run(Path(folder))
    for name, value in experiment.figures.items():
        say(f"{name}: {value:.3f}")
    say(f"written: {arguments.out}")


if __name__ == "__main__":
    main()
