"""All recommenders by one protocol: full rankings, configurations chosen on validation events, tested once.

    python benchmarks/compare_recommenders.py --cache build/compare_recommenders    # about 30 minutes on one core
    python benchmarks/compare_recommenders.py --quick                               # does it run?

Three tasks. "small": MovieLens small, a quarter of the events held out at random; a fifth of the rest chooses among a
model's configurations by NDCG@10, and the chosen one learns from all of the rest. "1m": MovieLens-1M, the last item of
each of 6,040 users held out, the one before chooses. "cold": films without any event in training, ranked among
themselves; a fifth of the films. All items that a user has not taken are ranked, seen ones left out. Networks have few
configurations, for they cost the most: what a model used up is in the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from benchmarks import common
from benchmarks.common import say
from tfkit import recommenders as r
from tfkit.recommenders import Features, Interactions

K = 10
PLOT = common.RESULTS.parents[1] / "docs" / "compare_recommenders.png"
TITLES = {
    "small": "MovieLens small, random quarter",
    "1m": "MovieLens-1M, last item",
    "cold": "MovieLens small, films without events",
}
SHOWN = ("recall", "hit_rate", "mrr", "coverage", "novelty", "popularity")
FOLDER = Path(os.environ.get("TFKIT_DATA", "."))


def grid(**values: Any) -> list[dict[str, Any]]:
    """Returns all combinations of settings: a value that is no list is the same in all of them."""
    listed = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [dict(zip(listed, chosen, strict=True)) for chosen in itertools.product(*listed.values())]


def small_models() -> dict[str, tuple[type, list[dict[str, Any]]]]:
    """Returns class and configurations of each model for 75,000 events of 671 users."""
    pairs = grid(dimension=32, epochs=15, penalty=[0.0, 0.01], learning_rate=2e-3)
    sequences = {"dimension": 64, "length": 50, "epochs": 40, "dropout": 0.3}
    return {
        "Popularity": (r.Popularity, [{}]),
        "ItemKNN": (r.ItemKNN, grid(neighbours=[50, 200], shrinkage=[0.0, 10.0, 50.0])),
        "EASE": (r.EASE, grid(penalty=[100.0, 200.0, 400.0, 800.0])),
        "IALS": (
            r.IALS,
            grid(dimension=[64, 128], unobserved_weight=[0.03, 0.1, 0.3], penalty=[0.003, 0.01, 0.03], epochs=12),
        ),
        "BPR": (r.BPR, grid(penalty=[0.01, 0.03, 0.06], epochs=[50, 150, 300], negatives=["uniform", "dynamic"])),
        "WARP": (r.WARP, grid(penalty=[0.06, 0.12, 0.2], epochs=[60, 150])),
        "TwoTower": (r.TwoTower, grid(dimension=64, learning_rate=3e-3, epochs=[5, 10, 20], mixed_negatives=[0, 512])),
        "NeuMF": (r.NeuMF, pairs),
        "NeuMF, inner product": (r.NeuMF, [setting | {"similarity": "dot"} for setting in pairs]),
        "DeepCross": (r.DeepCross, grid(epochs=[3, 6])),
        "DLRM": (r.DLRM, grid(epochs=[3, 6])),
        "SASRec": (r.SASRec, [sequences]),
        "SASRec, gBCE": (r.SASRec, [sequences | {"loss": "gbce", "negatives": 256}]),
        "GRU4Rec": (r.GRU4Rec, [sequences | {"loss": "sampled_softmax", "negatives": 512}]),
        "BERT4Rec": (r.BERT4Rec, [sequences | {"loss": "sampled_softmax", "negatives": 512}]),
    }


def large_models() -> dict[str, tuple[type, list[dict[str, Any]]]]:
    """Returns class and configurations of each model for a million events."""
    sequences = {"dimension": 64, "length": 50, "epochs": 12, "learning_rate": 2e-3}
    return {
        "Popularity": (r.Popularity, [{}]),
        "ItemKNN": (r.ItemKNN, grid(neighbours=[50, 200], shrinkage=[0.0, 50.0])),
        "EASE": (r.EASE, grid(penalty=[200.0, 500.0, 1000.0])),
        "IALS": (r.IALS, grid(dimension=[64, 128], unobserved_weight=[0.1, 0.3, 1.0], penalty=0.003, epochs=10)),
        "BPR": (r.BPR, grid(penalty=[0.003, 0.01], epochs=[30], negatives=["uniform", "dynamic"])),
        "WARP": (r.WARP, grid(penalty=[0.03, 0.1], epochs=30)),
        "TwoTower": (r.TwoTower, grid(dimension=64, learning_rate=3e-3, epochs=[4, 8], batch_size=2048)),
        "SASRec, gBCE": (r.SASRec, [sequences | {"loss": "gbce", "negatives": 256}]),
        "GRU4Rec": (r.GRU4Rec, [sequences | {"loss": "sampled_softmax", "negatives": 512, "blocks": 1}]),
    }


def cold_models() -> dict[str, tuple[type, list[dict[str, Any]]]]:
    """Returns models for films without events: with their genres and words, and by their numbers alone."""
    settings = grid(dimension=64, learning_rate=3e-3, epochs=[5, 10], number_dropout=[0.2, 0.5])
    return {
        "TwoTower, features": (r.TwoTower, settings),
        "TwoTower, numbers": (r.TwoTower, settings[:1]),
        "DeepCross, features": (r.DeepCross, grid(epochs=3)),
    }


def movielens_small() -> tuple[Interactions, Features]:
    log = Interactions.from_file(
        FOLDER / "movielens_small_ratings.csv.gz", user="userId", item="movieId", rating="rating", time="timestamp"
    )
    films = pd.read_csv(FOLDER / "movielens_small_movies.csv.gz").drop_duplicates("movieId")
    known = films[films["movieId"].isin(log.item_labels)]
    absent = pd.DataFrame({"movieId": np.setdiff1d(log.item_labels, known["movieId"])})
    features = Features.from_frame(
        pd.concat([known, absent]), key="movieId", labels=log.item_labels, categories=["genres"], words=["title"],
        numbers=["year"], least=3,
    )  # fmt: skip
    return log.at_least(0.0), features


def movielens_1m() -> Interactions:
    data = np.load(FOLDER / "ml1m_sequences.npz", allow_pickle=False)
    users = np.repeat(np.arange(len(data["train_offsets"]) - 1), np.diff(data["train_offsets"]))
    items = data["train_items"].astype(np.int64) - 1
    return Interactions.from_arrays(users, items, item_labels=np.arange(3416), duplicates="first")


class Task:
    """Events to learn from, to choose by and to judge by."""

    def __init__(self, name: str, quick: bool) -> None:
        self.features: Features | None = None
        self.models = {"small": small_models, "1m": large_models, "cold": cold_models}[name]()
        if name == "1m":
            log = movielens_1m()
            log = log.select(log.users < 100) if quick else log
            self.training, self.held = r.leave_one_out(log)
            self.inner, self.judged = r.leave_one_out(self.training)
            return
        log, self.features = movielens_small()
        log = log.select(log.users < 40) if quick else log
        split, shares = (r.random_split, (0.25, 0.2)) if name == "small" else (r.cold_start_split, (0.2, 0.2))
        self.training, self.held = split(log, shares[0], seed=0)
        self.inner, self.judged = split(self.training, shares[1], seed=1)
        self.cold = name == "cold"

    def fitted(self, kind: type, settings: dict[str, Any], training: Interactions, with_features: bool) -> Any:
        return kind(**settings).fit(training, *([self.features] if with_features and self.features else []))

    def evaluation(self, model: Any, training: Interactions, held: Interactions) -> r.Evaluation:
        candidates = None
        if getattr(self, "cold", False):
            candidates = np.flatnonzero(held.item_counts)
        return r.evaluate(model, training, held, K, candidates=candidates)

    def run(self, name: str, quick: bool) -> dict[str, Any]:
        """Chooses a configuration of a model, and judges it."""
        kind, settings = self.models[name]
        with_features = issubclass(kind, (r.DeepCross, r.DLRM)) or name.endswith("features")
        if quick:
            settings = [setting | ({"epochs": 1} if "epochs" in setting else {}) for setting in settings[:1]]
        start = time.process_time()
        trials = []
        for setting in settings if len(settings) > 1 else []:
            model = self.fitted(kind, setting, self.inner, with_features)
            trials.append(self.evaluation(model, self.inner, self.judged).metrics[f"ndcg@{K}"])
        chosen = settings[int(np.argmax(trials))] if trials else settings[0]
        between = time.process_time()
        model = self.fitted(kind, chosen, self.training, with_features)
        seconds = time.process_time() - between
        found = self.evaluation(model, self.training, self.held)
        low, high = found.interval(f"ndcg@{K}")
        return {
            "model": name, f"ndcg@{K}": found.metrics[f"ndcg@{K}"], "low": low, "high": high,
            **{f"{key}@{K}": found.metrics[f"{key}@{K}"] for key in SHOWN},
            "fit_s": round(seconds, 2), "all_s": round(time.process_time() - start, 1), "configurations": len(settings),
            "chosen": chosen, "validation": max(trials) if trials else None,
        }  # fmt: skip


def rows(task: str, models: list[str], cache: Path | None, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields a task's row of each model, those of the cache read from there."""
    made = Task(task, quick)
    for number, model in enumerate(made.models):
        if not models or model in models:
            kept = None if cache is None else cache / f"{task}_{number}.json"
            if kept is not None and kept.exists() and json.loads(kept.read_text())["model"] == model:
                row = json.loads(kept.read_text())
            else:
                row = made.run(model, quick)
                if kept is not None:
                    common.write_json(kept, row)
            say(f"{task:6} {model:22} NDCG@{K} {row[f'ndcg@{K}']:.4f}  {row['all_s']:.0f} s")
            yield row


def plot(table: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(rows) for rows in table.values()]
    figure, axes = plt.subplots(
        len(table), 1, figsize=(8, 0.28 * sum(heights) + 0.9 * len(table)), height_ratios=heights, squeeze=False
    )
    for axis, (name, found) in zip(axes[:, 0], table.items(), strict=True):
        ordered = sorted(found, key=lambda row: row[f"ndcg@{K}"])
        values = np.array([row[f"ndcg@{K}"] for row in ordered])
        around = [values - [row["low"] for row in ordered], [row["high"] for row in ordered] - values]
        axis.barh([row["model"] for row in ordered], values, xerr=around, color="#4477aa", ecolor="#222222", height=0.7)
        axis.set_title(TITLES[name], loc="left", fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"NDCG@{K}, all items ranked, with 95 % intervals over users")
    figure.tight_layout()
    figure.savefig(PLOT, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tasks", nargs="+", default=["small", "cold", "1m"], choices=["small", "cold", "1m"])
    parser.add_argument("--models", nargs="+", default=[], help="only these")
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    table: dict[str, list[dict[str, Any]]] = {}
    for task in arguments.tasks:
        cache = None if arguments.quick else arguments.cache
        table[task] = list(rows(task, arguments.models, cache, arguments.quick))
        if not arguments.quick:
            write(table)


def write(table: dict[str, list[dict[str, Any]]]) -> None:
    figures = {}
    for name, found in table.items():
        best = {row["model"]: row[f"ndcg@{K}"] for row in found}
        for one, other in (("IALS", "Popularity"), ("EASE", "Popularity"), ("IALS", "BPR"), ("TwoTower", "IALS")):
            if one in best and other in best:
                figures[f"{name}_{one.lower()}_over_{other.lower()}"] = best[one] / best[other]
    plot(table)
    results, choice = {}, {}
    for name, found in table.items():
        ordered = sorted(found, key=lambda row: -row[f"ndcg@{K}"])
        columns = ["model", f"ndcg@{K}", "low", "high", *(f"{key}@{K}" for key in SHOWN), "fit_s", "configurations"]
        results[TITLES[name]] = [{column: row[column] for column in columns} for row in ordered]
        choice[name] = {row["model"]: {key: row[key] for key in ("chosen", "validation", "all_s")} for row in ordered}
    common.write_result(
        common.RESULTS / "compare_recommenders.json", figures, title="Recommenders by one protocol", plot=PLOT.name,
        about="MovieLens small: 100,004 events of 671 users and 9,066 films, a random quarter held out, or a fifth of "
        "the films; MovieLens-1M: the last item of 6,040 users. All unseen items are ranked, or all films without "
        "events. Configurations were chosen on validation events, and judged once; low and high end the 95 % interval "
        "over users, fit_s is processor time. Sequences of a random split have holes, which costs sequential models.",
        results=results, choice=choice, k=K, versions=common.versions("numpy", "keras", "tensorflow"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
