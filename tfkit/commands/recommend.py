"""`tfkit recommend`: trains a recommender on a table of events, judges it by full rankings, and exports it."""

from __future__ import annotations

import inspect
import json as json_module
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
    bert4rec = "bert4rec"
    neumf = "neumf"


class Search(StrEnum):
    """How a bundle finds items."""

    exact = "exact"
    scann = "scann"
    nsw = "nsw"


Events = Annotated[Path, typer.Argument(help="A .csv, .tsv or .parquet file with a header.")]
User = Annotated[str, typer.Option(help="The column of users.")]
Item = Annotated[str, typer.Option(help="The column of items.")]
Time = Annotated[str, typer.Option(help="The column of times; none: the order of the rows.")]
Setting = Annotated[
    list[str] | None, typer.Option("--set", help="A setting of the model, as epochs=20; may be given several times.")
]
Model = Annotated[Path, typer.Argument(help="A file that `recommend train` wrote.")]


@app.command()
def train(
    events: Events,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.")],
    model: Annotated[Kind, typer.Option(help="The method.")] = Kind.ials,
    setting: Setting = None,
    user: User = "user",
    item: Item = "item",
    time: Time = "",
    force: Force = False,
) -> None:
    """Fit a model to all events and write it."""
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; pass --force to overwrite it")
    made = _make(model, setting).fit(_read(events, user, item, time))
    typer.echo(f"written: {made.save(out, force=force)}", err=True)


@app.command()
def evaluate(
    events: Events,
    model: Annotated[Kind, typer.Option(help="The method.")] = Kind.ials,
    setting: Setting = None,
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
    found = recommenders.evaluate(_make(model, setting).fit(training), training, held, k)
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
    index: Annotated[Search, typer.Option(help="The index of the items.")] = Search.exact,
    force: Force = False,
) -> None:
    """Write the query tower, the index of the items and their labels as one bundle."""
    from tfkit import retrieval
    from tfkit.recommenders import Recommender, export_bundle

    made = {Search.exact: retrieval.Exact, Search.scann: retrieval.ScaNN, Search.nsw: retrieval.NSW}[index]()
    typer.echo(f"written: {export_bundle(Recommender.load(model), out, index=made, force=force)}", err=True)


def _read(path: Path, user: str, item: str, time: str) -> Any:
    from tfkit.recommenders import Interactions

    return Interactions.from_file(path, user=user, item=item, time=time or None, duplicates="last")


def _make(kind: Kind, given: list[str] | None) -> Any:
    """Returns a model with the settings given as `name=value`, the value in JSON, or else a string."""
    from tfkit import recommenders as r

    settings: dict[str, Any] = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{text!r} is no name=value", param_hint="--set")
        try:
            settings[name] = json_module.loads(value)
        except ValueError:
            settings[name] = value

    makers = {
        Kind.popularity: r.Popularity, Kind.item_knn: r.ItemKNN, Kind.ease: r.EASE, Kind.ials: r.IALS, Kind.bpr: r.BPR,
        Kind.warp: r.WARP, Kind.two_tower: r.TwoTower, Kind.sasrec: r.SASRec, Kind.gru4rec: r.GRU4Rec,
        Kind.bert4rec: r.BERT4Rec, Kind.neumf: r.NeuMF,
    }  # fmt: skip
    known = list(inspect.signature(makers[kind]).parameters)
    unknown = sorted(set(settings) - set(known))
    if unknown:
        shown = ", ".join(known) or "none"
        raise typer.BadParameter(f"{kind} has no setting {unknown[0]!r}, but: {shown}", param_hint="--set")
    return makers[kind](**settings)  # type: ignore[operator]
