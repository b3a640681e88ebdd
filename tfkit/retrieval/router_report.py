"""What a router found out: its choices, and how far it gets beside one choice, mixtures, and who knows all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfkit.internal.files import write_atomically


class Choice(NamedTuple):
    """One index with one effort.

    Attributes:
        name: of the index.
        effort: keyword arguments of its `search`.
        recall: mean over the queries that the router learned from.
        query_us: processor time of a query on one thread, in microseconds.
    """

    name: str
    effort: Mapping[str, Any]
    recall: float
    query_us: float

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.effort.items())})"


class Row(NamedTuple):
    """A way of choosing, over the queries that decided nothing.

    Attributes:
        name: "single", "mixture", "oracle", or a model; "+ first steps" where the probe is run first.
        recall: mean.
        query_us: mean processor time of a query, in microseconds, with what choosing takes.
        own_us: of that, features and prediction.
        gain: queries a second over the best single choice at the same recall, its effort interpolated.
        over_mixture: over the best random mixture of two choices at the same recall.
        regret_us: mean time beyond that of the oracle.
    """

    name: str
    recall: float
    query_us: float
    own_us: float
    gain: float
    over_mixture: float
    regret_us: float


@dataclass(frozen=True)
class RouterReport:
    """What `Router.fit` found.

    Attributes:
        rows: the baselines and every model, over the queries that decided nothing.
        chosen: the name of the row that the router uses; "single" if no model is worth it.
        worth_it: whether routing was faster than the best single choice, on the queries that set the trade-off.
        choices: those between which is routed; `single` is the best alone, `probe` that of the first steps or None.
        measured_us: processor time of a query by `Router.search`, timed in turns with `measured_single_us`.
        measured_gain: their ratio, that of `measured_single_us` brought to the recall of the router.
        target_recall, k: as asked for.
        queries: how many learned, set the trade-off, and were reported on.
    """

    rows: tuple[Row, ...]
    chosen: str
    worth_it: bool
    choices: tuple[Choice, ...]
    single: Choice
    probe: Choice | None
    measured_us: float
    measured_single_us: float
    measured_gain: float
    target_recall: float
    k: int
    queries: tuple[int, int, int]

    @property
    def sentence(self) -> str:
        """What to do, in words."""
        row = {row.name: row for row in self.rows}
        oracle = f"An oracle would gain {row['oracle'].gain:.2f}."
        if not self.worth_it:
            return f"No router is worth it: {self.single} answers all queries. {oracle}"
        gain = f"{self.measured_gain:.2f} times as many queries as {self.single}"
        return f"Routing by {self.chosen} answers {gain}. {oracle}"

    def row(self, name: str) -> Row:
        """Returns the row of that name.

        Raises:
            KeyError: there is none.
        """
        return {row.name: row for row in self.rows}[name]

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it, ready for JSON."""
        plain = asdict(self)
        plain["rows"] = [row._asdict() for row in self.rows]
        plain["choices"] = [choice._asdict() for choice in self.choices]
        plain["single"] = self.single._asdict()
        plain["probe"] = None if self.probe is None else self.probe._asdict()
        return {**plain, "sentence": self.sentence}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes `to_dict` as JSON."""
        target = Path(path)
        write_atomically(target, (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        return target

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draws the time of a query, and what choosing takes of it, for each row."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 0.5 * len(self.rows) + 1.5), layout="tight")
        axis = figure.subplots()
        places = np.arange(len(self.rows))[::-1]
        own = np.array([row.own_us for row in self.rows])
        axis.barh(places, [row.query_us for row in self.rows] - own, color="0.7", label="searching")
        axis.barh(places, own, left=[row.query_us for row in self.rows] - own, color="0.2", label="choosing")
        axis.set_yticks(places, [f"{row.name}, recall {row.recall:.3f}" for row in self.rows])
        axis.set_xlabel("microseconds a query, one thread")
        axis.legend(fontsize=8)
        target = Path(path)
        figure.savefig(target, dpi=120)
        return target

    def __str__(self) -> str:
        lines = [f"{'':28}{'recall':>8}{'us':>9}{'own us':>8}{'gain':>7}{'/mixture':>9}{'regret us':>10}"]
        for row in self.rows:
            lines.append(
                f"{row.name:28}{row.recall:8.4f}{row.query_us:9.1f}{row.own_us:8.1f}{row.gain:7.2f}"
                f"{row.over_mixture:9.2f}{row.regret_us:10.1f}"
            )
        return "\n".join([*lines, self.sentence])


def single_cost(recall: float, curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> float:
    """Returns the least time at which one index reaches a mean recall, its effort interpolated between those measured.

    Args:
        recall: to be reached.
        curves: for each index the mean recalls and the times of its efforts.
    """
    return min(_reached(recall, *_front(*curve)) for curve in curves.values())


def mixture_cost(recall: float, recalls: np.ndarray, times: np.ndarray) -> float:
    """Returns the least mean time of a random mixture of two choices that reaches a mean recall: the lower hull."""
    best = np.inf
    for low, cheap in zip(recalls, times, strict=True):
        if low >= recall:
            best = min(best, cheap)
            continue
        enough = recalls >= recall
        share = (recall - low) / (recalls[enough] - low)
        best = min(best, np.min(cheap + share * (times[enough] - cheap), initial=np.inf))
    return float(best)


def _front(recalls: np.ndarray, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the points that no other beats, from little time to much."""
    order = np.lexsort((-recalls, times))
    recalls, times = recalls[order], times[order]
    better = recalls > np.concatenate([[-1.0], np.maximum.accumulate(recalls)[:-1]])
    return recalls[better], times[better]


def _reached(recall: float, recalls: np.ndarray, times: np.ndarray) -> float:
    place = int(np.searchsorted(recalls, recall))
    if place == len(recalls):
        return np.inf
    if place == 0:
        return float(times[0])
    return float(np.interp(recall, recalls[place - 1 : place + 1], times[place - 1 : place + 1]))
