"""Export: a trained GCN or GraphSAGE as a `.tflite` file for neighbourhoods of a fixed size."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import scipy.sparse as sp

from tfkit.graphs.layers.gcn import GCN
from tfkit.graphs.layers.graph_sage import GraphSAGE
from tfkit.graphs.sampling.blocks import Batch, Block
from tfkit.graphs.sampling.neighbour import NeighbourSampler
from tfkit.internal import checks


def fixed_size(model: keras.Model, nodes: int, dimension: int) -> keras.Model:
    """Returns a functional model of dense inputs of fixed size, whose weights are the model's, ready for `convert`.

    It takes a neighbourhood of at most `nodes` nodes, padded (`padded`): features (1, nodes, dimension) and an
    adjacency (1, nodes, nodes), normalised as in training. It gives logits of every node, (1, nodes, classes).

    Args:
        model: a built `GCN`, or a `GraphSAGE` that takes means.
        nodes: the most nodes.
        dimension: of the features.
    """
    checks.integer("nodes", nodes, 1)
    if not isinstance(model, (GCN, GraphSAGE)) or getattr(model, "settings", {}).get("aggregator", "mean") != "mean":
        raise checks.error("model", "a GCN, or a GraphSAGE with the aggregator 'mean'", model)
    if not model.built:
        raise checks.error("model", "built", model, "Train it, or call it once.")
    features = keras.Input((nodes, dimension), batch_size=1, name="features")
    adjacency = keras.Input((nodes, nodes), batch_size=1, name="adjacency")
    x = features
    if isinstance(model, GraphSAGE):
        present = keras.ops.cast(keras.ops.not_equal(adjacency, 0), "float32")
        spread = present / keras.ops.maximum(keras.ops.sum(present, axis=-1, keepdims=True), 1.0)
    layers: list[tuple[keras.layers.Dense, list[np.ndarray]]] = []

    def dense(kernel: Any, inputs: Any) -> Any:
        made = keras.layers.Dense(kernel.shape[1], use_bias=False)
        layers.append((made, [np.asarray(kernel)]))
        return made(inputs)

    for layer in model.stack:
        if isinstance(model, GraphSAGE):
            y = dense(layer.self_kernel, x) + keras.ops.matmul(spread, dense(layer.neighbour_kernel, x))
        else:
            y = keras.ops.matmul(adjacency, dense(layer.kernel, x))
        x = layer.activation(y if layer.bias is None else y + np.asarray(layer.bias))
        if getattr(layer, "normalize", False):
            x = x * keras.ops.rsqrt(keras.ops.maximum(keras.ops.sum(x * x, axis=-1, keepdims=True), 1e-12))
    made = keras.Model([features, adjacency], x, name=f"{model.name}_fixed")
    for part, weights in layers:
        part.set_weights(weights)
    return made


def padded(batch: Batch, features: Any, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the two inputs of a `fixed_size` model: those of a batch, filled up with zeros.

    Only batches whose one block serves every layer fit, as subgraphs' do (`k_hop_batch`).

    Args:
        batch: of one square block.
        features: those of the whole graph.
        nodes: the model's.
    """
    if len(batch.blocks) != 1 or batch.blocks[0].shape != (len(batch.inputs),) * 2:
        raise checks.error("batch", "a subgraph, with one square block", batch, "Make it with k_hop_batch.")
    if len(batch.inputs) > nodes:
        raise checks.error("nodes", f"at least the batch's {len(batch.inputs)}", nodes, "Or take a smaller batch.")
    rows = features[batch.inputs]
    dense = rows.toarray() if sp.issparse(rows) else np.asarray(rows)
    x = np.zeros((1, nodes, dense.shape[1]), "float32")
    x[0, : len(batch.inputs)] = dense
    adjacency = np.zeros((1, nodes, nodes), "float32")
    block = batch.blocks[0]
    np.add.at(adjacency[0], (block.indices[:, 0], block.indices[:, 1]), block.values)
    return x, adjacency


def k_hop_batch(adjacency: Any, targets: Any, hops: int) -> Batch:
    """Returns the subgraph of all nodes within `hops` of the targets, which come first; their outputs are exact.

    Args:
        adjacency: SciPy CSR, normalised.
        targets: node ids.
        hops: the model's layers.
    """
    sampler = NeighbourSampler(adjacency, [None] * checks.integer("hops", hops, 1), nodes=targets)
    chosen = sampler.sample(np.asarray(targets, np.int64))
    pairs, entries = sampler.induced(chosen.inputs)
    block = Block(pairs, sampler.values[entries], (len(chosen.inputs),) * 2)
    return Batch(chosen.inputs, (block,), chosen.targets, chosen.weights)
