"""The package implicit in an interpreter of its own: reads a job on standard input, writes an answer of one line."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import scipy.sparse as sp


def main() -> None:
    from implicit.als import AlternatingLeastSquares
    from implicit.bpr import BayesianPersonalizedRanking

    job = json.loads(sys.stdin.read())
    data = np.load(job["data"], allow_pickle=False)
    matrix = sp.csr_matrix((np.ones(len(data["indices"]), "f"), data["indices"], data["indptr"]), data["shape"])
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
    ranking = time.process_time() - start
    print(json.dumps({"epoch_s": seconds / model.iterations, "ranking_s": ranking}))


if __name__ == "__main__":
    main()
