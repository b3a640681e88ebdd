"""The named graphs: Cora, Citeseer, BlogCatalog and Wiki; and synthetic ones of known structure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from tfkit.data import DataError
from tfkit.data import npz as archives
from tfkit.graphs.graph import Graph
from tfkit.graphs.normalization import gcn_normalize
from tfkit.internal import checks

#: Name: whether its edges are directed, and where the graph is published.
NAMES = {
    "cora": (False, "https://github.com/kimiyoung/planetoid"),
    "citeseer": (False, "https://github.com/kimiyoung/planetoid"),
    "blogcatalog": (False, "https://github.com/phanein/deepwalk"),
    "wiki": (True, "https://github.com/thunlp/OpenNE"),
}


def load(name: str) -> Graph:
    """Returns a named graph from the folder `$TFKIT_DATA`.

    Args:
        name: "cora" or "citeseer" (features, splits "train", "val", "test"), "blogcatalog" (several labels a node), or
            "wiki" (directed).

    Raises:
        DataError: the file is not there, or is not such a graph; the message names file, address and variable.
    """
    checks.choice("name", name, NAMES)
    directed, address = NAMES[name]
    folder = os.environ.get("TFKIT_DATA", "")
    path = Path(folder) / f"{name}.npz"
    if not folder or not path.is_file():
        raise DataError(
            f"The graph {name!r} is not on this machine. Get it from {address} and put it as {name}.npz into a folder "
            f"to which TFKIT_DATA is set. Looked for: {path if folder else 'TFKIT_DATA is not set'}."
        )
    arrays = archives.read(path)
    try:
        return _graph(name, arrays, directed)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} does not hold the graph {name!r}: {error}") from error


def _graph(name: str, arrays: dict[str, np.ndarray], directed: bool) -> Graph:
    rest: dict[str, Any] = {"name": name}
    nodes = int(arrays["num_nodes"]) if "num_nodes" in arrays else len(arrays["labels"])
    if "features_data" in arrays:
        shape = tuple(int(size) for size in arrays["features_shape"])
        parts = (arrays["features_data"], arrays["features_indices"], arrays["features_indptr"])
        rest["features"] = sp.csr_array(parts, shape=shape)
    if "labels_indptr" in arrays:
        indices = arrays["labels_indices"]
        parts = (np.ones(len(indices), "float32"), indices, arrays["labels_indptr"])
        rest["labels"] = sp.csr_array(parts, shape=(nodes, int(arrays["num_labels"])))
    else:
        rest["labels"] = arrays["labels"]
    rest["splits"] = {key: arrays[f"{key}_index"] for key in ("train", "val", "test") if f"{key}_index" in arrays}
    return Graph.from_edges(arrays["edges"].astype(np.int64), nodes, directed=directed, **rest)


def stochastic_block_model(
    nodes: int,
    classes: int,
    degree: float,
    *,
    homophily: float = 0.8,
    features: int = 0,
    noise: float = 1.0,
    seed: int = 0,
) -> Graph:
    """Returns an undirected graph of known communities, made in time linear in its edges.

    Each of nodes * degree / 2 edges starts at a random node and ends, with chance `homophily`, at one of its class,
    else anywhere.

    Args:
        nodes: how many.
        classes: communities, which are the labels.
        degree: mean neighbours of a node; fewer where edges fall on each other.
        homophily: in [0, 1].
        features: dimensions of Gaussian features around a mean of each class; 0 for none.
        noise: standard deviation around the mean, whose entries have 1.
        seed: of everything.
    """
    nodes, classes = checks.integer("nodes", nodes, 1), checks.integer("classes", classes, 1)
    homophily = checks.number("homophily", homophily, 0, 1)
    rng = np.random.default_rng(checks.integer("seed", seed, 0))
    labels = rng.integers(0, classes, nodes).astype(np.int32)
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes)
    starts = np.cumsum(counts) - counts
    count = round(nodes * checks.number("degree", degree, 0) / 2)
    source = rng.integers(0, nodes, count)
    own = labels[source]
    inside = order[starts[own] + rng.integers(0, counts[own])]
    target = np.where(rng.random(count) < homophily, inside, rng.integers(0, nodes, count))
    matrix = None
    if checks.integer("features", features, 0):
        means = rng.normal(size=(classes, features)).astype("float32")
        matrix = rng.standard_normal((nodes, features), "float32")
        matrix *= np.float32(noise)
        matrix += means[labels]
    cut = np.cumsum([nodes // 2, nodes // 4])
    train, val, test = np.split(rng.permutation(nodes), cut)
    splits = {"train": train, "val": val, "test": test}
    return Graph.from_edges(
        np.stack([source, target], axis=1),
        nodes,
        features=matrix,
        labels=labels,
        splits=splits,
        name="stochastic block model",
    )


def power_law_roles(nodes: int, attach: int = 3, *, seed: int = 0) -> Graph:
    """Returns a preferential-attachment graph whose labels are quartiles of the degree: roles, not communities.

    Args:
        nodes: how many.
        attach: edges that each new node brings.
        seed: of the choices.
    """
    nodes, attach = checks.integer("nodes", nodes, 2), checks.integer("attach", attach, 1)
    rng = np.random.default_rng(checks.integer("seed", seed, 0))
    pool = list(range(min(attach, nodes)))
    edges = []
    for node in range(min(attach, nodes), nodes):
        chosen = {pool[i] for i in rng.integers(0, len(pool), attach)}
        edges += [(node, other) for other in chosen]
        pool += [*chosen, *[node] * len(chosen)]
    graph = Graph.from_edges(edges, nodes, name="power law")
    ranks = np.argsort(np.argsort(graph.degrees, kind="stable"), kind="stable")
    return graph.with_(labels=(4 * ranks // nodes).astype(np.int32))


def two_hop_quantiles(nodes: int, classes: int, degree: float, *, features: int = 16, seed: int = 0) -> Graph:
    """Returns a random graph whose labels are quantiles of an average over all neighbours, so that each one counts.

    With P the GCN's matrix, X Gaussian, and random matrices A and b, a node's label is the quantile of P relu(P X A) b:
    what a GCN of two layers computes. Who sees few neighbours in training learns to distrust what the average says.

    Args:
        nodes: how many.
        classes: quantiles.
        degree: mean neighbours of a node.
        features: dimensions of X.
        seed: of everything.
    """
    graph = stochastic_block_model(nodes, 1, degree, seed=seed)
    rng = np.random.default_rng([checks.integer("seed", seed, 0), 1])
    x = rng.standard_normal((nodes, features), "float32")
    matrix = gcn_normalize(graph.adjacency)
    hidden = np.maximum(matrix @ x @ rng.standard_normal((features, 8), "float32"), 0)
    score = (matrix @ hidden) @ rng.standard_normal(8, "float32")
    ranks = np.argsort(np.argsort(score, kind="stable"), kind="stable")
    labels = (checks.integer("classes", classes, 2) * ranks // nodes).astype(np.int32)
    # Inputs of unit size after the first average, as features divided by their deviation would be.
    return graph.with_(features=x * np.float32(np.sqrt(degree)), labels=labels, name="two-hop quantiles")
