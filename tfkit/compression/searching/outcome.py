"""The outcome of a search: warnings, verdicts, and what goes into `results.json`."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import keras
import numpy as np

import tfkit
from tfkit.compression import report
from tfkit.compression.searching import workspace
from tfkit.compression.searching.judging import Measured, Objective, judge, standard_error_of_drop
from tfkit.data import Dataset

FORMAT = "tfkit.compress/1"
PACKAGES = ("tensorflow", "keras", "numpy", "ai-edge-litert")
#: A baseline less accurate than this many times the largest class's share has learnt too little to judge by.
CHANCE_FACTOR = 1.5


def warnings_of(rows: Sequence[dict[str, Any]], data: Dataset) -> list[str]:
    """Looks for files that gained nothing and a baseline that knows nothing; adds to the rows' own `warnings`.

    Args:
        rows: the measured rows, the baseline first.
        data: the data they were judged by.

    Returns:
        All warnings, each with the name of its row.
    """
    base, found = rows[0], []
    largest_share = float(np.bincount(data.y_validation).max() / len(data.y_validation))
    if base["validation_accuracy"] < CHANCE_FACTOR * largest_share:
        found.append(
            f"The float32 file is right on {base['validation_accuracy']:.1%} of the validation data, which is little "
            "more than chance. Was the model trained, and on inputs scaled like these "
            f"({data.x_train.min():g} to {data.x_train.max():g})?"
        )
    for row in rows[1:]:
        grown = [
            f"{what} ({row[key]:,} bytes, float32 {base[key]:,})"
            for key, what in (("size_bytes", "its file"), ("packed_bytes", "its packed file"))
            if row[key] > base[key] or (key == "packed_bytes" and row[key] == base[key])
        ]
        own = [f"not smaller than what it was made from: {' and '.join(grown)}"] if grown else []
        if row["sha256"] == base["sha256"]:
            own.append("changed nothing: the file is identical to the float32 file")
        row["warnings"] = [*row["warnings"], *own]
    return found + [f"{row['name']}: {warning}" for row in rows for warning in row["warnings"]]


def judge_rows(rows: Sequence[dict[str, Any]], max_drop: float, objective: Objective) -> str:
    """Judges the rows, writes the verdicts into them, and returns the name of the best."""
    finished = [row for row in rows if row["status"] != "failed"]
    judgement = judge(
        [
            Measured(row["name"], row["validation_accuracy"], row["packed_bytes"], row["latency_ratio"])
            for row in finished
        ],
        max_drop=max_drop,
        objective=objective,
    )
    base = finished[0]
    right = {row["name"]: _booleans(row.pop("validation_right")) for row in finished}
    for row in finished:
        row["validation_drop"] = base["validation_accuracy"] - row["validation_accuracy"]
        row["validation_drop_error"] = standard_error_of_drop(right[base["name"]], right[row["name"]])
        row["test_drop"] = base["test_accuracy"] - row["test_accuracy"]
        row["packed_ratio"] = base["size_bytes"] / row["packed_bytes"]
        row["pareto_size"] = row["name"] in judgement.pareto_size
        row["pareto_latency"] = row["name"] in judgement.pareto_latency
        row["best"] = row["name"] == judgement.best
        row["status"] = "accepted" if row["name"] in judgement.accepted else "rejected"
        row["reason"] = ""
        if row["status"] == "rejected":
            lost = 100 * row["validation_drop"]
            row["reason"] = f"validation accuracy {lost:.2f} points below float32, {100 * max_drop:g} allowed"
    base["status"] = "baseline"
    return judgement.best


def doubt(best: Mapping[str, Any], max_drop: float, examples: int) -> list[str]:
    """Warns if the accuracy that the best file lost is known less well than the budget is wide.

    Args:
        best: its judged row.
        max_drop: the budget, as a fraction.
        examples: how many it was judged by.
    """
    error = best["validation_drop_error"]
    if error <= max_drop:
        return []
    return [
        f"{best['name']} was judged by {examples:,} validation examples, which tell its accuracy from that of float32 "
        f"with a standard error of {100 * error:.2f} points: more than the {100 * max_drop:g} points allowed. A larger "
        "validation part would tell better."
    ]


def _booleans(stored: Mapping[str, Any]) -> np.ndarray:
    packed = np.frombuffer(bytes.fromhex(stored["bits"]), np.uint8)
    return np.unpackbits(packed, count=stored["count"]).astype(bool)


def assemble(
    rows: Sequence[dict[str, Any]],
    *,
    model: keras.Model,
    data: Dataset,
    run: Mapping[str, Any],
    described: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the content of `results.json`.

    Args:
        rows: the judged rows, the baseline first.
        model: the float32 model.
        data: the data.
        run: `max_drop`, `objective`, `seed`, `settings`, `warnings`, `resumed` and `seconds`.
        described: the model's `name` and what its `output` is.
        machine: the one that was measured on.
    """
    base, best = rows[0], next(row for row in rows if row.get("best"))
    warnings = list(run["warnings"])
    if best is base:
        warnings.insert(0, "No candidate within the accuracy budget is better than the float32 file.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "format": FORMAT,
        "headline": report.headline(base, best),
        "best": best["name"],
        "figures": {
            "best_packed_ratio": best["packed_ratio"],
            "best_latency_ratio": best["latency_ratio"],
            "best_validation_drop_points": 100 * best["validation_drop"],
            "best_test_drop_points": 100 * best["test_drop"],
            "accepted": sum(row["status"] == "accepted" for row in rows),
        },
        "model": {
            **described,
            "parameters": int(model.count_params()),
            "input_shape": list(data.input_shape),
            "sha256": workspace.hash_of_model(model),
        },
        "data": {
            "name": data.name,
            "source": data.source,
            "train": len(data.x_train),
            "validation": len(data.x_validation),
            "test": len(data.x_test),
            "classes": data.num_classes,
            "sha256": workspace.hash_of_data(data),
        },
        **run,
        "warnings": warnings,
        "candidates": list(rows),
        "machine": {**machine, "cores": cores},
        "versions": versions() | {"python": platform.python_version()},
    }


def versions() -> dict[str, str]:
    """Returns the versions of the packages that shape a candidate."""
    return {"tfkit": tfkit.__version__} | {name: metadata.version(name) for name in PACKAGES}
