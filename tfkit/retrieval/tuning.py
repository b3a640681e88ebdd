"""Autotune: builds several indexes, walks their efforts, and gives back the fastest that finds enough.

What is fastest depends on the vectors: on skewed norms a scan by norm or a graph wins, on others clusters and codes.
So everything is measured here, on queries of the user's: recall on one half of them decides, and the other half, which
decides nothing, tells the recall to expect. Times are processor time of one thread.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkit.internal import checks
from tfkit.internal.files import write_atomically
from tfkit.retrieval import scann
from tfkit.retrieval.base import Index, SearchResult, as_vectors, thread_count
from tfkit.retrieval.exact import Exact
from tfkit.retrieval.ivf import IVF
from tfkit.retrieval.norm_scan import NormScan
from tfkit.retrieval.nsw import NSW

#: `progress(done, total, text)`: seconds gone, seconds given, and what is being done.
Progress = Callable[[float, float, str], None]
#: Where indexes are larger than this, a tenth of the items is indexed first, to see how long the whole will take.
PROBED_ITEMS = 20_000
PROBE_SHARE = 0.1
#: The name of the exact scan, which is always looked at.
BASELINE = "Exact"
#: Scores this part of a query's largest below the k-th best are equal to it: sums are rounded in different orders.
ROUNDING = 1e-5
#: Efforts beyond this many times the time of the fastest that suffices are not looked at.
HOPELESS = 4.0
#: Points this close to the fastest are timed again, in turns.
CONTENDERS = 1.3
ROUNDS = 5


class Point(NamedTuple):
    """One index with one effort.

    Attributes:
        name: of the index.
        effort: keyword arguments of its `search`.
        recall: share of the true best that it found, over the tuning queries; see `recall`.
        query_us: processor time of a query, in microseconds.
        build_s: processor time of the build, in seconds.
        memory_bytes: of the index.
    """

    name: str
    effort: Mapping[str, Any]
    recall: float
    query_us: float
    build_s: float
    memory_bytes: int


@dataclass(frozen=True)
class Tuning:
    """What `autotune` found.

    Attributes:
        index: the index to use, built.
        effort: keyword arguments for its `search`.
        recall: over queries that took no part in the choice.
        target_recall, k: as they were asked for.
        best: the point chosen.
        points: all that were measured, index by index, from little effort to much.
        skipped: names of indexes there was no time for, and why.
    """

    index: Index
    effort: Mapping[str, Any]
    recall: float
    target_recall: float
    k: int
    best: Point
    points: tuple[Point, ...]
    skipped: Mapping[str, str]

    def search(self, queries: Any, k: int | None = None, *, threads: int | None = None) -> SearchResult:
        """Searches the index with the effort that was chosen; see `Index.search`."""
        return self.index.search(queries, self.k if k is None else k, threads=threads, **self.effort)

    def to_dict(self) -> dict[str, Any]:
        """Returns all but the index, ready for JSON."""
        return {
            "index": repr(self.index),
            "effort": dict(self.effort),
            "held_out_recall": self.recall,
            "target_recall": self.target_recall,
            "k": self.k,
            "best": self.best._asdict(),
            "points": [point._asdict() for point in self.points],
            "skipped": dict(self.skipped),
        }

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Writes `to_dict` as JSON.

        Args:
            path: of the file.
            force: overwrite an existing file.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        target = _free(path, force)
        write_atomically(target, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        return target

    def plot(self, path: str | os.PathLike[str], *, force: bool = False) -> Path:
        """Draws recall against queries a second, a line for each index, and marks the choice.

        Args:
            path: of the file, whose suffix names the format, such as .png.
            force: overwrite an existing file.

        Raises:
            FileExistsError: the file is there and `force` is False.
        """
        from matplotlib.figure import Figure

        target = _free(path, force)
        figure = Figure(figsize=(8, 5), layout="tight")
        axis = figure.subplots()
        for number, name in enumerate(dict.fromkeys(point.name for point in self.points)):
            curve = [point for point in self.points if point.name == name]
            recalls, speeds = [p.recall for p in curve], [1e6 / p.query_us for p in curve]
            axis.plot(recalls, speeds, marker="osD^vPX*"[number % 8], label=name, linewidth=1)
        axis.scatter([self.best.recall], [1e6 / self.best.query_us], s=160, facecolors="none", edgecolors="black")
        axis.axvline(self.target_recall, color="0.6", linestyle="--", linewidth=0.8)
        axis.set(yscale="log", xlabel=f"recall@{self.k}", ylabel="queries a second, one thread")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=8)
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=120, format=target.suffix[1:] or "png")
        write_atomically(target, drawn.getvalue())
        return target


def candidates(count: int) -> dict[str, Index]:
    """Returns the indexes that `autotune` looks at for so many items, the fastest to build first."""
    found: dict[str, Index] = {"NormScan": NormScan()}
    if scann.available():
        found["ScaNN"] = scann.ScaNN()
        if count >= scann.TREE_ITEMS:
            found["ScaNN, hashing"] = scann.ScaNN("hashing")
    found["IVF"] = IVF()
    found["NSW"] = NSW()
    return found


def autotune(
    items: Any,
    queries: Any,
    target_recall: float = 0.95,
    *,
    k: int = 10,
    seconds: float = 120.0,
    indexes: Mapping[str, Index] | Sequence[Index] | None = None,
    single: bool = False,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tuning:
    """Picks index and effort for these vectors.

    Args:
        items: (items, dimension).
        queries: (queries, dimension), at least 20, such as will be asked; a few hundred tell enough.
        target_recall: share of the true k best that must be found, in the mean over the queries, in (0, 1].
        k: items sought for each query.
        seconds: for all of it, about; no index is begun that would take longer. The exact scan, under the name "Exact",
            is always there.
        indexes: to choose from, not built; by default `candidates`.
        single: time queries that come one at a time instead of all at once.
        threads: most threads to build with; searches are timed on one.
        seed: of the split of the queries.
        progress: called as the work goes on.

    Raises:
        ValueError: an argument breaks its rule.
    """
    vectors = as_vectors("items", items)
    asked = as_vectors("queries", queries, vectors.shape[1], least=20)
    k = checks.integer("k", k, 1, len(vectors))
    target_recall = checks.number("target_recall", target_recall, 0, 1)
    if not target_recall > 0:
        raise checks.error("target_recall", "above 0", target_recall)
    seconds, seed, threads = (
        checks.number("seconds", seconds, 0),
        checks.integer("seed", seed, 0),
        thread_count(threads),
    )
    if not isinstance(single, bool):
        raise checks.error("single", "True or False", single)
    if progress is not None and not callable(progress):
        raise checks.error("progress", "a function of (done, total, text)", progress)
    named = candidates(len(vectors)) if indexes is None else _named(indexes)
    run = _Run(vectors, asked, target_recall, k, seconds, single, threads, seed, progress)
    return run.run({BASELINE: Exact(), **named})


def _named(indexes: Any) -> dict[str, Index]:
    """Returns the indexes by name, checked."""
    if not isinstance(indexes, Mapping):
        if not isinstance(indexes, Sequence):
            raise checks.error("indexes", "a mapping or list of indexes", indexes)
        indexes = {repr(index): index for index in indexes}
    for name, index in indexes.items():
        if not isinstance(name, str) or not isinstance(index, Index):
            raise checks.error("indexes", "a mapping of names to indexes, or a list of indexes", index)
        if name == BASELINE and type(index) is not Exact:
            raise checks.error("indexes", f"without the name {BASELINE!r}, which the exact scan has", index)
    return dict(indexes)


class _Run:
    """One call of `autotune`."""

    def __init__(
        self,
        items: np.ndarray,
        queries: np.ndarray,
        target: float,
        k: int,
        seconds: float,
        single: bool,
        threads: int,
        seed: int,
        progress: Progress | None,
    ) -> None:
        order = np.random.default_rng(seed).permutation(len(queries))
        half = len(order) // 2
        self.items, self.target, self.k, self.single, self.threads = items, target, k, single, threads
        self.seconds, self.started, self.progress = seconds, time.perf_counter(), progress
        oracle = Exact().build(items, threads=threads)
        self.tuning, self.held_out = (queries[part] for part in (order[:half], order[half:]))
        self.truth, self.held_truth = (oracle.search(part, k, threads=threads) for part in (self.tuning, self.held_out))
        self.points: list[Point] = []
        self.built: dict[str, Index] = {}
        self.skipped: dict[str, str] = {}

    def run(self, indexes: Mapping[str, Index]) -> Tuning:
        for name, index in indexes.items():
            if self._build(name, index):
                self._walk(name, index)
        enough = [point for point in self.points if point.recall >= self.target]
        best = self._fastest(enough)
        index = self.built[best.name]
        return Tuning(
            index=index,
            effort=best.effort,
            recall=recall(index.search(self.held_out, self.k, **best.effort), self.held_truth),
            target_recall=self.target,
            k=self.k,
            best=best,
            points=tuple(self.points),
            skipped=self.skipped,
        )

    def _build(self, name: str, index: Index) -> bool:
        """Builds an index if there is time for it."""
        left = self._left()
        if name != BASELINE:
            needed = 0.0
            if len(self.items) > PROBED_ITEMS and left > 0:
                self._tell(f"{name}: how long will it take")
                begun = time.perf_counter()
                index.build(self.items[: int(PROBE_SHARE * len(self.items))], threads=self.threads)
                needed = (time.perf_counter() - begun) / PROBE_SHARE
                left = self._left()
            if left <= needed:
                self.skipped[name] = f"about {needed:.0f} s to build, {max(left, 0):.0f} s left"
                return False
        self._tell(f"{name}: building")
        begun = time.process_time()
        index.build(self.items, threads=self.threads)
        self.build_s = time.process_time() - begun
        self.built[name] = index
        return True

    def _left(self) -> float:
        """Returns the seconds that are left."""
        return self.seconds - (time.perf_counter() - self.started)

    def _walk(self, name: str, index: Index) -> None:
        """Measures an index from little effort to much, and in between around the first that suffices."""
        made: list[Point] = []
        for effort in index.efforts(self.k):
            made.append(self._measure(name, index, effort))
            if made[-1].recall >= self.target and made[-1].recall > 0.999:
                break
            if made[-1].query_us > HOPELESS * self._least() or self._left() <= 0:
                break
        for _ in range(2 if self._left() > 0 else 0):
            enough = next((i for i, point in enumerate(made) if point.recall >= self.target), 0)
            middle = between(made[enough - 1].effort, made[enough].effort) if enough else None
            if middle is not None:
                made.insert(enough, self._measure(name, index, middle))
        self.points += made

    def _measure(self, name: str, index: Index, effort: Mapping[str, Any]) -> Point:
        self._tell(f"{name}: {', '.join(f'{key}={value}' for key, value in effort.items()) or 'searching'}")
        found = index.search(self.tuning, self.k, threads=1, **effort)
        return Point(
            name,
            dict(effort),
            recall(found, self.truth),
            self._query_us(index, effort),
            self.build_s,
            index.memory_bytes,
        )

    def _query_us(self, index: Index, effort: Mapping[str, Any]) -> float:
        """Returns the least processor time of a query over a few passes."""
        rows = self.tuning[:100] if self.single else self.tuning
        best = np.inf
        for _ in range(3):
            begun = time.process_time()
            if self.single:
                for row in rows:
                    index.search(row, self.k, threads=1, **effort)
            else:
                index.search(rows, self.k, threads=1, **effort)
            best = min(best, time.process_time() - begun)
        return max(1e6 * best / len(rows), 1e-3)

    def _least(self) -> float:
        """Returns the time of the fastest point so far that suffices."""
        return min((point.query_us for point in self.points if point.recall >= self.target), default=np.inf)

    def _fastest(self, enough: Sequence[Point]) -> Point:
        """Returns the fastest, after the close ones were timed again in turns."""
        least = min(point.query_us for point in enough)
        close = [point for point in enough if point.query_us <= CONTENDERS * least]
        if len(close) == 1:
            return close[0]
        self._tell(f"timing {len(close)} again, in turns")
        times = [[self._query_us(self.built[point.name], point.effort) for point in close] for _ in range(ROUNDS)]
        return close[int(np.argmin(np.median(times, axis=0)))]

    def _tell(self, text: str) -> None:
        if self.progress is not None:
            self.progress(min(time.perf_counter() - self.started, self.seconds), self.seconds, text)


def recall(found: SearchResult, truth: SearchResult) -> float:
    """Returns the share of the true best that were found, by score: of items that are equally good any will do.

    Args:
        found: the result to judge, whose scores are inner products, as those of every index here are.
        truth: the exact result for the same queries and k.

    >>> truth = SearchResult(np.array([[5.0, 4.0]], np.float32), np.array([[2, 3]]))
    >>> recall(SearchResult(np.array([[5.0, 1.0]], np.float32), np.array([[2, 7]])), truth)
    0.5
    """
    return float(recalls(found, truth).mean())


def recalls(found: SearchResult, truth: SearchResult) -> np.ndarray:
    """Returns the `recall` of each query, float64, (queries,)."""
    best = np.nan_to_num(truth.scores)  # Where float32 cannot hold them, the largest that it can.
    enough = best[:, -1:] - ROUNDING * np.abs(best).max(axis=1, keepdims=True)
    each: np.ndarray = ((found.ids >= 0) & (np.nan_to_num(found.scores) >= enough)).mean(axis=1)
    return each


def _free(path: str | os.PathLike[str], force: bool) -> Path:
    target = Path(path)
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists. Choose another path, or pass force=True to overwrite it.")
    return target


def between(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the effort halfway between two, as factors go; None if there is no other in between."""
    if low.keys() != high.keys():
        return None
    middle = {
        name: round(float(np.sqrt(low[name] * high[name]))) if isinstance(high[name], int) else high[name]
        for name in low
    }
    return None if middle in (dict(low), dict(high)) else middle
