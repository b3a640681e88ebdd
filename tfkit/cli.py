"""The `tfkit` command: thin over the library, and quick to answer, since TensorFlow is imported only inside a command.

Exit codes: 0, done; 1, done, but a result is below what was asked for; 2, bad input; 3, a fault of tfkit's own; 130,
interrupted. With `--json`, standard output carries one JSON document and nothing else.
"""

from __future__ import annotations

import enum
import importlib
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import tfkit
from tfkit.commands import launch, recommend, retrieve
from tfkit.commands.attack import attack
from tfkit.commands.certify import certify
from tfkit.commands.common import (
    BAD_INPUT,
    BELOW_WHAT_WAS_ASKED,
    INTERRUPTED,
    OWN_FAULT,
    Force,
    Json,
    Out,
    new_table,
    plain,
    print_json,
    print_table,
    show,
    size,
)

if TYPE_CHECKING:
    from rich.table import Table

    from tfkit.export.measure import Measurement


class Objective(enum.StrEnum):
    """What `compress` makes small."""

    size = "size"
    latency = "latency"


app = typer.Typer(
    name="tfkit",
    help="Make Keras models small and fast, put them on phones, and measure the exported file.",
    epilog="Exit codes: 0 done, 1 a result is below what was asked for, 2 bad input.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(recommend.app, name="recommend", no_args_is_help=True)
app.add_typer(retrieve.app, name="retrieve", no_args_is_help=True)
app.command(name="launch", context_settings=launch.PASSES_ON)(launch.launch)
app.command()(certify)
app.command()(attack)


def main() -> NoReturn:
    """Runs the command; an error is one message on standard error."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted.", INTERRUPTED)
    except Exception as error:
        if os.environ.get("TFKIT_TRACEBACK", "") not in ("", "0"):
            raise
        own = type(error).__module__.partition(".")[0] == "tfkit"  # e.g. a MeasureError
        expected = own or isinstance(error, (ValueError, TypeError, OSError, ImportError))
        if expected:
            _fail(_one_line(error), BAD_INPUT)
        _fail(f"{type(error).__name__}: {_one_line(error)} (tfkit --traceback ... shows where)", OWN_FAULT)
    raise SystemExit(0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"tfkit: {message}", err=True)
    raise SystemExit(code)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"tfkit {tfkit.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", envvar="TFKIT_TRACEBACK", help="Show where an error came from.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if traceback:
        os.environ["TFKIT_TRACEBACK"] = "1"


@app.command()
def data(
    name: Annotated[
        str | None, typer.Argument(help="A name, an .npz file, or module:function. Without it, the list of names.")
    ] = None,
    validation: Annotated[float, typer.Option(help="Fraction of the training examples set aside.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Chooses them.")] = 0,
    json: Json = False,
) -> None:
    """List the data sets and where they are found, or load one and show its shapes and classes."""
    from tfkit import data as sets

    if name is None:
        locations = [sets.describe(known) for known in sets.names()]
        if json:
            print_json([location._asdict() for location in locations])
            return
        table = new_table("name", "found", "size", "place")
        for location in locations:
            table.add_row(location.name, location.kind, size(location.size_bytes), location.place)
        print_table(table)
        return
    loaded = sets.load(name, validation=validation, seed=seed)
    shown: dict[str, Any] = {
        "name": loaded.name,
        "source": loaded.source,
        "train": len(loaded.x_train),
        "validation": len(loaded.x_validation),
        "test": len(loaded.x_test),
        "input_shape": list(loaded.input_shape),
        "dtype": str(loaded.x_train.dtype),
        "range": [loaded.x_train.min().item(), loaded.x_train.max().item()],
        "class_names": list(loaded.class_names),
    }
    if json:
        print_json(shown)
        return
    table = new_table("", "")
    for key, value in shown.items():
        table.add_row(key.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value))
    print_table(table)


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A .keras file, or a name of tfkit.models, which is trained first.")],
    data: Annotated[str, typer.Option("--data", help="A name, an .npz file, or module:function.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    max_drop: Annotated[
        float, typer.Option(min=0, max=1, help="Validation accuracy that may be lost; 0.01 is one point.")
    ] = 0.01,
    objective: Annotated[Objective, typer.Option(help="What the best file has least of.")] = Objective.size,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a pruning; other training takes its share.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a training step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of a pruning, at its first step.")] = 1e-3,
    validation: Annotated[float, typer.Option(help="Fraction of the training examples to judge by.")] = 0.1,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Inputs that the ranges of int8 come from.")] = 300,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the interpreter that is timed.")] = 1,
    candidates: Annotated[
        list[str] | None, typer.Option("--candidate", help="Try only these; may be repeated.", show_default="all")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the data's split and of training.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Compress a classifier in several ways, measure every file, and keep the best within an accuracy budget.

    An interrupted run goes on from its finished candidates: repeat the command.
    """
    settings = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "calibration_samples": calibration_samples,
        "threads": threads,
    }
    options = {"max_drop": max_drop, "objective": objective.value, "validation": validation, "seed": seed}
    _run_search("compress", model, data, out, settings, json, force=force, candidates=candidates, **options)


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A .keras file, or a name of tfkit.models, which is trained first.")],
    data: Annotated[str, typer.Option("--data", help="A name, an .npz file, or module:function.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    max_drop: Annotated[
        float, typer.Option(min=0, max=1, help="Validation accuracy that may be lost; 0.01 is one point.")
    ] = 0.01,
    objective: Annotated[Objective, typer.Option(help="What the best file has least of.")] = Objective.size,
    time_budget: Annotated[
        float | None, typer.Option(min=1, help="Seconds to spend in all; fewer and shorter trials fit it.")
    ] = None,
    first: Annotated[int, typer.Option(min=1, help="Chains of methods that get a first, short training.")] = 12,
    rungs: Annotated[int, typer.Option(min=1, help="Rounds; the best of one train longer in the next.")] = 2,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of a pruning in the last round.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a training step.")] = 64,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of a pruning, at its first step.")] = 1e-3,
    train_epochs: Annotated[int, typer.Option(min=1, help="Epochs of a model given by name.")] = 12,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror every other training image.")] = False,
    shift: Annotated[int, typer.Option(min=0, help="Move training images by up to this many pixels.")] = 0,
    validation: Annotated[float, typer.Option(help="Fraction of the training examples to judge by.")] = 0.1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the interpreter that is timed.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the data's split and of training.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Search for chains of methods (pruning, low rank, clustering, few bits) that make the smallest or fastest file.

    Many chains are trained briefly, the best again for longer; each is a file, and judged by it. An interrupted search
    goes on from its finished files: repeat the command.
    """
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "train_epochs": train_epochs,
        "threads": threads,
    }
    if flip or shift:
        settings["augment"] = {"flip": flip, "shift": shift}
    options = {"max_drop": max_drop, "objective": objective.value, "validation": validation, "seed": seed}
    limits = {"time_budget": time_budget, "first": first, "rungs": rungs}
    _run_search("search", model, data, out, settings, json, force=force, **limits, **options)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")] = Path("demo_output"),
    quick: Annotated[bool, typer.Option("--quick", help="Few candidates and epochs: less than a minute.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the data's split and of training.")] = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """The main job on real digits: train LeNet-5, compress it in every way, and write a report to look at."""
    settings = {"epochs": 2, "train_epochs": 4} if quick else {}
    candidates = ["dynamic_int8", "int8", "pruned_80_dynamic"] if quick else None
    options = {"force": force, "candidates": candidates, "validation": 0.2, "seed": seed}
    _run_search("compress", "lenet5", "mnist5k", out, settings, json, **options)


def _run_search(
    name: str, model: str, data: str, out: Path, settings: dict[str, Any], json: bool, **options: Any
) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Its notices of absent GPUs help nobody here.
    # The package gives the function of this name; the module holds both.
    home = importlib.import_module("tfkit.compression.search")
    from tfkit.compression.searching import console

    console.quiet()
    if "augment" in settings:
        settings["augment"] = home.Augmentation(**settings["augment"])
    try:
        with console.showing_progress() as progress:
            run = getattr(home, name)
            result = run(model, data, out=out, settings=home.Settings(**settings), progress=progress, **options)
    except KeyboardInterrupt:
        typer.echo(f"tfkit: what is finished is kept in {out}; the same command goes on from there.", err=True)
        raise
    if json:
        print_json(result.results)
    else:
        console.show(result)
    if not result.found:
        typer.echo("tfkit: no candidate is within the accuracy budget.", err=True)
        raise typer.Exit(BELOW_WHAT_WAS_ASKED)


@app.command()
def pack(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    out: Out = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Entropy-code a .tflite file without loss; `unpack` gives the identical bytes back."""
    from tfkit.export.pack import pack as run

    result = run(file, out, force=force)
    show(result, json)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="A packed file.")],
    out: Out = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Give the .tflite file back that `pack` was given, checked against its checksum."""
    from tfkit.export.pack import unpack as run

    written = Path(run(file, out, force=force))
    size_bytes = written.stat().st_size
    if json:
        print_json({"path": str(written), "size_bytes": size_bytes})
    else:
        typer.echo(f"{written} ({size(size_bytes)})")


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help=".tflite files; several are measured in interleaved rounds.")],
    data: Annotated[str, typer.Option("--data", help="Run on these inputs; accuracy is over their whole test part.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of the interpreter.")] = 1,
    runs: Annotated[int, typer.Option(min=1, help="At least this many timed runs a file.")] = 50,
    min_seconds: Annotated[float, typer.Option(min=0, help="At least this long a file.")] = 1.0,
    no_xnnpack: Annotated[bool, typer.Option("--no-xnnpack", help="Leave the XNNPACK delegate out.")] = False,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if a file is less accurate than this.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure size, latency, memory and accuracy of .tflite files, in a fresh process without TensorFlow."""
    from tfkit import data as sets
    from tfkit.export.measure import measure

    loaded = sets.load(data)
    measured = measure(
        files,
        loaded.x_test,
        threads=threads,
        xnnpack=not no_xnnpack,
        runs=runs,
        min_seconds=min_seconds,
        accuracy_data=(loaded.x_test, loaded.y_test),
    )
    if json:
        print_json([plain(result) for result in measured])
    else:
        print_table(_bench_table(measured))
    worst = min(result.accuracy for result in measured if result.accuracy is not None)
    if min_accuracy is not None and worst < min_accuracy:
        typer.echo(f"tfkit: accuracy {worst:.4f} is below the {min_accuracy:g} asked for.", err=True)
        raise typer.Exit(BELOW_WHAT_WAS_ASKED)


def _bench_table(measured: list[Measurement]) -> Table:
    columns = ("file", "bytes", "gzip", "packed", "p50 ms", "p90 ms", "p99 ms", "/ first", "peak memory", "accuracy")
    table = new_table(*columns, right=tuple(range(1, len(columns))))
    for result in measured:
        # Round by round, since only times of the same round were taken under the same load.
        rounds = zip(result.round_p50_ms, measured[0].round_p50_ms, strict=True)
        table.add_row(
            Path(result.path).name,
            *(f"{size:,}" for size in (result.size_bytes, result.gzip_bytes, result.packed_bytes)),
            *(f"{latency:.3f}" for latency in (result.p50_ms, result.p90_ms, result.p99_ms)),
            f"{statistics.median(own / first for own, first in rounds):.2f}",
            size(result.peak_memory_bytes),
            "" if result.accuracy is None else f"{result.accuracy:.4f}",
        )
    return table


if __name__ == "__main__":
    main()
