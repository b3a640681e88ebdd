"""Speed-up against recall of the PCA tree over the Euclidean transformation, with and without neighbourhood boosting.

    python benchmarks/papers/xbox.py            # all data sets; about ten minutes on one core
    python benchmarks/papers/xbox.py --quick    # 32-dimensional factors and few queries: does it run?

Bachrach et al., Speeding up the Xbox recommender system using a Euclidean transformation for inner-product spaces.
RecSys 2014, https://doi.org/10.1145/2645710.2645741. As there, trees of several depths are searched in the query's own
leaf, and in all leaves whose paths differ from it in one decision (the boost, a Hamming distance of 1); beside that, in
two, and in a number of leaves from the nearest node on. The paper's data, Xbox Movies and Yahoo! Music, are not public;
here are factors of MovieLens-1M and synthetic vectors (benchmarks/vectors.py). How time is measured:
benchmarks/speedups.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common, speedups, vectors
from tfkit.retrieval import KDTree, PCATree

PAPER = {"speed_up_against_precision": "not quoted: the paper gives it as plots"}
DATA = {
    "ml1m_50": lambda: vectors.movielens(50),
    "ml1m_100": lambda: vectors.movielens(100),
    "synthetic_20000_64": lambda: vectors.synthetic(20_000, 64),
    "synthetic_100000_50": lambda: vectors.synthetic(100_000, 50),
}
QUICK = {"ml1m_32": lambda: vectors.movielens(32)}
RECALLS = (0.5, 0.8, 0.9)
WAYS = {0: "own leaf", 1: "boosted", 2: "distance 2"}


def measure(name: str, data: vectors.Vectors, quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns figures and curves of one data set."""
    bench = speedups.Bench(data, queries=60 if quick else 200, rounds=3 if quick else 5)
    points: dict[str, list[speedups.Point]] = {}
    deepest = (len(bench.items) // 8).bit_length()
    for depth in range(1, deepest + 1, 3 if quick else 1):
        index = PCATree(depth=depth).build(bench.items, threads=1)
        for point in bench.points("", index, [{"hamming": distance} for distance in WAYS]):
            way = WAYS[int(point.effort[-1])]
            points.setdefault(way, []).append(point._replace(method=way, effort=f"depth={depth}"))
    for method, index in (("nearest leaves", PCATree()), ("k-d tree", KDTree())):
        index.build(bench.items, threads=1)
        points[method] = bench.points(method, index, index.efforts(10))
    print(f"\n{name}: {bench.items.shape[0]:,} items of dimension {bench.items.shape[1]}")
    print(speedups.table([point for some in points.values() for point in some], 10), flush=True)
    reached = {
        method: {
            f"{recall:g}": {
                field: speedups.speed_up_at(some, recall, 10, field) for field in ("over_scan", "over_batch")
            }
            for recall in RECALLS
        }
        for method, some in points.items()
    }
    figures = {}
    for recall in RECALLS:
        tag = f"{recall:g}".replace("0.", "0")
        plain, boosted = (reached[way][f"{recall:g}"]["over_scan"] for way in ("own leaf", "boosted"))
        if plain is not None:
            figures[f"{name}_own_leaf_speed_up_{tag}"] = plain
        if boosted is not None:
            figures[f"{name}_boosted_speed_up_{tag}"] = boosted
    shape = {"items": bench.items.shape[0], "dimension": bench.items.shape[1], "queries": len(bench.queries)}
    return figures, {
        **shape,
        "speed_up_at": reached,
        "points": {method: [point._asdict() for point in some] for method, some in points.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--quick", action="store_true", help="small factors, few queries and depths, nothing written")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "xbox.json")
    arguments = parser.parse_args()

    figures: dict[str, float] = {}
    results: dict[str, Any] = {}
    for name, make in QUICK.items() if arguments.quick else ((name, DATA[name]) for name in arguments.data):
        found, results[name] = measure(name, make(), arguments.quick)
        figures |= found
        if not arguments.quick:
            common.write_result(
                arguments.out, figures, paper=PAPER, table=speedups.rows(results), results=results,
                seeds=[0], versions=common.versions("numpy", "numba"),
                data="factors of MovieLens-1M by implicit ALS, and synthetic vectors, not Xbox Movies and Yahoo!",
            )  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
