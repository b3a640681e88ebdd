"""`tfkit retrieve`: measures indexes on the user's vectors, and picks one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tfkit.commands.common import BELOW_WHAT_WAS_ASKED, Force, Json, new_table, print_json, print_table, size

app = typer.Typer(help="Maximum inner product search: measure indexes on your vectors, and pick one.")

Items = Annotated[Path, typer.Argument(help="A .npy file: items, (items, dimension).")]
Queries = Annotated[Path, typer.Argument(help="A .npy file: queries such as will be asked, (queries, dimension).")]
Neighbours = Annotated[int, typer.Option("--k", min=1, help="Items sought for each query.")]
Seconds = Annotated[float, typer.Option(min=0, help="For all of it, about.")]
Single = Annotated[bool, typer.Option("--single", help="Time queries that come one at a time.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the split of the queries.")]
#: Recalls that `retrieve bench` tells the speed at.
RECALLS = (0.8, 0.9, 0.95, 0.99)


@app.command()
def tune(
    items: Items,
    queries: Queries,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    target_recall: Annotated[float, typer.Option(min=0, max=1, help="Share of the true best to find.")] = 0.95,
    k: Neighbours = 10,
    seconds: Seconds = 120,
    single: Single = False,
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Pick the fastest index and effort for these vectors; write the index, what was measured, and a plot."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is not a folder; name another with --out")
    if not force and (there := [name for name in ("best.index", "tuning.json", "tuning.png") if (out / name).exists()]):
        raise FileExistsError(f"{out / there[0]} exists; pass --force to overwrite it")
    found = _tuned(items, queries, target_recall, k, seconds, single, seed)
    out.mkdir(parents=True, exist_ok=True)
    found.index.save(out / "best.index", force=True)
    found.save(out / "tuning.json", force=True)
    found.plot(out / "tuning.png", force=True)
    if json:
        print_json(found.to_dict())
    else:
        table = new_table("", "")
        effort = ", ".join(f"{name}={value}" for name, value in found.effort.items())
        table.add_row("index", repr(found.index))
        table.add_row("search", effort or "without an effort to choose")
        table.add_row(f"recall@{k}", f"{found.recall:.4f} over queries that took no part in the choice")
        table.add_row("queries a second", f"{1e6 / found.best.query_us:,.0f} on one thread")
        table.add_row("written", ", ".join(str(out / name) for name in ("best.index", "tuning.json", "tuning.png")))
        print_table(table)
    if found.recall < target_recall:
        typer.echo(f"tfkit: recall {found.recall:.4f} is below the {target_recall:g} asked for.", err=True)
        raise typer.Exit(BELOW_WHAT_WAS_ASKED)


@app.command(name="bench")
def bench_retrieval(
    items: Items,
    queries: Queries,
    k: Neighbours = 10,
    seconds: Seconds = 300,
    single: Single = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Queries a second of each index at several recalls, on these vectors and one thread."""
    found = _tuned(items, queries, RECALLS[-1], k, seconds, single, seed)
    if json:
        print_json(found.to_dict())
        return
    columns = ("index", "build s", "memory", *(f"{level:g}" for level in RECALLS))
    table = new_table(*columns, right=tuple(range(1, len(columns))))
    for name in dict.fromkeys(point.name for point in found.points):
        curve = [point for point in found.points if point.name == name]
        speeds = [max((1e6 / p.query_us for p in curve if p.recall >= level), default=None) for level in RECALLS]
        shown = ("-" if speed is None else f"{speed:,.0f}" for speed in speeds)
        table.add_row(name, f"{curve[0].build_s:.1f}", size(curve[0].memory_bytes), *shown)
    typer.echo(f"Queries a second on one thread, at least at this recall@{k}:")
    print_table(table)
    for name, why in found.skipped.items():
        typer.echo(f"{name}: not measured, {why}. Give it more --seconds.", err=True)


def _tuned(items: Path, queries: Path, target: float, k: int, seconds: float, single: bool, seed: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tfkit.retrieval import autotune

    read = _vectors(items), _vectors(queries)
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        return autotune(
            *read, target, k=k, seconds=seconds, single=single, seed=seed,
            progress=lambda done, total, text: bar.update(task, completed=done, total=total, description=text),
        )  # fmt: skip


def _vectors(path: Path) -> Any:
    import zipfile

    import numpy as np

    try:
        read = np.load(path, allow_pickle=False)
    except MemoryError:
        raise ValueError(f"{path} holds, or says that it holds, more numbers than there is memory for.") from None
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a .npy file of numbers: {error}") from None
    if not isinstance(read, np.ndarray):
        raise ValueError(f"{path} holds several arrays. Save each with numpy.save.")
    return read
