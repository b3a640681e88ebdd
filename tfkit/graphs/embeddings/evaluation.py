"""Evaluation: how embeddings are compared, by node classification, link prediction and reconstruction."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.optimize import minimize

from tfkit.graphs.embeddings.base import Embedding
from tfkit.graphs.graph import Graph
from tfkit.graphs.sampling.kernels import kernel
from tfkit.internal import checks


class F1(NamedTuple):
    """Micro- and macro-averaged F1, in [0, 1]."""

    micro: float
    macro: float


def classify_nodes(
    vectors: np.ndarray, labels: Any, fraction: float, *, repeats: int = 10, c: float = 1.0, seed: int = 0
) -> F1:
    """Trains a one-vs-rest logistic regression on a random share of the nodes, and tests it on the others.

    A test node with k labels is given the k likeliest, as Perozzi et al. do.

    Args:
        vectors: (nodes, dimension), taken as they are.
        labels: (nodes,) class numbers, -1 for none, or (nodes, classes) zeros and ones; nodes without any are left out.
        fraction: share to train on, in (0, 1).
        repeats: random splits to average over.
        c: the inverse of the L2 penalty.
        seed: of the splits.
    """
    matrix = label_matrix(labels)
    _rows_for(vectors, len(matrix))
    kept = np.flatnonzero(matrix.any(axis=1))
    fraction = checks.number("fraction", fraction, 0, 1)
    count = round(fraction * len(kept))
    if not 0 < count < len(kept):
        raise checks.error("fraction", f"one that leaves nodes on both sides of {len(kept)}", fraction)
    found = []
    for repeat in range(checks.integer("repeats", repeats, 1)):
        order = np.random.default_rng([seed, repeat]).permutation(kept)
        train, test = order[:count], order[count:]
        weights, bias = logistic_regression(vectors[train], matrix[train], c)
        found.append(f1(matrix[test], top_labels(vectors[test] @ weights + bias, matrix[test].sum(axis=1))))
    return F1(*np.mean(found, axis=0).tolist())


def label_matrix(labels: Any) -> np.ndarray:
    """Returns (nodes, classes) booleans of either kind of labels."""
    if sp.issparse(labels):
        return labels.toarray() > 0
    array = np.asarray(labels)
    return array > 0 if array.ndim == 2 else array[:, None] == np.arange(array.max(initial=-1) + 1)


def logistic_regression(x: np.ndarray, y: np.ndarray, c: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Returns weights (dimension, classes) and biases that minimise |W|^2 / 2 + c * the log-loss of every class.

    Biases are not penalised.

    Args:
        x: (examples, dimension).
        y: (examples, classes) booleans.
        c: weight of the loss.
    """
    x = np.asarray(x, np.float64)
    target = np.asarray(y, np.float64)
    shape = (x.shape[1] + 1, target.shape[1])
    # Directions of like curvature: the optimum is the same, and is found in far fewer steps.
    scale = 1 / np.sqrt(1 + c * 0.05 * (x**2).sum(axis=0))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        held = flat.reshape(shape)
        w = held[:-1] * scale[:, None]
        logits = x @ w + held[-1]
        loss = np.logaddexp(0, logits).sum() - (target * logits).sum()
        error = c * (0.5 * (1 + np.tanh(0.5 * logits)) - target)
        gradient = np.concatenate([(x.T @ error + w) * scale[:, None], error.sum(axis=0, keepdims=True)])
        return c * loss + 0.5 * (w**2).sum(), gradient.ravel()

    start = np.zeros(shape)
    # The share of each class is where its bias ends up without features.
    share = np.clip(target.mean(axis=0), 1e-4, 1 - 1e-4)
    start[-1] = np.log(share / (1 - share))
    options = {"maxiter": 300, "maxcor": 20, "gtol": 1e-4 * max(1.0, c), "ftol": 1e-8}
    found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
    return found[:-1] * scale[:, None], found[-1]


def top_labels(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns booleans of the `counts[i]` largest scores of each row.

    >>> top_labels(np.array([[0.1, 0.7, 0.2]]), np.array([2]))
    array([[False,  True,  True]])
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, np.arange(scores.shape[1]) < counts[:, None], axis=1)
    return found


def f1(truth: np.ndarray, predicted: np.ndarray) -> F1:
    """Returns the F1 over all decisions, and its mean over the classes that occur in either.

    >>> f1(np.eye(2, dtype=bool), np.array([[True, False], [True, False]]))
    F1(micro=0.5, macro=0.3333333333333333)
    """
    right = (truth & predicted).sum(axis=0)
    marked = truth.sum(axis=0) + predicted.sum(axis=0)
    seen = marked > 0
    return F1(float(2 * right.sum() / max(1, marked.sum())), float((2 * right[seen] / marked[seen]).mean()))


class LinkSplit(NamedTuple):
    """A graph without some of its edges, the edges, and as many pairs that are none."""

    graph: Graph
    edges: np.ndarray
    others: np.ndarray


def split_links(graph: Graph, share: float = 0.2, *, seed: int = 0) -> LinkSplit:
    """Takes a share of the edges away, none that would leave a node without any.

    Args:
        graph: of which an undirected edge counts once.
        share: of the edges, in (0, 1); fewer where nodes would be left alone.
        seed: of the choices.
    """
    share = checks.number("share", share, 0, 1, open_high=True)
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(graph.edges())
    wanted = round(share * len(pairs))
    if not wanted:
        raise checks.error("share", f"enough for one of {len(pairs)} edges", share)
    degrees = np.bincount(pairs.ravel(), minlength=graph.num_nodes)
    taken = np.zeros(len(pairs), bool)
    _take(pairs, degrees, wanted, taken)
    weights = np.asarray(graph.adjacency[pairs[:, 1], pairs[:, 0]]).ravel()
    rest = Graph.from_edges(
        pairs[~taken], graph.num_nodes, weights=weights[~taken], directed=graph.directed, self_loops="keep"
    )
    rest = rest.with_(features=graph.features, labels=graph.labels, splits=graph.splits, name=graph.name)
    return LinkSplit(rest, pairs[taken], absent_pairs(graph, int(taken.sum()), seed))


@kernel
def _take(pairs, degrees, wanted, taken):  # type: ignore[no-untyped-def]
    """Marks the first pairs whose removal leaves both ends another edge."""
    count = 0
    for i in range(pairs.shape[0]):
        a, b = pairs[i, 0], pairs[i, 1]
        if count < wanted and a != b and degrees[a] > 1 and degrees[b] > 1:
            taken[i] = True
            degrees[a] -= 1
            degrees[b] -= 1
            count += 1


def absent_pairs(graph: Graph, count: int, seed: int) -> np.ndarray:
    """Returns pairs of different nodes without an edge, drawn uniformly: (count, 2)."""
    nodes, rng = graph.num_nodes, np.random.default_rng([seed, 1])
    present = graph.adjacency.tocoo()
    keys = np.unique(present.coords[1].astype(np.int64) * nodes + present.coords[0])
    if nodes * (nodes - 1) - len(keys) < count:
        raise checks.error("graph", f"with {count} pairs that are no edges", graph)
    found = np.zeros((0, 2), np.int64)
    while len(found) < count:
        pairs = rng.integers(0, nodes, (2 * count, 2))
        absent = ~np.isin(pairs[:, 0] * nodes + pairs[:, 1], keys) & (pairs[:, 0] != pairs[:, 1])
        found = np.concatenate([found, pairs[absent]])
    return found[:count]


def auc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the chance that a positive's score is above a negative's, ties counted half.

    >>> auc(np.array([2.0, 3.0]), np.array([1.0, 2.0]))
    0.875
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.concatenate([positive, negative]))
    count = len(positive)
    return float((ranks[:count].sum() - count * (count + 1) / 2) / (count * len(negative)))


def predict_links(method: Embedding, graph: Graph, share: float = 0.2, *, seed: int = 0) -> float:
    """Returns the AUC on edges that the method did not see.

    An edge is judged by a logistic regression on the entrywise product of its ends' unit vectors, trained on edges that
    the method did see and as many absent pairs; how the products count is thus the same question for every method.
    """
    split = split_links(graph, share, seed=seed)
    vectors = unit_rows(method.embed(split.graph))
    seen = split.graph.edges()
    none = absent_pairs(graph, len(seen), seed + 1)
    x = np.concatenate([_products(vectors, seen), _products(vectors, none)])
    y = np.arange(len(x))[:, None] < len(seen)
    weights, _ = logistic_regression(x, y)
    return auc(_products(vectors, split.edges) @ weights[:, 0], _products(vectors, split.others) @ weights[:, 0])


def reconstruct(vectors: np.ndarray, graph: Graph, *, nodes: int = 1000, seed: int = 0) -> float:
    """Returns the mean precision at each node's degree of its nearest nodes by angle: 1 where they are its neighbours.

    Self loops do not count.

    Args:
        vectors: (nodes, dimension).
        graph: the graph they were made of, without regard to directions.
        nodes: how many random nodes with neighbours to look at.
        seed: of the choice.
    """
    _rows_for(vectors, graph.num_nodes)
    matrix = graph.undirected().adjacency
    matrix = sp.csr_array(matrix - sp.diags_array(matrix.diagonal(), dtype="float32"))
    matrix.eliminate_zeros()
    degrees = np.diff(matrix.indptr)
    able = np.flatnonzero(degrees)
    if not len(able):
        raise checks.error("graph", "with an edge between two nodes or more", graph)
    chosen = np.random.default_rng(seed).permutation(able)[:nodes]
    rows = unit_rows(vectors)
    scores = rows[chosen] @ rows.T
    scores[np.arange(len(chosen)), chosen] = -np.inf
    near = top_labels(scores, degrees[chosen])
    present = (matrix[chosen] > 0).toarray()
    return float(((near & present).sum(axis=1) / degrees[chosen]).mean())


def _rows_for(vectors: np.ndarray, nodes: int) -> None:
    if getattr(vectors, "ndim", 0) != 2 or len(vectors) != nodes:
        raise checks.error("vectors", f"an array ({nodes}, dimension), a row for each node", vectors)


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """Returns the rows divided by their norms; zeros stay zeros."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _products(vectors: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return vectors[pairs[:, 0]] * vectors[pairs[:, 1]]
