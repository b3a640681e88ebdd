"""`tfkit recommend`: trains a recommender on a table of events, judges it by full rankings, and exports it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from tfkit.commands.common import Force, Json, new_table, print_json, print_table

app = typer.Typer(help="Recommenders: train on a table of events, judge by full rankings, export a serving bundle.")


class Kind(StrEnum):
    """What `train` can make of a table."""

    popularity = "popularity"
    item_knn = "item-knn"
    ease = "ease"
    ials = "ials"
    bpr = "bpr"
    warp = "warp"
    two_tower = "two-tower"
    sasrec = "sasrec"
    gru4rec = "gru4rec"


Events = Annotated[Path, typer.Argument(help="A .csv, .tsv or .parquet file with a header.")]
User = Annotated[str, typer.Option(help="The column of users.")]
Item = Annotated[str, typer.Option(help="The column of items.")]
Time = Annotated[str, typer.Option(help="The column of times; none: the order of the rows.")]
Model = Annotated[Path, typer.Argument(help="A file that `recommend train` wrote.")]


@app.command()
def train(
    events: Events,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    model: Annotated[Kind, typer.Option(help="The method, with its default settings.")] = Kind.ials,
    user: User = "user",
    item: Item = "item",
    time: Time = "",
    force: Force = False,
) -> None:
    """Fit a model to all events and write it."""
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; pass --force to overwrite it")
    made = _make(model).fit(_read(events, user, item, time))
    typer.echo(f"written: {made.save(out, force=force)}", err=True)


@app.command()
def evaluate(
    events: Events,
    model: Annotated[Kind, typer.Option(help="The method, with its default settings.")] = Kind.ials,
    user: User = "user",
    item: Item = "item",
    time: Time = "",
    fraction: Annotated[float, typer.Option(min=0, max=1, help="Of the events, held out at random.")] = 0.25,
    k: Annotated[int, typer.Option("--k", min=1, help="Length of the list.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    json: Json = False,
) -> None:
    """Hold events out, fit to the rest, and rank all items for every user."""
    from tfkit import recommenders

    training, held = recommenders.random_split(_read(events, user, item, time), fraction, seed=seed)
    found = recommenders.evaluate(_make(model).fit(training), training, held, k)
    intervals = {name: found.interval(name) for name in found.per_user}
    if json:
        print_json({"metrics": found.metrics, "intervals": intervals, "users": len(found.users)})
        return
    table = new_table("metric", "value", "95 % interval", right=(1, 2))
    for name, value in found.metrics.items():
        shown = "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else ""
        table.add_row(name, f"{value:.4f}", shown)
    print_table(table)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    force: Force = False,
) -> None:
    """Write the query tower, the index of the items and their numbers as one bundle."""
    from tfkit.recommenders import Recommender, export_bundle

    typer.echo(f"written: {export_bundle(Recommender.load(model), out, force=force)}", err=True)


def _read(path: Path, user: str, item: str, time: str) -> Any:
    from tfkit.recommenders import Interactions

    return Interactions.from_file(path, user=user, item=item, time=time or None, duplicates="last")


def _make(kind: Kind) -> Any:
    from tfkit import recommenders as r

    makers = {
        Kind.popularity: r.Popularity, Kind.item_knn: r.ItemKNN, Kind.ease: r.EASE, Kind.ials: r.IALS, Kind.bpr: r.BPR,
        Kind.warp: r.WARP, Kind.two_tower: r.TwoTower, Kind.sasrec: r.SASRec, Kind.gru4rec: r.GRU4Rec,
    }  # fmt: skip
    return makers[kind]()  # type: ignore[operator]
