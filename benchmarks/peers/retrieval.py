"""tfkit's indexes beside faiss, hnswlib, usearch and scann: recall@10 against queries a second of one thread.

    python benchmarks/peers/retrieval.py --peer-python PEERVENV/bin/python
    python benchmarks/peers/retrieval.py --peer-python PEERVENV/bin/python --quick    # small sets: does it run?

Each algorithm runs in a process of its own (retrieval_worker.py): tfkit's indexes and the peers in the interpreter of
`--peer-python` (requirements-retrieval.txt), scann's own wheel, which would clash with scann-core there, in this one,
and tfkit's `ScaNN` in both. A recall counts an id if its inner product, computed here, is among the ten largest. Speed
is processor time of one thread, in rounds: every algorithm once, then all again, so that a change of the machine's
speed falls on all. Queries a second at a recall lie between the measured efforts on either side of it, along the
logarithm; a ratio of two algorithms is the median over the rounds. Efforts are grids, the same for graphs and for
clusters of every library. That of ScaNN's trees was widened once, for all variants alike, after a first run had shown
that it ended short of a recall of 0.99; and that of our `IVF`, which ended at a fifth of its clusters, likewise.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import common, vectors
from benchmarks.common import say
from tfkit.retrieval import Exact

K = 10
RECALLS = (0.8, 0.9, 0.95, 0.99)
WORKER = Path(__file__).with_name("retrieval_worker.py")
PLOTS = Path(__file__).resolve().parents[2] / "docs"
#: (name, module, whether it runs in this interpreter, where scann's own wheel is)
ALGORITHMS = (
    ("tfkit Exact", "tfkit_", False),
    ("tfkit NormScan", "tfkit_", False),
    ("tfkit NSW", "tfkit_", False),
    ("tfkit IVF", "tfkit_", False),
    ("tfkit GreedyMIPS", "tfkit_", False),
    ("tfkit ScaNN", "tfkit_", False),
    ("tfkit ScaNN", "tfkit_", True),
    ("scann", "scann_", True),
    ("scann brute force", "scann_", True),
    ("scann", "scann_", False),
    ("scann brute force", "scann_", False),
    ("faiss Flat", "faiss_", False),
    ("faiss HNSW", "faiss_", False),
    ("faiss IVF", "faiss_", False),
    ("faiss IVFPQ fast scan", "faiss_", False),
    ("hnswlib", "hnswlib_", False),
    ("usearch", "usearch_", False),
)
GRAPHS = ("faiss HNSW", "hnswlib", "usearch")
EXACT = ("faiss Flat", "scann brute force", "scann brute force (core)")
#: Efforts whose recall is below this are not timed.
LEAST_RECALL = 0.6
#: One with this recall has found everything; one slower than another of at least its recall by this factor, or than the
#: scan by that one, is not timed again.
ALL, AHEAD, HOPELESS = 0.9995, 1.3, 2.0


def data_sets(quick: bool) -> dict[str, Callable[[], vectors.Vectors]]:
    if quick:
        return {"synthetic 3,000 x 32": lambda: vectors.synthetic(3000, 32)}
    return {
        "ml1m factors 3,416 x 64": lambda: vectors.movielens(64),
        "GloVe 100,000 x 50": vectors.glove,
        "synthetic 100,000 x 128, even norms": lambda: vectors.synthetic(100_000, 128, skew=0.2),
        "synthetic 100,000 x 128, skewed norms": lambda: vectors.synthetic(100_000, 128, skew=0.8),
        "synthetic 100,000 x 300, skewed norms": lambda: vectors.synthetic(100_000, 300, skew=0.6),
    }


class Process:
    """An algorithm in its process."""

    def __init__(self, name: str, module: str, python: str, data: Path) -> None:
        self.name, self.efforts, self.recalls = name, [], []
        pipe = subprocess.PIPE
        command = [python, str(WORKER)]
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        label = name.removesuffix(" (core)").removesuffix(" (wheel)")
        self.ask("start", module=module, name=label, data=str(data), k=K)

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"operation": operation, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "its process ended"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def walk(self, efforts: Sequence[dict[str, Any]], scan_us: float) -> None:
        """Finds the efforts worth timing, and their recalls.

        Left out are those that find too little, that ask for more than one which found everything, that take much
        longer than a scan, or that another one beats by far in both.
        """
        tried: list[tuple[dict[str, Any], float, float]] = []
        for effort in efforts:
            if any(
                recall >= ALL and all(effort[key] >= value for key, value in less.items()) for less, recall, _ in tried
            ):
                continue
            recall = self.ask("check", effort=effort)["recall"]
            if recall >= LEAST_RECALL or len(efforts) == 1:
                tried.append((effort, recall, self.ask("time", effort=effort, single=False)["us"]))
        for effort, recall, us in tried:
            beaten = any(other >= recall and AHEAD * time < us for _, other, time in tried)
            if len(efforts) == 1 or not beaten and us < HOPELESS * scan_us:
                self.efforts.append(effort)
                self.recalls.append(recall)

    def times(self, single: bool) -> list[float]:
        return [self.ask("time", effort=effort, single=single)["us"] for effort in self.efforts]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def front(recalls: Sequence[float], us: Sequence[float]) -> list[tuple[float, float]]:
    """Returns the (recall, time) that no other beats in both, from little recall to much."""
    kept: list[tuple[float, float]] = []  # From much recall to little, each faster than the one before.
    for recall, time in sorted(zip(recalls, us, strict=True), key=lambda point: (-point[0], point[1])):
        if not kept or time < kept[-1][1]:
            kept.append((recall, time))
    return kept[::-1]


def speed_at(recalls: Sequence[float], us: Sequence[float], wanted: float) -> float | None:
    """Returns queries a second at a recall, along the front; None if it is not reached."""
    best = front(recalls, us)
    if not best or best[-1][0] < wanted:
        return None
    found = np.interp(wanted, [recall for recall, _ in best], [np.log(time) for _, time in best])
    return float(1e6 / np.exp(found))


def measure(
    name: str, found: vectors.Vectors, peer_python: str | None, only: Sequence[str], queries: int, rounds: int
) -> dict[str, Any]:
    """Builds every algorithm over one data set, and times them in turns."""
    items = found.items
    asked = np.ascontiguousarray(found.queries[np.random.default_rng(0).permutation(len(found.queries))[:queries]])
    truth = Exact().build(items).search(asked, K, threads=1).ids
    norms = np.linalg.norm(items, axis=1)
    row: dict[str, Any] = {"items": len(items), "dimension": items.shape[1], "queries": len(asked), "algorithms": {}}
    row["norm_variation"] = float(norms.std() / norms.mean())
    running: list[Process] = []
    scan_us = float("inf")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, items=items, queries=asked, truth=truth)
        for label, module, here in ALGORITHMS:
            if only and label not in only:
                continue
            python = sys.executable if here else peer_python
            shown = label if "cann" not in label.lower() else f"{label} ({'wheel' if here else 'core'})"
            if python is None:
                continue
            try:
                process = Process(shown, module, python, data)
                built = process.ask("build")
                process.walk(built.pop("efforts"), scan_us)
                if label == "tfkit Exact":
                    scan_us = process.times(single=False)[0]
            except RuntimeError as error:
                say(f"  {shown} left out: {error}")
                row["algorithms"][shown] = {"error": str(error)}
                continue
            row["algorithms"][shown] = {**built, "efforts": process.efforts, "recalls": process.recalls}
            say(f"  {shown:28} built in {built['build_s']:.1f} s, recall up to {max(process.recalls, default=0):.3f}")
            running.append(process)
        for mode in ("batch", "single"):
            timed = [{p.name: p.times(mode == "single") for p in running} for _ in range(rounds)]
            for process in running:
                entry = row["algorithms"][process.name]
                entry[f"{mode}_us"] = [[round(us, 3) for us in one[process.name]] for one in timed]
                entry[f"{mode}_qps"] = {
                    str(wanted): _median([speed_at(process.recalls, us, wanted) for us in entry[f"{mode}_us"]])
                    for wanted in RECALLS
                }
        for process in running:
            process.close()
    say(f"\n{name}: queries a second, one thread, batch (single)")
    for label, entry in row["algorithms"].items():
        if "batch_qps" in entry:
            cells = (_cell(entry["batch_qps"][str(w)], entry["single_qps"][str(w)]) for w in RECALLS)
            say(f"  {label:28}" + "".join(f"{cell:>24}" for cell in cells))
    return row


def _cell(batch: float | None, single: float | None) -> str:
    return "-" if batch is None or single is None else f"{batch:,.0f} ({single:,.0f})"


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def ratio(
    row: dict[str, Any], ours: str, theirs: Sequence[str], wanted: float, mode: str = "batch"
) -> tuple[float, str] | None:
    """Returns ours over the fastest of theirs at a recall, the median over the rounds, and which that was."""

    def speeds(label: str) -> list[float | None]:
        entry = row["algorithms"].get(label, {})
        return [speed_at(entry["recalls"], us, wanted) for us in entry.get(f"{mode}_us", [])]

    own = speeds(ours)
    found = []
    for label in theirs:
        pairs = [(a, b) for a, b in zip(own, speeds(label), strict=False) if a is not None and b is not None]
        if pairs:
            found.append((float(np.median([a / b for a, b in pairs])), label))
    return min(found) if found else None


def figures_of(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Returns the figures that are there to be had: the worst over the data sets that each is about."""
    figures: dict[str, float] = {}

    def put(key: str, value: float) -> None:
        figures[key] = min(value, figures.get(key, np.inf))

    for name, row in rows.items():
        labels = [label for label, entry in row["algorithms"].items() if "batch_us" in entry]
        others = [label for label in labels if not label.startswith("tfkit") and "(core)" not in label]
        for wanted in RECALLS:
            for mode in ("batch", "single"):
                found = ratio(row, "tfkit ScaNN (core)", others, wanted, mode)
                suffix = "" if mode == "batch" else "_single"
                if found and "ml1m" not in name:
                    put(f"scann_over_best_peer_{round(100 * wanted):03d}{suffix}", found[0])
        if "even norms" in name:
            for wanted in RECALLS:
                found = ratio(row, "tfkit NSW", ["hnswlib"], wanted)
                if found:
                    put(f"nsw_over_hnswlib_{round(100 * wanted):03d}", found[0])
            pair = [row["algorithms"].get(label, {}).get("build_s") for label in ("tfkit NSW", "hnswlib")]
            if all(pair):
                figures["nsw_build_over_hnswlib"] = pair[0] / pair[1]
        if "skewed" in name and "128" in name:
            entry = row["algorithms"].get("tfkit NSW", {})
            fast = [r for r in entry.get("recalls", []) if r >= 0.95]
            found = ratio(row, "tfkit NSW", ["faiss Flat"], fast[0]) if fast else None
            if found:
                figures["nsw_skewed_recall"], figures["nsw_skewed_over_flat"] = fast[0], found[0]
            best = [max(row["algorithms"].get(label, {}).get("recalls", [0.0]) or [0.0]) for label in GRAPHS]
            figures["peer_graphs_skewed_best_recall"] = max(best)
        found = ratio(row, "tfkit Exact", [label for label in EXACT if label in labels], 0.99)
        if found:
            put("exact_batch_over_best_peer", found[0])
    return figures


def plot(name: str, row: dict[str, Any], path: Path) -> None:
    """Draws recall against queries a second, batches left and single queries right."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), sharey=True, sharex=True)
    for axis, mode in zip(axes, ("batch", "single"), strict=True):
        for number, (label, entry) in enumerate(row["algorithms"].items()):
            if f"{mode}_us" not in entry:
                continue
            best = front(entry["recalls"], np.median(entry[f"{mode}_us"], axis=0))
            style = "-" if label.startswith("tfkit") else ":"
            colour = plt.get_cmap("tab20")(number % 20)
            xs, ys = [recall for recall, _ in best], [1e6 / time for _, time in best]
            axis.plot(xs, ys, style, marker="osD^vPX*"[number % 8], markersize=5, label=label, color=colour)
        axis.set(yscale="log", xlabel=f"recall@{K}", title=mode)
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("queries a second, one thread")
    figure.suptitle(name)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter of the peers' environment")
    parser.add_argument("--only", nargs="+", default=[], help="algorithms to run")
    parser.add_argument("--data", nargs="+", help="parts of the names of data sets to run; the others stay")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="a small data set, nothing written")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "retrieval_peers.json")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if arguments.data and arguments.out.is_file() and not arguments.quick:
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["results"]
    figures: dict[str, float] = {}
    names = list(data_sets(arguments.quick))
    for name, load in data_sets(arguments.quick).items():
        if arguments.data and not any(part in name for part in arguments.data):
            continue
        say(f"\n{name}")
        try:
            found = load()
        except FileNotFoundError as error:
            say(f"  left out: {error}")
            continue
        rounds, queries = (2, 200) if arguments.quick else (arguments.rounds, arguments.queries)
        rows[name] = measure(name, found, arguments.peer_python, arguments.only, queries, rounds)
        figures = figures_of(rows)
        if not arguments.quick:
            rows = {label: rows[label] for label in names if label in rows}
            plot(name, rows[name], PLOTS / f"retrieval_{names.index(name) + 1}.png")
            common.write_result(
                arguments.out, figures, k=K, rounds=rounds, results=rows,
                data={label: {key: row[key] for key in ("items", "dimension", "queries", "norm_variation")}
                      for label, row in rows.items()},
                versions=common.versions("numpy", "numba", "scann", "tensorflow"),
            )  # fmt: skip
    for key, value in figures.items():
        say(f"{key}: {value:.3g}")


if __name__ == "__main__":
    main()
