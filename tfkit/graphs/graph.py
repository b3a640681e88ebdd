"""Graph: nodes, weighted edges, features, labels and splits in one immutable container."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp

from tfkit.internal import checks

Features: TypeAlias = np.ndarray | sp.csr_array
SELF_LOOPS = ("keep", "drop", "error")
DUPLICATES = ("merge", "sum", "error")


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph, read-only.

    Entry (i, j) of the adjacency is the weight of the edge by which node i hears node j; an undirected graph has both
    directions. Arrays are checked, brought into one form and locked; a change makes a new graph (`with_`).

    Attributes:
        adjacency: (nodes, nodes), SciPy CSR, float32, sorted, without stored zeros.
        features: (nodes, dimensions), a float32 array or SciPy CSR array; or None. A memory-mapped array stays one, and
            its rows are checked for NaN only when they are read.
        labels: (nodes,) integers, -1 for none; or (nodes, classes) SciPy CSR array of zeros and ones, where a node may
            have several; or None.
        splits: names, as "train", to node ids.
        name: for messages.
        label: what is to be predicted of the graph as a whole: an integer, a float, or a float32 array (k,); or None.

    >>> graph = Graph.from_edges([(0, 1), (1, 2)])
    >>> graph
    Graph(nodes=3, edges=2, undirected)
    >>> graph.degrees
    array([1, 2, 1])
    """

    adjacency: sp.csr_array
    features: Features | None = None
    labels: np.ndarray | sp.csr_array | None = None
    splits: Mapping[str, np.ndarray] = field(default_factory=dict)
    name: str = ""
    label: int | float | np.ndarray | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "adjacency", _adjacency(self.adjacency))
        nodes = self.adjacency.shape[0]
        if self.features is not None:
            put(self, "features", _features(self.features, nodes))
        if self.labels is not None:
            put(self, "labels", _labels(self.labels, nodes))
        if self.label is not None:
            put(self, "label", _label(self.label))
        splits = {str(key): _ids(f"splits[{key!r}]", ids, nodes) for key, ids in dict(self.splits).items()}
        put(self, "splits", MappingProxyType(splits))

    @classmethod
    def from_edges(
        cls,
        edges: Any,
        num_nodes: int | None = None,
        *,
        weights: Any = None,
        directed: bool = False,
        self_loops: str = "drop",
        duplicates: str = "merge",
        **rest: Any,
    ) -> Graph:
        """Makes a graph of a list of edges.

        Args:
            edges: (edges, 2) node ids from 0; for a directed graph (source, target), where the target hears the source.
            num_nodes: nodes, isolated ones too; None: the largest id and one.
            weights: (edges,) finite numbers; None: 1 each.
            directed: False stores both directions of each edge.
            self_loops: "drop", "keep" or "error".
            duplicates: an edge given twice counts once ("merge", the largest weight), as their "sum", or is an
                "error". In an undirected graph (i, j) and (j, i) are the same edge.
            **rest: features, labels, splits, name, label.

        Raises:
            ValueError: ids out of range, weights that are not finite, or what the settings call an error.
        """
        checks.choice("self_loops", self_loops, SELF_LOOPS)
        checks.choice("duplicates", duplicates, DUPLICATES)
        pairs, count = _pairs(edges, num_nodes)
        values = np.ones(len(pairs), "float32") if weights is None else np.asarray(weights, "float32")
        if values.shape != (len(pairs),) or not np.isfinite(values).all():
            raise checks.error("weights", f"{len(pairs)} finite numbers, one an edge", weights)
        loops = pairs[:, 0] == pairs[:, 1]
        if self_loops == "error" and loops.any():
            raise checks.error("edges", "without self loops", pairs[loops][:5].tolist(), 'Or set self_loops="keep".')
        if self_loops == "drop":
            pairs, values = pairs[~loops], values[~loops]
        if not directed:
            pairs = np.sort(pairs, axis=1)
        # The target, which hears, is the row.
        pairs, values = _without_duplicates(pairs[:, ::-1], values, duplicates)
        matrix = sp.coo_array((values, (pairs[:, 0], pairs[:, 1])), shape=(count, count)).tocsr()
        if not directed:
            diagonal = sp.diags_array(matrix.diagonal(), dtype="float32")
            matrix = sp.csr_array(matrix + matrix.T - diagonal)
        return cls(matrix, **rest)

    @property
    def num_nodes(self) -> int:
        """How many nodes there are, isolated ones too."""
        return int(self.adjacency.shape[0])

    @cached_property
    def num_edges(self) -> int:
        """Edges, each direction counted in a directed graph, pairs in an undirected one."""
        if self.directed:
            return int(self.adjacency.nnz)
        loops = int(np.count_nonzero(self.adjacency.diagonal()))
        return (int(self.adjacency.nnz) - loops) // 2 + loops

    @cached_property
    def directed(self) -> bool:
        """Whether some edge goes one way only, or weighs otherwise in the other."""
        return (self.adjacency - self.adjacency.T).count_nonzero() > 0

    @cached_property
    def degrees(self) -> np.ndarray:
        """Neighbours of each node: (nodes,) integers."""
        return np.diff(self.adjacency.indptr)

    @cached_property
    def num_classes(self) -> int:
        """Classes among the labels; 0 without labels."""
        if self.labels is None:
            return 0
        return int(self.labels.shape[1]) if self.labels.ndim == 2 else int(self.labels.max(initial=-1)) + 1

    def edges(self) -> np.ndarray:
        """Returns (edges, 2) pairs (source, target); of an undirected graph each once, the lower id first."""
        matrix = self.adjacency.tocoo()
        pairs = np.stack([matrix.coords[1], matrix.coords[0]], axis=1).astype(np.int64)
        pairs = pairs if self.directed else pairs[pairs[:, 0] <= pairs[:, 1]]
        return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]

    def undirected(self) -> Graph:
        """Returns the graph with every edge in both directions, with the larger of their weights."""
        return replace(self, adjacency=self.adjacency.maximum(self.adjacency.T)) if self.directed else self

    def subgraph(self, nodes: Any) -> Graph:
        """Returns the graph induced by `nodes`, in their order; splits keep what lies inside."""
        chosen = _ids("nodes", nodes, self.num_nodes)
        position = np.full(self.num_nodes, -1)
        position[chosen] = np.arange(len(chosen))
        splits = {key: position[ids][position[ids] >= 0] for key, ids in self.splits.items()}
        return Graph(
            self.adjacency[chosen][:, chosen],
            None if self.features is None else self.features[chosen],
            None if self.labels is None else self.labels[chosen],
            splits,
            self.name,
        )

    def with_(self, **changes: Any) -> Graph:
        """Returns the graph with the named attributes changed."""
        return replace(self, **changes)

    def mask(self, split: str) -> np.ndarray:
        """Returns (nodes,) float32: 1 for the nodes of the split."""
        if split not in self.splits:
            raise checks.error("split", f"one of {sorted(self.splits)}", split, "Pass splits= when making the graph.")
        found = np.zeros(self.num_nodes, "float32")
        found[self.splits[split]] = 1
        return found

    def __repr__(self) -> str:
        kind = "directed" if self.directed else "undirected"
        name = f"{self.name!r}, " if self.name else ""
        shown = "" if self.features is None else f", features={self.features.shape[1]}"
        classes = f", classes={self.num_classes}" if self.labels is not None else ""
        return f"Graph({name}nodes={self.num_nodes}, edges={self.num_edges}, {kind}{shown}{classes})"


def _pairs(edges: Any, num_nodes: int | None) -> tuple[np.ndarray, int]:
    pairs = np.asarray(edges)
    if pairs.size == 0:
        pairs = np.zeros((0, 2), np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        remedy = "from_networkx numbers nodes that have names." if pairs.dtype.kind in "OSU" else ""
        remedy = "Give them as integers." if pairs.dtype.kind == "f" else remedy
        remedy = "Transpose them." if pairs.ndim == 2 and len(pairs) == 2 and pairs.dtype.kind in "iu" else remedy
        raise checks.error("edges", "integer node ids of shape (edges, 2)", edges, remedy)
    largest = int(pairs.max(initial=-1))
    count = largest + 1 if num_nodes is None else checks.integer("num_nodes", num_nodes, 0)
    if pairs.min(initial=0) < 0 or largest >= count:
        bad = pairs.min(initial=0) if pairs.min(initial=0) < 0 else largest
        raise checks.error("edges", f"node ids from 0 to {count - 1}", int(bad), "Renumber them, or raise num_nodes.")
    return pairs.astype(np.int64), count


def _without_duplicates(pairs: np.ndarray, values: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs, values = pairs[order], values[order]
    first = np.ones(len(pairs), bool)
    first[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    if first.all():
        return pairs, values
    if rule == "error":
        raise checks.error("edges", "without duplicates", pairs[~first][:5].tolist(), 'Or set duplicates="merge".')
    join = np.add if rule == "sum" else np.maximum
    return pairs[first], join.reduceat(values, np.flatnonzero(first))


def _locked(array: np.ndarray) -> np.ndarray:
    if array.flags.writeable:
        array = array.view()
        array.flags.writeable = False
    return array


def _lock_matrix(matrix: sp.csr_array) -> sp.csr_array:
    matrix.data, matrix.indices, matrix.indptr = map(_locked, (matrix.data, matrix.indices, matrix.indptr))
    return matrix


def _csr(name: str, matrix: Any) -> sp.csr_array:
    """Returns a sorted CSR array of float32 without duplicates, of its own."""
    made = sp.csr_array(matrix, dtype="float32", copy=True)
    made.check_format(full_check=True)
    made.sum_duplicates()
    made.eliminate_zeros()
    made.sort_indices()
    if not np.isfinite(made.data).all():
        raise checks.error(name, "finite", matrix, "NaN or infinity was found.")
    return made


def _adjacency(matrix: Any) -> sp.csr_array:
    if getattr(matrix, "ndim", 0) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise checks.error("adjacency", "a square matrix", matrix, "Graph.from_edges takes a list of edges.")
    return _lock_matrix(_csr("adjacency", matrix))


def _features(features: Any, nodes: int) -> Features:
    features = _array(features)
    if features.ndim != 2 or features.shape[0] != nodes:
        raise checks.error("features", f"of shape ({nodes}, dimensions), a row for each node", features)
    if sp.issparse(features):
        return _lock_matrix(_csr("features", features))
    if isinstance(features, np.memmap):
        return features  # Larger than memory, so that a look at every number would take minutes.
    return _locked(finite_rows(np.asarray(features, "float32")))


def finite_rows(rows: np.ndarray, nodes: Any = None) -> np.ndarray:
    """Returns rows of features, of these `nodes` or of all, if all are finite, and raises with the first that is not.

    Raises:
        ValueError: a row holds NaN or infinity.
    """
    if not np.isfinite(rows).all():
        row = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        row = row if nodes is None else int(nodes[row])
        raise checks.error("features", "finite", rows, f"Row {row} holds NaN or infinity; impute or drop it.")
    return rows


def _array(values: Any) -> Any:
    """Returns lists and the like as an array; matrices as they are."""
    if hasattr(values, "ndim"):
        return values
    try:
        return np.asarray(values)
    except ValueError:  # Rows of different lengths.
        return np.asarray(None)


def _labels(labels: Any, nodes: int) -> np.ndarray | sp.csr_array:
    labels = _array(labels)
    if labels.ndim not in (1, 2) or labels.shape[0] != nodes:
        raise checks.error("labels", f"of shape ({nodes},), or ({nodes}, classes) for several labels a node", labels)
    if labels.ndim == 2:
        matrix = _csr("labels", labels)
        if not (matrix.data == 1).all():
            raise checks.error("labels", "zeros and ones, where they have two axes", labels)
        return _lock_matrix(matrix)
    array = np.asarray(labels)
    if array.dtype.kind not in "biu" or array.min(initial=0) < -1:
        named = array.dtype.kind not in "biuf"
        remedy = "np.unique(labels, return_inverse=True) numbers names." if named else ""
        raise checks.error("labels", "integers from 0, or -1 for none", labels, remedy)
    return _locked(array.astype(np.int32))


def _label(label: Any) -> int | float | np.ndarray:
    array = np.asarray(label)
    if array.ndim > 1 or not array.size or array.dtype.kind not in "biuf":
        raise checks.error("label", "a number, or an array (k,) of numbers, for the whole graph", label)
    if array.ndim:
        return _locked(array.astype("float32"))
    return float(array) if array.dtype.kind == "f" else int(array)


def _ids(name: str, ids: Any, nodes: int) -> np.ndarray:
    array = np.asarray(ids)
    if array.dtype == bool and array.shape == (nodes,):
        array = np.flatnonzero(array)
    if array.size == 0:
        array = np.zeros(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise checks.error(name, "a list of node ids or a mask of all nodes", ids)
    if array.min(initial=0) < 0 or array.max(initial=-1) >= nodes:
        raise checks.error(name, f"node ids from 0 to {nodes - 1}", int(array[np.argmax(np.abs(array))]))
    if len(np.unique(array)) != len(array):
        raise checks.error(name, "without duplicates", ids)
    return _locked(array.astype(np.int64))
