"""How tfkit's indexes grow from 10,000 to 1,000,000 vectors: time and memory to build, time of a query.

    python benchmarks/retrieval_scale.py            # about an hour on one core
    python benchmarks/retrieval_scale.py --quick    # small sets: does it run?

Synthetic vectors of 128 dimensions (see vectors.py), one thread. Each index is built in a process of its own; times are
processor time, and the peak is that of the process beyond what it held before the vectors were read, over the bytes of
the vectors. A query is timed at the first of the index's own efforts that reaches the target recall on half of the
queries; recall and time are those of the other half.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import common, vectors
from benchmarks.common import say
from tfkit import retrieval

INDEXES = ("Exact", "NormScan", "IVF", "NSW", "ScaNN")
SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
DIMENSION, K, TARGET, SKEW = 128, 10, 0.95, 0.4
PLOT = Path(__file__).resolve().parents[1] / "docs" / "retrieval_scale.png"


def resident() -> int:
    """Returns the memory that the process holds now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reset_peak() -> None:
    """Lets the system count the most memory from here on, where it can: compiling took some before."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Returns the most memory that the process held since then, in bytes."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found, "the system does not tell"
    return int(found[1]) * 1024


def recall(scores: np.ndarray, truth: np.ndarray) -> float:
    """Returns the share of results whose score is among the true best, ties included."""
    worst = truth[:, -1:]
    return float((scores >= worst - 1e-5 * np.abs(worst)).mean())


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Builds one index in this process, and searches it."""
    index = getattr(retrieval, name)()
    # The compiled kernels are loaded before anything is measured.
    small = np.random.default_rng(0).normal(size=(2000, DIMENSION)).astype(np.float32)
    getattr(retrieval, name)().build(small, threads=1).search(small[:50], K, threads=1)
    reset_peak()
    before = resident()
    items = np.load(folder / "items.npy")
    started = time.process_time()
    index.build(items, threads=1)
    row: dict[str, Any] = {
        "build_s": time.process_time() - started,
        "peak_over_raw": (peak() - before) / items.nbytes,
        "memory_over_raw": index.memory_bytes / items.nbytes,
    }
    queries, truth = np.load(folder / "queries.npy"), np.load(folder / "truth.npy")
    half = len(queries) // 2
    for effort in index.efforts(K):
        if recall(index.search(queries[:half], K, threads=1, **effort).scores, truth[:half]) >= TARGET:
            break
    started = time.process_time()
    scores = index.search(queries[half:], K, threads=1, **effort).scores
    spent = time.process_time() - started
    return {
        **row,
        "effort": effort,
        "query_us": 1e6 * spent / (len(queries) - half),
        "recall": recall(scores, truth[half:]),
    }


def prepare(size: int, folder: Path, queries: int) -> None:
    """Writes the vectors and the true scores of one size."""
    made = vectors.synthetic(size, DIMENSION, skew=SKEW)
    np.save(folder / "items.npy", made.items)
    np.save(folder / "queries.npy", made.queries[:queries])
    found = retrieval.Exact().build(made.items).search(made.queries[:queries], K)
    np.save(folder / "truth.npy", found.scores)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws build time, peak memory and query time against the number of vectors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = (
        ("build_s", "seconds to build"),
        ("peak_over_raw", "peak memory over the vectors'"),
        ("query_us", "µs a query"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2))
    for axis, (key, label) in zip(axes, shown, strict=True):
        for name in dict.fromkeys(row["index"] for row in rows):
            own = [row for row in rows if row["index"] == name]
            axis.plot([row["items"] for row in own], [row[key] for row in own], "o-", label=name)
        axis.set(xscale="log", yscale="linear" if key == "peak_over_raw" else "log", xlabel="vectors", ylabel=label)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.suptitle(f"{DIMENSION} dimensions, one thread, recall@{K} of {TARGET}")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--indexes", nargs="+", default=list(INDEXES), choices=INDEXES)
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="small sets, nothing written")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "retrieval_scale.json")
    parser.add_argument("--measure", nargs=2, metavar=("INDEX", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder = arguments.measure
        print(json.dumps(measure(name, Path(folder))))
        return
    sizes, queries = ([2000, 4000], 100) if arguments.quick else (arguments.sizes, 1000)
    rows: list[dict[str, Any]] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            prepare(size, Path(folder), queries)
            for name in arguments.indexes:
                command = [sys.executable, __file__, "--measure", name, folder]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    say(f"{size:9,} {name:8} failed")
                    continue
                row = {"items": size, "index": name, **json.loads(done.stdout.splitlines()[-1])}
                rows.append(row)
                memory = f"peak {row['peak_over_raw']:.2f} and kept {row['memory_over_raw']:.2f} of the vectors"
                query = f"{row['query_us']:.1f} us a query at recall {row['recall']:.3f}"
                say(f"{size:9,} {name:8} built in {row['build_s']:.1f} s, {memory}, {query}")
        if not arguments.quick:
            largest = [row for row in rows if row["items"] == max(row["items"] for row in rows)]
            figures = {f"{row['index'].lower()}_peak_over_raw": row["peak_over_raw"] for row in largest}
            figures |= {f"{row['index'].lower()}_build_s": row["build_s"] for row in largest}
            common.write_result(
                arguments.out, figures, data={"synthetic": {"dimension": DIMENSION, "skew": SKEW, "queries": queries}},
                k=K, target_recall=TARGET, plot=PLOT.name, table=rows,
                versions=common.versions("numpy", "numba", "scann"),
            )  # fmt: skip
            plot(rows, PLOT)


if __name__ == "__main__":
    main()
