"""The container, its sources, and normalisations."""

import types

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from tfkit import graphs
from tfkit.data import DataError


@pytest.fixture
def square():
    """A ring of four and an isolated node."""
    return graphs.Graph.from_edges([(0, 1), (1, 2), (2, 3), (3, 0)], 5, labels=np.array([0, 1, 0, 1, -1]))


def test_undirected_graph_has_both_directions(square):
    assert square.num_nodes == 5 and square.num_edges == 4 and not square.directed
    np.testing.assert_array_equal(square.degrees, [2, 2, 2, 2, 0])
    np.testing.assert_array_equal(square.edges(), [[0, 1], [0, 3], [1, 2], [2, 3]])
    assert square.num_classes == 2


def test_directed_edges_are_heard_by_their_target():
    graph = graphs.Graph.from_edges([(0, 1), (1, 2)], directed=True)
    assert graph.directed and graph.num_edges == 2
    np.testing.assert_array_equal(graph.adjacency.toarray(), [[0, 0, 0], [1, 0, 0], [0, 1, 0]])
    assert not graph.undirected().directed
    np.testing.assert_array_equal(graph.edges(), [[0, 1], [1, 2]])


@pytest.mark.parametrize(("rule", "weight"), [("merge", 3.0), ("sum", 6.0)])
def test_duplicates_in_either_direction_are_one_edge(rule, weight):
    graph = graphs.Graph.from_edges([(0, 1), (1, 0), (0, 1)], weights=[1, 2, 3], duplicates=rule)
    np.testing.assert_array_equal(graph.adjacency.toarray(), [[0, weight], [weight, 0]])


def test_self_loops_drop_or_stay_once():
    assert graphs.Graph.from_edges([(0, 0), (0, 1)]).num_edges == 1
    kept = graphs.Graph.from_edges([(0, 0), (0, 1)], self_loops="keep")
    np.testing.assert_array_equal(kept.adjacency.toarray(), [[1, 1], [1, 0]])
    assert kept.num_edges == 2


@pytest.mark.parametrize(
    ("edges", "settings_", "message"),
    [
        ([(0, 5)], {"num_nodes": 3}, "node ids from 0 to 2"),
        ([(-1, 0)], {}, "node ids from 0"),
        ([(0.5, 1.0)], {}, "integer node ids"),
        ([(0, 1, 2)], {}, "shape"),
        ([(0, 0)], {"self_loops": "error"}, "self loops"),
        ([(0, 1), (1, 0)], {"duplicates": "error"}, "duplicates"),
        ([(0, 1)], {"weights": [np.nan]}, "finite"),
        ([(0, 1)], {"features": np.array([[np.nan], [1]])}, "Row 0"),
        ([(0, 1)], {"features": np.ones((3, 1))}, r"\(2, dimensions\)"),
        ([(0, 1)], {"labels": np.array([0, -2])}, "-1 for none"),
        ([(0, 1)], {"splits": {"train": [0, 0]}}, "without duplicates"),
        ([(0, 1)], {"splits": {"train": [2]}}, "node ids from 0 to 1"),
    ],
)
def test_bad_input_is_refused(edges, settings_, message):
    with pytest.raises(ValueError, match=message):
        graphs.Graph.from_edges(edges, **settings_)


def test_lists_and_truth_values_are_arrays():
    graph = graphs.Graph.from_edges([(0, 1)], features=[[1, 2], [3, 4]], labels=[True, False])
    np.testing.assert_array_equal(graph.features, [[1, 2], [3, 4]])
    np.testing.assert_array_equal(graph.labels, [1, 0])
    assert graph.with_(labels=[1, 0]).labels.dtype == np.int32
    with pytest.raises(ValueError, match=r"np.unique\(labels"):
        graph.with_(labels=["left", "right"])
    for features in ([[1, 2], [3]], 5):
        with pytest.raises(ValueError, match=r"\(2, dimensions\)"):
            graph.with_(features=features)
    with pytest.raises(ValueError, match="from_networkx"):
        graphs.Graph.from_edges([("a", "b")])
    with pytest.raises(ValueError, match="Transpose"):
        graphs.Graph.from_edges([[0, 1, 2], [1, 2, 0]])


def test_a_graph_is_read_only(square):
    with pytest.raises(AttributeError):
        square.name = "other"
    with pytest.raises(ValueError, match="read-only"):
        square.adjacency.data[0] = 2
    with pytest.raises(ValueError, match="read-only"):
        square.labels[0] = 2
    with pytest.raises(TypeError):
        square.splits["train"] = np.array([0])


def test_the_callers_arrays_are_neither_locked_nor_shared():
    matrix = sp.csr_array(np.array([[0, 1], [1, 0]], "float32"))
    graph = graphs.Graph(matrix)
    matrix.data[0] = 7
    assert graph.adjacency.data[0] == 1


def test_empty_graphs_are_graphs():
    assert graphs.Graph.from_edges([], 3).num_edges == 0
    assert graphs.Graph.from_edges([]).num_nodes == 0


def test_subgraph_keeps_order_and_splits(square):
    part = square.with_(splits={"train": [3, 4]}).subgraph([3, 0, 1])
    np.testing.assert_array_equal(part.adjacency.toarray(), [[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    np.testing.assert_array_equal(part.splits["train"], [0])
    np.testing.assert_array_equal(part.labels, [1, 0, 1])


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_normalisations_are_those_of_dense_matrices(pairs):
    adjacency = graphs.Graph.from_edges(np.array(pairs, int).reshape(-1, 2), 7, self_loops="keep").adjacency
    dense = adjacency.toarray().astype(np.float64)
    loops = dense + np.eye(7)
    root = np.diag(loops.sum(1) ** -0.5)
    np.testing.assert_allclose(graphs.gcn_normalize(adjacency).toarray(), root @ loops @ root, atol=1e-6)
    sums = dense.sum(1)
    expected = np.divide(dense, sums[:, None], out=np.zeros_like(dense), where=sums[:, None] > 0)
    np.testing.assert_allclose(graphs.row_normalize(adjacency).toarray(), expected, atol=1e-6)
    np.testing.assert_allclose(graphs.row_normalize(dense), expected, atol=1e-6)
    np.testing.assert_allclose(
        graphs.laplacian(adjacency, normalized=False).toarray(), np.diag(sums) - dense, atol=1e-6
    )
    eigenvalues = np.linalg.eigvalsh(graphs.laplacian(adjacency).toarray())
    assert eigenvalues.min() > -1e-5 and eigenvalues.max() < 2 + 1e-5


def test_negative_weights_have_no_root():
    with pytest.raises(ValueError, match="negative"):
        graphs.gcn_normalize(sp.csr_array(np.array([[0, -1], [-1, 0]])))


def test_networkx_round_trip():
    networkx = pytest.importorskip("networkx")
    source = networkx.karate_club_graph()
    graph = graphs.from_networkx(source)
    back = graphs.to_networkx(graph)
    assert graph.num_edges == source.number_of_edges()
    assert {frozenset(edge) for edge in back.edges} == {frozenset(edge) for edge in source.edges}
    assert back[0][1]["weight"] == source[0][1]["weight"]
    with pytest.raises(ValueError, match="attribute 'x'"):
        graphs.from_networkx(source, feature="x")
    networkx.set_node_attributes(source, {node: node / 2 for node in source}, "x")
    assert graphs.from_networkx(source, feature="x").features.shape == (34, 1)
    source[0][1]["weight"] = None
    with pytest.raises(ValueError, match="number at every edge"):
        graphs.from_networkx(source)
    assert graphs.from_networkx(source, weight="").adjacency.max() == 1


def test_objects_of_other_libraries():
    matrix = np.array([[0, 1], [1, 0]], "float32")
    spektral = types.SimpleNamespace(a=matrix, x=np.ones((2, 3), "float32"), y=np.eye(2), e=None)
    graph = graphs.from_spektral(spektral)
    np.testing.assert_array_equal(graph.labels, [0, 1])
    arrays = graphs.to_pyg_arrays(graph.with_(splits={"train": [1]}))
    np.testing.assert_array_equal(arrays["edge_index"], [[1, 0], [0, 1]])
    pyg = types.SimpleNamespace(num_nodes=2, **arrays)
    again = graphs.from_pyg(pyg)
    np.testing.assert_array_equal(again.adjacency.toarray(), matrix)
    np.testing.assert_array_equal(again.splits["train"], [1])
    np.testing.assert_array_equal(again.features, graph.features)


def molecule(y, nodes=3, **more):
    """What PyG and Spektral hold of a path of `nodes` nodes, with labels `y`."""
    path = np.arange(nodes)
    edges = np.stack([np.r_[path[:-1], path[1:]], np.r_[path[1:], path[:-1]]])
    adjacency = np.zeros((nodes, nodes), "float32")
    adjacency[edges[0], edges[1]] = 1
    x = np.ones((nodes, 2), "float32")
    pyg = types.SimpleNamespace(num_nodes=nodes, x=x, edge_index=edges, y=None if y is None else np.asarray(y), **more)
    return pyg, types.SimpleNamespace(a=adjacency, x=x, y=pyg.y, e=None)


@pytest.mark.parametrize(
    ("y", "label"),
    [([1], 1), ([[1]], 1), ([0.5], 0.5), ([[0.5]], 0.5), ([[0.0, 1.0]], [0, 1]), (1, 1), (True, 1)],
)
def test_one_row_of_labels_is_of_the_whole_graph(y, label):
    graph = graphs.from_pyg(molecule(y)[0])
    assert graph.labels is None
    np.testing.assert_array_equal(graph.label, label)
    again = graphs.from_pyg(types.SimpleNamespace(num_nodes=3, **graphs.to_pyg_arrays(graph)))
    np.testing.assert_array_equal(again.label, label)
    assert type(again.label) is type(graph.label)
    if np.ndim(y) < 2:
        np.testing.assert_array_equal(graphs.from_spektral(molecule(y)[1]).label, label)


def test_labels_of_nodes_and_of_graphs_are_told_apart():
    pyg, spektral = molecule([0, 1, 0])
    np.testing.assert_array_equal(graphs.from_pyg(pyg).labels, [0, 1, 0])
    np.testing.assert_array_equal(graphs.from_spektral(spektral).labels, [0, 1, 0])
    np.testing.assert_array_equal(graphs.from_pyg(molecule([[0], [1], [0]])[0]).labels, [0, 1, 0])
    # As many classes as nodes: only the reader knows.
    one_hot = graphs.from_spektral(spektral, level="graph")
    assert one_hot.labels is None
    np.testing.assert_array_equal(one_hot.label, [0, 1, 0])
    # A single node.
    single = molecule([1], 1)[0]
    assert graphs.from_pyg(single).label == 1 and graphs.from_pyg(single, level="node").labels[0] == 1
    with pytest.raises(ValueError, match=r"one row.*level=\"node\""):
        graphs.from_pyg(molecule([[0], [1], [0]])[0], level="graph")
    with pytest.raises(ValueError, match="level"):
        graphs.from_pyg(pyg, level="edge")
    pyg.edge_index = spektral.a = None
    with pytest.raises(ValueError, match="edge_index"):
        graphs.from_pyg(pyg)
    with pytest.raises(ValueError, match="adjacency"):
        graphs.from_spektral(spektral)
    with pytest.raises(ValueError, match="label"):
        graphs.Graph.from_edges([(0, 1)], label="toxic")


def test_named_graphs(shared_data):
    cora = graphs.load("cora")
    assert (cora.num_nodes, cora.num_edges, cora.features.shape[1], cora.num_classes) == (2708, 5278, 1433, 7)
    assert [len(cora.splits[key]) for key in ("train", "val", "test")] == [140, 500, 1000]
    assert graphs.load("wiki").directed


def test_absent_graph_says_where_it_is_published(monkeypatch, tmp_path):
    monkeypatch.setenv("TFKIT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"planetoid.*TFKIT_DATA"):
        graphs.load("cora")
    (tmp_path / "cora.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="not a readable"):
        graphs.load("cora")


def test_synthetic_graphs_repeat_and_have_their_structure():
    graph = graphs.stochastic_block_model(400, 4, 12, homophily=0.9, features=3, seed=5)
    again = graphs.stochastic_block_model(400, 4, 12, homophily=0.9, features=3, seed=5)
    assert (graph.adjacency != again.adjacency).nnz == 0
    np.testing.assert_array_equal(graph.features, again.features)
    pairs = graph.edges()
    inside = (graph.labels[pairs[:, 0]] == graph.labels[pairs[:, 1]]).mean()
    assert abs(inside - (0.9 + 0.1 / 4)) < 0.03
    roles = graphs.power_law_roles(200)
    assert roles.degrees[roles.labels == 3].min() >= roles.degrees[roles.labels == 0].max()
    quantiles = graphs.two_hop_quantiles(300, 3, 10)
    np.testing.assert_array_equal(np.bincount(quantiles.labels), [100, 100, 100])
