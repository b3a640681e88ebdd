"""`tfkit certify`: the radius around each example within which a prediction is proven not to change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfkit.commands.common import BELOW_WHAT_WAS_ASKED, Force, Json, new_table, print_json, print_table


def certify(
    model: Annotated[Path, typer.Argument(help="A .keras file to logits, or an int8 .tflite file.")],
    data: Annotated[str, typer.Option("--data", help="A name, an .npz file, or module:function; its test part.")],
    examples: Annotated[int, typer.Option(min=1, help="The first so many of it.")] = 100,
    norm: Annotated[str, typer.Option(help="linf, l2 or l1.")] = "linf",
    method: Annotated[
        str, typer.Option(help="interval, crown_ibp, fast_lin, fast_lip, crown, alpha_crown or dual.")
    ] = "crown",
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Tell the accuracy at this radius; may be repeated.")
    ] = None,
    clip: Annotated[
        bool, typer.Option(help="Leave out points outside of [0, 1], which no image has. Radii grow.")
    ] = True,
    tolerance: Annotated[float, typer.Option(min=1e-9, max=0.5, help="Of a radius, relative.")] = 1e-3,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if less is certified at the largest --epsilon.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for report.json and report.png.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Certify a classifier: how far its inputs can move before a prediction can change, proven for each example."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tfkit import data as sets
    from tfkit.robustness import certification

    if out is not None and not force:
        there = [name for name in ("report.json", "report.png") if (out / name).exists()]
        if there:
            raise FileExistsError(f"{out / there[0]} exists; pass --force to overwrite it")
    if min_accuracy is not None and not epsilons:
        raise ValueError("--min-accuracy is that at the largest --epsilon: give one")
    network = _read(model)
    loaded = sets.load(data)
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("certifying", total=None)
        report = certification.certify(
            network, loaded.x_test[:examples], loaded.y_test[:examples], norm, method, epsilons=epsilons,
            clip=(0.0, 1.0) if clip else None, tolerance=tolerance,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report.save(out / "report.json", force=True)
        report.plot(out / "report.png", force=True)
    if json:
        print_json(report.to_dict())
    else:
        table = new_table("", "")
        table.add_row("examples", str(len(report.radii)))
        table.add_row("accuracy", f"{report.accuracy:.4f}")
        table.add_row("method", f"{report.method}, norm {report.norm}, arithmetic {report.arithmetic}")
        table.add_row("inputs", "anywhere" if report.clip is None else f"in [{report.clip[0]:g}, {report.clip[1]:g}]")
        table.add_row("radius", f"mean {report.mean_radius:.5g}, median {report.median_radius:.5g}")
        for epsilon, share in zip(report.epsilons, report.certified_accuracy, strict=True):
            table.add_row(f"certified at {epsilon:.4g}", f"{share:.4f}")
        table.add_row("seconds", f"{report.seconds:.1f}")
        print_table(table)
    if min_accuracy is not None and epsilons:
        worst = report.certified_accuracy[report.epsilons.index(max(report.epsilons))]
        if worst < min_accuracy:
            typer.echo(f"tfkit: certified accuracy {worst:.4f} is below the {min_accuracy:g} asked for.", err=True)
            raise typer.Exit(BELOW_WHAT_WAS_ASKED)


def _read(path: Path):  # type: ignore[no-untyped-def]
    from tfkit.robustness.certification import Network, read_tflite

    if path.suffix == ".tflite":
        return Network(read_tflite(path))
    import keras

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return Network(keras.saving.load_model(path, compile=False))
