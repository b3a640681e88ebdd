"""Peers in an interpreter of their own: reads a job on standard input, writes an answer of one line.

implicit ("ials", "bpr") and cornac ("ease") recommend; cornac ("mf") and surprise ("svd", "svdpp") predict ratings.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np


def recommend(job: dict[str, Any], data: Any) -> dict[str, float]:
    """Fits to a matrix of events and writes the best items of all users."""
    import scipy.sparse as sp

    matrix = sp.csr_matrix((np.ones(len(data["indices"]), "f"), data["indices"], data["indptr"]), data["shape"])
    if job["model"] == "ease":
        from cornac.data import Dataset
        from cornac.models import EASE

        events = matrix.tocoo()
        log = Dataset.from_uir([(int(u), int(i), 1.0) for u, i in zip(events.row, events.col, strict=True)])
        model = EASE(**job["options"], verbose=False)
        start = time.process_time()
        model.fit(log)
        seconds = time.process_time() - start
        known = np.array([int(item) for item in log.item_ids])
        start = time.process_time()
        ids = np.full((matrix.shape[0], job["k"]), -1, np.int64)
        for user, number in log.uid_map.items():
            scores = np.asarray(model.score(number)).ravel().copy()
            seen = matrix[user].indices
            scores[np.isin(known, seen)] = -np.inf
            ids[user] = known[np.argsort(-scores, kind="stable")[: job["k"]]]
        np.save(job["out"], ids)
        return {"epoch_s": seconds, "ranking_s": time.process_time() - start}
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking

    makers = {"ials": AlternatingLeastSquares, "bpr": BayesianPersonalizedRanking}
    model = makers[job["model"]](**job["options"], num_threads=1)
    start = time.process_time()
    model.fit(matrix, show_progress=False)
    seconds = time.process_time() - start
    users = np.arange(matrix.shape[0])
    model.recommend(users[:2], matrix[:2], 10)
    start = time.process_time()
    ids, _ = model.recommend(users, matrix, job["k"])
    np.save(job["out"], ids.astype(np.int64))
    return {"epoch_s": seconds / model.iterations, "ranking_s": time.process_time() - start}


def predict(job: dict[str, Any], data: Any) -> dict[str, float]:
    """Fits to ratings and writes predictions of others."""
    triples = list(zip(data["users"].tolist(), data["items"].tolist(), data["ratings"].tolist(), strict=True))
    asked = list(zip(data["asked_users"].tolist(), data["asked_items"].tolist(), strict=True))
    low, high = float(data["ratings"].min()), float(data["ratings"].max())
    if job["model"] == "mf":
        from cornac.data import Dataset
        from cornac.models import MF

        log = Dataset.from_uir(triples)
        start = time.process_time()
        model = MF(**job["options"], num_threads=1).fit(log)
        seconds = time.process_time() - start
        mean = float(data["ratings"].mean())
        biases = model.u_biases, model.i_biases
        made = []
        for user, item in asked:
            u, i = log.uid_map.get(user), log.iid_map.get(item)
            score = mean + (0.0 if u is None else biases[0][u]) + (0.0 if i is None else biases[1][i])
            made.append(score + (0.0 if u is None or i is None else float(model.u_factors[u] @ model.i_factors[i])))
    else:
        import pandas as pd
        from surprise import SVD, Dataset, Reader, SVDpp

        frame = pd.DataFrame(triples, columns=["user", "item", "rating"])
        log = Dataset.load_from_df(frame, Reader(rating_scale=(low, high))).build_full_trainset()
        start = time.process_time()
        model = {"svd": SVD, "svdpp": SVDpp}[job["model"]](**job["options"]).fit(log)
        seconds = time.process_time() - start
        made = [model.predict(user, item).est for user, item in asked]
    np.save(job["out"], np.clip(np.array(made), low, high))
    return {"fit_s": seconds}


def main() -> None:
    job = json.loads(sys.stdin.read())
    data = np.load(job["data"], allow_pickle=False)
    print(json.dumps((predict if "users" in data else recommend)(job, data)))


if __name__ == "__main__":
    main()
