"""Router: it gains where queries differ and features tell how, says so where they do not, and its report is honest."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tfkit.retrieval import IVF, Exact, NormScan, Router, router_choice, router_fit, router_models, router_report
from tfkit.retrieval.router_choice import cheapest, costs_after, set_price
from tfkit.retrieval.tuning import recall

CHOICES = [("scan", {"budget": 100}), ("scan", {"budget": 30000})]


@pytest.fixture(scope="module")
def two_kinds():
    """Long items in one half of the coordinates, many short ones in the other; a query looks at one half."""
    rng = np.random.default_rng(0)
    items = np.zeros((30000, 32), np.float32)
    items[:100, :16] = 5 * rng.normal(size=(100, 16))
    items[100:, 16:] = rng.normal(size=(29900, 16))
    queries = np.zeros((1200, 32), np.float32)
    kind = rng.random(1200) < 0.2
    queries[~kind, :16] = rng.normal(size=((~kind).sum(), 16))
    queries[kind, 16:] = rng.normal(size=(kind.sum(), 16))
    return items, queries, kind, NormScan().build(items)


@pytest.fixture(scope="module", params=["trees", "bandit"])
def routed(request, two_kinds):
    _, queries, _, index = two_kinds
    router = Router({"scan": index}, target_recall=0.97, model=request.param, probe=False, choices=CHOICES)
    steps = []
    return router, router.fit(queries[:800], steps.append), steps


def test_two_kinds_of_queries_are_told_apart(routed, two_kinds):
    router, report, steps = routed
    _, queries, kind, _ = two_kinds
    assert report.worth_it and report.chosen == router.model
    taken = router.route(queries[800:])
    dear = np.array([choice.effort["budget"] == 30000 for choice in report.choices])
    assert (dear[taken] == kind[800:]).mean() > 0.93
    assert report.row(router.model).recall > 0.95 and report.row("oracle").gain > 1.5
    assert any("learning" in step for step in steps)


def test_results_are_those_of_the_index_chosen(routed, two_kinds):
    router, report, _ = routed
    _, queries, _, index = two_kinds
    rows = queries[800:]
    taken, found = router.route(rows), router.search(rows, 5)
    for number, choice in enumerate(report.choices):
        group = taken == number
        alone = index.search(rows[group], 5, **choice.effort)
        np.testing.assert_array_equal(found.ids[group], alone.ids)
        np.testing.assert_allclose(found.scores[group], alone.scores, rtol=1e-5)
    one = router.search(rows[3], 5)
    assert one.ids.shape == (5,)
    np.testing.assert_array_equal(one.ids, found.ids[3])
    assert router.search(rows[:0]).ids.shape == (0, 10)


def test_the_report_tells_recall_of_queries_that_decided_nothing(routed, two_kinds):
    router, report, _ = routed
    items, queries, _, _ = two_kinds
    held = queries[:800][np.random.default_rng(0).permutation(800)[600:]]
    assert report.queries == (400, 200, 200)
    truth = Exact().build(items).search(held, 10)
    assert recall(router.search(held), truth) == pytest.approx(report.row(report.chosen).recall)


def test_queries_that_are_reported_on_decide_nothing(two_kinds, monkeypatch):
    _, queries, _, index = two_kinds
    monkeypatch.setattr(router_fit.Fit, "_time", staticmethod(lambda work: (work(), 1000.0)[1]))

    def fitted(changed):
        router = Router({"scan": index}, target_recall=0.9, model="trees", probe=False, choices=CHOICES)
        rows = queries[:400].copy()
        held = np.random.default_rng(0).permutation(400)[300:]
        rows[held] = rows[held][::-1] * 0.5 if changed else rows[held]
        router.fit(rows)
        return router

    one, other = fitted(False), fitted(True)
    assert one.single == other.single and one._choices == other._choices
    assert (one._plan is None) == (other._plan is None)
    if one._plan is not None:
        assert one._plan.price == other._plan.price


def test_where_all_queries_are_alike_no_router_is_worth_it():
    rng = np.random.default_rng(1)
    items = rng.normal(size=(2000, 16)).astype("float32")
    router = Router([IVF(40).build(items)], target_recall=0.9, model="trees", choices=None, probe=False)
    report = router.fit(np.tile(rng.normal(size=16), (200, 1)).astype("float32"))
    assert not report.worth_it and report.chosen == "single" and report.measured_gain == 1.0
    assert "No router is worth it" in str(report)
    query = rng.normal(size=(3, 16)).astype("float32")
    alone = router.indexes[report.single.name].search(query, 10, **report.single.effort)
    np.testing.assert_array_equal(router.search(query).ids, alone.ids)
    assert report.choices[router.route(query)[0]] == report.single


def test_first_steps_and_the_network(two_kinds, tmp_path):
    _, queries, _, index = two_kinds
    router = Router({"scan": index}, target_recall=0.97, model="network", probe=True, choices=CHOICES)
    report = router.fit(queries[:400])
    row = report.row("network + first steps")
    assert row.recall > 0.9 and row.own_us > 0
    assert row.query_us > report.probe.query_us if report.worth_it else report.probe is None
    content = json.loads(report.save(tmp_path / "router.json").read_text())
    assert content["rows"][0]["name"] == "single" and content["sentence"] == report.sentence
    assert report.plot(tmp_path / "router.png").stat().st_size > 5000
    router.search(queries[:20])
    assert router.search(queries[0]).ids.shape == (10,)


def test_trees_predict_what_scikit_learn_does():
    from sklearn.ensemble import GradientBoostingRegressor

    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)).astype(np.float32)
    y = np.stack([np.sin(x[:, 0]) + x[:, 1] * (x[:, 2] > 0), np.ones(300)], axis=1)
    model = router_models.Trees()
    model.fit(x, y, np.ones(2), 0.9, 3)
    other = GradientBoostingRegressor(
        n_estimators=router_models.TREES, learning_rate=router_models.RATE, max_depth=router_models.DEPTH,
        min_samples_leaf=router_models.LEAF_QUERIES, subsample=router_models.SUBSAMPLE, max_features=0.5,
        random_state=3,
    ).fit(x, y[:, 0])  # fmt: skip
    new = rng.normal(size=(200, 5)).astype(np.float32)
    np.testing.assert_allclose(model.predict(new)[:, 0], other.predict(new), atol=1e-5)
    np.testing.assert_array_equal(model.predict(new)[:, 1], 1)


def test_features_of_a_query():
    items = np.eye(4, dtype=np.float32) * np.array([[1], [2], [3], [4]], np.float32)
    features = router_choice.Features(items, 0)
    found = features.of_queries(np.array([[0, 0, 0, 2.0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32))
    count = 4
    np.testing.assert_allclose(np.sort(found[0, :count]), [0, 0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(found[0, count], 4 / np.sqrt(30), atol=1e-6)
    np.testing.assert_allclose(found[:2, -3], np.log([2, 2]), atol=1e-6)
    np.testing.assert_allclose(found[:2, -2], [0, np.log(4)], atol=1e-5)
    assert np.isfinite(found).all()


def test_the_price_is_that_of_the_least_time_that_reaches_the_target():
    recalls = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    costs = np.array([1.0, 10.0])
    price, reached, cost = set_price(recalls, recalls, costs, 1.0)
    assert (reached, cost) == (1.0, 5.5) and price > 9
    assert set_price(recalls, recalls, costs, 0.5)[1:] == (0.5, 1.0)
    assert cheapest(recalls, costs, 100.0).tolist() == [0, 0, 1, 1]
    assert costs_after(costs, 1).tolist() == [1.0, 0.0] and costs.tolist() == [1.0, 10.0]


def test_baselines_interpolate():
    curve = np.array([0.8, 0.9, 1.0]), np.array([1.0, 2.0, 6.0])
    assert router_report.single_cost(0.95, {"a": curve}) == pytest.approx(4.0)
    assert router_report.single_cost(0.7, {"a": curve}) == 1.0
    assert router_report.single_cost(0.95, {"a": (curve[0][:2], curve[1][:2])}) == np.inf
    assert router_report.mixture_cost(0.9, np.array([0.8, 0.9, 1.0]), np.array([1.0, 5.0, 2.0])) == pytest.approx(1.5)


def test_search_needs_no_tensorflow():
    code = "import sys, tfkit.retrieval; sys.exit('tensorflow' in sys.modules or 'keras' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_bad_arguments(two_kinds):
    items, queries, _, index = two_kinds
    small = NormScan().build(items[:50])
    for arguments, name in (
        ({"indexes": []}, "indexes"),
        ({"indexes": ["NSW"]}, "indexes"),
        ({"indexes": [NormScan()]}, "built"),
        ({"indexes": {"a": index, "b": small}}, "same items"),
        ({"k": 0}, "`k`"),
        ({"k": 40000}, "`k`"),
        ({"target_recall": 0}, "target_recall"),
        ({"target_recall": 1.0}, "target_recall"),
        ({"model": "forest"}, "model"),
        ({"probe": "often"}, "probe"),
        ({"choices": [("other", {})]}, "choices"),
    ):
        with pytest.raises(ValueError, match=name):
            Router(**{"indexes": [index], **arguments})
    router = Router({"scan": index}, choices=[("scan", {"budget": 100})])
    with pytest.raises(ValueError, match="Call `fit"):
        router.search(queries[:2])
    with pytest.raises(ValueError, match="queries"):
        router.fit(queries[:99])
    with pytest.raises(ValueError, match="target_recall"):
        router.fit(queries[:120])
