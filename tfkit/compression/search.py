"""The main job: compress a classifier in many ways, measure the files, keep the best within an accuracy budget.

`compress` makes the files of a fixed table; `search` looks for chains of methods that suit the model. Both judge a file
on validation data by the accuracy of the `.tflite` file itself. Test accuracy is reported, and decides nothing.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras

from tfkit import models
from tfkit.compression import report
from tfkit.compression.searching import candidates as table
from tfkit.compression.searching import halving, outcome, sensitivity, trials, workspace
from tfkit.compression.searching.finetuning import Augmentation, FineTuning, check_fits
from tfkit.compression.searching.judging import ROUNDING, Objective, pareto
from tfkit.compression.searching.making import Maker, Progress, Settings
from tfkit.compression.searching.trials import Step, Trial
from tfkit.data import Dataset, load
from tfkit.export.pack import SUFFIX
from tfkit.internal import checks

__all__ = ["Augmentation", "Progress", "SearchResult", "Settings", "Step", "Trial", "compress", "search"]

#: Seconds it takes to convert, check and pack a file, and to time one, about: what a time budget is planned with until
#: they are known.
FILE_SECONDS, TIMING_SECONDS = 5.0, 4.0
#: An epoch under a compression method over one of the plain model, about.
METHOD_COST = 1.4
#: A trial of the last rung that misses the budget by less than another is trained again, so many times longer.
NEAR_MISS_EPOCHS = 2.0
#: A rung's trials that lose more than this many budgets (at least 5 points) go on only if there is nothing else.
HOPELESS_DROPS, HOPELESS_POINTS = 5.0, 0.05


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
    def front(self) -> list[dict[str, Any]]:
        """The rows of the Pareto front, smallest (or fastest) first: within the accuracy budget, none beats another."""
        key, cost = f"pareto_{self.results['objective']}", _cost_key(self.results["objective"])
        return sorted((row for row in self.results["candidates"] if row.get(key)), key=lambda row: row[cost])

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
    chosen = table.select(candidates)
    job = _Job.of(model, data, out, max_drop, objective, settings, seed, validation, force, resume, progress, {})
    job.maker.expect(chosen, table.STAGES)
    job.maker.start()
    return job.conclude(job.maker.rows_of(chosen), {})


def search(
    model: keras.Model | str | os.PathLike[str],
    data: Dataset | str,
    max_drop: float = 0.01,
    objective: Objective = "size",
    time_budget: float | None = None,
    *,
    out: str | os.PathLike[str] = "search_output",
    formats: Sequence[str] | None = None,
    chains: Sequence[Trial] | None = None,
    first: int = 12,
    rungs: int = 2,
    reduction: float = 3.0,
    settings: Settings | None = None,
    seed: int = 0,
    validation: float = 0.1,
    force: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> SearchResult:
    """Searches for chains of compression methods: the smallest (or fastest) files within an accuracy budget.

    The chains are structured pruning, low rank, pruning, clustering and quantization, any of them left out. How much
    each layer minds is measured first; zeros and bits are shared out by that, and it says which chains get a first
    look. They are trained briefly; those that spread along the Pareto front of validation accuracy and packed bytes (or
    latency) train again for longer, and so on (successive halving). Those that then just miss the budget get a last,
    still longer training. Each is a file from the start, and is judged by it.

    A run repeats bit for bit, except where `time_budget` or measured latencies decide.

    Args:
        model: as for `compress`.
        data: a data set, or what `tfkit.data.load` takes.
        max_drop: how far a file's validation accuracy may lie below that of the float32 file, as a fraction.
        objective: `"size"` looks for few packed bytes, `"latency"` for a short latency.
        time_budget: seconds to spend in all, earlier parts of an interrupted run included. First there are fewer
            trials, then shorter ones; no training starts that would end too late. None: no limit.
        out: the folder to write.
        formats: of the files that are looked for, as `tfkit.export.convert` names them: `["int8-qat"]` where only
            integer kernels are fast. All by default.
        chains: what to try; by default `tfkit.compression.searching.trials.space`.
        first: how many of them get a first look.
        rungs: how often trials are trained and compared; the last time with the whole `settings.epochs`.
        reduction: each rung but the first has this many times fewer trials and more epochs than the one before.
        settings: training, calibration and timing; see `Settings`.
        seed: of training, and of the split of `data` if it is given by name.
        validation: fraction of the training examples to judge by, if `data` is given by name.
        force: replace the results of an earlier run.
        resume: go on with an interrupted run of the same arguments.
        progress: called as the work goes on; see `Progress`.

    Returns:
        The folder and the results; `.front` is the Pareto front, `.best` its best file.

    Raises:
        ValueError, TypeError: the model cannot be rebuilt or does not fit the data, or an argument breaks its rule.
        FileExistsError: the folder holds something else and `force` is False.
    """
    given = None if chains is None else trials.check(chains)
    for name in formats or ():
        checks.choice("formats", name, trials.ENDINGS)
    first, rungs = checks.integer("first", first, 1), checks.integer("rungs", rungs, 1)
    reduction = checks.number("reduction", reduction, 1)
    if time_budget is not None:
        time_budget = checks.number("time_budget", time_budget, 1)
    asked = {
        "time_budget_s": time_budget,
        "first": first,
        "rungs": rungs,
        "reduction": reduction,
        "formats": None if formats is None else list(formats),
        "chains": None if given is None else [repr(trial) for trial in given],
    }
    extra = {"search": asked | {"max_drop": max_drop, "objective": objective}}
    job = _Job.of(model, data, out, max_drop, objective, settings, seed, validation, force, resume, progress, extra)
    clock = _Clock(job.space, time_budget)
    found = _Halving(job, clock, given, formats, first, rungs, reduction).run()
    return job.conclude(found.rows, {"search": asked | found.told})


class _Job(NamedTuple):
    """What `compress` and `search` have in common: a model, data, a folder, and who makes the files in it."""

    maker: Maker
    space: workspace.Workspace
    data: Dataset
    max_drop: float
    objective: Objective
    seed: int
    described: dict[str, Any]
    started: float

    @classmethod
    def of(
        cls,
        model: Any,
        data: Dataset | str,
        out: str | os.PathLike[str],
        max_drop: float,
        objective: Objective,
        settings: Settings | None,
        seed: int,
        validation: float,
        force: bool,
        resume: bool,
        progress: Progress | None,
        extra: Mapping[str, Any],
    ) -> _Job:
        max_drop = checks.number("max_drop", max_drop, 0, 1)
        checks.choice("objective", objective, ("size", "latency"))
        settings = settings if settings is not None else Settings()
        data_code = "...  # the Dataset that was given"
        if not isinstance(data, Dataset):
            data_code = f"data.load({os.fspath(data)!r}, validation={validation!r}, seed={seed})"
            data = load(data, validation=validation, seed=seed)
        if not len(data.x_validation):
            raise ValueError(
                f"Argument `data` must have a validation part, to judge by. Received: '{data.name}' without one. Load "
                "it with validation=0.1."
            )
        given = _Given.of(model, data, seed)
        loss = check_fits(given.model, data)
        configuration = {
            "model": given.fingerprint,
            "data": workspace.hash_of_data(data),
            "seed": checks.integer("seed", seed, 0),
            "settings": settings.to_dict(),
            "versions": outcome.versions(),
            **extra,
        }
        started = time.perf_counter()
        space = workspace.Workspace(out, configuration, force=force, resume=resume)
        tell = progress if progress is not None else lambda *_: None
        maker = Maker(space, given.model, data, data_code, settings, seed, loss, tell, given.untrained)
        described = {"name": given.name, "output": loss}
        return cls(maker, space, data, max_drop, objective, seed, described, started)

    def conclude(self, rows: list[dict[str, Any]], told: Mapping[str, Any]) -> SearchResult:
        """Measures the files, judges them, and writes the results and the report."""
        maker = self.maker
        maker.finish(rows)
        best = outcome.judge_rows(rows, self.max_drop, self.objective)
        chosen = next(row for row in rows if row["name"] == best)
        maker.warnings += outcome.doubt(chosen, self.max_drop, len(self.data.y_validation))
        results = outcome.assemble(
            rows,
            model=maker.model(table.BASELINE.stage),
            data=self.data,
            run={
                "max_drop": self.max_drop,
                "objective": self.objective,
                "seed": self.seed,
                "settings": maker.settings.to_dict(),
                "warnings": maker.warnings,
                "resumed": self.space.resumed,
                "seconds": time.perf_counter() - self.started,
                **told,
            },
            described=self.described,
            machine=maker.machine,
        )
        chosen_file = self.space.candidate(best)
        workspace.copy(chosen_file, self.space.folder / workspace.BEST)
        workspace.copy(chosen_file.with_suffix(SUFFIX), self.space.folder / workspace.BEST_PACKED)
        report.write_html(results, self.space.folder / workspace.REPORT)
        workspace.write_json(self.space.folder / workspace.RESULTS, results)
        return SearchResult(self.space.folder, results)


class _Found(NamedTuple):
    """The rows to report, the baseline first, and how they were come by."""

    rows: list[dict[str, Any]]
    told: dict[str, Any]


class _Plan(NamedTuple):
    """What the time allows: the trials of the first rung, and the share of `settings.epochs` that is full training."""

    names: list[str]
    scale: float


class _Clock:
    """Counts the seconds that a search has taken, earlier parts of an interrupted one included."""

    def __init__(self, space: workspace.Workspace, budget: float | None) -> None:
        self.space, self.budget = space, budget
        self.earlier = float((space.note("clock") or {}).get("seconds", 0.0))
        self.started = time.perf_counter()

    def used(self) -> float:
        seconds = self.earlier + time.perf_counter() - self.started
        self.space.save_note("clock", {"seconds": seconds})
        return seconds

    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - self.used()


class _Halving:
    """One run of successive halving."""

    def __init__(
        self,
        job: _Job,
        clock: _Clock,
        given: tuple[Trial, ...] | None,
        formats: Sequence[str] | None,
        first: int,
        rungs: int,
        reduction: float,
    ) -> None:
        self.job, self.clock, self.given, self.formats = job, clock, given, formats
        self.first, self.rungs, self.reduction = first, rungs, reduction
        self.maker, self.space = job.maker, job.space
        #: Seconds that a unit of work has taken, an epoch about.
        self.epoch_seconds = 0.0
        self.told: list[dict[str, Any]] = []
        self.rows: dict[str, dict[str, Any]] = {}

    def run(self) -> _Found:
        maker = self.maker
        formats = [Trial((), quantization).candidate() for quantization in trials.FORMATS]
        free = [table.BASELINE, *formats]
        maker.expect(free, ())
        maker.start()
        model = maker.model(table.BASELINE.stage)
        minded = self._sensitivity(model)
        known = self.given if self.given is not None else tuple(trials.space(model, minded, self.formats))
        by_name = {trial.name: trial for trial in known}
        fixed = maker.rows_of(free)
        base = fixed[0]
        predict = trials.Predictor(model, minded)
        plan = self._plan(
            min(self.first, len(known)),
            lambda count: trials.first_rung(known, count, predict, self.job.objective),
        )
        going = [by_name[name] for name in plan.names]
        counts = halving.sizes(len(going), self.rungs, self.reduction)
        last: list[dict[str, Any]] = []
        for rung, share in enumerate(halving.shares(self.rungs, self.reduction)):
            suffix = "" if rung == self.rungs - 1 else f"_r{rung}"
            made, complete = self._rung(going, share * plan.scale, suffix, later=self._later(rung, counts))
            done = [row for row in made if row["status"] != "failed"]
            self.rows |= {row["name"]: row for row in done}
            last = made or last
            keep = counts[rung + 1] if rung + 1 < self.rungs else 0
            chosen = self._promote(rung, base, done, keep) if keep else []
            going = [trial for trial in going if trial.name + suffix in chosen]
            self.told.append(_told(rung, share * plan.scale, made, chosen))
            if not complete:
                self._say_cut_short(rung, len(made), counts[rung])
                break
        else:
            last += self._longer([by_name[name] for name in self._near_misses(base, last)], plan.scale)
        return _Found(
            fixed + self._finalists(base, last),
            {
                "considered": len(known),
                "full_epochs": plan.scale * maker.settings.epochs,
                "seconds_in_all": self.clock.used(),
                "rungs_made": self.told,
                "sensitivity": [row._asdict() for row in minded.layers],
            },
        )

    def _sensitivity(self, model: keras.Model) -> sensitivity.Sensitivity:
        noted = self.space.note("sensitivity")
        if noted is not None:
            layers = tuple(sensitivity.LayerSensitivity(**row) for row in noted["layers"])
            return sensitivity.Sensitivity(noted["samples"], layers)
        data = self.job.data
        self.maker.tell("measuring how much each layer minds")
        minded = sensitivity.measure(model, data.x_validation, output=self.maker.loss)
        self.space.save_note(
            "sensitivity",
            {"samples": minded.samples, "layers": [row._asdict() for row in minded.layers]},
        )
        return minded

    def _plan(self, count: int, choose: Callable[[int], tuple[Trial, ...]]) -> _Plan:
        """Fits the trials into the time that is left: fewer first, then shorter."""
        noted = self.space.note("plan")
        if noted is not None:
            self.epoch_seconds = noted["epoch_seconds"]
            return _Plan(noted["trials"], noted["scale"])
        scale = 1.0
        if self.clock.budget is not None:
            self.epoch_seconds = METHOD_COST * (self.maker.epoch_seconds or self._time_an_epoch())
            left = self.clock.left()
            least = max(1, min(count, math.ceil(self.reduction)))
            while count > least and self._seconds(choose(count), scale) > left:
                count -= 1
            while scale > 1 / self.maker.settings.epochs and self._seconds(choose(count), scale) > left:
                scale *= 0.8
        names = [trial.name for trial in choose(count)]
        self.space.save_note("plan", {"trials": names, "scale": scale, "epoch_seconds": self.epoch_seconds})
        return _Plan(names, scale)

    def _time_an_epoch(self) -> float:
        data, maker = self.job.data, self.maker
        part = data.subset(train=min(len(data.x_train), 8 * maker.settings.batch_size))
        fit = FineTuning(part, epochs=1, batch_size=maker.settings.batch_size, loss=maker.loss,
                         augment=maker.settings.augment)  # fmt: skip
        copy = keras.models.clone_model(maker.model(table.BASELINE.stage))
        fit(copy)  # Tracing is paid for once.
        started = time.perf_counter()
        fit(copy)
        return (time.perf_counter() - started) * len(data.x_train) / len(part.x_train)

    def _seconds(self, ordered: Sequence[Trial], scale: float) -> float:
        """Predicts how long these trials take through all the rungs, and their files."""
        counts = halving.sizes(len(ordered), self.rungs, self.reduction)
        total = TIMING_SECONDS * (1 + len(trials.FORMATS) + counts[-1])
        for share, count in zip(halving.shares(self.rungs, self.reduction), counts, strict=True):
            stages = {stage.name: stage for trial in ordered for stage in trial.stages(share * scale)}
            epochs = sum(stage.epochs_of(self.maker.settings.epochs) for stage in stages.values())
            total += count / len(ordered) * epochs * self.epoch_seconds + FILE_SECONDS * count
        return total

    def _later(self, rung: int, counts: Sequence[int]) -> float:
        """Returns about how much work comes after a rung, in epochs: each has as much as the one before, at most."""
        later = zip(halving.shares(self.rungs, self.reduction)[rung + 1 :], counts[rung + 1 :], strict=True)
        return sum(count * (share * self.maker.settings.epochs + 2) for share, count in later)

    def _rung(
        self, going: Sequence[Trial], share: float, suffix: str, *, later: float
    ) -> tuple[list[dict[str, Any]], bool]:
        """Makes the files of one rung, until the time runs out; says whether it did not."""
        maker = self.maker
        stages = {stage.name: stage for trial in going for stage in trial.stages(share, suffix)}
        maker.expect([trial.candidate(suffix) for trial in going], tuple(stages.values()), later=later)
        made: list[dict[str, Any]] = []
        for trial in going:
            candidate = trial.candidate(suffix)
            if self.space.record(candidate.name) is None and self.clock.budget is not None:
                units = maker.units([candidate], tuple(maker.stages.values())) - 2
                timing = TIMING_SECONDS * (len(trials.FORMATS) + 2 + len(made))
                if units * self.epoch_seconds + FILE_SECONDS + timing > self.clock.left():
                    return made, False
            started, units = time.perf_counter(), maker.units([candidate], tuple(maker.stages.values())) - 2
            made += maker.rows_of([candidate])
            self.clock.used()
            if units > 0 and self.clock.budget is not None:
                took = (time.perf_counter() - started - FILE_SECONDS) / units
                self.epoch_seconds = max(self.epoch_seconds, took)
        return made, True

    def _promote(self, rung: int, base: dict[str, Any], done: list[dict[str, Any]], count: int) -> list[str]:
        noted = self.space.note(f"rung{rung}")
        if noted is not None:
            return list(noted)
        cost = _cost_key(self.job.objective)
        if self.job.objective == "latency" and done:
            self.maker.measure([base, *done], runs=20, min_seconds=0.2)
        points = [halving.Point(row["name"], row["validation_accuracy"], row[cost]) for row in done]
        floor = base["validation_accuracy"] - max(HOPELESS_DROPS * self.job.max_drop, HOPELESS_POINTS)
        chosen = halving.promote(points, count, floor=floor)
        self.space.save_note(f"rung{rung}", chosen)
        return chosen

    def _near_misses(self, base: dict[str, Any], last: Sequence[dict[str, Any]]) -> list[str]:
        """Returns the trials of the last rung that miss the budget by less than another, and would beat what is in."""
        noted = self.space.note("near_misses")
        if noted is not None:
            return list(noted)
        cost, floor = _cost_key(self.job.objective), base["validation_accuracy"] - self.job.max_drop - ROUNDING
        done = [row for row in last if row["status"] != "failed"]
        if self.job.objective == "latency" and done:
            self.maker.measure([base, *done], runs=20, min_seconds=0.2)
        within = [row[cost] for row in self.rows.values() if row["validation_accuracy"] >= floor and cost in row]
        names = [
            row["name"] for row in done
            if floor - self.job.max_drop <= row["validation_accuracy"] < floor
            and row[cost] < min(within, default=math.inf)
        ]  # fmt: skip
        self.space.save_note("near_misses", names)
        return names

    def _longer(self, near: Sequence[Trial], scale: float) -> list[dict[str, Any]]:
        """Trains near misses anew, for longer."""
        if not near:
            return []
        made, _ = self._rung(near, NEAR_MISS_EPOCHS * scale, "_longer", later=0.0)
        self.rows |= {row["name"]: row for row in made if row["status"] != "failed"}
        self.told.append(_told(self.rungs, NEAR_MISS_EPOCHS * scale, made, []))
        return made

    def _finalists(self, base: dict[str, Any], last: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns the last rung, and what earlier rungs have on the Pareto front within the accuracy budget."""
        floor = base["validation_accuracy"] - self.job.max_drop
        good = [row for row in self.rows.values() if row["validation_accuracy"] >= floor]
        front = pareto([(row["name"], row["validation_accuracy"], row["packed_bytes"]) for row in good])
        names = {row["name"] for row in last}
        return [*last, *(row for row in good if row["name"] in front and row["name"] not in names)]

    def _say_cut_short(self, rung: int, made: int, wanted: int) -> None:
        self.maker.warnings.append(
            f"The time budget ended the search in round {rung + 1} of {self.rungs}: {made} of its {wanted} trials were "
            "made. Give it more time, fewer trials or fewer epochs."
        )


def _told(rung: int, share: float, made: Sequence[Mapping[str, Any]], chosen: Sequence[str]) -> dict[str, Any]:
    rows = [
        {key: row.get(key) for key in ("name", "summary", "status", "validation_accuracy", "packed_bytes", "sha256")}
        | {"promoted": row["name"] in chosen}
        for row in made
    ]
    return {"rung": rung, "share": share, "trials": rows}


def _cost_key(objective: str) -> str:
    return "packed_bytes" if objective == "size" else "latency_ratio"


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
