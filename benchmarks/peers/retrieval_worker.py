"""One algorithm in a process of its own, driven by retrieval.py: a JSON command a line in, a JSON answer a line out."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np  # noqa: E402


def resident() -> int:
    """Returns the resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class Worker:
    """An index, and what is asked of it."""

    def __init__(self, module: str, name: str, data: str, k: int) -> None:
        self.algorithm = importlib.import_module(f"benchmarks.peers.ann.{module}").ALGORITHMS[name]
        with np.load(data) as file:
            self.items, self.queries, self.truth = file["items"], file["queries"], file["truth"]
        self.k = k

    def build(self) -> dict[str, Any]:
        before, started = resident(), time.process_time()
        self.index = self.algorithm.build(self.items)
        spent = time.process_time() - started
        efforts = [dict(effort) for effort in self.algorithm.efforts(len(self.items), self.k)]
        told = self.algorithm.memory(self.index)
        return {"build_s": spent, "memory_bytes": told or resident() - before, "efforts": efforts}

    def check(self, effort: dict[str, Any]) -> dict[str, Any]:
        """Recall, by scores that are computed here: an id counts if its inner product is among the k largest."""
        ids = np.asarray(self.algorithm.search(self.index, self.queries, self.k, effort))
        valid = (ids >= 0) & (ids < len(self.items))
        scores = np.einsum("qd,qkd->qk", self.queries, self.items[np.where(valid, ids, 0)])
        worst = np.einsum("qd,qd->q", self.queries, self.items[self.truth[:, -1]])
        best = np.einsum("qd,qd->q", self.queries, self.items[self.truth[:, 0]])
        slack = 1e-5 * np.maximum(np.abs(best), np.abs(worst))  # Sums are rounded in different orders.
        good = valid & (scores >= (worst - slack)[:, None])
        twice = [
            len(row) - len(set(row)) for row in (some[mask].tolist() for some, mask in zip(ids, good, strict=True))
        ]
        return {"recall": float((good.sum(axis=1) - twice).mean() / self.k)}

    def time(self, effort: dict[str, Any], single: bool) -> dict[str, Any]:
        """Processor time of a query, in microseconds."""
        rows = self.queries[:200] if single else self.queries
        started, calls = time.process_time(), 0
        while True:
            if single:
                for row in rows:
                    self.algorithm.single(self.index, row, self.k, effort)
            else:
                self.algorithm.search(self.index, rows, self.k, effort)
            calls += 1
            spent = time.process_time() - started
            if spent > 0.02:
                return {"us": 1e6 * spent / calls / len(rows)}


def main() -> None:
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Libraries that print do not disturb the answers.
    worker: Worker | None = None
    for line in sys.stdin:
        command = json.loads(line)
        operation = command.pop("operation")
        try:
            if operation == "start":
                worker = Worker(**command)
                answer: dict[str, Any] = {}
            else:
                answer = getattr(worker, operation)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=output, flush=True)


if __name__ == "__main__":
    main()
