"""Recommenders beside implicit, cornac and surprise on MovieLens small: ratings by five folds, rankings on one split.

    python benchmarks/peers/recommenders.py --peer-python PEERVENV/bin/python --surprise-python OTHERVENV/bin/python
    python benchmarks/peers/recommenders.py --quick

All run on one thread. For epochs and full rankings both sides have the same hyper-parameters, set before, take turns,
and a ratio is the median over the rounds of processor times. For quality each side has a grid of its own: the settings
of ratings are chosen on a fifth of the first fold's training part and then judged on all folds, those of rankings on a
fifth of the training part and then judged once. Surprise needs NumPy 1, and so an interpreter of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit.recommenders import (
    BPR,
    EASE,
    IALS,
    BiasedMF,
    Interactions,
    RatingALS,
    SVDPlusPlus,
    evaluate,
    k_fold,
    random_split,
    rating_metrics,
)
from tfkit.recommenders.evaluation import ranking_metrics

WORKER = Path(__file__).with_name("recommenders_worker.py")
FACTORS, K, EPOCHS = 64, 10, 10
Split = tuple[Interactions, Interactions]

#: Dimension, learning rate, penalty, penalty of biases, epochs, decay.
SGD_TRIALS = (
    (50, 0.01, 0.1, 0.05, 100, 1.0), (100, 0.01, 0.08, 0.05, 100, 1.0), (100, 0.02, 0.1, 0.05, 100, 0.97),
    (200, 0.02, 0.1, 0.05, 100, 0.97),
)  # fmt: skip
FEEDBACK_TRIALS = ((50, 0.01, 0.1, 0.05, 60, 1.0), (100, 0.005, 0.1, 0.05, 120, 1.0), (100, 0.01, 0.1, 0.05, 120, 0.98))
RATING_MODELS: dict[str, list[Callable[[], Any]]] = {
    "BiasedMF": [lambda t=t: BiasedMF(*t) for t in SGD_TRIALS],  # type: ignore[misc]
    "RatingALS": [lambda p=p: RatingALS(50, p, threads=1) for p in (0.08, 0.1, 0.12)],  # type: ignore[misc]
    "SVDPlusPlus": [lambda t=t: SVDPlusPlus(*t) for t in FEEDBACK_TRIALS],  # type: ignore[misc]
}
#: The peers' own defaults, and settings like those above.
RATING_PEERS: dict[str, list[dict[str, Any]]] = {
    "mf": [
        {"k": k, "max_iter": epochs, "learning_rate": 0.01, "lambda_reg": penalty, "seed": 0}
        for k, epochs, penalty in ((10, 20, 0.02), (50, 100, 0.1), (100, 100, 0.08), (50, 60, 0.05))
    ],
    "svd": [
        {"random_state": 0},
        {"n_factors": 50, "n_epochs": 100, "lr_all": 0.01, "reg_all": 0.1, "random_state": 0},
        {"n_factors": 100, "n_epochs": 60, "lr_all": 0.01, "reg_all": 0.08, "random_state": 0},
    ],
    "svdpp": [
        {"random_state": 0},
        {"n_factors": 20, "n_epochs": 40, "lr_all": 0.01, "reg_all": 0.1, "random_state": 0},
    ],
}
RANKING_PEERS = [
    {"factors": f, "regularization": r, "alpha": a, "iterations": 12, "random_state": 0}
    for f, r, a in itertools.product((64, 128), (3.0, 10.0, 30.0), (1.0, 3.0))
]
PENALTIES = (100.0, 200.0, 400.0, 800.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default="", help="with implicit and cornac")
    parser.add_argument("--surprise-python", default="", help="with surprise")
    parser.add_argument("--cache", type=Path, help="folder for what is done, so that an interrupted run goes on")
    arguments = parser.parse_args()
    quick, python = arguments.quick, arguments.peer_python
    path = Path(os.environ["TFKIT_DATA"]) / "movielens_small_ratings.csv.gz"
    log = Interactions.from_file(path, user="userId", item="movieId", rating="rating", time="timestamp")
    if quick:
        log = log.select(log.users < 60)
    figures: dict[str, float] = {}
    rest: dict[str, Any] = {}
    parts = {"ratings": ratings, "speed": beside_implicit, "full_ranking": full_ranking, "chosen": chosen_rankings}
    if not python:
        say("implicit and cornac: skipped, pass --peer-python")
        parts = {"ratings": ratings}
    with tempfile.TemporaryDirectory() as folder:
        peers = Peers(Path(folder), {"surprise": arguments.surprise_python, "": python})
        for name, part in parts.items():
            kept = None if quick or arguments.cache is None else arguments.cache / f"{name}.json"
            if kept is not None and kept.exists():
                found = json.loads(kept.read_text())
            else:
                tables: dict[str, Any] = {}
                found = {"figures": part(log, peers, 1 if quick else arguments.rounds, quick, tables), "rest": tables}
                if kept is not None:
                    common.write_json(kept, found)
            figures |= found["figures"]
            rest |= found["rest"]
    if not quick:
        data = "MovieLens small: 100,004 ratings, 671 users, 9,066 films"
        common.write_result(common.RESULTS / "recommenders_peers.json", figures, data=data, **rest)


class Peers:
    """Runs jobs in the peers' interpreters."""

    def __init__(self, folder: Path, pythons: dict[str, str]) -> None:
        self.folder, self.pythons = folder, pythons

    def python(self, model: str) -> str:
        return self.pythons["surprise" if model.startswith("svd") else ""]

    def run(self, model: str, options: dict[str, Any], **arrays: Any) -> tuple[np.ndarray, dict[str, float]]:
        """Returns what a model gave, and how long it took."""
        data, out = self.folder / "data.npz", self.folder / "out.npy"
        np.savez(data, **arrays)
        job = {"model": model, "options": options, "data": str(data), "out": str(out), "k": K}
        ran = subprocess.run([self.python(model), str(WORKER)], input=json.dumps(job), capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{model}: {ran.stderr[-2000:]}")
        return np.load(out, allow_pickle=False), json.loads(ran.stdout.splitlines()[-1])

    def recommend(self, model: str, options: dict[str, Any], log: Interactions) -> tuple[np.ndarray, dict[str, float]]:
        seen = log.seen
        return self.run(model, options, indptr=seen.indptr, indices=seen.indices, shape=np.array(seen.shape))

    def predict(self, model: str, options: dict[str, Any], split: Split) -> np.ndarray:
        training, held = split
        columns = {"users": training.users, "items": training.items, "ratings": training.ratings}
        return self.run(model, options, **columns, asked_users=held.users, asked_items=held.items)[0]


def ratings(log: Interactions, peers: Peers, rounds: int, quick: bool, rest: dict[str, Any]) -> dict[str, float]:
    folds = k_fold(log, 5, seed=0)[: 1 if quick else 5]
    inner = random_split(folds[0][0], 0.2, seed=1)
    table: dict[str, list[float]] = {}
    tried: dict[str, list[float]] = {}

    def own(make: Callable[[], Any], split: Split) -> float:
        model = make().fit(split[0])
        return rating_metrics(model.predict_ratings(split[1].users, split[1].items), split[1].ratings)["rmse"]

    def peer(name: str, options: dict[str, Any], split: Split) -> float:
        return rating_metrics(peers.predict(name, options, split), split[1].ratings)["rmse"]

    for name, trials in RATING_MODELS.items():
        trials = trials[:1] if quick else trials
        tried[name] = [own(make, inner) for make in trials]
        table[name] = [own(trials[int(np.argmin(tried[name]))], fold) for fold in folds]
        say(f"{name}: RMSE {np.mean(table[name]):.4f}")
    for name, options in RATING_PEERS.items():
        if not peers.python(name):
            say(f"{name}: skipped, its interpreter was not named")
            continue
        options = options[:1] if quick else options
        tried[name] = [peer(name, setting, inner) for setting in options]
        table[name] = [peer(name, options[int(np.argmin(tried[name]))], fold) for fold in folds]
        say(f"{name} of a peer: RMSE {np.mean(table[name]):.4f}")
    rest["rmse"], rest["rmse_of_trials"] = table, tried
    figures = {"mf_rmse": float(np.mean(table["BiasedMF"])), "als_rmse": float(np.mean(table["RatingALS"]))}
    figures["svdpp_rmse"] = float(np.mean(table["SVDPlusPlus"]))
    others = {name: float(np.mean(values)) for name, values in table.items() if name in RATING_PEERS}
    return figures | ({"best_peer_rmse": min(others.values())} if others else {})


def beside_implicit(
    log: Interactions, peers: Peers, rounds: int, quick: bool, rest: dict[str, Any]
) -> dict[str, float]:
    """Compares speed and quality at the same hyper-parameters."""
    training, held = random_split(log.at_least(0.0), 0.25, seed=0)
    judged = np.flatnonzero(np.diff(held.offsets))
    times: dict[str, list[float]] = {}
    ndcg: dict[str, list[float]] = {}

    def note(name: str, epoch: float, ranking: float, ids: np.ndarray) -> None:
        times.setdefault(name, []).append(epoch)
        times.setdefault(f"{name} ranking", []).append(ranking)
        ndcg.setdefault(name, []).append(_ndcg(ids[judged], held.seen[judged]))
        say(f"{name}: NDCG {ndcg[name][-1]:.4f}, {epoch * 1e3:.1f} ms an epoch, ranking {ranking * 1e3:.0f} ms")

    for number in range(rounds):
        for name, options, makers in (
            ("ials", {"regularization": 10.0, "alpha": 1.0, "iterations": EPOCHS}, {"ials": _ials}),
            (
                "bpr",
                {"regularization": 0.01, "learning_rate": 0.05, "iterations": 3 * EPOCHS},
                {"bpr": _bpr("uniform", 20), "bpr, its negatives": _bpr("popularity", 1)},
            ),
        ):
            ids, took = peers.recommend(name, {"factors": FACTORS, "random_state": number, **options}, training)
            note(f"{name} implicit", took["epoch_s"], took["ranking_s"], ids)
            for own, make in makers.items():
                model = make(number)
                model.start(training)
                model.epoch()  # Compiled by now.
                model.start(training)
                start = time.process_time()
                for _ in range(model.epochs):
                    model.epoch()
                epoch = (time.process_time() - start) / model.epochs
                model.recommend(judged[:2], K, threads=1)
                start = time.process_time()
                found = model.recommend(np.arange(log.num_users), K, threads=1).ids
                note(own, epoch, time.process_time() - start, found)
    rest["seconds"], rest["ndcg10"] = times, ndcg

    def ratio(one: str, other: str) -> float:
        return float(np.median(np.array(times[one]) / np.array(times[other])))

    return {
        "ials_ndcg_over_implicit": float(np.mean(ndcg["ials"]) / np.mean(ndcg["ials implicit"])),
        "bpr_ndcg_over_implicit": float(np.mean(ndcg["bpr"]) / np.mean(ndcg["bpr implicit"])),
        "bpr_same_negatives_ndcg_over_implicit": float(
            np.mean(ndcg["bpr, its negatives"]) / np.mean(ndcg["bpr implicit"])
        ),
        "ials_epoch_over_implicit": ratio("ials", "ials implicit"),
        "bpr_epoch_over_implicit": ratio("bpr", "bpr implicit"),
        "bpr_same_negatives_epoch_over_implicit": ratio("bpr, its negatives", "bpr implicit"),
    }


def full_ranking(log: Interactions, peers: Peers, rounds: int, quick: bool, rest: dict[str, Any]) -> dict[str, float]:
    """Compares the time of the ten best of 3,416 films for 6,040 users, seen ones left out."""
    data = np.load(Path(os.environ["TFKIT_DATA"]) / "ml1m_sequences.npz", allow_pickle=False)
    users = np.repeat(np.arange(len(data["train_offsets"]) - 1), np.diff(data["train_offsets"]))
    large = Interactions.from_arrays(users, data["train_items"].astype(np.int64), duplicates="first")
    large = large.select(large.users < 200) if quick else large
    times: dict[str, list[float]] = {"implicit": [], "tfkit": []}
    model = IALS(FACTORS, 1.0, 10.0, 0.0, 1.0, "hu", epochs=1, threads=1).fit(large)
    model.recommend(np.arange(2), K, threads=1)
    for number in range(rounds):
        options = {"factors": FACTORS, "regularization": 10.0, "alpha": 1.0, "iterations": 1, "random_state": number}
        times["implicit"].append(peers.recommend("ials", options, large)[1]["ranking_s"])
        start = time.process_time()
        model.recommend(np.arange(large.num_users), K, threads=1)
        times["tfkit"].append(time.process_time() - start)
    say(f"full ranking: {times}")
    rest["full_ranking_seconds"] = times
    return {"full_ranking_over_fastest": float(np.median(np.array(times["implicit"]) / np.array(times["tfkit"])))}


def chosen_rankings(
    log: Interactions, peers: Peers, rounds: int, quick: bool, rest: dict[str, Any]
) -> dict[str, float]:
    """Compares quality where each side chose its own settings on validation events."""
    training, held = random_split(log.at_least(0.0), 0.25, seed=0)
    inner, judged = random_split(training, 0.2, seed=1)
    grid = itertools.product((64, 128), (0.03, 0.1, 0.3), (0.003, 0.01, 0.03))
    trials: dict[str, list[Callable[[], Any]]] = {
        "iALS": [lambda s=s: IALS(s[0], s[1], s[2], epochs=12, threads=1) for s in grid],  # type: ignore[misc]
        "EASE": [lambda p=p: EASE(p) for p in PENALTIES],  # type: ignore[misc]
    }

    def own(make: Callable[[], Any], split: Split) -> float:
        return evaluate(make().fit(split[0]), *split, K).metrics[f"ndcg@{K}"]

    def peer(name: str, options: dict[str, Any], split: Split) -> float:
        ids, _ = peers.recommend(name, options, split[0])
        there = np.flatnonzero(np.diff(split[1].offsets))
        return _ndcg(ids[there], split[1].seen[there])

    table = {}
    for name, makers in trials.items():
        makers = makers[:1] if quick else makers
        found = [own(make, (inner, judged)) for make in makers]
        best = int(np.argmax(found))
        table[name] = own(makers[best], (training, held))
        say(f"{name}, chosen: NDCG {table[name]:.4f}")
    # EASE is a closed form: the peer gets the same penalty, and need not choose.
    options = RANKING_PEERS[:1] if quick else RANKING_PEERS
    found = [peer("ials", setting, (inner, judged)) for setting in options]
    table["implicit's iALS"] = peer("ials", options[int(np.argmax(found))], (training, held))
    table["cornac's EASE"] = peer("ease", {"lamb": PENALTIES[best], "posB": False}, (training, held))
    say(", ".join(f"{name} {value:.4f}" for name, value in table.items()))
    rest["ndcg10_chosen"] = table
    highest = max(table["implicit's iALS"], table["cornac's EASE"])
    return {"ials_over_best_peer": table["iALS"] / highest, "ease_over_best_peer": table["EASE"] / highest}


def _ials(seed: int) -> IALS:
    return IALS(FACTORS, 1.0, 10.0, 0.0, 1.0, "hu", epochs=EPOCHS, threads=1, seed=seed)


def _bpr(negatives: str, attempts: int) -> Callable[[int], BPR]:
    return lambda seed: BPR(FACTORS, 0.05, 0.01, 3 * EPOCHS, negatives, attempts=attempts, seed=seed)


def _ndcg(ids: np.ndarray, truth: Any) -> float:
    return float(ranking_metrics(ids, truth, K)["ndcg"].mean())


if __name__ == "__main__":
    main()
