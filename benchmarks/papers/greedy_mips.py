"""Precision against speed-up over a scan: Greedy-MIPS, PCA tree, LSH and sampling on matrix-factorisation vectors.

    python benchmarks/papers/greedy_mips.py            # all data sets; about half an hour on one core
    python benchmarks/papers/greedy_mips.py --quick    # 32-dimensional factors and few queries: does it run?

The comparison of Yu, Hsieh, Lei, Dhillon, NIPS 2017, https://arxiv.org/abs/1610.03317, with our own indexes:
precision@k is the share of the true k best among the k found. Its data are factors of Netflix and Yahoo! Music; here
are factors of MovieLens-1M, which has 3,416 items only, and synthetic vectors (benchmarks/vectors.py). Each rival is
given several settings besides its efforts, and the best of them counts at each precision. Beside the paper's rivals
there are norm-ranging LSH, the k-d tree and the norm scan, which are not in it. How time is measured:
benchmarks/speedups.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import common, speedups, vectors
from tfkit.retrieval import (
    DiamondSampling,
    GreedyMIPS,
    Index,
    KDTree,
    NormRangingLSH,
    NormScan,
    PCATree,
    SimpleLSH,
    WedgeSampling,
)

#: The abstract: "on a candidate set containing half a million vectors of dimension 200, Greedy-MIPS runs 200x faster
#: than the naive approach while yielding search results with the top-5 precision greater than 75%".
PAPER = {
    "items": 500_000, "dimension": 200, "precision_at_5": 0.75, "speed_up": 200,
    "curves": "not quoted: the paper gives them as plots",
}  # fmt: skip
DATA: dict[str, Callable[[], vectors.Vectors]] = {
    "ml1m_50": lambda: vectors.movielens(50),
    "ml1m_100": lambda: vectors.movielens(100),
    "ml1m_200": lambda: vectors.movielens(200),
    "synthetic_20000_64": lambda: vectors.synthetic(20_000, 64),
    "synthetic_100000_128": lambda: vectors.synthetic(100_000, 128),
}
QUICK = {"ml1m_32": lambda: vectors.movielens(32)}
PRECISIONS = (0.75, 0.9, 0.95)
#: Those of the paper, which Greedy-MIPS is held against.
RIVALS = ("PCATree", "SimpleLSH", "WedgeSampling", "DiamondSampling")


def settings(count: int, quick: bool) -> Iterator[tuple[str, Index, list[dict[str, Any]] | None]]:
    """Gives each method's name, an index to build, and the efforts; None: those of the index."""
    deepest = (count // 16).bit_length()
    yield "GreedyMIPS", GreedyMIPS(), None
    for depth in (deepest,) if quick else (deepest - 4, deepest - 2, deepest):
        yield "PCATree", PCATree(depth=depth), [{"hamming": far} for far in range(5)]
        yield "PCATree", PCATree(depth=depth), None
    for bits in (64,) if quick else (16, 64, 128):
        yield "SimpleLSH", SimpleLSH(bits=bits), None
        yield "NormRangingLSH", NormRangingLSH(bits=bits), None
    for method in (WedgeSampling, DiamondSampling):
        for share in (2,) if quick else (1, 4, 16):
            budgets = [(count >> power, share * (count >> power)) for power in range(3, 10, 2) if count >> power >= 10]
            efforts = [{"candidates": candidates, "samples": samples} for candidates, samples in reversed(budgets)]
            yield method.__name__, method(), efforts
    yield "KDTree", KDTree(), None
    yield "NormScan", NormScan(), None


def measure(name: str, make: Callable[[], vectors.Vectors], quick: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns figures and curves of one data set."""
    bench = speedups.Bench(make(), queries=60 if quick else 200, rounds=3 if quick else 5)
    points: dict[str, list[speedups.Point]] = {}
    for method, index, efforts in settings(len(bench.items), quick):
        index.build(bench.items, threads=1)
        points.setdefault(method, []).extend(bench.points(method, index, efforts or index.efforts(10)))
    print(f"\n{name}: {bench.items.shape[0]:,} items of dimension {bench.items.shape[1]}")
    print(speedups.table([point for some in points.values() for point in some], 10), flush=True)
    reached = {
        method: {
            f"p{depth}_{precision:g}": {
                field: speedups.speed_up_at(some, precision, depth, field) for field in ("over_scan", "over_batch")
            }
            for depth in speedups.DEPTHS
            for precision in PRECISIONS
        }
        for method, some in points.items()
    }
    figures = {}
    for depth, precision in ((5, 0.75), (10, 0.9), (10, 0.95)):
        key = f"p{depth}_{precision:g}"
        ours = reached["GreedyMIPS"][key]["over_scan"]
        if ours is None:
            continue
        tag = key.replace("0.", "0")
        figures[f"{name}_greedy_speed_up_{tag}"] = ours
        for rival in RIVALS:
            theirs = reached[rival][key]["over_scan"]
            # A method that never gets there is a scan.
            figures[f"{name}_greedy_over_{rival.lower()}_{tag}"] = ours / max(theirs or 1.0, 1.0)
    shape = {"items": bench.items.shape[0], "dimension": bench.items.shape[1], "queries": len(bench.queries)}
    return figures, {
        **shape,
        "speed_up_at": reached,
        "points": {method: [point._asdict() for point in some] for method, some in points.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=list(DATA), default=list(DATA))
    parser.add_argument("--quick", action="store_true", help="small factors, few queries and settings, nothing written")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "greedy_mips.json")
    arguments = parser.parse_args()

    figures: dict[str, float] = {}
    results: dict[str, Any] = {}
    for name, make in QUICK.items() if arguments.quick else ((name, DATA[name]) for name in arguments.data):
        found, results[name] = measure(name, make, arguments.quick)
        figures |= found
        if not arguments.quick:
            common.write_result(
                arguments.out, figures, paper=PAPER, table=speedups.rows(results), results=results,
                seeds=[0], versions=common.versions("numpy", "numba"),
                data="factors of MovieLens-1M by implicit ALS, and synthetic vectors: smaller than the paper's",
            )  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {value:.2f}")


if __name__ == "__main__":
    main()
