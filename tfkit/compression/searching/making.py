"""The work of a search: train the stages, write the files, check each against its model, and time them together."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfkit import export
from tfkit.compression.base import NoEffectWarning
from tfkit.compression.searching import candidates as table
from tfkit.compression.searching import outcome, workspace
from tfkit.compression.searching.file_weights import file_weights, total_sparsity
from tfkit.compression.searching.finetuning import Augment, FineTuning, describe_function
from tfkit.data import Dataset
from tfkit.export import runner
from tfkit.export.pack import SUFFIX
from tfkit.internal import checks
from tfkit.internal.quiet import quiet_stderr

#: `progress(done, total, text)`: units of work done, units in all, and what is being done.
Progress = Callable[[float, float, str], None]

#: What agreement with the Keras model is owed by a file: exact formats in value, lossy ones in the class they choose.
PARITY: Mapping[str, Mapping[str, float]] = {
    "float32": {"atol": 1e-4},
    "float16": {"atol": 1e-2},
    "dynamic": {"atol": math.inf, "max_steps": math.inf, "min_agreement": 0.95},
    "int8": {"atol": math.inf, "max_steps": math.inf, "min_agreement": 0.95},
    "int8-qat": {"max_steps": 1.0, "min_agreement": 0.95},
}
PARITY_SAMPLES = 128


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
        augment: changes each batch of training, `augment(x, seed)`: an `Augmentation`, or a function of TensorFlow
            operations; see `FineTuning`.
    """

    epochs: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 64
    train_epochs: int = 12
    train_learning_rate: float = 1e-3
    calibration_samples: int = 300
    threads: int = 1
    augment: Augment | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "train_epochs", "calibration_samples", "threads"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("learning_rate", "train_learning_rate"):
            checks.number(name, getattr(self, name), 0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain values; a function is told by its name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"augment": describe_function(self.augment)}


class Maker:
    """Makes the files of a search. A stage is trained when a candidate needs it, and once.

    Args:
        space: the output folder.
        model: the float32 model.
        data: the data set.
        data_code: the expression that gives it, for the recipes.
        settings, seed: see `tfkit.compression.search.compress`.
        loss: what the model's output is.
        progress: called as the work goes on.
        untrained: whether `model` is to be trained first.
    """

    def __init__(
        self,
        space: workspace.Workspace,
        model: keras.Model,
        data: Dataset,
        data_code: str,
        settings: Settings,
        seed: int,
        loss: str,
        progress: Progress,
        untrained: bool,
    ) -> None:
        self.space, self.given, self.data, self.data_code, self.settings = space, model, data, data_code, settings
        self.seed, self.loss, self.untrained = seed, loss, untrained
        self.warnings: list[str] = []
        self.stages: dict[str, table.Stage] = {}
        self.machine: dict[str, Any] = {}
        #: Seconds that an epoch of the float32 model took; None as long as none was trained here.
        self.epoch_seconds: float | None = None
        self._models: dict[str, keras.Model] = {}
        self._failed: dict[str, str] = {}
        self._progress = progress
        self._started = time.perf_counter()
        self._done = 0.0
        self._total = 0.0
        if untrained and not space.has_model(table.BASELINE.stage):
            self._total += settings.train_epochs

    def expect(self, chosen: Sequence[table.Candidate], stages: Sequence[table.Stage], *, later: float = 0.0) -> None:
        """Announces what will be made.

        Args:
            chosen: the candidates.
            stages: those they are made by, among others.
            later: units of work that will be announced after these.
        """
        self.stages |= {stage.name: stage for stage in stages}
        self._total = self._done + self.units(chosen, tuple(self.stages.values())) + later

    def units(self, chosen: Sequence[table.Candidate], stages: Sequence[table.Stage]) -> float:
        """Returns the work that is left for these candidates, in epochs, about.

        Converting and checking a file takes one, timing it another.
        """
        left = [candidate for candidate in chosen if self.space.record(candidate.name) is None]
        needed = {item.name: item for candidate in left for item in table.lineage(candidate.stage, stages)}
        epochs = sum(
            item.epochs_of(self.settings.epochs) for item in needed.values() if not self.space.has_model(item.name)
        )
        return float(epochs + len(left) + len(chosen))

    def start(self) -> None:
        """Gets the float32 model ready, which is trained now if it was given by name."""
        self.tell("resuming" if self.space.resumed else "starting")
        self.model(table.BASELINE.stage)

    def rows_of(self, chosen: Sequence[table.Candidate]) -> list[dict[str, Any]]:
        """Makes what is not there yet, and returns a row for each candidate, in order."""
        rows = []
        for candidate in chosen:
            record = self.space.record(candidate.name)
            rows.append(record if record is not None else self.make(candidate))
            self._advance(0.0 if record is not None else 1.0, candidate.name)
        return rows

    def measure(self, rows: Sequence[dict[str, Any]], **options: Any) -> None:
        """Times the files in turns, in a fresh process, and writes the figures into their rows; the first is float32.

        Args:
            rows: those of the files, as `make` gives them.
            **options: of `tfkit.export.measure`.
        """
        finished = [row for row in rows if row["status"] != "failed"]
        self.tell(f"timing {len(finished)} files, in turns, in a fresh process")
        files = [self.space.folder / row["path"] for row in finished]
        measured = export.measure(
            files,
            self.data.x_test[:64],
            threads=self.settings.threads,
            packed_bytes=[file.with_suffix(SUFFIX).stat().st_size for file in files],
            **options,
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
            if measurement.accuracy is not None:
                row["test_accuracy"] = measurement.accuracy
            row["latency_ratio"] = float(np.median(rounds))
            row["latency_ratio_range"] = [float(rounds.min()), float(rounds.max())]
        self.machine = dict(measured[0].machine)

    def finish(self, rows: Sequence[dict[str, Any]]) -> None:
        """Measures the rows that are reported, accuracy on the test data included, and gathers what to mind."""
        self.measure(rows, accuracy_data=(self.data.x_test, self.data.y_test))
        self.warnings += outcome.warnings_of([row for row in rows if row["status"] != "failed"], self.data)

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
                tuple(self.stages.values()),
                data=self.data_code,
                seed=self.seed,
                loss=self.loss,
                epochs=self.settings.epochs,
                learning_rate=self.settings.learning_rate,
                batch_size=self.settings.batch_size,
                calibration_samples=self.settings.calibration_samples,
                augment=self.settings.augment,
            ),
        }
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", NoEffectWarning)
                model = self.model(candidate.stage)
                self.tell(f"{candidate.name}: converting and checking")
                with tempfile.TemporaryFile() as log, quiet_stderr(log):  # The interpreter announces its delegates.
                    row |= self._file(candidate, model)
        except Exception as error:
            if candidate == table.BASELINE:
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            self.warnings.append(f"{candidate.name} could not be made. {reason}")
            return row | {"status": "failed", "reason": reason, "best": False}
        own = []
        for warning in caught:
            if issubclass(warning.category, NoEffectWarning):
                own.append(str(warning.message))
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        row["warnings"] = list(dict.fromkeys(own + row["warnings"]))
        row["seconds"] = time.perf_counter() - started
        self.space.save_record(candidate.name, row)
        return row

    def _file(self, candidate: table.Candidate, model: keras.Model) -> dict[str, Any]:
        path = self.space.candidate(candidate.name)
        options: dict[str, Any] = {}
        if candidate.quantization == "int8":
            options = {
                "calibration": self.data.x_train,
                "calibration_samples": self.settings.calibration_samples,
                "seed": self.seed,
            }
        export.convert(model, path, quantization=candidate.quantization, force=True, **options)
        packed = export.pack(path, path.with_suffix(SUFFIX), force=True)
        if export.unpack_bytes(packed.path.read_bytes()) != path.read_bytes():
            raise RuntimeError("unpacking did not give the packed file back")
        kernels = ("xnnpack", "reference") if candidate.quantization == "int8-qat" else ("xnnpack",)
        parity = export.verify(model, path, self.data.x_validation[:PARITY_SAMPLES], kernels=kernels)
        weights = file_weights(path, model)
        right = runner.correct(runner.Runner(path), self.data.x_validation, self.data.y_validation)
        agrees = parity.ok(**PARITY[candidate.quantization])
        complaint = f"differs from its Keras model by up to {parity.max_abs_error:.3g}" + (
            f" ({parity.max_error_steps:.2f} steps)" if parity.max_error_steps is not None else ""
        )
        return {
            "path": path.relative_to(self.space.folder).as_posix(),
            "sha256": workspace.sha256_of(path),
            "packed_bytes": packed.size_bytes,
            "validation_accuracy": float(np.mean(right)),
            "validation_right": {"count": right.size, "bits": np.packbits(right).tobytes().hex()},
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
            if loaded is None and name == table.BASELINE.stage:
                # The recipes begin with this file. Keras names the input of a sequential model anew on loading it.
                self._models[name] = self.space.load_model(name) or self._models[name]
        return self._models[name]

    def _train(self, name: str) -> keras.Model:
        settings = self.settings
        if name == table.BASELINE.stage:
            if self.untrained:
                fit = self._fit(f"{self.given.name}: training", settings.train_epochs, settings.train_learning_rate)
                started = time.perf_counter()
                fit(self.given)
                self.epoch_seconds = (time.perf_counter() - started) / settings.train_epochs
            return self.given
        stage = self.stages[name]
        parent = self.model(stage.parent)
        rate = stage.learning_rate * settings.learning_rate
        fit = self._fit(f"{name}: training", stage.epochs_of(settings.epochs), rate)
        return stage.compressor(parent).apply(parent, fit)

    def _fit(self, text: str, epochs: int, learning_rate: float) -> FineTuning:
        self.tell(text)
        return FineTuning(
            self.data,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=self.settings.batch_size,
            loss=self.loss,
            seed=self.seed,
            augment=self.settings.augment,
            on_epoch=lambda done: self._advance(1, f"{text}, epoch {done} of {epochs}"),
        )

    def tell(self, text: str) -> None:
        """Says what is being done, and about how long it will go on."""
        if self._done > 0 and self._total > self._done:
            left = (time.perf_counter() - self._started) * (self._total - self._done) / self._done
            text += f", about {_duration(left)} left"
        self._progress(self._done, self._total, text)

    def _advance(self, units: float, text: str) -> None:
        self._done = min(self._done + units, self._total)
        self.tell(text)


def _duration(seconds: float) -> str:
    """Writes a time, roughly.

    >>> _duration(42), _duration(600), _duration(7300)
    ('42 s', '10 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; None stands for it."""
    return value if value is not None and math.isfinite(value) else None
