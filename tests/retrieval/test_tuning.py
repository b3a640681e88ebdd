"""Autotune: what it measures, what it picks, and that a time limit holds."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tfkit.retrieval import IVF, NSW, Exact, NormScan, SearchResult, autotune, tuning
from tfkit.retrieval.tuning import between, candidates, recall


def vectors(count, dimension=16, seed=0, skew=0.0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dimension)) * np.exp(skew * rng.normal(size=(count, 1)))).astype("float32")


@pytest.fixture(scope="module")
def tuned():
    items = vectors(4000, skew=0.3)
    steps = []
    found = autotune(
        items, vectors(120, seed=1), 0.9, k=5, indexes={"graph": NSW(8, 40), "clusters": IVF(), "scan": NormScan()},
        threads=1, progress=lambda *step: steps.append(step),
    )  # fmt: skip
    return items, found, steps


def test_the_choice_is_fastest_of_those_that_find_enough(tuned):
    _, found, _ = tuned
    assert found.best in found.points and found.best.recall >= 0.9
    least = min(point.query_us for point in found.points if point.recall >= 0.9)
    assert found.best.query_us <= tuning.CONTENDERS * least
    assert {point.name for point in found.points} == {"Exact", "graph", "clusters", "scan"}
    assert next(point.recall for point in found.points if point.name == "Exact") == 1.0


def test_recall_is_of_queries_that_decided_nothing(tuned):
    items, found, _ = tuned
    order = np.random.default_rng(0).permutation(120)
    held_out = vectors(120, seed=1)[order[60:]]
    truth = Exact().build(items).search(held_out, 5)
    assert found.recall == pytest.approx(recall(found.search(held_out), truth))


def test_efforts_rise_and_are_refined_around_the_target(tuned):
    _, found, _ = tuned
    for name in ("graph", "clusters"):
        curve = [point for point in found.points if point.name == name]
        widths = [next(iter(point.effort.values())) for point in curve]
        assert widths == sorted(widths)
        known = {json.dumps(effort) for effort in {"graph": NSW, "clusters": IVF}[name]().build(tuned[0]).efforts(5)}
        assert any(json.dumps(point.effort) not in known for point in curve)


def test_progress_and_what_is_written(tuned, tmp_path):
    _, found, steps = tuned
    assert steps[0][0] <= steps[-1][0] <= steps[0][1] and any("graph: building" in text for _, _, text in steps)
    content = json.loads(found.save(tmp_path / "tuning.json").read_text())
    assert content["best"]["recall"] == found.best.recall and len(content["points"]) == len(found.points)
    assert found.plot(tmp_path / "tuning.png").stat().st_size > 5000
    for write, name in ((found.save, "tuning.json"), (found.plot, "tuning.png")):
        with pytest.raises(FileExistsError, match="force"):
            write(tmp_path / name)
        write(tmp_path / name, force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuning.json", "tuning.png"]


def test_without_time_there_is_the_exact_scan():
    found = autotune(vectors(300), vectors(30, seed=1), seconds=0)
    assert isinstance(found.index, Exact) and found.recall == 1.0
    assert set(found.skipped) == set(candidates(300))


def test_an_index_that_would_take_too_long_is_not_begun(monkeypatch):
    monkeypatch.setattr(tuning, "PROBED_ITEMS", 100)
    monkeypatch.setattr(tuning, "PROBE_SHARE", 1e-3)  # A thousand times the time of a probe of one item.

    class Slow(NSW):
        def _build(self, threads):
            import time

            time.sleep(0.02)
            super()._build(threads)

    found = autotune(vectors(2000), vectors(30, seed=1), seconds=5, indexes=[Slow()])
    assert list(found.skipped) == [repr(Slow())] and isinstance(found.index, Exact)


def test_single_queries_can_be_timed():
    found = autotune(vectors(500), vectors(40, seed=1), 0.8, indexes=[NormScan()], single=True)
    assert found.best.recall >= 0.8


def test_halfway_as_factors_go():
    assert between({"ef": 10}, {"ef": 40}) == {"ef": 20}
    assert between({"leaves": 2, "rescore": 30}, {"leaves": 8, "rescore": 120}) == {"leaves": 4, "rescore": 60}
    assert between({"ef": 3}, {"ef": 4}) is None and between({"a": 1}, {"b": 4}) is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"queries": np.ones((5, 16))}, "queries"),
        ({"queries": np.ones((50, 3))}, "queries"),
        ({"target_recall": 0}, "target_recall"),
        ({"target_recall": 1.5}, "target_recall"),
        ({"k": 301}, "`k`"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": float("inf")}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"seed": -1}, "seed"),
        ({"single": 1}, "single"),
        ({"progress": 3}, "progress"),
        ({"indexes": ["NSW"]}, "indexes"),
        ({"indexes": 3}, "indexes"),
        ({"indexes": {1: NSW()}}, "indexes"),
        ({"indexes": {"Exact": NSW()}}, "'Exact'"),
    ],
)
def test_bad_arguments(change, name):
    arguments = {"items": vectors(300), "queries": vectors(40, seed=1), **change}
    with pytest.raises(ValueError, match=name):
        autotune(**arguments)


def test_of_equal_items_any_is_right():
    items = np.repeat(vectors(50), 6, axis=0)
    queries = vectors(20, seed=1)
    truth = Exact().build(items).search(queries, 4)
    twin = truth._replace(ids=(truth.ids // 6) * 6 + (truth.ids + 3) % 6, scores=truth.scores * np.float32(1 - 1e-7))
    assert recall(twin, truth) == 1.0
    missed = twin._replace(ids=np.where(np.arange(4) == 3, -1, twin.ids))
    assert recall(missed, truth) == 0.75
    worse = twin._replace(scores=twin.scores - np.float32([0, 0, 0, 1e-2]) * np.abs(twin.scores[:, :1]))
    assert recall(worse, truth) == 0.75


def test_recall_of_long_lists_takes_little_memory():
    import tracemalloc

    result = Exact().build(vectors(3000)).search(vectors(40, seed=1), 2000)
    tracemalloc.start()
    assert recall(result, result) == 1.0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * result.scores.nbytes


def test_recall_where_float32_ends():
    scores = np.float32([[np.inf, np.inf, 3e38]])
    truth = retrieval_result(scores, [[1, 2, 3]])
    assert recall(truth, truth) == 1.0
    assert recall(retrieval_result(np.float32([[np.inf, 1.0, -np.inf]]), [[1, 2, -1]]), truth) == pytest.approx(1 / 3)


def retrieval_result(scores, ids):
    return SearchResult(scores, np.array(ids))
