"""The main job: compress a classifier in every way of the table, measure the files, keep the best within a budget.

The files are judged on validation data by the accuracy of the `.tflite` file itself. Test accuracy is reported, and
decides nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

import tfkit
from tfkit import export, models
from tfkit.compression import candidates as table
from tfkit.compression import report, workspace
from tfkit.compression.base import NoEffectWarning
from tfkit.compression.file_weights import file_weights, total_sparsity
from tfkit.compression.finetuning import FineTuning, check_fits
from tfkit.compression.judging import Judgement, Measured, Objective, judge
from tfkit.data import Dataset, load
from tfkit.export import runner
from tfkit.internal import checks

#: `progress(done, total, text)`: units of work done, units in all, and what is being done.
Progress = Callable[[float, float, str], None]

FORMAT = "tfkit.compress/1"
#: What agreement with the Keras model is owed by a file: exact formats in value, lossy ones in the class they choose.
PARITY: Mapping[str, Mapping[str, float]] = {
    "float32": {"atol": 1e-4},
    "float16": {"atol": 1e-2},
    "dynamic": {"atol": math.inf, "max_steps": math.inf, "min_agreement": 0.95},
    "int8": {"atol": math.inf, "max_steps": math.inf, "min_agreement": 0.95},
    "int8-qat": {"max_steps": 1.0, "min_agreement": 0.95},
}
PARITY_SAMPLES = 128
#: A baseline less accurate than this many times the largest class's share has learnt too little to judge by.
CHANCE_FACTOR = 1.5
PACKAGES = ("tensorflow", "keras", "numpy", "ai-edge-litert")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What shapes the candidates.

    Attributes:
        epochs: of a pruning; the other stages take their share of it.
        learning_rate: of a pruning, at its first step.
        batch_size: examples a training step.
        train_epochs, train_learning_rate: for a model given by name, which is trained first.
        calibration_samples: training inputs that the ranges of int8 are taken from.
        threads: of the interpreter that is timed.
    """

    epochs: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 64
    train_epochs: int = 12
    train_learning_rate: float = 1e-3
    calibration_samples: int = 300
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "train_epochs", "calibration_samples", "threads"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("learning_rate", "train_learning_rate"):
            checks.number(name, getattr(self, name), 0)


class SearchResult(NamedTuple):
    """What a search found.

    Attributes:
        out: the folder, with `best.tflite`, `candidates/`, `results.json` and `report.html`.
        results: the content of `results.json`.
    """

    out: Path
    results: dict[str, Any]

    @property
    def best(self) -> dict[str, Any]:
        """The row of the best file."""
        return next(row for row in self.results["candidates"] if row["name"] == self.results["best"])

    @property
    def found(self) -> bool:
        """Whether any candidate but the baseline is within the accuracy budget."""
        return any(row["status"] == "accepted" for row in self.results["candidates"])


def compress(
    model: keras.Model | str | os.PathLike[str],
    data: Dataset | str,
    *,
    out: str | os.PathLike[str],
    max_drop: float = 0.01,
    objective: Objective = "size",
    candidates: Sequence[str] | None = None,
    settings: Settings | None = None,
    seed: int = 0,
    force: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> SearchResult:
    """Compresses a classifier in several ways, measures every file and picks the best within an accuracy budget.

    Args:
        model: a functional or sequential Keras classifier with logits, softmax or (two classes) sigmoid output; the
            path of its `.keras` file; or a name of `tfkit.models`, which is then trained first. It is not changed.
        data: a data set, or what `tfkit.data.load` takes.
        out: the folder to write.
        max_drop: how far a file's validation accuracy may lie below that of the float32 file, as a fraction.
        objective: `"size"` picks the fewest packed bytes, `"latency"` the shortest latency.
        candidates: names of `tfkit.compression.candidates.CANDIDATES`; all by default, the baseline always.
        settings: training, calibration and timing; see `Settings`.
        seed: of training, and of the split of `data` if it is given by name.
        force: replace the results of an earlier run.
        resume: go on with an interrupted run of the same model, data, seed and settings.
        progress: called as the work goes on; see `Progress`.

    Returns:
        The folder and the results.

    Raises:
        ValueError, TypeError: the model cannot be rebuilt or does not fit the data, or an argument breaks its rule.
        FileExistsError: the folder holds something else and `force` is False.
    """
    max_drop = checks.number("max_drop", max_drop, 0, 1)
    checks.choice("objective", objective, ("size", "latency"))
    chosen = table.select(candidates)
    settings = settings if settings is not None else Settings()
    if not isinstance(data, Dataset):
        data = load(data, seed=seed)
    if not len(data.x_validation):
        raise ValueError(
            f"Argument `data` must have a validation part, to judge by. Received: '{data.name}' without one. Load it "
            "with validation=0.1."
        )
    given = _Given.of(model, data, seed)
    loss = check_fits(given.model, data)
    configuration = {
        "model": given.fingerprint,
        "data": _hash_of_data(data),
        "seed": checks.integer("seed", seed, 0),
        "settings": dataclasses.asdict(settings),
        "versions": _versions(),
    }
    space = workspace.Workspace(out, configuration, force=force, resume=resume)
    search = _Search(space, given, data, settings, seed, loss, chosen, progress or (lambda *_: None))
    started = time.perf_counter()
    rows = search.run()
    judgement = _judge(rows, max_drop, objective)
    results = _results(search, rows, judgement, max_drop, objective, time.perf_counter() - started)
    best = space.candidate(judgement.best)
    workspace.copy(best, space.folder / workspace.BEST)
    workspace.copy(best.with_suffix(".tfpack"), space.folder / workspace.BEST_PACKED)
    report.write_html(results, space.folder / workspace.REPORT)
    workspace.write_json(space.folder / workspace.RESULTS, results)
    return SearchResult(space.folder, results)


class _Given(NamedTuple):
    """The model to compress, and what to call it."""

    model: keras.Model
    name: str
    fingerprint: str
    untrained: bool

    @classmethod
    def of(cls, model: Any, data: Dataset, seed: int) -> _Given:
        if isinstance(model, keras.Model):
            return cls(model, model.name, _hash_of_model(model), False)
        text = os.fspath(model)
        if text in models.names():
            made = models.get(text)(input_shape=data.input_shape, classes=data.num_classes, seed=seed)
            return cls(made, text, f"tfkit.models.{text}", True)
        if not text.endswith((".keras", ".h5")) or not Path(text).is_file():
            raise ValueError(
                f"Argument `model` must be a Keras model, the path of a .keras file, or one of "
                f"{', '.join(models.names())}. Received: {checks.describe(text)}."
            )
        loaded = keras.saving.load_model(text, compile=False)
        return cls(loaded, Path(text).stem, _hash_of_model(loaded), False)


class _Search:
    """The work: stages are trained when a candidate needs them, and each once."""

    def __init__(
        self,
        space: workspace.Workspace,
        given: _Given,
        data: Dataset,
        settings: Settings,
        seed: int,
        loss: str,
        chosen: Sequence[table.Candidate],
        progress: Progress,
    ) -> None:
        self.space, self.given, self.data, self.settings = space, given, data, settings
        self.seed, self.loss, self.chosen = seed, loss, chosen
        self.warnings: list[str] = []
        self._models: dict[str, keras.Model] = {}
        self._failed: dict[str, str] = {}
        self._progress = progress
        self._done = 0.0
        records = {candidate.name: space.record(candidate.name) for candidate in chosen}
        self.records = {name: record for name, record in records.items() if record is not None}
        stages = {
            item.name: item
            for candidate in chosen
            if candidate.name not in self.records
            for item in table.lineage(candidate.stage)
        }
        epochs = sum(item.epochs_of(settings.epochs) for item in stages.values())
        epochs += settings.train_epochs if given.untrained else 0
        # In units of an epoch, about: converting and checking a file takes one, timing all of them one each.
        self._total = float(epochs + 2 * len(chosen))

    def run(self) -> list[dict[str, Any]]:
        """Makes what is not there yet, measures everything, and returns a row for each candidate, in order."""
        self._tell("resuming" if self.space.resumed else "starting")
        self.model(table.BASELINE.stage)
        rows = []
        for candidate in self.chosen:
            rows.append(self.records.get(candidate.name) or self.make(candidate))
            self._advance(1, candidate.name)
        finished = [row for row in rows if row["status"] != "failed"]
        self._tell(f"timing {len(finished)} files, in turns, in a fresh process")
        measured = export.measure(
            [self.space.folder / row["path"] for row in finished],
            self.data.x_test[:64],
            threads=self.settings.threads,
            accuracy_data=(self.data.x_test, self.data.y_test),
        )
        first = np.asarray(measured[0].round_p50_ms)
        for row, measurement in zip(finished, measured, strict=True):
            rounds = np.asarray(measurement.round_p50_ms) / first
            row |= {
                key: getattr(measurement, key)
                for key in (
                    "size_bytes", "gzip_bytes", "packed_bytes", "load_ms", "first_run_ms", "p50_ms", "p90_ms",
                    "p99_ms", "runs", "peak_memory_bytes", "kernels", "delegated",
                )
            }  # fmt: skip
            row["test_accuracy"] = measurement.accuracy
            row["latency_ratio"] = float(np.median(rounds))
            row["latency_ratio_range"] = [float(rounds.min()), float(rounds.max())]
        self.machine = dict(measured[0].machine)
        self._warn_of_growth(finished)
        return rows

    def make(self, candidate: table.Candidate) -> dict[str, Any]:
        """Makes one candidate's file and all that is said of it but its timing. What fails is said, and passed over."""
        started = time.perf_counter()
        row: dict[str, Any] = {
            "name": candidate.name,
            "summary": candidate.summary,
            "stage": candidate.stage,
            "quantization": candidate.quantization,
            "status": "made",
            "recipe": table.recipe(
                candidate,
                data=self.data.name,
                seed=self.seed,
                loss=self.loss,
                epochs=self.settings.epochs,
                learning_rate=self.settings.learning_rate,
                batch_size=self.settings.batch_size,
            ),
        }
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", NoEffectWarning)
                row |= self._file(candidate)
        except Exception as error:
            if candidate == table.BASELINE:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.warnings.append(f"{candidate.name} could not be made. {reason}")
            return row | {"status": "failed", "reason": reason}
        own = [str(warning.message) for warning in caught if issubclass(warning.category, NoEffectWarning)]
        row["warnings"] = list(dict.fromkeys(own + row["warnings"]))
        row["seconds"] = time.perf_counter() - started
        self.space.save_record(candidate.name, row)
        return row

    def _file(self, candidate: table.Candidate) -> dict[str, Any]:
        model = self.model(candidate.stage)
        self._tell(f"{candidate.name}: converting and checking")
        path = self.space.candidate(candidate.name)
        options: dict[str, Any] = {}
        if candidate.quantization == "int8":
            options = {
                "calibration": self.data.x_train,
                "calibration_samples": self.settings.calibration_samples,
                "seed": self.seed,
            }
        export.convert(model, path, quantization=candidate.quantization, force=True, **options)
        export.pack(path, path.with_suffix(".tfpack"), force=True)
        kernels = ("xnnpack", "reference") if candidate.quantization == "int8-qat" else ("xnnpack",)
        parity = export.verify(model, path, self.data.x_validation[:PARITY_SAMPLES], kernels=kernels)
        agrees = parity.ok(**PARITY[candidate.quantization])
        weights = file_weights(path, model)
        right, _ = runner.accuracy(runner.Runner(path), self.data.x_validation, self.data.y_validation)
        complaint = f"differs from its Keras model by up to {parity.max_abs_error:.3g}" + (
            f" ({parity.max_error_steps:.2f} steps)" if parity.max_error_steps is not None else ""
        )
        return {
            "path": path.relative_to(self.space.folder).as_posix(),
            "sha256": workspace.sha256_of(path),
            "validation_accuracy": right,
            "parity": {
                "agrees": agrees,
                "samples": parity.samples,
                "kernels": list(kernels),
                "max_abs_error": _finite(parity.max_abs_error),
                "max_error_steps": _finite(parity.max_error_steps),
                "argmax_agreement": parity.argmax_agreement,
            },
            "sparsity": total_sparsity(weights),
            "weights": [item._asdict() for item in weights],
            "warnings": [] if agrees else [complaint],
        }

    def model(self, name: str) -> keras.Model:
        """Returns the model of a stage: from memory, from the folder, or trained now."""
        if name in self._failed:
            raise RuntimeError(f"its model '{name}' could not be made: {self._failed[name]}")
        if name not in self._models:
            loaded = self.space.load_model(name)
            try:
                self._models[name] = loaded if loaded is not None else self._train(name)
            except Exception as error:
                self._failed[name] = str(error)
                raise
            if loaded is None:
                self.space.save_model(name, self._models[name])
        return self._models[name]

    def _train(self, name: str) -> keras.Model:
        settings = self.settings
        if name == table.BASELINE.stage:
            if self.given.untrained:
                fit = self._fit(f"{self.given.name}: training", settings.train_epochs, settings.train_learning_rate)
                fit(self.given.model)
            return self.given.model
        stage = table.stage(name)
        parent = self.model(stage.parent)
        rate = stage.learning_rate * settings.learning_rate
        fit = self._fit(f"{name}: training", stage.epochs_of(settings.epochs), rate)
        return stage.compressor(parent).apply(parent, fit)

    def _fit(self, text: str, epochs: int, learning_rate: float) -> FineTuning:
        self._tell(text)
        return FineTuning(
            self.data,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=self.settings.batch_size,
            loss=self.loss,
            seed=self.seed,
            on_epoch=lambda done: self._advance(1, f"{text}, epoch {done} of {epochs}"),
        )

    def _warn_of_growth(self, rows: Sequence[dict[str, Any]]) -> None:
        base = rows[0]
        if base["validation_accuracy"] < CHANCE_FACTOR * _largest_share(self.data.y_validation):
            self.warnings.append(
                f"The float32 file is right on {base['validation_accuracy']:.1%} of the validation data, which is "
                "little more than chance. Was the model trained, and on inputs scaled like these "
                f"({self.data.x_train.min():g} to {self.data.x_train.max():g})?"
            )
        for row in rows[1:]:
            grown = [
                f"{what} ({row[key]:,} bytes, float32 {base[key]:,})"
                for key, what in (("size_bytes", "its file"), ("packed_bytes", "its packed file"))
                if row[key] >= base[key] and (key == "packed_bytes" or row[key] > base[key])
            ]
            if grown:
                row["warnings"] = [*row["warnings"], f"not smaller than what it was made from: {' and '.join(grown)}"]
            if row["sha256"] == base["sha256"]:
                row["warnings"] = [*row["warnings"], "changed nothing: the file is identical to the float32 file"]
        self.warnings += [f"{row['name']}: {warning}" for row in rows for warning in row["warnings"]]

    def _tell(self, text: str) -> None:
        self._progress(self._done, self._total, text)

    def _advance(self, units: float, text: str) -> None:
        self._done = min(self._done + units, self._total)
        self._tell(text)


def _judge(rows: Sequence[dict[str, Any]], max_drop: float, objective: Objective) -> Judgement:
    """Judges the rows and writes the outcome into them."""
    finished = [row for row in rows if row["status"] != "failed"]
    judgement = judge(
        [
            Measured(row["name"], row["validation_accuracy"], row["packed_bytes"], row["latency_ratio"])
            for row in finished
        ],
        max_drop=max_drop,
        objective=objective,
    )
    base = finished[0]
    for row in finished:
        row["validation_drop"] = base["validation_accuracy"] - row["validation_accuracy"]
        row["test_drop"] = base["test_accuracy"] - row["test_accuracy"]
        row["packed_ratio"] = base["size_bytes"] / row["packed_bytes"]
        row["pareto_size"] = row["name"] in judgement.pareto_size
        row["pareto_latency"] = row["name"] in judgement.pareto_latency
        row["best"] = row["name"] == judgement.best
        row["status"] = "accepted" if row["name"] in judgement.accepted else "rejected"
        row["reason"] = ""
        if row["status"] == "rejected":
            row["reason"] = (
                f"validation accuracy {100 * row['validation_drop']:.2f} points below float32, {100 * max_drop:g} allowed"
            )
    base["status"] = "baseline"
    return judgement


def _results(
    search: _Search,
    rows: Sequence[dict[str, Any]],
    judgement: Judgement,
    max_drop: float,
    objective: Objective,
    seconds: float,
) -> dict[str, Any]:
    data, model = search.data, search.model(table.BASELINE.stage)
    by_name = {row["name"]: row for row in rows}
    best, base = by_name[judgement.best], rows[0]
    if judgement.best == table.BASELINE.name:
        search.warnings.insert(0, "No candidate within the accuracy budget is better than the float32 file.")
    results = {
        "format": FORMAT,
        "headline": "",
        "model": {
            "name": search.given.name,
            "parameters": int(model.count_params()),
            "input_shape": list(data.input_shape),
            "output": search.loss,
            "sha256": _hash_of_model(model),
        },
        "data": {
            "name": data.name,
            "source": data.source,
            "train": len(data.x_train),
            "validation": len(data.x_validation),
            "test": len(data.x_test),
            "classes": data.num_classes,
            "sha256": _hash_of_data(data),
        },
        "max_drop": max_drop,
        "objective": objective,
        "seed": search.seed,
        "settings": dataclasses.asdict(search.settings),
        "best": judgement.best,
        "figures": {
            "best_packed_ratio": best["packed_ratio"],
            "best_latency_ratio": best["latency_ratio"],
            "best_validation_drop_points": 100 * best["validation_drop"],
            "best_test_drop_points": 100 * best["test_drop"],
            "accepted": sum(row["status"] == "accepted" for row in rows),
        },
        "candidates": list(rows),
        "warnings": search.warnings,
        "resumed": search.space.resumed,
        "seconds": seconds,
        "machine": search.machine | {"cores": len(os.sched_getaffinity(0))}
        if hasattr(os, "sched_getaffinity")
        else search.machine,
        "versions": _versions() | {"python": platform.python_version()},
    }
    results["headline"] = report.headline(base, best)
    return results


def _largest_share(labels: np.ndarray) -> float:
    return float(np.bincount(labels).max() / len(labels))


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; None stands for it."""
    return value if value is not None and math.isfinite(value) else None


def _versions() -> dict[str, str]:
    return {"tfkit": tfkit.__version__} | {name: metadata.version(name) for name in PACKAGES}


def _hash_of_model(model: keras.Model) -> str:
    """Returns the SHA-256 of a model's architecture and weights."""
    digest = hashlib.sha256(json.dumps(json.loads(model.to_json())["config"], sort_keys=True).encode())
    for value in model.get_weights():
        digest.update(f"{value.shape}{value.dtype}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _hash_of_data(data: Dataset) -> str:
    """Returns the SHA-256 of all the arrays of a data set."""
    digest = hashlib.sha256()
    for part in ("train", "validation", "test"):
        for array in (getattr(data, f"x_{part}"), getattr(data, f"y_{part}")):
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
