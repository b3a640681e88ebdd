"""Recommenders beside the package implicit, on one split of MovieLens small; ratings by five folds.

    python benchmarks/peers/recommenders.py --peer-python PEERVENV/bin/python
    python benchmarks/peers/recommenders.py --quick

Both run on one thread, in turns; a ratio is the median over the rounds of processor times. The hyper-parameters are the
same on both sides and were set before. The settings of the ratings' model were chosen on a fifth of the training part
of the first fold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit.recommenders import (
    BPR,
    IALS,
    BiasedMF,
    Interactions,
    RatingALS,
    k_fold,
    random_split,
    rating_metrics,
)
from tfkit.recommenders.evaluation import ranking_metrics

WORKER = Path(__file__).with_name("recommenders_worker.py")
FACTORS, K, EPOCHS = 64, 10, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default="")
    arguments = parser.parse_args()
    path = Path(os.environ["TFKIT_DATA"]) / "movielens_small_ratings.csv.gz"
    log = Interactions.from_file(path, user="userId", item="movieId", rating="rating", time="timestamp")
    if arguments.quick:
        log = log.select(log.users < 60)
    figures, rest = {}, {}
    rest["mf"] = ratings(log, arguments.quick)
    figures["mf_rmse"] = float(np.mean(rest["mf"]["BiasedMF"]))
    say(f"RMSE {figures['mf_rmse']:.4f}")
    if arguments.peer_python:
        found = beside_implicit(log, arguments.peer_python, 1 if arguments.quick else arguments.rounds)
        figures |= found.pop("figures")
        rest |= found
    else:
        say("implicit: skipped, pass --peer-python")
    if not arguments.quick:
        data = "MovieLens small: 100,004 ratings, 671 users, 9,066 films"
        common.write_result(common.RESULTS / "recommenders_peers.json", figures, data=data, **rest)


def ratings(log: Interactions, quick: bool) -> dict[str, list[float]]:
    folds = k_fold(log, 5, seed=0)
    inner, judged = random_split(folds[0][0], 0.2, seed=1)
    trials = [BiasedMF(d, 0.01, p, 0.05, epochs=e) for d, p in ((50, 0.1), (100, 0.08)) for e in (100, 150)]
    trials = trials[:1] if quick else trials
    best = min(trials, key=lambda model: _rmse(model, inner, judged))
    kinds = {"BiasedMF": best, "RatingALS": RatingALS(50, 0.1, epochs=10, threads=1)}
    return {name: [_rmse(model, *fold) for fold in folds[: 1 if quick else 5]] for name, model in kinds.items()}


def _rmse(model, training: Interactions, held: Interactions) -> float:  # type: ignore[no-untyped-def]
    model.fit(training)
    return rating_metrics(model.predict_ratings(held.users, held.items), held.ratings)["rmse"]


def beside_implicit(log: Interactions, python: str, rounds: int) -> dict:
    training, held = random_split(log.at_least(0.0), 0.25, seed=0)
    truth = held.seen
    judged = np.flatnonzero(np.diff(held.offsets))
    times: dict[str, list[float]] = {}
    ndcg: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        seen = training.seen
        np.savez(data, indptr=seen.indptr, indices=seen.indices, shape=np.array(seen.shape))
        for number in range(rounds):
            for name, options, make in (
                ("ials", {"regularization": 10.0, "alpha": 1.0, "iterations": EPOCHS}, _ials),
                ("bpr", {"regularization": 0.01, "learning_rate": 0.05, "iterations": 3 * EPOCHS}, _bpr),
            ):
                settings = {"factors": FACTORS, "random_state": number, **options}
                job = {"model": name, "data": str(data), "k": K, "out": f"{folder}/ids.npy", "options": settings}
                ran = subprocess.run(
                    [python, str(WORKER)], input=json.dumps(job), capture_output=True, text=True, check=True
                )
                answer = json.loads(ran.stdout.splitlines()[-1])
                ids = np.load(job["out"], allow_pickle=False)
                times.setdefault(f"{name} implicit", []).append(answer["epoch_s"])
                times.setdefault(f"{name} ranking implicit", []).append(answer["ranking_s"])
                ndcg.setdefault(f"{name} implicit", []).append(_ndcg(ids[judged], truth[judged]))
                model = make(number)
                model.start(training)
                model.epoch()  # Compiled by now.
                model.start(training)
                start = time.process_time()
                for _ in range(model.epochs):
                    model.epoch()
                times.setdefault(name, []).append((time.process_time() - start) / model.epochs)
                model.recommend(judged[:2], K, threads=1)
                start = time.process_time()
                found = model.recommend(np.arange(log.num_users), K, threads=1).ids
                times.setdefault(f"{name} ranking", []).append(time.process_time() - start)
                ndcg.setdefault(name, []).append(_ndcg(found[judged], truth[judged]))
                say(f"{name}: NDCG {ndcg[name][-1]:.4f}, implicit {ndcg[name + ' implicit'][-1]:.4f}")

    def ratio(one: str, other: str) -> float:
        return float(np.median(np.array(times[one]) / np.array(times[other])))

    figures = {
        "ials_ndcg_over_implicit": float(np.mean(ndcg["ials"]) / np.mean(ndcg["ials implicit"])),
        "bpr_ndcg_over_implicit": float(np.mean(ndcg["bpr"]) / np.mean(ndcg["bpr implicit"])),
        "ials_epoch_over_implicit": ratio("ials", "ials implicit"),
        "bpr_epoch_over_implicit": ratio("bpr", "bpr implicit"),
        "full_ranking_over_fastest": ratio("ials ranking implicit", "ials ranking"),
    }
    return {"figures": figures, "seconds": times, "ndcg10": ndcg}


def _ials(seed: int) -> IALS:
    return IALS(FACTORS, 1.0, 10.0, 0.0, 1.0, "hu", epochs=EPOCHS, threads=1, seed=seed)


def _bpr(seed: int) -> BPR:
    return BPR(FACTORS, 0.05, 0.01, epochs=3 * EPOCHS, negatives="popularity", seed=seed)


def _ndcg(ids: np.ndarray, truth) -> float:  # type: ignore[no-untyped-def]
    return float(ranking_metrics(ids, truth, K)["ndcg"].mean())


if __name__ == "__main__":
    main()
