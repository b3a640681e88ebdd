"""VR-GCN: sampled graph convolution whose variance stored histories take away.

Paper: Chen, Zhu, Song. Stochastic training of graph convolutional networks with variance reduction. ICML 2018,
https://arxiv.org/abs/1710.10568

Differs: a batch's inner layers also compute the nodes of the layer above, which refreshes more histories; the exact
test goes layer by layer over all nodes, which is the fixed point of the paper's repeated passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.sparse as sp
import tensorflow as tf

from tfkit.graphs.graph import Graph, finite_rows
from tfkit.graphs.layers.gcn import GCN
from tfkit.graphs.normalization import gcn_normalize
from tfkit.graphs.propagation import propagate
from tfkit.graphs.sampling.blocks import rows_of
from tfkit.graphs.sampling.neighbour import NeighbourSampler
from tfkit.graphs.sampling.pipeline import ahead
from tfkit.internal import checks

ESTIMATORS = ("cvd", "cv", "sampling", "exact")


class Hop(NamedTuple):
    """A sampled propagation.

    Attributes:
        indices: (entries, 2) of the drawn neighbours, local numbers (output, input).
        values: (entries,) adjacency * n / D.
        root_values: (entries,) adjacency * sqrt(n / D), under which independent noise keeps its variance.
        outputs: how many nodes come out.
        inputs: ids of the nodes that go in, the outputs first.
        whole_indices, whole_values: all neighbours, by local numbers (output, position in `whole`).
        whole: ids of all neighbours.
    """

    indices: Any
    values: Any
    root_values: Any
    outputs: Any
    inputs: Any
    whole_indices: Any
    whole_values: Any
    whole: Any


class VRGCN:
    """Trains a `GCN` on batches with few sampled neighbours.

    Estimators of the propagation P h, with sampled P~ and histories h':

    - "cv": P~ (h - h') + P h'.
    - "cvd": R (h - m) + P~ (m - m') + P m', where m runs without dropout and R keeps the variance of dropout's noise.
    - "sampling": P~ h, as GraphSAGE samples.
    - "exact": P h over all neighbours.

    The first propagation is done once for all, P X, so that a GCN of L layers samples L - 1 times, and dropout acts on
    P X in place of X. The trained model is the one given; it predicts like any GCN.

    Args:
        model: the GCN; it gets its weights here if it has none.
        graph: with features and class numbers. Features may be memory-mapped.
        fanout: neighbours drawn for each node, itself among the neighbours.
        batch_size: nodes a batch.
        estimator: as above.
        split: the nodes to train on.
        learning_rate: of Adam.
        optimizer: in place of Adam.
        propagated: P X if it is there already, as `propagate_features` writes it; None: computed here.
        seed: of batches, draws and dropout (dropout: if the model has none of its own).
        prefetch: batches that are made ahead.
    """

    def __init__(
        self,
        model: GCN,
        graph: Graph,
        *,
        fanout: int = 2,
        batch_size: int = 1000,
        estimator: str = "cvd",
        split: str = "train",
        learning_rate: float = 0.01,
        optimizer: keras.optimizers.Optimizer | None = None,
        propagated: Any = None,
        seed: int = 0,
        prefetch: int = 4,
    ) -> None:
        if not isinstance(model, GCN) or model.settings["layers"] < 2:
            raise checks.error("model", "a GCN of two layers or more", model)
        if graph.features is None or graph.labels is None or graph.labels.ndim != 1:
            raise checks.error("graph", "with features and one class number a node", graph)
        if split not in graph.splits or not len(graph.splits[split]):
            raise checks.error("split", f"one of {sorted(graph.splits)}, with nodes", split)
        self.model, self.graph, self.labels = model, graph, np.asarray(graph.labels)
        self.estimator = checks.choice("estimator", estimator, ESTIMATORS)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.prefetch = checks.integer("prefetch", prefetch, 1)
        self.adjacency = gcn_normalize(graph.adjacency)
        self.inputs = propagate_features(graph) if propagated is None else propagated
        if getattr(self.inputs, "ndim", 0) != 2 or self.inputs.shape[0] != graph.num_nodes:
            raise checks.error("propagated", f"of shape ({graph.num_nodes}, dimensions)", propagated)
        if propagated is not None and type(propagated) is np.ndarray:
            finite_rows(propagated)
        width = self.inputs.shape[1]
        if not model.built:
            model.build([(None, width), (None, None)])
        nodes = graph.splits[split]
        if (self.labels[nodes] < 0).any():
            raise checks.error("split", "without nodes that have no label", split)
        if self.labels[nodes].max() >= model.settings["classes"]:
            classes = int(self.labels[nodes].max())
            raise checks.error("model", f"with outputs for the classes 0 to {classes}", model, "See graph.num_classes.")
        hops = model.settings["layers"] - 1
        draws = [None if estimator == "exact" else checks.integer("fanout", fanout, 1)] * hops
        self.sampler = NeighbourSampler(self.adjacency, draws, self.batch_size, nodes, seed=seed)
        #: Of the inputs of every propagation but the first: (nodes, hidden).
        self.histories = [
            tf.Variable(tf.zeros((graph.num_nodes, model.settings["hidden"])), trainable=False, name=f"history_{i}")
            for i in range(hops if estimator in ("cv", "cvd") else 0)
        ]
        self.optimizer = optimizer or keras.optimizers.Adam(learning_rate)
        self.optimizer.build(model.trainable_variables)
        self._step = tf.function(self._train, autograph=False, reduce_retracing=True)
        self._gradients = tf.function(self.gradients, autograph=False, reduce_retracing=True)
        self.epoch = 0

    def fit(self, epochs: int = 1, *, after: Callable[[int, float], Any] | None = None) -> list[float]:
        """Trains for more epochs; returns the mean loss of each.

        Args:
            epochs: passes over the training nodes.
            after: called with the epoch's number and loss after each; training stops where it returns True.
        """
        losses = []
        for _ in range(checks.integer("epochs", epochs, 1)):
            found = [self._step(*batch) for batch in ahead(self.batches(self.epoch), self.prefetch)]
            losses.append(float(np.mean([loss.numpy() for loss in found])))
            if not np.isfinite(losses[-1]):
                raise FloatingPointError(f"The loss is {losses[-1]} in epoch {self.epoch}. Lower the learning rate.")
            self.epoch += 1
            if after is not None and after(self.epoch - 1, losses[-1]):
                break
        return losses

    def batches(self, epoch: int) -> Iterator[tuple[Any, ...]]:
        """Yields (P X rows, labels, hops) of an epoch."""
        order = self.sampler._shuffled(epoch)
        for number, start in enumerate(range(0, len(order), self.batch_size)):
            yield self.batch(order[start : start + self.batch_size], epoch, number)

    def batch(self, targets: np.ndarray, *counters: int) -> tuple[Any, ...]:
        """Draws the batch of `targets`; other `counters` give other draws."""
        hops: list[Hop] = []
        outputs = np.asarray(targets, np.int64)
        labels = tf.constant(self.labels[outputs])
        for layer in range(len(self.sampler.fanouts) - 1, -1, -1):
            hop = self._hop(outputs, self.sampler.fanouts[layer], self.sampler._bits(*counters, layer))
            hops.append(hop)
            outputs = hop.inputs
        tensors = tuple(Hop(*map(tf.convert_to_tensor, hop)) for hop in reversed(hops))
        return rows_of(self.inputs, outputs), labels, tensors

    def _hop(self, outputs: np.ndarray, fanout: int | None, bits: np.uint64) -> Hop:
        sampler = self.sampler
        rows, entries, scales = sampler.draw(outputs, fanout, bits)
        inputs, columns = sampler.number(outputs, sampler.indices[entries])
        values = sampler.values[entries]
        if self.histories:
            whole_rows, whole_entries = sampler.whole_rows(outputs)
            whole, whole_columns = sampler.number(outputs[:0], sampler.indices[whole_entries])
            whole_values = sampler.values[whole_entries]
        else:
            whole_rows = whole_columns = whole = np.zeros(0, np.int64)
            whole_values = np.zeros(0, "float32")
        return Hop(
            np.stack([rows, columns], axis=1),
            values * scales,
            values * np.sqrt(scales),
            np.int64(len(outputs)),
            inputs,
            np.stack([whole_rows, whole_columns], axis=1),
            whole_values,
            whole,
        )

    def logits(self, inputs: Any, hops: tuple[Hop, ...], training: bool) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the logits of a batch's targets, and what the histories of the hops' inputs become."""
        first, *rest = self.model.stack
        drop = [lambda x, d=dropout: d(x, training=training) for dropout in self.model.dropouts]
        x = _dense(first, propagate(drop[0](inputs), tf.convert_to_tensor(first.kernel)))
        mean = x
        if self.estimator == "cvd":
            # The same without dropout, whose noise is then added with the variance that all neighbours would give.
            mean = _dense(first, propagate(inputs, tf.convert_to_tensor(first.kernel)))
        stored = []
        for position, (layer, hop) in enumerate(zip(rest, hops, strict=True)):
            x = drop[position + 1](x)
            kernel = tf.convert_to_tensor(layer.kernel)
            if self.estimator == "cvd":
                stored.append(tf.stop_gradient(mean))
                spread = self._controlled(mean, hop, position)
                noise = propagate(_sparse(hop.indices, hop.root_values, hop.outputs, hop.inputs), x - mean)
                x = _dense(layer, tf.matmul(spread + noise, kernel))
                mean = _dense(layer, tf.matmul(spread, kernel))
                continue
            if self.estimator == "cv":
                stored.append(tf.stop_gradient(x))
                spread = self._controlled(x, hop, position)
            else:
                spread = propagate(_sparse(hop.indices, hop.values, hop.outputs, hop.inputs), x)
            x = _dense(layer, tf.matmul(spread, kernel))
        return x, stored

    def _controlled(self, x: tf.Tensor, hop: Hop, position: int) -> tf.Tensor:
        """Returns P~ (x - h') + P h'."""
        history = self.histories[position]
        change = x - tf.gather(history, hop.inputs)
        known = tf.gather(history, hop.whole)
        sampled = propagate(_sparse(hop.indices, hop.values, hop.outputs, hop.inputs), change)
        return sampled + propagate(_sparse(hop.whole_indices, hop.whole_values, hop.outputs, hop.whole), known)

    def gradients(
        self, inputs: Any, labels: tf.Tensor, hops: tuple[Hop, ...]
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
        """Returns loss, gradients of the trainable weights, and the new histories of a batch, and changes nothing."""
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            logits, stored = self.logits(inputs, hops, training=True)
            each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
            loss = tf.reduce_mean(each) + sum(self.model.losses)
        return loss, tape.gradient(loss, [variable.value for variable in variables]), stored

    def _train(self, inputs: Any, labels: tf.Tensor, hops: tuple[Hop, ...]) -> tf.Tensor:
        loss, gradients, stored = self.gradients(inputs, labels, hops)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        for history, hop, values in zip(self.histories, hops, stored, strict=False):
            history.scatter_update(tf.IndexedSlices(values, hop.inputs))
        return loss

    def refresh(self) -> None:
        """Sets every history to the activations that the weights now give, without dropout."""
        self._forward(keep=True)

    def predict(self, nodes: Any = None) -> np.ndarray:
        """Returns exact logits, (nodes, classes): every layer over all nodes and all their neighbours, in batches.

        Args:
            nodes: ids; None: all.
        """
        found = self._forward(keep=False)
        return found if nodes is None else found[np.asarray(nodes)]

    def _forward(self, keep: bool) -> np.ndarray:
        total, size = self.graph.num_nodes, max(self.batch_size, 4096)
        parts = [np.arange(start, min(start + size, total)) for start in range(0, total, size)]
        first, *rest = self.model.stack
        x = np.concatenate(
            [
                _dense(first, propagate(rows_of(self.inputs, part), tf.convert_to_tensor(first.kernel))).numpy()
                for part in parts
            ]
        )
        for position, layer in enumerate(rest):
            if keep and self.histories:
                self.histories[position].assign(x)
            kernel = tf.convert_to_tensor(layer.kernel)
            # Narrow outputs are multiplied first: a layer that shrinks propagates less.
            messages = tf.matmul(x, kernel).numpy()
            spread = [self.adjacency[part[0] : part[-1] + 1] @ messages for part in parts]
            x = np.concatenate([_dense(layer, tf.convert_to_tensor(found)).numpy() for found in spread])
        return x

    def accuracy(self, split: str = "test") -> float:
        """Returns the share of a split's nodes that are classified right, by `predict`."""
        nodes = self.graph.splits[split]
        return float((self.predict(nodes).argmax(axis=1) == self.labels[nodes]).mean())


def propagate_features(graph: Graph, path: Any = None, rows: int = 65536) -> Any:
    """Returns P X with the GCN's P; with a path, written to a float32 `.npy` file block by block and memory-mapped.

    Args:
        graph: with dense features, which may be memory-mapped: a block holds the rows that its neighbours need.
        path: a file that is not there yet; None: in memory.
        rows: of a block.

    Raises:
        FileExistsError: the file is there.
        ValueError: the features hold NaN or infinity.
    """
    matrix = gcn_normalize(graph.adjacency)
    if path is None:
        features = graph.features
        return matrix @ (finite_rows(np.asarray(features)) if isinstance(features, np.memmap) else features)
    return _write_product(matrix, graph.features, path, rows)


def _write_product(matrix: sp.csr_array, features: Any, path: Any, rows: int) -> np.ndarray:
    from pathlib import Path

    target = Path(path)
    if target.exists():
        raise FileExistsError(f"{target} is there already. Delete it or choose another path.")
    partial = target.with_name(f".{target.name}.partial")
    shape = (matrix.shape[0], features.shape[1])
    written = np.lib.format.open_memmap(partial, mode="w+", dtype="float32", shape=shape)
    try:
        _fill(written, matrix, features, rows)
        written.flush()
    except BaseException:
        partial.unlink()
        raise
    del written
    partial.rename(target)
    return np.load(target, mmap_mode="r")


def _fill(written: np.ndarray, matrix: sp.csr_array, features: Any, rows: int) -> None:
    for start in range(0, matrix.shape[0], rows):
        part = matrix[start : start + rows]
        needed, columns = np.unique(part.indices, return_inverse=True)
        local = sp.csr_array((part.data, columns, part.indptr), shape=(part.shape[0], len(needed)))
        written[start : start + rows] = local @ finite_rows(np.asarray(features[needed], "float32"), needed)


def _sparse(indices: tf.Tensor, values: tf.Tensor, outputs: tf.Tensor, inputs: tf.Tensor) -> tf.SparseTensor:
    return tf.SparseTensor(indices, values, tf.stack([outputs, tf.size(inputs, out_type=tf.int64)]))


def _dense(layer: Any, x: tf.Tensor) -> tf.Tensor:
    """What a layer does after its products: bias and activation."""
    return layer._finish(x, layer.bias)
