"""Router: queries a second over the best single choice at a mean recall of 0.95, on queries that decided nothing.

    python benchmarks/router.py            # about twenty minutes on one core
    python benchmarks/router.py --quick    # few items and queries: does it run?

For each data set and seed a router is fitted over `NormScan`, `IVF` and `NSW` with all their efforts, and one over each
of them alone (early termination). The seed splits the queries; a quarter of them is reported on. `gain` is over the
best single choice with its effort interpolated to the router's recall, `over mixture` over the best random mixture of
two choices, both with the time of features and prediction counted; `measured` is timed in turns with the single choice.
Times are processor time of one thread, queries searched all at once.

The figures are the medians over seeds on the data set where an oracle gains most, "all" indexes; every other is a row.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import common, vectors
from benchmarks.common import say
from tfkit.retrieval import IVF, NSW, Index, NormScan, Router

TARGET, K, QUERIES, SEEDS = 0.95, 10, 2000, (0, 1, 2)
#: Name to what makes the vectors.
DATA: dict[str, Any] = {
    "MovieLens-1M factors, 64": lambda: vectors.movielens(64),
    "GloVe 6B, 100,000 x 50": vectors.glove,
    "synthetic, 20,000 x 64, equal norms": lambda: vectors.synthetic(20_000, 64, skew=0.0),
    "synthetic, 20,000 x 64, skew 0.6": lambda: vectors.synthetic(20_000, 64, skew=0.6),
    "synthetic, 100,000 x 128, skew 0.2": lambda: vectors.synthetic(100_000, 128, skew=0.2),
}


def rows_of(name: str, family: str, seed: int, router: Router, queries: np.ndarray) -> list[dict[str, Any]]:
    """Fits a router; returns a row for each way of choosing, and prints them."""
    report = router.fit(queries)
    say(f"{name}; {family}; seed {seed}\n{report}")
    rows = []
    for row in report.rows:
        taken = row.name == report.chosen
        rows.append({"data": name, "indexes": family, "seed": seed, "way": row.name, **row._asdict(), "chosen": taken})
        rows[-1].pop("name")
        if taken:
            rows[-1]["measured"] = report.measured_gain
    return rows


def run(quick: bool, model: str) -> list[dict[str, Any]]:
    """Returns the rows of all data sets."""
    rows: list[dict[str, Any]] = []
    data = {"synthetic, 2,000 x 16": lambda: vectors.synthetic(2000, 16, skew=0.0)} if quick else dict(DATA)
    for name, make in data.items():
        made = make()
        asked = made.queries[np.linalg.norm(made.queries, axis=1) > 0]
        asked = asked[np.random.default_rng(0).permutation(len(asked))[: 200 if quick else QUERIES]]
        built: dict[str, Index] = {"NormScan": NormScan(), "IVF": IVF(), "NSW": NSW()}
        for index in built.values():
            index.build(made.items)
        for seed in SEEDS[:1] if quick else SEEDS:
            families = {"all": built} | {key: {key: index} for key, index in built.items()}
            for family, some in families.items() if seed == 0 else [("all", built)]:
                router = Router(some, k=K, target_recall=TARGET, model=model, seed=seed)
                rows += rows_of(name, family, seed, router, asked)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns for each data set and set of indexes the medians over seeds."""
    table = []
    for data, family in dict.fromkeys((row["data"], row["indexes"]) for row in rows):
        some = [row for row in rows if (row["data"], row["indexes"]) == (data, family)]

        def median(way: str, key: str, of: list[dict[str, Any]] = some) -> float:
            return float(np.median([row[key] for row in of if row["way"] == way]))

        seeds = sorted({row["seed"] for row in some})
        ways = [next((r for r in some if r["seed"] == seed and r["chosen"]), None) for seed in seeds]
        chosen = [row for row in ways if row is not None and row["way"] != "single"]
        table.append(
            {
                "data": data, "indexes": family, "seeds": len(seeds), "single us": median("single", "query_us"),
                "mixture gain": median("mixture", "gain"), "oracle gain": median("oracle", "gain"),
                "best model gain": float(np.median([max(r["gain"] for r in some if r["seed"] == seed and r["own_us"])
                                                    for seed in seeds])),
                "router gain": float(np.median([1.0] * (len(seeds) - len(chosen)) + [r["gain"] for r in chosen])),
                "router measured": float(
                    np.median([1.0] * (len(seeds) - len(chosen)) + [r["measured"] for r in chosen])
                ),
                "routed": ", ".join(sorted({row["way"] for row in chosen})) or "not worth it",
            }
        )  # fmt: skip
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few items and queries, nothing kept")
    parser.add_argument("--model", default="auto", choices=("auto", "trees", "network", "bandit"))
    arguments = parser.parse_args()
    rows = run(arguments.quick, arguments.model)
    table = summary(rows)
    everything = [row for row in table if row["indexes"] == "all"]
    best = max(everything, key=lambda row: row["oracle gain"])
    figures = {
        "router_over_best_single_095": best["router measured"],
        "oracle_over_best_single_095": best["oracle gain"],
        "router_over_best_single_095_median": float(np.median([row["router measured"] for row in everything])),
        "oracle_over_best_single_095_median": float(np.median([row["oracle gain"] for row in everything])),
    }
    folder = Path(tempfile.mkdtemp()) if arguments.quick else common.RESULTS
    path = common.write_result(
        folder / "router.json", figures, table=table, rows=rows, data_of_figures=best["data"],
        settings={"recall": TARGET, "k": K, "queries": QUERIES, "seeds": list(SEEDS)}, seeds=list(SEEDS),
        versions=common.versions("tfkit", "numpy", "numba", "scikit-learn", "keras"),
    )  # fmt: skip
    say(f"wrote {path.name}: {figures}")


if __name__ == "__main__":
    main()
