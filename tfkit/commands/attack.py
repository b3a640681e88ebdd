"""`tfkit attack`: what attacks leave of a classifier's accuracy, and whether to believe it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tfkit.commands.common import BELOW_WHAT_WAS_ASKED, Force, Json, new_table, print_json, print_table

_FILES = ("report.json", "report.png", "examples.png")


def attack(
    model: Annotated[Path, typer.Argument(help="A .keras or .tflite file.")],
    data: Annotated[str, typer.Option("--data", help="A name, an .npz file, or module:function; its test part.")],
    examples: Annotated[int, typer.Option(min=1, help="The first so many of it.")] = 200,
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    epsilons: Annotated[
        list[float] | None, typer.Option("--epsilon", help="Radius; may be repeated.", show_default="four radii")
    ] = None,
    surrogate: Annotated[
        Path | None, typer.Option(help="Of a .tflite file: the .keras file it was made from; what breaks it is tried.")
    ] = None,
    sees: Annotated[str, typer.Option(help="What the attacker of a .tflite file sees: scores or labels.")] = "scores",
    queries: Annotated[
        int, typer.Option(min=0, help="An example, of attacks that ask; 0: none, of a .keras file.")
    ] = 500,
    steps: Annotated[int, typer.Option(min=1, help="Gradients of PGD and Auto-PGD, a start.")] = 40,
    restarts: Annotated[int, typer.Option(min=1, help="Starts of PGD.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Draws a gradient, of a model that answers at random.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the starts.")] = 0,
    min_accuracy: Annotated[
        float | None, typer.Option(min=0, max=1, help="Exit with 1 if less is left at the largest --epsilon.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for a report, a plot and examples.")] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Attack a classifier in several ways; say what accuracy is left, and which controls failed.

    A .tflite file gives no gradients: it is asked, and attacked with what breaks the --surrogate.

    Exits with 1 if a control fails: then the numbers measure the attacks, and not the model.
    """
    import keras
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from tfkit import data as sets
    from tfkit.robustness import attacks

    if out is not None and not force:
        there = [name for name in _FILES if (out / name).exists()]
        if there:
            raise FileExistsError(f"{out / there[0]} exists; pass --force to overwrite it")
    if not model.exists():
        raise FileNotFoundError(f"{model}: no such file")
    is_file = model.suffix == ".tflite"
    if not is_file and (surrogate is not None or sees != "scores"):
        raise ValueError("--surrogate and --sees are for .tflite files: a .keras file is attacked by its gradients")
    if is_file and not queries:
        raise ValueError("--queries must be at least 1 for a .tflite file: without gradients an attack has to ask")
    loaded = sets.load(data)
    network, other = (
        None if path is None else keras.saving.load_model(path, compile=False)
        for path in (None if is_file else model, surrogate)
    )
    x, y = loaded.x_test[:examples], loaded.y_test[:examples]
    radii = epsilons or ([0.05, 0.1, 0.2, 0.3] if norm == "linf" else [0.5, 1.0, 2.0, 3.0])
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def told(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        if is_file:
            report = attacks.evaluate_file(
                model, x, y, radii, surrogate=other, output=sees, max_queries=queries, norm=norm, seed=seed,
                progress=told,
            )  # fmt: skip
        else:
            asking = {"Square": attacks.Square(norm=norm, max_queries=queries, seed=seed)} if queries else None
            report = attacks.evaluate(
                network, x, y, radii, norm=norm, steps=steps, restarts=restarts, samples=samples, black_box=asking,
                seed=seed, progress=told,
            )  # fmt: skip
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        report.save(out / "report.json", force=True)
        report.plot(out / "report.png", force=True)
        if x.ndim == 4 and x.shape[3] in (1, 3) and (report.x != report.x_adv).any():
            report.plot_examples(out / "examples.png", force=True)
    if json:
        print_json(report.to_dict())
    else:
        table = new_table("", "")
        table.add_row("examples", f"{report.examples}, of which right {report.clean_accuracy:.4f}")
        name = "robust accuracy" if report.reliable else "left (not robustness: a control failed)"
        for epsilon, share in zip(report.epsilons, report.remaining, strict=True):
            table.add_row(f"{norm} {epsilon:.4g}", f"{name} {share:.4f}")
        for finding in report.findings:
            table.add_row(finding.control, f"{'ok' if finding.passed else 'FAILED'}. {finding.detail}")
        print_table(table)
    if not report.reliable:
        typer.echo("tfkit: controls failed: " + ", ".join(finding.control for finding in report.failed), err=True)
        raise typer.Exit(BELOW_WHAT_WAS_ASKED)
    if min_accuracy is not None and report.remaining[-1] < min_accuracy:
        typer.echo(f"tfkit: {report.remaining[-1]:.4f} is left, below the {min_accuracy:g} asked for.", err=True)
        raise typer.Exit(BELOW_WHAT_WAS_ASKED)
