"""The main job: compress a classifier in every way of the table, measure the files, keep the best within a budget.

The files are judged on validation data by the accuracy of the `.tflite` file itself. Test accuracy is reported, and
decides nothing.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from tfkit import models
from tfkit.compression import report
from tfkit.compression.searching import candidates as table
from tfkit.compression.searching import outcome, workspace
from tfkit.compression.searching.finetuning import check_fits
from tfkit.compression.searching.judging import Objective
from tfkit.compression.searching.making import Maker, Progress, Settings
from tfkit.data import Dataset, load
from tfkit.export.pack import SUFFIX
from tfkit.internal import checks

__all__ = ["Progress", "SearchResult", "Settings", "compress"]


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
    validation: float = 0.1,
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
        candidates: names of `tfkit.compression.searching.candidates.CANDIDATES`; all by default, the baseline always.
        settings: training, calibration and timing; see `Settings`.
        seed: of training, and of the split of `data` if it is given by name.
        validation: fraction of the training examples to judge by, if `data` is given by name.
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
    data_code = "...  # the Dataset that was given"
    if not isinstance(data, Dataset):
        data_code = f"data.load({os.fspath(data)!r}, validation={validation!r}, seed={seed})"
        data = load(data, validation=validation, seed=seed)
    if not len(data.x_validation):
        raise ValueError(
            f"Argument `data` must have a validation part, to judge by. Received: '{data.name}' without one. Load it "
            "with validation=0.1."
        )
    given = _Given.of(model, data, seed)
    loss = check_fits(given.model, data)
    configuration = {
        "model": given.fingerprint,
        "data": workspace.hash_of_data(data),
        "seed": checks.integer("seed", seed, 0),
        "settings": dataclasses.asdict(settings),
        "versions": outcome.versions(),
    }
    space = workspace.Workspace(out, configuration, force=force, resume=resume)
    tell = progress if progress is not None else lambda *_: None
    maker = Maker(space, given.model, data, data_code, settings, seed, loss, chosen, tell, given.untrained)
    started = time.perf_counter()
    rows = maker.run()
    best = outcome.judge_rows(rows, max_drop, objective)
    results = outcome.assemble(
        rows,
        model=maker.model(table.BASELINE.stage),
        data=data,
        run={
            "max_drop": max_drop,
            "objective": objective,
            "seed": seed,
            "settings": dataclasses.asdict(settings),
            "warnings": maker.warnings,
            "resumed": space.resumed,
            "seconds": time.perf_counter() - started,
        },
        described={"name": given.name, "output": loss},
        machine=maker.machine,
    )
    chosen_file = space.candidate(best)
    workspace.copy(chosen_file, space.folder / workspace.BEST)
    workspace.copy(chosen_file.with_suffix(SUFFIX), space.folder / workspace.BEST_PACKED)
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
            return cls(model, model.name, workspace.hash_of_model(model), False)
        text = os.fspath(model)
        if text in models.names():
            made = models.get(text)(input_shape=data.input_shape, classes=data.num_classes, seed=seed)
            return cls(made, text, f"tfkit.models.{text}", True)
        if not text.endswith(".keras") or not Path(text).is_file():
            raise ValueError(
                f"Argument `model` must be a Keras model, the path of a .keras file, or one of "
                f"{', '.join(models.names())}. Received: {checks.describe(text)}."
            )
        loaded = keras.saving.load_model(text, compile=False)
        return cls(loaded, Path(text).stem, workspace.hash_of_model(loaded), False)
