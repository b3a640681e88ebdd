"""Reproduces how the work of a search in a navigable small world grows with the items, and how tries add recall.

    python benchmarks/papers/nsw.py            # up to 100,000 vectors; about half an hour on one core
    python benchmarks/papers/nsw.py --quick    # up to 3,000 vectors: does it run?

Malkov, Ponomarenko, Logvinov, Krylov, Information Systems 45, 2014, https://doi.org/10.1016/j.is.2013.10.006, say of
random vectors: at a fixed accuracy a search computes of the order of log(n)^2 distances, and with each further try from
a random start the share of misses falls by the same factor. Here recall@10 and the inner products computed are counted
for the graph of that paper, with as many candidates as neighbours sought, and for the hierarchical one of the second
paper. How much that is does not depend on the machine.

The vectors are uniform on the unit sphere in 30 dimensions, where the nearest and those of the largest inner product
are the same, and no norm helps. The paper's are uniform in a cube, whose border makes a difference of its own.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from tfkit.retrieval import NSW, Exact, SearchResult, tuning

#: The abstract: "log2(n) insertion and search complexity at fixed accuracy", where log2 is the square of a logarithm;
#: "only 0.03% of the 10 million 208-dimensional vector dataset is needed to be evaluated to achieve 0.999 recall".
PAPER = {
    "growth": "log(n)^2 at fixed accuracy",
    "cophir": {"items": 10_000_000, "dimension": 208, "recall": 0.999, "share_evaluated": 0.0003},
    "curves": "not quoted: the paper gives them as plots",
}
DIMENSION, NEIGHBOURS, DEGREE, CONSTRUCTION = 30, 10, 30, 60
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
TRIES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
WIDTHS = (10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320, 480)
RECALLS = (0.9, 0.95, 0.99)


def sphere(count: int, seed: int) -> np.ndarray:
    """Returns float32 vectors uniform on the unit sphere."""
    vectors = np.random.default_rng(seed).normal(size=(count, DIMENSION))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def curve(index: NSW, queries: np.ndarray, truth: SearchResult, efforts: list[dict[str, int]]) -> list[dict[str, Any]]:
    """Returns recall and inner products a query for each effort, until nothing is missing."""
    rows: list[dict[str, Any]] = []
    for effort in efforts:
        found = tuning.recall(index.search(queries, NEIGHBOURS, threads=1, **effort), truth)
        evaluations = float(index.evaluations(queries, NEIGHBOURS, **effort).mean())
        rows.append({"effort": effort, "recall": found, "evaluations": evaluations})
        if found == 1:
            break
    return rows


def evaluations_at(rows: list[dict[str, Any]], recall: float) -> float | None:
    """Returns the inner products at a recall, between the measured ones; None if it is not reached."""
    for before, after in zip([{"recall": 0.0, "evaluations": 0.0}, *rows], rows, strict=False):
        if after["recall"] >= recall:
            part = (recall - before["recall"]) / max(after["recall"] - before["recall"], 1e-12)
            return float(before["evaluations"] + part * (after["evaluations"] - before["evaluations"]))
    return None


def measure(count: int, queries: np.ndarray, seed: int) -> dict[str, Any]:
    """Returns the curves of both graphs over so many items."""
    items = sphere(count, seed)
    truth = Exact().build(items).search(queries, NEIGHBOURS, threads=1)
    plain = {
        "tries": NSW(DEGREE, CONSTRUCTION, space="angle", hierarchy=False, seed=seed),
        "hierarchy": NSW(DEGREE // 2, CONSTRUCTION, space="angle", seed=seed),
    }
    efforts = {
        "tries": [{"ef": NEIGHBOURS, "scan": 0, "starts": tries} for tries in TRIES],
        "hierarchy": [{"ef": width, "scan": 0} for width in WIDTHS],
    }
    row: dict[str, Any] = {"items": count}
    for name, index in plain.items():
        started = time.process_time()
        index.build(items, threads=1)
        built = time.process_time() - started
        held = (index.links >= 0).sum(axis=1)
        rows = curve(index, queries, truth, efforts[name])
        row[name] = {
            "build_cpu_s": round(built, 1),
            "links_mean": float(held.mean()),
            "full_lists_share": float((held == index.links.shape[1]).mean()),
            "curve": rows,
            "evaluations_at": {str(recall): evaluations_at(rows, recall) for recall in RECALLS},
        }
        print(
            f"{count:>7,} {name:9}: " + ", ".join(f"{r['recall']:.3f} at {r['evaluations']:,.0f}" for r in rows),
            flush=True,
        )
    return row


def summarize(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the figures: growth from the smallest to the largest set, share looked at, and what each try mends."""
    figures: dict[str, float] = {}
    for name in ("tries", "hierarchy"):
        for recall in RECALLS:
            points = [(r["items"], r[name]["evaluations_at"][str(recall)]) for r in rows]
            points = [(count, spent) for count, spent in points if spent is not None]
            if len(points) < 2:
                continue
            tag = f"{name}_{recall:.2f}".replace("0.", "0")
            (few, first), (many, last) = points[0], points[-1]
            # 1 if the work grows as log(n)^2; the exponent of n would be 1 for a scan.
            figures[f"{tag}_growth_over_log2"] = (last / first) / (math.log(many) / math.log(few)) ** 2
            figures[f"{tag}_exponent_of_n"] = math.log(last / first) / math.log(many / few)
            figures[f"{tag}_share_evaluated"] = last / many
    # Misses after m tries, were each as likely to fail as the first: (1 - p)^m. 1: as likely; above: less is gained.
    tries = rows[-1]["tries"]["curve"]
    misses = {point["effort"]["starts"]: 1 - point["recall"] for point in tries}
    if 0 < misses.get(4, 0) and 0 < misses[1] < 1:
        figures["miss_exponent_of_four_tries"] = math.log(misses[4]) / (4 * math.log(misses[1]))
    return figures


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a flat row for each size and graph."""
    return [
        {
            "items": row["items"], "graph": name, "build CPU s": row[name]["build_cpu_s"],
            **{f"inner products at {recall}": spent for recall, spent in row[name]["evaluations_at"].items()},
        }
        for row in rows for name in ("tries", "hierarchy")
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="up to 3,000 vectors, few queries, nothing written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=common.RESULTS / "nsw.json")
    arguments = parser.parse_args()

    queries = sphere(100 if arguments.quick else 500, arguments.seed + 1_000)
    rows = []
    for count in SIZES[:2] if arguments.quick else SIZES:
        rows.append(measure(count, queries, arguments.seed))
        figures = summarize(rows) if len(rows) > 1 else {}
        if not arguments.quick:
            common.write_result(
                arguments.out, figures, paper=PAPER, table=table(rows), results=rows, seeds=[arguments.seed],
                settings={"dimension": DIMENSION, "degree": DEGREE, "construction": CONSTRUCTION,
                          "queries": len(queries)},
                versions=common.versions("numpy", "numba"),
                data="vectors uniform on the unit sphere, made by the program",
            )  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {value:.3g}")


if __name__ == "__main__":
    main()
