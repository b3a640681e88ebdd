"""What the commands share: options, exit codes, and how results are printed."""

from __future__ import annotations

import dataclasses
import json as json_format
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

BELOW_WHAT_WAS_ASKED = 1
BAD_INPUT = 2
OWN_FAULT = 3
INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Where to write; by default beside the input.")]

# Printing. rich is imported where it is needed: it takes longer than everything else here.


def new_table(*columns: str, right: tuple[int, ...] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in right else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    from rich.console import Console

    Console().print(table)


def show(result: Any, json: bool) -> None:
    """Prints a result record: its fields as JSON, or a line each."""
    fields = plain(result)
    if json:
        print_json(fields)
        return
    table = new_table("", "")
    for key, value in fields.items():
        if not isinstance(value, (dict, list)):
            shown = size(value) if key.endswith("_bytes") and isinstance(value, int) else value
            table.add_row(key.replace("_", " "), f"{shown:.4g}" if isinstance(shown, float) else str(shown))
    print_table(table)


def plain(value: Any) -> Any:
    """Turns records, paths and numpy scalars into what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {key: plain(item) for key, item in value._asdict().items()}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def print_json(value: Any) -> None:
    json_format.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")


def size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return ""
    value = float(size_bytes)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
