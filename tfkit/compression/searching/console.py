"""A search as the terminal shows it: a progress bar while it runs, a table when it is done."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tfkit.compression import report
from tfkit.compression.search import Progress as Callback
from tfkit.compression.search import SearchResult
from tfkit.compression.searching import workspace


def quiet() -> None:
    """Keeps TensorFlow's own notices off the terminal; call it before anything is trained."""
    import logging

    logging.getLogger("tensorflow").setLevel(logging.ERROR)


@contextlib.contextmanager
def showing_progress() -> Iterator[Callback]:
    """Gives the `progress` for a search: a bar on standard error; where that is no terminal, a line for each step."""
    if not sys.stderr.isatty():
        yield _lines(Console(stderr=True, highlight=False, soft_wrap=True))
        return
    columns = [
        BarColumn(28),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    ]
    # A descriptor of its own: the converter's noise is kept off the usual one while the bar goes on.
    with (
        os.fdopen(os.dup(sys.stderr.fileno()), "w") as file,
        Progress(*columns, console=Console(file=file, highlight=False), transient=True) as bar,
    ):
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(task, completed=done, total=total, description=escape(text))


def _lines(console: Console) -> Callback:
    started, last = time.perf_counter(), ""

    def tell(done: float, total: float, text: str) -> None:
        nonlocal last
        step = text.partition(",")[0]
        if step != last and ":" in step:
            console.print(f"{time.perf_counter() - started:6.0f} s  {100 * done / total:3.0f} %  {step}", markup=False)
        last = step

    return tell


def table(results: Mapping[str, Any]) -> Table:
    """Returns the candidates of a search, a row each."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # 80 columns hold it
    for column in ("", "candidate", "valid.", "test", "packed", "smaller", "p50 ms", "/ f32", "zeros"):
        made.add_column(column, justify="left" if column in ("", "candidate") else "right", no_wrap=True)
    for row in results["candidates"]:
        if row["status"] == "failed":
            made.add_row("✗", row["name"], "failed", style="red")
            continue
        mark = "★" if row["best"] else {"rejected": "✗", "baseline": "·"}.get(row["status"], "✓")
        made.add_row(
            mark,
            row["name"],
            report.percent(row["validation_accuracy"]),
            report.percent(row["test_accuracy"]),
            report.size(row["packed_bytes"]),
            report.times(row["packed_ratio"]),
            f"{row['p50_ms']:.3f}",
            f"{row['latency_ratio']:.2f}",
            f"{row['sparsity']:.0%}",
            style="bold green" if row["best"] else ("dim" if row["status"] == "rejected" else ""),
        )
    return made


def show(result: SearchResult) -> None:
    """Prints the table, the warnings, the outcome and where the files are."""
    console = Console(highlight=False)
    console.print(table(result.results))
    console.print(
        f"\n★ best by {result.results['objective']}, ✓ at most {100 * result.results['max_drop']:g} points below "
        "float32 in validation accuracy, ✗ further below; test accuracy decides nothing",
        style="dim",
    )
    for warning in result.results["warnings"]:
        console.print(f"Mind: {warning}", style="yellow", markup=False)
    console.print(f"\n{result.results['headline']}", style="bold", markup=False)
    for name, what in (
        (workspace.BEST, "the best file"),
        (workspace.BEST_PACKED, "the same, packed"),
        (workspace.REPORT, "look at this"),
        (workspace.RESULTS, "everything, for programs"),
        (workspace.CANDIDATES + os.sep, "every file"),
    ):
        console.print(f"  {os.path.join(result.out, name)}  [dim]{what}[/dim]", soft_wrap=True)
