"""The search on LeNet-5 (MNIST) and ResNet-8 (a CIFAR-10 subset), beside every single method trained as long.

    python benchmarks/search.py            # both networks; about an hour and a half on one core
    python benchmarks/search.py --quick    # few epochs, embedded digits: does it run?

A float network is trained on the training part; `tfkit.compression.search` then looks for small files, and every single
method is run alone with as many epochs as the best file's chain had in all, or as a single step has in the last round
if those are more. Files are chosen by their accuracy on
validation examples, which are training examples set aside; the test examples decide nothing. At the end the float file,
every file that the search made and those of the single methods are unpacked, and measured together.

The ratio is that of the float32 `.tflite` file, or of its weights alone where those are fewer bytes, to the packed
file. An interrupted run goes on from the finished files in `--work`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras

from benchmarks import common
from benchmarks.common import say
from tfkit import data, export, models
from tfkit.compression.search import Augmentation, SearchResult, Settings, Step, Trial, search
from tfkit.compression.searching.finetuning import FineTuning
from tfkit.compression.searching.judging import pareto
from tfkit.compression.searching.workspace import STATE, read_json

SEED = 0


class Plan(NamedTuple):
    """How one network is trained and searched."""

    data: str
    validation: float
    train_epochs: int
    train_learning_rate: float
    max_drop: float
    first: int
    formats: tuple[str, ...] | None
    settings: Settings
    singles: tuple[Trial, ...]


def single(label: str, method: str, quantization: str = "float32", rate: float = 0.5, **arguments: Any) -> Trial:
    """Makes a trial of one method."""
    return Trial((Step(label, method, arguments, 1.0, rate),), quantization)


SINGLES = (
    single("structured", "StructuredPruning", rate=1.0, macs=0.5),
    single("low_rank", "LowRank", budget=0.5),
    single("pruning", "MagnitudePruning", rate=1.0, sparsity=0.9),
    single("clustering", "WeightClustering", bits=4),
    single("qat8", "QuantizationAware", "int8-qat"),
    single("qat4", "QuantizationAware", "int8-qat", bits=4),
)

PLANS = {
    "lenet5": Plan("mnist", 0.3, 12, 1e-3, 0.002, 16, None, Settings(epochs=10), SINGLES),
    "resnet8": Plan(
        "cifar10", 0.1, 30, 2e-3, 0.01, 6, ("int8-qat",), Settings(epochs=5, augment=Augmentation(True, 3)), SINGLES
    ),
}


def baseline(network: str, plan: Plan, dataset: data.Dataset, work: Path) -> Path:
    """Trains the float network, once."""
    path = work / network / "float32.keras"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        model = models.get(network)(input_shape=dataset.input_shape, classes=dataset.num_classes, seed=SEED)
        FineTuning(
            dataset,
            epochs=plan.train_epochs,
            learning_rate=plan.train_learning_rate,
            seed=SEED,
            augment=plan.settings.augment,
            on_epoch=lambda done: say(f"{network}: epoch {done} of {plan.train_epochs}"),
        )(model)
        model.save(path.with_name("part.keras"))
        os.replace(path.with_name("part.keras"), path)
    return path


def found(network: str, plan: Plan, dataset: data.Dataset, path: Path, work: Path) -> SearchResult:
    """Searches, or reads what an earlier run found."""
    out = work / network / "search"
    if (out / "results.json").is_file():
        return SearchResult(out, json.loads((out / "results.json").read_text(encoding="utf-8")))
    return search(
        path,
        dataset,
        plan.max_drop,
        out=out,
        first=plan.first,
        formats=plan.formats,
        settings=plan.settings,
        seed=SEED,
        progress=reporter(network),
    )


def alone(
    network: str, plan: Plan, dataset: data.Dataset, path: Path, work: Path, epochs: int, names: Sequence[str]
) -> SearchResult:
    """Runs every single method with this many epochs."""
    out = work / network / "singles"
    if (out / "results.json").is_file():
        return SearchResult(out, json.loads((out / "results.json").read_text(encoding="utf-8")))
    chosen = tuple(trial for trial in SINGLES if not names or trial.name in names)
    return search(
        path,
        dataset,
        plan.max_drop,
        out=out,
        chains=chosen,
        first=len(chosen),
        rungs=1,
        settings=dataclasses.replace(plan.settings, epochs=epochs),
        seed=SEED,
        progress=reporter(f"{network} alone"),
    )


def epochs_of(row: Mapping[str, Any]) -> int:
    """Returns how many epochs a file's chain was trained in all after the float network, from its recipe."""
    return sum(int(number) for number in re.findall(r"epochs=(\d+)", row["recipe"]))


def made(result: SearchResult) -> list[dict[str, Any]]:
    """Returns a row for each file that a search trained, those of early rounds too."""
    names = [row["name"] for rung in result.results["search"]["rungs_made"] for row in rung["trials"]
             if row["status"] != "failed"]  # fmt: skip
    rows = [read_json(result.out / STATE / f"{name}.json") for name in names]
    return sorted(rows, key=lambda row: row["packed_bytes"])


def measured(
    network: str, plan: Plan, dataset: data.Dataset, searched: SearchResult, singles: SearchResult | None
) -> dict[str, Any]:
    """Unpacks the files that the table shows, measures them together, and compares them."""
    before = searched.results["candidates"][:4]  # float32 and the formats that take no training
    listed = {"float32": (searched, before[0])}
    listed |= {f"search: {row['name']}": (searched, row) for row in made(searched)}
    listed |= {f"format: {row['name']}": (searched, row) for row in before[1:] if row["status"] != "failed"}
    if singles is not None:
        listed |= {f"alone: {row['name']}": (singles, row) for row in made(singles)}
    with tempfile.TemporaryDirectory() as folder:
        files, packed = [], []
        for position, (result, row) in enumerate(listed.values()):
            source = result.out / row["path"]
            file = export.unpack(source.with_suffix(".tfk"), Path(folder) / f"{position}.tflite")
            if file.read_bytes() != source.read_bytes():
                raise RuntimeError(f"{source}: unpacking did not give the packed file back")
            files.append(file)
            packed.append(source.with_suffix(".tfk").stat().st_size)
        options = {"accuracy_data": (dataset.x_test, dataset.y_test), "packed_bytes": packed}
        latencies = export.compare_latency(files, dataset.x_test[:64], **options)
    model = keras.saving.load_model(searched.out / "models" / "float32.keras", compile=False)
    weight_bytes = 4 * int(model.count_params())
    base = latencies[0].measurement
    floor = before[0]["validation_accuracy"] - plan.max_drop - 1e-9
    float_bytes = min(weight_bytes, base.size_bytes)
    rows = {}
    for (name, (_, row)), latency in zip(listed.items(), latencies, strict=True):
        one = latency.measurement
        rows[name] = {
            "summary": row["summary"],
            "quantization": row["quantization"],
            "tflite_bytes": one.size_bytes,
            "packed_bytes": one.packed_bytes,
            "ratio": float_bytes / one.packed_bytes,
            "validation_accuracy": row["validation_accuracy"],
            "test_accuracy": one.accuracy,
            "test_drop_points": round(100 * (base.accuracy - one.accuracy), 6),
            "p50_ms": one.p50_ms,
            "latency_over_float": latency.ratio,
            "latency_range": [latency.low, latency.high],
            "within_budget": row["validation_accuracy"] >= floor,
            "epochs": epochs_of(row),
        }
    found = {name: row for name, row in rows.items() if name.startswith("search: ")}
    best = pareto([(name, row["validation_accuracy"], row["packed_bytes"]) for name, row in found.items()])
    front = {name: found[name] for name in best}  # Chosen on validation examples, whatever the test says.
    for name, row in rows.items():
        if name.startswith("alone: "):
            for part in ("validation", "test"):
                row[f"dominated_on_{part}_by"] = [
                    other for other, one in front.items()
                    if one["packed_bytes"] <= row["packed_bytes"]
                    and one[f"{part}_accuracy"] >= row[f"{part}_accuracy"]
                ]  # fmt: skip
    return {
        "float_weight_bytes": weight_bytes,
        "float_tflite_bytes": base.size_bytes,
        "chosen": f"search: {searched.best['name']}",
        "max_drop_points_on_validation": 100 * plan.max_drop,
        "files": rows,
        "rungs": searched.results["search"]["rungs_made"],
        "sensitivity": searched.results["search"]["sensitivity"],
        "warnings": searched.results["warnings"] + ([] if singles is None else singles.results["warnings"]),
    }


def figures_of(network: str, result: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of one network, all of the same file: the smallest within the budget on validation data."""
    row = result["files"][result["chosen"]]
    if network == "lenet5":
        return {"lenet5_ratio": row["ratio"], "lenet5_error_change_points": row["test_drop_points"]}
    return {
        "resnet8_ratio": row["ratio"],
        "resnet8_accuracy_drop_points": row["test_drop_points"],
        "resnet8_latency_over_float": row["latency_over_float"],
    }


def show(network: str, result: dict[str, Any]) -> None:
    """Prints the table of one network."""
    say(f"\n{network}: {'file':<44}{'packed':>9}{'ratio':>7}{'valid.':>8}{'test':>8}{'/ f32':>7}{'epochs':>7}")
    for name, row in result["files"].items():
        beaten = "" if row.get("dominated_on_test_by", [1]) else "  not dominated on test"
        beaten += "" if row.get("dominated_on_validation_by", [1]) else "  not dominated on validation"
        say(f"  {'*' if name == result['chosen'] else ' '} {name:<46}{row['packed_bytes']:>9,}{row['ratio']:>7.1f}"
            f"{100 * row['validation_accuracy']:>8.2f}{100 * row['test_accuracy']:>8.2f}"
            f"{row['latency_over_float']:>7.2f}{row['epochs']:>7}{beaten}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(PLANS), choices=list(PLANS))
    parser.add_argument("--singles", nargs="*", default=[], help="names of single methods; all by default")
    parser.add_argument("--without-singles", action="store_true", help="the search alone")
    parser.add_argument("--quick", action="store_true", help="few epochs, few examples")
    parser.add_argument("--work", type=Path, help="folder of the unfinished run; by default a temporary one")
    parser.add_argument("--until", choices=["baseline", "search", "singles"], help="stop after this part")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "search.json")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="tfkit-search-"))
    results, figures, used = {}, {}, {}
    for network in arguments.networks:
        plan = PLANS[network]
        dataset = data.load(plan.data, validation=plan.validation, seed=SEED)
        if arguments.quick:
            dataset = dataset.subset(640, 200, 200)
            brief = dataclasses.replace(plan.settings, epochs=1)
            plan = plan._replace(train_epochs=1, first=3, max_drop=0.2, settings=brief)
        path = baseline(network, plan, dataset, work)
        if arguments.until == "baseline":
            continue
        started = time.time()
        searched = found(network, plan, dataset, path, work)
        if arguments.until == "search":
            continue
        singles = None
        if not arguments.without_singles:
            epochs = max(epochs_of(searched.best), plan.settings.epochs)
            singles = alone(network, plan, dataset, path, work, epochs, arguments.singles)
        if arguments.until == "singles":
            continue
        results[network] = measured(network, plan, dataset, searched, singles)
        results[network]["search_seconds"] = searched.results["search"]["seconds_in_all"]
        results[network]["singles_seconds"] = 0.0 if singles is None else singles.results["search"]["seconds_in_all"]
        results[network]["plan"] = {
            "train_epochs": plan.train_epochs, "first": plan.first, "formats": plan.formats,
            "settings": plan.settings.to_dict(),
        }  # fmt: skip
        used[network] = {"name": dataset.name, "train": len(dataset.x_train),
                         "validation": len(dataset.x_validation), "test": len(dataset.x_test)}  # fmt: skip
        figures |= figures_of(network, results[network])
        show(network, results[network])
        say(f"{network}: {time.time() - started:.0f} s")
    if results and not arguments.quick:
        common.write_result(
            arguments.out,
            figures,
            data=used,
            seeds=[SEED],
            results=results,
            versions=common.versions("tensorflow", "keras", "ai-edge-litert", "numpy"),
        )
        say(f"\nfigures: {figures}\nwritten to {arguments.out}")


def reporter(what: str) -> Any:
    """Returns a `progress` that prints a line for each step."""
    started, last = time.time(), ""

    def tell(done: float, total: float, text: str) -> None:
        nonlocal last
        step = text.partition(",")[0]
        if step != last:
            say(f"{time.time() - started:6.0f} s  {what}  {done:.0f}/{total:.0f}  {text}")
        last = step

    return tell


if __name__ == "__main__":
    main()
