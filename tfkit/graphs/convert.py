"""Conversion: graphs from and to NetworkX, SciPy, Spektral and PyG objects."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp

from tfkit.graphs.graph import Graph
from tfkit.internal import checks

LEVELS = ("", "node", "graph")
_SPLITS = {"train_mask": "train", "val_mask": "val", "test_mask": "test"}


def from_scipy(adjacency: Any, **rest: Any) -> Graph:
    """Makes a graph of a SciPy adjacency, where entry (i, j) is the weight by which i hears j."""
    return Graph(sp.csr_array(adjacency), **rest)


def from_networkx(graph: Any, *, weight: str = "weight", feature: str = "", label: str = "") -> Graph:
    """Makes a graph of a NetworkX one; nodes keep their order.

    Args:
        graph: Graph or DiGraph; of a multigraph the weights are added.
        weight: attribute of the edges; 1 where an edge lacks it.
        feature: attribute of the nodes with their vectors or numbers; "" for none.
        label: attribute of the nodes with their class numbers; "" for none.

    Raises:
        ValueError: a node lacks the named attribute.
    """
    order = list(graph)
    number = {node: i for i, node in enumerate(order)}
    triples = [(number[a], number[b], data.get(weight, 1)) for a, b, data in graph.edges(data=True)]
    try:
        weights = np.array([float(triple[2]) for triple in triples])
    except (TypeError, ValueError) as found:
        remedy = 'Name another attribute by weight=, or none by weight="".'
        raise checks.error(
            "weight", f"an attribute with a number at every edge, as {weight!r}", str(found), remedy
        ) from found
    rest: dict[str, Any] = {}
    for name, key in ((feature, "features"), (label, "labels")):
        missing = [node for node in order if name and name not in graph.nodes[node]]
        if missing:
            raise checks.error(key, f"given by every node's attribute {name!r}", missing[0], "This node lacks it.")
        if name:
            values = np.asarray([graph.nodes[node][name] for node in order])
            rest[key] = values[:, None] if key == "features" and values.ndim == 1 else values
    return Graph.from_edges(
        np.array([triple[:2] for triple in triples], np.int64).reshape(-1, 2),
        len(order),
        weights=weights,
        directed=graph.is_directed(),
        self_loops="keep",
        duplicates="sum",
        **rest,
    )


def to_networkx(graph: Graph) -> Any:
    """Returns a NetworkX graph with weights, and `features` and `label` at its nodes. Needs the extra `graph`."""
    import networkx

    made = networkx.DiGraph() if graph.directed else networkx.Graph()
    made.add_nodes_from(range(graph.num_nodes))
    pairs = graph.edges()
    weights = graph.adjacency[pairs[:, 1], pairs[:, 0]] if len(pairs) else np.zeros(0)
    made.add_weighted_edges_from(
        (int(a), int(b), float(w)) for (a, b), w in zip(pairs, np.asarray(weights).ravel(), strict=True)
    )
    if graph.features is not None:
        networkx.set_node_attributes(made, dict(enumerate(_array(graph.features))), "features")
    if graph.labels is not None and graph.labels.ndim == 1:
        networkx.set_node_attributes(made, dict(enumerate(graph.labels.tolist())), "label")
    return made


def from_spektral(graph: Any, *, level: str = "") -> Graph:
    """Makes a graph of a `spektral.data.Graph`: x (features), a (adjacency), y (one-hot or class numbers).

    Edge features, `e`, have no place here and are left out.

    Args:
        graph: the object.
        level: "node" where y has a row for each node, "graph" where it is of the whole graph and becomes the graph's
            `label`; "" tells them apart by its shape: with one axis, and not as long as there are nodes, it is the
            graph's.

    Raises:
        ValueError: y fits neither.
    """
    checks.choice("level", level, LEVELS)
    if graph.a is None:
        raise checks.error("graph", "with an adjacency, a", graph)
    matrix = sp.csr_array(graph.a)
    y = None if graph.y is None else np.asarray(graph.y)
    whole = y is not None and (y.ndim == 0 or (y.ndim == 1 and len(y) != matrix.shape[0]))
    if y is not None and (level == "graph" or (whole and not level)):
        return Graph(matrix, graph.x, label=_of_graph(y))
    if y is not None and y.ndim == 2:
        rows = y.sum(axis=1)
        y = np.where(rows > 0, y.argmax(axis=1), -1) if rows.max(initial=0) <= 1 else y
    return Graph(matrix, graph.x, y)


def from_pyg(data: Any, *, level: str = "") -> Graph:
    """Makes a graph of a `torch_geometric.data.Data`: x, edge_index, edge_weight, y, and the three masks.

    PyG stores an undirected graph with both directions, and so it is found undirected here.

    Args:
        data: the object.
        level: "node" where y has a row for each node, "graph" where its one row is of the whole graph and becomes the
            graph's `label`; "" tells them apart by the number of rows, where that of a single node is the graph's.

    Raises:
        ValueError: y fits neither.
    """
    checks.choice("level", level, LEVELS)
    if getattr(data, "edge_index", None) is None:
        raise checks.error("data", "with an edge_index", data, "An adj_t is not read; leave ToSparseTensor out.")
    pairs = _numpy(data.edge_index).T.astype(np.int64)
    weights = getattr(data, "edge_weight", None)
    rest: dict[str, Any] = {}
    if getattr(data, "x", None) is not None:
        rest["features"] = _numpy(data.x)
    if getattr(data, "y", None) is not None:
        y = _numpy(data.y)
        if level == "graph" or (not level and (y.ndim == 0 or len(y) == 1)):
            rest["label"] = _of_graph(y)
        else:
            rest["labels"] = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    masks = {
        short: _numpy(getattr(data, long)) for long, short in _SPLITS.items() if getattr(data, long, None) is not None
    }
    return Graph.from_edges(
        pairs,
        int(data.num_nodes),
        weights=None if weights is None else _numpy(weights),
        directed=True,
        self_loops="keep",
        duplicates="sum",
        splits={key: mask for key, mask in masks.items() if mask.ndim == 1},
        **rest,
    )


def to_pyg_arrays(graph: Graph) -> dict[str, np.ndarray]:
    """Returns what `torch_geometric.data.Data` takes, as NumPy arrays: edge_index, edge_weight, x, y, and masks."""
    matrix = graph.adjacency.tocoo()
    arrays = {
        "edge_index": np.stack([matrix.coords[1], matrix.coords[0]]).astype(np.int64),
        "edge_weight": np.array(matrix.data),
    }
    if graph.features is not None:
        arrays["x"] = _array(graph.features)
    if graph.labels is not None:
        arrays["y"] = _array(graph.labels).astype(np.int64)
    elif graph.label is not None:
        arrays["y"] = np.asarray(graph.label)[None]
    for long, short in _SPLITS.items():
        if short in graph.splits:
            arrays[long] = graph.mask(short).astype(bool)
    return arrays


def _of_graph(y: np.ndarray) -> np.ndarray:
    """Returns the one row of y; a number where it has one entry."""
    if y.ndim > 2 or (y.ndim == 2 and len(y) != 1):
        raise checks.error("y", "one row, for the whole graph", y, 'Or set level="node".')
    return y.reshape(()) if y.size == 1 else y.reshape(-1)


def _array(matrix: Any) -> np.ndarray:
    return matrix.toarray() if sp.issparse(matrix) else np.array(matrix)


def _numpy(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().cpu().numpy() if hasattr(tensor, "detach") else tensor)
