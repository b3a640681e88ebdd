"""The table and the plain figures of compression.py, from the rows of every seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.peers.plan import DEEP, METHODS

SIDES = ("tfkit", "tfmot")


def summarize(seeds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, one row a network, method and side, in the order of the methods."""
    table = []
    names = {name: None for results in seeds.values() for name in results}
    for network in names:
        runs = [results[network] for results in seeds.values() if network in results]
        for method in METHODS:
            for side in SIDES:
                found = [row for run in runs for row in run["rows"] if (row["side"], row["method"]) == (side, method)]
                good = [row for row in found if "error" not in row]
                if not good:
                    table += [{"network": network, "method": method, "side": side, **row} for row in found[:1]]
                    continue
                bases = [row["accuracy"] for run in runs for row in run["rows"]
                         if (row["side"], row["method"]) == (side, "float")]  # fmt: skip
                steps = [run["timing"].get(side, {}).get(method) for run in runs]
                steps = [step for step in steps if step]
                row: dict[str, Any] = {"network": network, "method": method, "side": side, "seeds": len(good)}
                row["accuracy"] = mean(r["accuracy"] for r in good)
                row["accuracy_drop_points"] = 100 * (mean(bases) - row["accuracy"])
                for key in ("latency_over_float", "p50_ms", "zeros", "train_seconds", "packed_over_best_general"):
                    row[key] = mean(r[key] for r in good)
                row["bytes"] = {key: round(mean(r["bytes"][key] for r in good)) for key in good[0]["bytes"]}
                row["distinct"] = max(r["distinct"] for r in good)
                if steps:
                    row["step_ms"] = mean(step["step_ms"] for step in steps)
                    row["step_over_float"] = mean(step["over_float"] for step in steps)
                table.append(row)
    return table


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean as a plain float."""
    return float(statistics.fmean(values))


def figures(table: list[dict[str, Any]], seeds: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The plain numbers owed: tfkit's, then the peer's under the same name with `tfmot_` before it."""
    files = [row for results in seeds.values() for found in results.values() for row in found["rows"]
             if "error" not in row]  # fmt: skip
    ours = [row for row in files if row["side"] == "tfkit"]
    result = {"packed_over_best_general_any_file": max(r["packed_over_best_general"] for r in files)}
    if deep := [r["packed_over_best_general"] for r in ours if r["method"] in DEEP]:
        result["packed_over_best_general"] = max(deep)  # the worst file, not the mean
    for side, prefix in (("tfkit", ""), ("tfmot", "tfmot_")):
        rows = {row["method"]: row for row in table
                if (row["network"], row["side"]) == ("convnet_bn", side) and "error" not in row}  # fmt: skip
        if "qat" in rows:
            result[f"{prefix}qat_accuracy_drop_points"] = rows["qat"]["accuracy_drop_points"]
            result[f"{prefix}qat_latency_over_float"] = rows["qat"]["latency_over_float"]
            result[f"{prefix}qat_step_over_float_step"] = rows["qat"]["step_over_float"]
            for size in ("raw", "packed"):
                result[f"{prefix}qat_times_smaller_{size}"] = rows["float"]["bytes"]["raw"] / rows["qat"]["bytes"][size]
    return result


def show(table: list[dict[str, Any]]) -> None:
    """Print the table for reading."""
    head = ("accuracy", "raw", "gzip", "xz", "zstd", "packed", "latency/f", "step ms", "step/f")
    print(f"{'network':<11}{'method':<18}{'side':<6}" + "".join(f"{name:>10}" for name in head))
    for row in table:
        start = f"{row['network']:<11}{row['method']:<18}{row['side']:<6}"
        if "error" in row:
            print(f"{start} {row['error']}")
            continue
        sizes = "".join(f"{row['bytes'][k]:>10}" for k in ("raw", "gzip", "xz", "zstd", "packed"))
        step = f"{row['step_ms']:>10.1f}{row['step_over_float']:>10.2f}" if "step_ms" in row else f"{'-':>10}{'-':>10}"
        print(f"{start}{row['accuracy']:>10.4f}{sizes}{row['latency_over_float']:>10.2f}{step}")
