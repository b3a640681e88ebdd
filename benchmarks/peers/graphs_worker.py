"""One peer of graphs.py in its own interpreter: answers a JSON line for each JSON line it reads.

Operations: `start` (data file, peer), `time` (seconds of processor time and of wall time of `steps` training steps or
of walks), `parity` (outputs of layers with given weights).
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np

HIDDEN, DROPOUT, RATE, DECAY = 16, 0.5, 0.01, 5e-4


def one_thread_tf() -> Any:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    return tf


def one_thread_torch() -> Any:
    import torch

    torch.set_num_threads(1)
    return torch


class PyG:
    """torch_geometric's GCNConv with cached normalisation; dense or sparse features."""

    def __init__(self, data: Any, sparse: bool) -> None:
        torch = one_thread_torch()
        from torch_geometric.nn import GCNConv

        self.torch, self.sparse = torch, sparse
        x = torch.tensor(data["x"])
        self.x = x.to_sparse_csr() if sparse else x
        self.edges, self.labels = torch.tensor(data["edge_index"]), torch.tensor(data["y"])
        self.train = torch.tensor(data["train"])
        # A product with the sorted sparse matrix is its fastest propagation on a CPU.
        size = (x.shape[0], x.shape[0])
        loops = torch.arange(x.shape[0])
        pairs = torch.cat([self.edges.flip(0), torch.stack([loops, loops])], dim=1)
        matrix = torch.sparse_coo_tensor(pairs, torch.ones(pairs.shape[1]), size).coalesce()
        degree = torch.sparse.sum(matrix, 1).to_dense()
        rows, columns = matrix.indices()
        values = (degree[rows] * degree[columns]).rsqrt()
        self.matrix = torch.sparse_coo_tensor(matrix.indices(), values, size).to_sparse_csr()
        self.first = GCNConv(x.shape[1], HIDDEN, normalize=False, bias=False)
        self.second = GCNConv(HIDDEN, int(self.labels.max()) + 1, normalize=False, bias=False)
        self.optimizer = torch.optim.Adam(
            [
                {"params": self.first.parameters(), "weight_decay": DECAY},
                {"params": self.second.parameters(), "weight_decay": 0.0},
            ],
            lr=RATE,
        )

    def step(self) -> None:
        f = self.torch.nn.functional
        self.optimizer.zero_grad()
        x = self.x
        if self.sparse:
            values = f.dropout(x.values(), DROPOUT)
            x = self.torch.sparse_csr_tensor(x.crow_indices(), x.col_indices(), values, x.shape)
        else:
            x = f.dropout(x, DROPOUT)
        x = f.relu(self.first(x, self.matrix))
        x = self.second(f.dropout(x, DROPOUT), self.matrix)
        f.cross_entropy(x[self.train], self.labels[self.train]).backward()
        self.optimizer.step()

    def parity(self, data: Any) -> dict[str, np.ndarray]:
        from torch_geometric import nn

        torch = self.torch
        weights = {key: torch.tensor(value) for key, value in data.items()}
        x, (width, units) = weights["parity_x"], data["kernel"].shape
        heads = len(data["own_attention"])
        mlp = torch.nn.Sequential(torch.nn.Linear(width, units), torch.nn.ReLU(), torch.nn.Linear(units, units))
        layers = {
            "GCN": nn.GCNConv(width, units),
            "GraphSAGE": nn.SAGEConv(width, units),
            "GAT": nn.GATConv(width, units, heads),
            "GIN": nn.GINConv(mlp, eps=0.3),
            "SGC": nn.SGConv(width, units, K=2),
            "APPNP": nn.APPNP(K=5, alpha=0.2),
        }
        values = {
            "GCN": {"lin.weight": "kernel", "bias": "bias"},
            "GraphSAGE": {"lin_r.weight": "kernel", "lin_l.weight": "other_kernel", "lin_l.bias": "bias"},
            "GAT": {
                "lin.weight": "heads_kernel",
                "att_dst": "own_attention",
                "att_src": "other_attention",
                "bias": "heads_bias",
            },
            "GIN": {
                "nn.0.weight": "kernel",
                "nn.0.bias": "bias",
                "nn.2.weight": "square_kernel",
                "nn.2.bias": "other_bias",
            },
            "SGC": {"lin.weight": "kernel", "lin.bias": "bias"},
            "APPNP": {},
        }
        found = {}
        with torch.no_grad():
            for name, layer in layers.items():
                parameters = dict(layer.named_parameters())
                for parameter, key in values[name].items():
                    value = weights[key].T if parameter.endswith("weight") else weights[key]
                    parameters[parameter].copy_(value.reshape(parameters[parameter].shape))
                found[name] = layer(x, self.edges).numpy()
        return found


class Spektral:
    """Spektral's GCNConv on tf_keras, sparse features where it takes them, in a compiled function."""

    def __init__(self, data: Any, sparse: bool) -> None:
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        tf = one_thread_tf()
        import tf_keras
        from spektral.layers import GCNConv
        from spektral.utils import gcn_filter, sp_matrix_to_sp_tensor

        self.tf = tf
        import scipy.sparse as sp

        nodes = len(data["y"])
        pairs = data["edge_index"]
        adjacency = sp.csr_matrix((np.ones(pairs.shape[1], "f"), (pairs[1], pairs[0])), shape=(nodes, nodes))
        self.adjacency = adjacency
        self.a = sp_matrix_to_sp_tensor(gcn_filter(adjacency.copy()).astype("f"))
        self.x = tf.constant(data["x"])
        classes = int(data["y"].max()) + 1
        regularizer = tf_keras.regularizers.l2(DECAY / 2)
        self.drop = tf_keras.layers.Dropout(DROPOUT)
        self.first = GCNConv(HIDDEN, activation="relu", kernel_regularizer=regularizer, use_bias=False)
        self.second = GCNConv(classes, use_bias=False)
        self.optimizer = tf_keras.optimizers.Adam(RATE)
        train, labels = tf.constant(data["train"]), tf.constant(data["y"][data["train"]])

        @tf.function
        def step() -> None:
            with tf.GradientTape() as tape:
                x = self.first([self.drop(self.x, training=True), self.a])
                x = self.second([self.drop(x, training=True), self.a])
                each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, tf.gather(x, train))
                loss = tf.reduce_mean(each) + sum(self.first.losses)
            variables = self.first.trainable_variables + self.second.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

        self.step = step

    def parity(self, data: Any) -> dict[str, np.ndarray]:
        from spektral import layers
        from spektral.utils import sp_matrix_to_sp_tensor

        x, units, heads = self.tf.constant(data["parity_x"]), data["kernel"].shape[1], len(data["own_attention"])
        plain = sp_matrix_to_sp_tensor(self.adjacency)
        attention = [data[key].T[:, :, None] for key in ("own_attention", "other_attention")]
        by_head = data["heads_kernel"].reshape(-1, heads, units)
        cases = {
            "GCN": (layers.GCNConv(units), self.a, [data["kernel"], data["bias"]]),
            "GraphSAGE, own loop": (
                layers.GraphSageConv(units),
                plain,
                [np.concatenate([data["kernel"], data["other_kernel"]]), data["bias"]],
            ),
            "GAT": (layers.GATConv(units, heads), plain, [by_head, *attention, data["heads_bias"]]),
            "GIN": (
                layers.GINConv(units, epsilon=0.3, mlp_hidden=[units], mlp_batchnorm=False),
                plain,
                [data["kernel"], data["bias"], data["square_kernel"], data["other_bias"]],
            ),
        }
        found = {}
        for name, (layer, matrix, weights) in cases.items():
            layer([x, matrix])
            # By shape too, so that another order of the layer's weights fails here and not in the numbers.
            layer.set_weights(weights)
            found[name] = layer([x, matrix]).numpy()
        return found


class K3Node:
    """k3-node's GCNConv on Keras 3 with torch, which it imports anyway."""

    def __init__(self, data: Any, sparse: bool) -> None:
        os.environ["KERAS_BACKEND"] = "torch"
        torch = one_thread_torch()
        import keras
        from k3_node.layers import GCNConv

        self.torch = torch
        self.x = torch.tensor(data["x"])
        self.edges, self.labels = torch.tensor(data["edge_index"]), torch.tensor(data["y"])
        self.train = torch.tensor(data["train"])
        classes = int(data["y"].max()) + 1
        self.first = GCNConv(data["x"].shape[1], HIDDEN, cached=True)
        self.second = GCNConv(HIDDEN, classes, cached=True)
        self.first(self.x, self.edges)
        self.second(torch.zeros((len(data["y"]), HIDDEN)), self.edges)
        self.optimizer = torch.optim.Adam(
            [v.value for layer in (self.first, self.second) for v in layer.trainable_weights], lr=RATE
        )
        self.keras = keras

    def step(self) -> None:
        f = self.torch.nn.functional
        self.optimizer.zero_grad()
        x = f.relu(self.first(f.dropout(self.x, DROPOUT), self.edges))
        x = self.second(f.dropout(x, DROPOUT), self.edges)
        f.cross_entropy(x[self.train], self.labels[self.train]).backward()
        self.optimizer.step()


class Tfkit:
    """tfkit's GCN with sparse features, its compiled step."""

    def __init__(self, data: Any, sparse: bool) -> None:
        tf = one_thread_tf()
        import keras
        import scipy.sparse as sp

        from tfkit import graphs
        from tfkit.graphs.training import compiled_step

        self.tf, self.graphs = tf, graphs
        pairs = data["edge_index"].T
        x = sp.csr_array(data["x"]) if sparse else data["x"]
        self.graph = graphs.Graph.from_edges(
            pairs, len(data["y"]), directed=True, features=x, labels=data["y"], splits={"train": data["train"]}
        )
        self.inputs = graphs.inputs_of(self.graph)
        model = graphs.GCN(int(data["y"].max()) + 1, HIDDEN, dropout=DROPOUT, l2=DECAY, seed=0)
        self.step = compiled_step(model, self.graph, self.inputs, keras.optimizers.Adam(RATE))

    def parity(self, data: Any) -> dict[str, np.ndarray]:
        graphs = self.graphs
        x, units, heads = self.tf.constant(data["parity_x"]), data["kernel"].shape[1], len(data["own_attention"])
        plain = self.graph.adjacency
        # In the order of the layers' weights.
        sage = [data["kernel"], data["other_kernel"], data["bias"]]
        attention = [data[key] for key in ("heads_kernel", "own_attention", "other_attention", "heads_bias")]
        perceptron = [data[key] for key in ("kernel", "bias", "square_kernel", "other_bias")]
        loops, normalized = graphs.add_self_loops(plain), graphs.gcn_normalize(plain)
        cases = {
            "GCN": (graphs.GCNConv(units), normalized, [data["kernel"], data["bias"]]),
            "GraphSAGE": (graphs.SAGEConv(units), plain, sage),
            "GraphSAGE, own loop": (graphs.SAGEConv(units, normalize=True), loops, sage),
            "GAT": (graphs.GATConv(units, heads), loops, attention),
            "GIN": (graphs.GINConv(units, epsilon=0.3, train_epsilon=False), plain, perceptron),
            "SGC": (graphs.SGCConv(units, 2), normalized, [data["kernel"], data["bias"]]),
            "APPNP": (graphs.PageRankPropagation(5, 0.2), normalized, []),
        }
        found = {}
        for name, (layer, matrix, weights) in cases.items():
            inputs = (x, graphs.to_tensor(matrix))
            layer(inputs)
            for variable, value in zip(layer.trainable_variables, weights, strict=True):
                variable.assign(value)
            found[name] = np.asarray(layer(inputs))
        return found


class TfkitWalks:
    """tfkit's uniform walks."""

    def __init__(self, data: Any, sparse: bool) -> None:
        from tfkit import graphs

        self.walk = graphs.embeddings.random_walks
        self.graph = graphs.Graph.from_edges(data["edge_index"].T, len(data["y"]), directed=True)

    def step(self) -> None:
        self.walk(self.graph, 1, 80)


class TorchWalks:
    """Walks in torch: one step of all walks at a time."""

    def __init__(self, data: Any, sparse: bool) -> None:
        torch = one_thread_torch()
        self.torch = torch
        order = np.lexsort((data["edge_index"][1], data["edge_index"][0]))
        rows, columns = data["edge_index"][:, order]
        self.degree = torch.tensor(np.bincount(rows, minlength=len(data["y"])))
        self.start = torch.tensor(np.concatenate([[0], np.cumsum(self.degree.numpy())[:-1]]))
        self.columns = torch.tensor(columns)

    def step(self) -> None:
        torch = self.torch
        node = torch.randperm(len(self.degree))
        path = [node]
        for _ in range(79):
            offset = (torch.rand(len(node)) * self.degree[node]).long()
            node = torch.where(self.degree[node] > 0, self.columns[self.start[node] + offset], node)
            path.append(node)
        torch.stack(path, dim=1)


class NetworkXWalks:
    """Walks over lists of neighbours in Python, as the authors of DeepWalk wrote them."""

    def __init__(self, data: Any, sparse: bool) -> None:
        import random

        self.random = random.Random(0)
        self.near: list[list[int]] = [[] for _ in data["y"]]
        for a, b in data["edge_index"].T.tolist():
            self.near[a].append(b)

    def step(self) -> None:
        for node in range(len(self.near)):
            path = [node]
            for _ in range(79):
                if not self.near[path[-1]]:
                    break
                path.append(self.random.choice(self.near[path[-1]]))


class TfkitSkipGram:
    """tfkit's skip-gram with negative sampling on given walks."""

    def __init__(self, data: Any, sparse: bool) -> None:
        from tfkit.graphs.embeddings import kernels
        from tfkit.graphs.embeddings.walks import negative_table

        self.learn, self.walks, nodes = kernels.skip_gram, data["walks"], len(data["y"])
        self.table = negative_table(np.bincount(self.walks[self.walks >= 0], minlength=nodes))
        self.start = ((np.random.default_rng(0).random((nodes, 128), "float32") - 0.5) / 128).astype("float32")
        self.rates = np.array([0.025, 0.0000025])

    def step(self) -> None:
        centers, contexts = self.start.copy(), np.zeros_like(self.start)
        self.learn(self.walks, 10, 5, self.table, 0, len(self.walks), self.rates, 0, centers, contexts)


class GensimSkipGram:
    """gensim's Word2Vec on the same walks; words are counted once, outside of the time."""

    def __init__(self, data: Any, sparse: bool) -> None:
        from gensim.models import Word2Vec

        self.sentences = [[str(node) for node in walk if node >= 0] for walk in data["walks"]]
        self.model = Word2Vec(
            vector_size=128, window=10, negative=5, sg=1, hs=0, min_count=0, sample=0, workers=1, epochs=1, seed=0
        )
        self.model.build_vocab(self.sentences)

    def step(self) -> None:
        self.model.train(self.sentences, total_examples=len(self.sentences), epochs=1)


PEERS = {
    "tfkit": Tfkit,
    "PyG": PyG,
    "Spektral": Spektral,
    "k3-node": K3Node,
    "tfkit walks": TfkitWalks,
    "torch walks": TorchWalks,
    "Python walks": NetworkXWalks,
    "tfkit skip-gram": TfkitSkipGram,
    "gensim skip-gram": GensimSkipGram,
}


def main() -> None:
    peer: Any = None
    data: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if asked["operation"] == "start":
                with np.load(asked["data"], allow_pickle=False) as file:
                    data = {key: file[key] for key in file.files}
                peer = PEERS[asked["peer"]](data, asked["sparse"])
                for _ in range(3):
                    peer.step()
            elif asked["operation"] == "time":
                cpu, wall = time.process_time(), time.perf_counter()
                for _ in range(asked["steps"]):
                    peer.step()
                answer = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            elif asked["operation"] == "parity":
                np.savez(asked["path"], **peer.parity(data))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
