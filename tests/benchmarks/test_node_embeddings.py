"""How the comparison of embeddings is read: the rule on a graph's statistics, and what is said of the cuts."""

import numpy as np

from benchmarks import node_embeddings as program
from tfkit import graphs


def table():
    """Small graphs favour "near", large ones "far"; only one graph has the method "best"; one lacks a homophily."""
    found = {}
    for number, name in enumerate(["wiki", "cora", "roles", "movielens", "blogcatalog", "citeseer"]):
        large = number > 2
        scores = {"near": 80.0 - 50 * large, "far": 40.0 + 20 * large}
        scores |= {"best": 99.0} if number == 0 else {}
        found[name] = {
            "statistics": {"nodes": 10 + 1000 * large + number, "homophily": None if name == "movielens" else 0.5},
            "methods": {method: {"micro_f1_50": score} for method, score in scores.items()},
        }
    return found


def test_the_rule_compares_what_all_graphs_have():
    rows = {row["graph"]: row for row in program.rule(table())["rule"]}
    assert len(rows) == 6
    assert {row["best"] for row in rows.values()} == {"near", "far"}
    # Three small graphs and three large ones, which the number of nodes tells apart.
    assert [row["points_lost"] for row in rows.values()] == [0] * 6
    assert rows["movielens"]["by"] == "nodes"
    # "far" loses 40 points on a small graph and "near" 30 on a large one; each is the best on average of five graphs.
    assert rows["wiki"]["points_lost_by_one_for_all"] == 40
    assert rows["blogcatalog"]["points_lost_by_one_for_all"] == 30


def test_one_method_or_few_graphs_have_no_rule():
    alone = {name: {**row, "methods": {"near": row["methods"]["near"]}} for name, row in table().items()}
    assert program.rule(alone) == {"rule": []}
    assert program.rule(dict(list(table().items())[:2])) == {"rule": []}
    assert program.rule({}) == {"rule": []}


def test_homophily_without_labelled_edges_is_not_zero():
    bipartite = graphs.Graph.from_edges([(0, 2), (1, 3)], labels=np.array([0, 1, -1, -1]))
    assert program.statistics(bipartite)["homophily"] is None
    assert program.statistics(bipartite.with_(labels=np.array([0, 1, 1, 1])))["homophily"] == 0.5


def test_cuts_are_said():
    said = " ".join(program.cuts({key: {"methods": {"spectral": {}}} for key in ("cora", "blogcatalog")}))
    assert "GraRep leaves out cora, blogcatalog." in said and "spectral leaves" not in said
    assert "On blogcatalog: 3 splits in place of 5" in said
    assert "80 times 40 on cora, and" in said
