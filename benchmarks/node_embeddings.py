"""Embeddings compared: classification, links and reconstruction, and which graph favours which method.

    python benchmarks/node_embeddings.py --cache build/node_embeddings      # all graphs; most of an hour on one core
    python benchmarks/node_embeddings.py --cache build/node_embeddings --graphs wiki cora
    python benchmarks/node_embeddings.py --quick                                    # small graphs: does it run?

Node classification as DeepWalk's authors do it: one-vs-rest logistic regression on a random 10, 50 or 90 % of the
labelled nodes, the k likeliest labels for a node that has k, mean over 5 orders of the nodes (BlogCatalog: 3). How
vectors are scaled (as they are, unit rows, or unit deviation), the regression's penalty and a method's own settings are
chosen for each order inside its first tenth, which is trained on at every share and never tested. Links: AUC on a fifth
of the edges, held out. Reconstruction: precision at the degree. Directed edges are taken in both directions.

Walks are DeepWalk's authors' 80 of 40 nodes on Wiki and BlogCatalog, node2vec's 10 of 80 on the others and for links.
On BlogCatalog LINE draws 100 edges an edge in place of 200, and only the spectral embedding has more than one
candidate. GraRep and HOPE, whose work grows with the square of the nodes or faster, leave out the largest graphs. With
`--cache` each method's row is kept. Needs $TFKIT_DATA.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from threadpoolctl import threadpool_limits

from benchmarks import common
from benchmarks.common import say
from tfkit import graphs
from tfkit.graphs import embeddings as e
from tfkit.graphs.embeddings.evaluation import f1, label_matrix, logistic_regression, top_labels, unit_rows

Maker = Callable[[], e.Embedding]
#: DeepWalk's authors' walks on BlogCatalog, and node2vec's authors', which are a quarter of the work.
LONG = {"walks": 80, "length": 40, "window": 10}
SHORT = {"walks": 10, "length": 80, "window": 10}
#: Graphs on which the walks are the long ones, and those too large for more than one candidate or many splits.
LONG_WALKS = ("wiki", "blogcatalog")
LARGE = ("blogcatalog",)


def methods(graph: str) -> dict[str, tuple[Maker, ...]]:
    """Returns every method's candidates; the first one is also the one for links and reconstruction."""
    walks, large = LONG if graph in LONG_WALKS else SHORT, graph in LARGE
    candidates: dict[str, tuple[Maker, ...]] = {
        "spectral": (
            lambda: e.LaplacianEigenmaps(128),
            lambda: e.LaplacianEigenmaps(128, random_walk=False, damping=1.0),
        ),
        "NetMF": (lambda: e.NetMF(128), lambda: e.NetMF(128, window=1)),
        "HOPE": (lambda: e.HOPE(128),),
        "GraRep": (lambda: e.GraRep(128),),
        "DeepWalk": (lambda: e.DeepWalk(128, **walks),),
        "node2vec": (
            lambda: e.Node2Vec(128, p=0.25, q=0.25, **walks),
            lambda: e.Node2Vec(128, p=1.0, q=2.0, **walks),
        ),
        "LINE": (lambda: e.LINE(128, samples_per_edge=100 if large else 200),),
        "VERSE": (lambda: e.VERSE(128, samples_per_node=10_000),),
    }
    # The spectral embedding is the baseline, and is tuned on every graph.
    return {name: found[:1] if large and name != "spectral" else found for name, found in candidates.items()}


#: Links are predicted with short walks on every graph.
LINKS: dict[str, Maker] = {
    "DeepWalk": lambda: e.DeepWalk(128, **SHORT),
    "node2vec": lambda: e.Node2Vec(128, p=0.25, q=0.25, **SHORT),
}
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda vectors: vectors,
    "unit rows": unit_rows,
    "unit deviation": lambda vectors: vectors / max(float(vectors.std()), 1e-12),
}
PENALTIES = (0.1, 1.0, 10.0)
#: Random orders of the labelled nodes.
SPLITS, LARGE_SPLITS = 5, 3
#: Largest graphs for methods whose memory or time grows with the square of the nodes or faster.
DENSE_LIMIT = {"GraRep": 6000, "HOPE": 8000}
#: Micro-F1 in percent at 10, 50 and 90 % in the literature: Perozzi et al., Qiu et al.
PAPER = {"blogcatalog": {"DeepWalk": (35.9, 41.5, 42.4), "NetMF": (38.5, 43.5, 45.5)}}


def movielens() -> graphs.Graph:
    """Users and films as a bipartite graph, an edge where a rating is 4 or more; a film's label is its first genre."""
    import gzip

    folder = Path(os.environ["TFKIT_DATA"])
    with gzip.open(folder / "movielens_small_ratings.csv.gz", "rt", encoding="utf-8") as file:
        ratings = [line.rstrip("\n").split(",") for line in file][1:]
    with gzip.open(folder / "movielens_small_movies.csv.gz", "rt", encoding="utf-8") as file:
        genres = {row.split(",")[0]: row.rstrip("\n").rsplit(",", 1)[1].split("|")[0] for row in list(file)[1:]}
    liked = [(row[0], row[1]) for row in ratings if float(row[2]) >= 4]
    users = {name: i for i, name in enumerate(sorted({user for user, _ in liked}))}
    films = {name: len(users) + i for i, name in enumerate(sorted({film for _, film in liked}))}
    kinds = {name: i for i, name in enumerate(sorted(set(genres.values())))}
    labels = np.full(len(users) + len(films), -1, np.int32)
    for film, number in films.items():
        labels[number] = kinds.get(genres.get(film, ""), -1)
    pairs = np.array([(users[user], films[film]) for user, film in liked])
    return graphs.Graph.from_edges(pairs, len(labels), labels=labels, name="movielens")


GRAPHS: dict[str, Callable[[], graphs.Graph]] = {
    "wiki": lambda: graphs.load("wiki").undirected(),
    "cora": lambda: graphs.load("cora"),
    "citeseer": lambda: graphs.load("citeseer"),
    "blocks": lambda: graphs.stochastic_block_model(2000, 8, 10, homophily=0.5, seed=0),
    "roles": lambda: graphs.power_law_roles(2000, 3, seed=0),
    "movielens": movielens,
    "blogcatalog": lambda: graphs.load("blogcatalog"),
}


def choose(found: list[np.ndarray], marks: np.ndarray, nodes: np.ndarray) -> tuple[int, str, float]:
    """Returns the candidate, scale and penalty that are best when one half of `nodes` is predicted from the other."""
    half = len(nodes) // 2
    best, choice = -1.0, (0, "unit deviation", 1.0)
    for number, vectors in enumerate(found):
        for scale, apply in SCALES.items():
            for c in PENALTIES:
                score = micro_macro(apply(vectors), marks, nodes[:half], nodes[half:], c).micro
                if score > best:
                    best, choice = score, (number, scale, c)
    return choice


def micro_macro(vectors: np.ndarray, marks: np.ndarray, train: np.ndarray, test: np.ndarray, c: float) -> e.F1:
    weights, bias = logistic_regression(vectors[train], marks[train], c)
    return f1(marks[test], top_labels(vectors[test] @ weights + bias, marks[test].sum(axis=1)))


def classify(found: list[np.ndarray], labels: Any, repeats: int) -> dict[str, Any]:
    """F1 in percent over random orders of the labelled nodes; the first tenth of each, always trained on, chooses."""
    marks = label_matrix(labels)
    labelled = np.flatnonzero(marks.any(axis=1))
    scores: dict[str, list[e.F1]] = {}
    choices = []
    for repeat in range(repeats):
        order = np.random.default_rng(repeat).permutation(labelled)
        choices.append(choose(found, marks, order[: len(order) // 10]))
        number, scale, c = choices[-1]
        vectors = SCALES[scale](found[number])
        for share in (10, 50, 90):
            cut = len(order) * share // 100
            scores.setdefault(str(share), []).append(micro_macro(vectors, marks, order[:cut], order[cut:], c))
    row: dict[str, Any] = {}
    for share, found_scores in scores.items():
        mean = 100 * np.mean(found_scores, axis=0)
        row |= {f"micro_f1_{share}": round(float(mean[0]), 2), f"macro_f1_{share}": round(float(mean[1]), 2)}
    number, scale, c = max(sorted(set(choices)), key=choices.count)
    return {**row, "most_chosen": f"candidate {number}, {scale}, c = {c:g}"}


def measure(name: str, graph: graphs.Graph, makers: tuple[Maker, ...], repeats: int) -> dict[str, Any]:
    """All figures of one method on one graph, in percent."""
    started = time.process_time()
    first = makers[0]().embed(graph)
    row: dict[str, Any] = {"cpu_seconds": round(time.process_time() - started, 1)}
    found = [first, *(make().embed(graph) for make in makers[1:])]
    row |= {"splits": repeats, **classify(found, graph.labels, repeats)}
    row["link_auc"] = round(100 * e.predict_links(LINKS.get(name, makers[0])(), graph), 2)
    row["reconstruction"] = round(100 * e.reconstruct(first, graph), 2)
    paper = PAPER.get(graph.name, {}).get(name)
    say(f"{graph.name:>22} {name:<9} {row}" + (f" (paper: {paper})" if paper else ""))
    return {**row, "paper": list(paper)} if paper else row


def statistics(graph: graphs.Graph) -> dict[str, float | None]:
    """What the rule may look at: size, degrees, triangles, and labels that agree along edges.

    The last is None where no edge has labels at both ends, as in a bipartite graph with labels on one side.
    """
    matrix = graph.adjacency
    pattern = matrix.astype(bool).astype("float64")
    triangles = float((pattern @ pattern).multiply(pattern).sum())
    degrees = graph.degrees.astype(float)
    wedges = float((degrees * (degrees - 1)).sum())
    marked = label_matrix(graph.labels)
    pairs = graph.edges()
    known = marked[pairs].any(axis=2).all(axis=1)
    agree = (marked[pairs[known, 0]] & marked[pairs[known, 1]]).any(axis=1)
    return {
        "nodes": graph.num_nodes,
        "mean_degree": round(float(degrees.mean()), 2),
        "degree_variation": round(float(degrees.std() / max(degrees.mean(), 1e-9)), 3),
        "clustering": round(triangles / max(wedges, 1.0), 4),
        "homophily": round(float(agree.mean()), 3) if len(agree) else None,
    }


def rule(table: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A rule on one statistic, cross-validated by leaving each graph out: what it loses against the best method.

    A stump on each statistic names the method of the best mean micro-F1 at 50 % on either side of its median; the
    statistic is chosen on the graphs that are left in. Beside it: always the method that is best on average. Only the
    methods that every graph has are compared. A graph without the statistic gets the method that is best on average.
    """
    names = [name for name in table if table[name]["methods"]]
    shared = sorted(set.intersection(*(set(table[name]["methods"]) for name in names))) if names else []
    score = {name: {m: table[name]["methods"][m]["micro_f1_50"] for m in shared} for name in names}
    keys = list(table[names[0]]["statistics"]) if names else []

    def loss(name: str, method: str) -> float:
        return max(score[name].values()) - score[name][method]

    def favourite(chosen: list[str]) -> str:
        return min(shared, key=lambda m: np.mean([loss(n, m) for n in chosen]))

    def predict(chosen: list[str], key: str, name: str) -> str:
        value = table[name]["statistics"][key]
        known = {n: table[n]["statistics"][key] for n in chosen if table[n]["statistics"][key] is not None}
        if value is None or not known:
            return favourite(chosen)
        cut = float(np.median(list(known.values())))
        return favourite([n for n in known if (known[n] > cut) == (value > cut)] or chosen)

    rows = []
    for name in names if len(names) > 2 and len(shared) > 1 else []:
        rest = [n for n in names if n != name]
        usable = [key for key in keys if table[name]["statistics"][key] is not None]
        key = min(usable, key=lambda k: np.mean([loss(n, predict([m for m in rest if m != n], k, n)) for n in rest]))
        method = predict(rest, key, name)
        rows.append(
            {
                "graph": name,
                "by": key,
                "predicted": method,
                "best": max(shared, key=lambda m: score[name][m]),
                "points_lost": round(loss(name, method), 2),
                "points_lost_by_one_for_all": round(loss(name, favourite(rest)), 2),
            }
        )
    return {"rule": rows}


RULE_TEXT = (
    "The rule names a method by one statistic of a graph that it has not seen, with the methods that all graphs have; "
    "points lost are those of micro-F1 at 50 % below the best of these, beside them those of the one method that is "
    "best on average on the other graphs. Homophily is not measured where no edge has labels at both ends."
)


def cuts(results: dict[str, Any]) -> list[str]:
    """Returns a sentence for each thing that was left out or done with less work on some graphs."""
    said = []
    for name in methods(""):
        without = [graph for graph, found in results.items() if name not in found["methods"]]
        if without:
            said.append(f"{name} leaves out {', '.join(without)}.")
    large = [graph for graph in LARGE if graph in results]
    if large:
        said.append(
            f"On {', '.join(large)}: {LARGE_SPLITS} splits in place of {SPLITS}, LINE with 100 samples an edge in "
            "place of 200, one candidate of each method but spectral."
        )
    short = [graph for graph in results if graph not in LONG_WALKS]
    if short:
        said.append(
            f"DeepWalk and node2vec walk 10 times 80 nodes in place of 80 times 40 on {', '.join(short)}, and for "
            "links on every graph."
        )
    return said


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", nargs="+", choices=GRAPHS, default=list(GRAPHS))
    parser.add_argument("--methods", nargs="+", choices=methods(""), default=list(methods("")))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    # The products are small: more threads wait for each other longer than they work.
    threadpool_limits(1)
    if options.quick:
        graph = graphs.stochastic_block_model(120, 3, 8, seed=0)
        quick = {"spectral": (lambda: e.LaplacianEigenmaps(8),), "HOPE": (lambda: e.HOPE(8),)}
        table = {"blocks": {"statistics": statistics(graph), "methods": {}}}
        for name, makers in quick.items():
            table["blocks"]["methods"][name] = measure(name, graph, makers, 1)
        # Made up, so that the rule has three graphs, one of them without a homophily.
        for change in ({"homophily": None}, {"nodes": 1}):
            made = {**table["blocks"]["statistics"], **change}
            table[str(change)] = {**table["blocks"], "statistics": made}
        say(str([*cuts(table), rule(table)]))
        return
    results: dict[str, Any] = {}
    for key in GRAPHS:
        graph = GRAPHS[key]() if key in options.graphs else None
        found: dict[str, Any] = {}
        for name, makers in methods(key).items():
            kept = options.cache / f"{key}_{name}.json" if options.cache else None
            if kept is not None and kept.exists():
                found[name] = json.loads(kept.read_text(encoding="utf-8"))
                continue
            if graph is None or name not in options.methods or graph.num_nodes > DENSE_LIMIT.get(name, 10**9):
                continue
            found[name] = measure(name, graph, makers, LARGE_SPLITS if key in LARGE else SPLITS)
            if kept is not None:
                common.write_json(kept, found[name])
        if found:
            results[key] = {"statistics": statistics(graph or GRAPHS[key]()), "methods": found}
    found_rule = rule(results)
    figures: dict[str, float] = {}
    for share in (10, 50, 90):
        row = results.get("blogcatalog", {}).get("methods", {})
        for name in ("DeepWalk", "NetMF", "spectral"):
            if name in row:
                figures[f"{name.lower()}_micro_f1_{share}"] = row[name][f"micro_f1_{share}"]
    for name, row in results.get("wiki", {}).get("methods", {}).items():
        figures[f"wiki_{name.lower()}_micro_f1_50"] = row["micro_f1_50"]
    for key in ("points_lost", "points_lost_by_one_for_all"):
        if found_rule["rule"]:
            figures[f"rule_{key}"] = round(float(np.mean([row[key] for row in found_rule["rule"]])), 2)
    common.write_result(
        common.RESULTS / "node_embeddings.json",
        figures,
        title="Node embeddings compared",
        about="128 dimensions. Micro- and macro-F1 in percent at 10, 50 and 90 % of the labels (one-vs-rest logistic "
        "regression, mean over `splits` random ones), AUC of links on held-out edges, precision of the reconstruction "
        "at the degree. Scaling, penalty and candidate settings were chosen inside the first tenth of the nodes. "
        + " ".join([*cuts(results), RULE_TEXT]),
        results={**results, **found_rule},
        versions=common.versions("numpy", "scipy", "numba"),
    )


if __name__ == "__main__":
    main()
