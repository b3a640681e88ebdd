"""Training on a whole graph: as a data set for `fit`, and as a compiled loop that is faster than it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import scipy.sparse as sp
import tensorflow as tf

from tfkit.graphs.graph import Graph, finite_rows
from tfkit.graphs.normalization import gcn_normalize
from tfkit.graphs.propagation import to_tensor
from tfkit.internal import checks


class History(NamedTuple):
    """What `train_nodes` saw.

    Attributes:
        loss: training loss of each epoch.
        val_loss, val_accuracy: of the split "val" after each epoch; empty without one.
        best_epoch: the epoch whose weights the model has, from 0.
    """

    loss: list[float]
    val_loss: list[float]
    val_accuracy: list[float]
    best_epoch: int


class GraphBatch(NamedTuple):
    """Several graphs as one of blocks that are not connected, for graph-level tasks.

    Attributes:
        features: (nodes of all, dimensions).
        adjacency: block diagonal.
        membership: (graphs, nodes) of ones, so that its product with node values sums over each graph.
        labels: (graphs,) integers or floats, or (graphs, k) floats; or None.
    """

    features: Any
    adjacency: Any
    membership: Any
    labels: np.ndarray | None


def batch_graphs(graphs: Sequence[Graph], labels: Any = None) -> GraphBatch:
    """Joins graphs to one batch; a graph without nodes gets a row of zeros in the membership.

    Args:
        graphs: one or more, with features of one width.
        labels: a number or a row of numbers for each graph; None: the graphs' own, `Graph.label`, if they have any.

    Raises:
        ValueError: no graph, features that are missing or differ in width, or labels that do not fit together.
    """
    if not graphs:
        raise checks.error("graphs", "one graph or more", graphs, "An empty batch has no result.")
    widths = {None if graph.features is None else graph.features.shape[1] for graph in graphs}
    if len(widths) > 1 or None in widths:
        raise checks.error("graphs", "with features of one width", sorted(map(str, widths)))
    sizes = [graph.num_nodes for graph in graphs]
    owner = np.repeat(np.arange(len(graphs)), sizes)
    nodes = np.arange(len(owner))
    membership = sp.csr_array((np.ones(len(owner), "float32"), (owner, nodes)), shape=(len(graphs), len(owner)))
    parts: list[Any] = [graph.features for graph in graphs]
    features = (
        sp.vstack(parts, format="csr")
        if all(map(sp.issparse, parts))
        else np.concatenate([part.toarray() if sp.issparse(part) else part for part in parts])
    )
    # A block of an empty graph has no row, which block_diag does not take.
    blocks = [graph.adjacency for graph in graphs if graph.num_nodes]
    adjacency = sp.block_diag(blocks, format="csr") if blocks else sp.csr_array((0, 0), dtype="float32")
    found = _graph_labels(graphs) if labels is None else np.asarray(labels)
    if found is not None and (found.ndim not in (1, 2) or len(found) != len(graphs)):
        raise checks.error("labels", f"a number, or a row of numbers, for each of {len(graphs)} graphs", labels)
    return GraphBatch(to_tensor(features), to_tensor(adjacency), to_tensor(membership), found)


def _graph_labels(graphs: Sequence[Graph]) -> np.ndarray | None:
    """Returns the labels of the graphs in one array: int32 where all are integers, else float32; None without any."""
    own = [graph.label for graph in graphs]
    if all(label is None for label in own):
        return None
    shapes = [None if label is None else np.shape(label) for label in own]
    odd = next((i for i, shape in enumerate(shapes) if shape is None or shape != shapes[0]), None)
    if odd is not None:
        remedy = 'Pass labels=, or read the graphs by from_pyg or from_spektral with level="graph".'
        raise checks.error(f"graphs[{odd}].label", "there, and of the shape of the first graph's", own[odd], remedy)
    return np.asarray(own, "int32" if all(isinstance(label, int) for label in own) else "float32")


def edge_scores(embeddings: tf.Tensor, edges: tf.Tensor) -> tf.Tensor:
    """Returns the inner products of the two ends of each edge, logits of its existence: (edges,).

    >>> edge_scores(tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant([[0, 1]])).numpy()
    array([11.], dtype=float32)
    """
    return tf.reduce_sum(tf.gather(embeddings, edges[:, 0]) * tf.gather(embeddings, edges[:, 1]), axis=1)


def inputs_of(graph: Graph, normalize: Callable[..., Any] | None = gcn_normalize) -> tuple[Any, Any]:
    """Returns the tensors (features, normalised adjacency) of a graph; sparse features stay sparse.

    Args:
        graph: with features.
        normalize: a function of the adjacency, as those of `tfkit.graphs.normalization`; None: as it is.
    """
    if graph.features is None:
        raise checks.error("graph", "with features", graph, "np.eye(nodes) as features tells nodes apart.")
    adjacency = graph.adjacency if normalize is None else normalize(graph.adjacency)
    features = graph.features
    if isinstance(features, np.memmap):
        features = finite_rows(np.asarray(features, "float32"))
    return to_tensor(features), to_tensor(adjacency)


def full_batch(
    graph: Graph, split: str = "train", normalize: Callable[..., Any] | None = gcn_normalize
) -> tf.data.Dataset:
    """Returns a data set of one batch, the whole graph, for `fit` and `evaluate`.

    The sample weights are 1 on the nodes of the split, so that Keras' mean over all nodes would be too small; they are
    scaled by nodes / (nodes of the split). For accuracies compile with `weighted_metrics`.

    Args:
        graph: with features, and a class number for each node; -1 only outside the split.
        split: its name.
        normalize: as in `inputs_of`.
    """
    labels, mask = _targets(graph, split)
    weights = mask * np.float32(graph.num_nodes / max(1.0, mask.sum()))
    features, adjacency = inputs_of(graph, normalize)
    data = ((features, adjacency), np.maximum(labels, 0), weights)
    return tf.data.Dataset.from_tensors(data)


def _targets(graph: Graph, split: str) -> tuple[np.ndarray, np.ndarray]:
    if graph.labels is None or graph.labels.ndim != 1:
        remedy = "Several labels need a loss of their own; of one-hot rows take argmax(axis=1)."
        raise checks.error("graph", "with one class number a node", graph, remedy)
    mask = graph.mask(split)
    labels = np.asarray(graph.labels)
    if not mask.any():
        raise checks.error("split", "with one node or more", split, "graph.splits has none under this name.")
    if (labels[mask > 0] < 0).any():
        raise checks.error("split", "without nodes that have no label", split, "Take them out of the split.")
    return labels, mask


def accuracy(model: keras.Model, graph: Graph, split: str, inputs: Any = None) -> float:
    """Returns the share of a split's nodes whose class the model gets right.

    Args:
        model: gives logits for (features, adjacency).
        graph: with labels.
        split: its name.
        inputs: the tensors; None: those of `inputs_of`.
    """
    labels, mask = _targets(graph, split)
    logits = np.asarray(model(inputs_of(graph) if inputs is None else inputs, training=False))
    chosen = mask > 0
    return float((logits[chosen].argmax(axis=1) == labels[chosen]).mean())


def train_nodes(
    model: keras.Model,
    graph: Graph,
    *,
    epochs: int = 200,
    learning_rate: float = 0.01,
    patience: int | None = None,
    window: int | None = None,
    restore: str = "val_loss",
    penalized: bool = True,
    inputs: Any = None,
    optimizer: keras.optimizers.Optimizer | None = None,
) -> History:
    """Trains on the whole graph, an optimizer step an epoch; step and validation are one compiled function.

    Args:
        model: gives logits for (features, adjacency).
        graph: with labels, a split "train", and "val" for stopping.
        epochs: the most.
        learning_rate: of Adam.
        patience: epochs without a lower validation loss until it stops; None: never.
        window: stops where the validation loss is above the mean of this many epochs before, as the authors of GCN do
            with 10; None: never.
        restore: the model ends with the weights of the epoch that had the best "val_loss" or "val_accuracy" (of equals,
            the lower loss), or with the "last" ones.
        penalized: adds the regularizers to the validation loss too, as the authors of GCN do. False where they are
            large, as in deep models: their fall would hide that the loss rises.
        inputs: the tensors; None: those of `inputs_of`.
        optimizer: in place of Adam.

    Returns:
        A `History`.
    """
    epochs = checks.integer("epochs", epochs, 1)
    checks.choice("restore", restore, ("val_loss", "val_accuracy", "last"))
    validate = "val" in graph.splits
    if not validate and (patience or window or restore != "last"):
        raise checks.error("graph", "with a split 'val'", sorted(graph.splits), 'Or set restore="last".')
    inputs = inputs_of(graph) if inputs is None else inputs
    optimizer = optimizer or keras.optimizers.Adam(learning_rate)
    step = compiled_step(model, graph, inputs, optimizer, validate, penalized)
    variables = model.trainable_variables + model.non_trainable_variables
    losses: list[float] = []
    val: list[tuple[float, float]] = []
    best: tuple[float, ...] = (float("inf"), float("inf"))
    kept, best_epoch, lowest, since = None, epochs - 1, float("inf"), 0
    for epoch in range(epochs):
        found = [float(value) for value in step()]
        losses.append(found[0])
        if not np.isfinite(found[0]):
            finite_inputs(inputs)
            raise FloatingPointError(f"The loss is {found[0]} in epoch {epoch}. Lower the learning rate.")
        if not validate:
            continue
        val.append((found[1], found[2]))
        score = (found[1], 0.0) if restore == "val_loss" else (-found[2], found[1])
        if restore != "last" and score < best:
            best, best_epoch, kept = score, epoch, [tf.identity(variable.value) for variable in variables]
        lowest, since = (found[1], 0) if found[1] < lowest else (lowest, since + 1)
        before = [loss for loss, _ in val[-1 - window : -1]] if window and len(val) > window + 1 else []
        if (patience is not None and since >= patience) or (before and found[1] > np.mean(before)):
            break
    if kept is None:
        best_epoch = len(losses) - 1
    else:
        for variable, value in zip(variables, kept, strict=True):
            variable.assign(value)
    return History(losses, [loss for loss, _ in val], [share for _, share in val], best_epoch)


def finite_inputs(inputs: Any) -> None:
    """Raises if features or adjacency hold NaN or infinity, which no learning rate helps."""
    for name, tensor in zip(("features", "adjacency"), inputs, strict=False):
        values = tensor.values if isinstance(tensor, tf.SparseTensor) else tensor
        if not np.isfinite(np.asarray(values)).all():
            raise checks.error(f"inputs ({name})", "finite", tensor, "Impute or drop the rows with NaN or infinity.")


def compiled_step(
    model: keras.Model,
    graph: Graph,
    inputs: Any,
    optimizer: keras.optimizers.Optimizer,
    validate: bool = False,
    penalized: bool = True,
) -> Callable[[], Any]:
    """Returns a compiled function that does one optimizer step and gives (loss,) or (loss, val_loss, val_accuracy).

    Losses are means of the cross-entropy over the nodes of the split. The model's regularizers are added in training,
    and with `penalized` in validation.
    """
    labels, mask = _targets(graph, "train")
    targets = {"train": (tf.constant(np.flatnonzero(mask)), tf.constant(labels[mask > 0]))}
    if validate:
        labels, mask = _targets(graph, "val")
        targets["val"] = tf.constant(np.flatnonzero(mask)), tf.constant(labels[mask > 0])
    largest = max(int(np.max(classes)) for _, classes in targets.values())
    if not model.built:
        model(inputs)
    optimizer.build(model.trainable_variables)

    def loss_of(logits: tf.Tensor, split: str) -> tf.Tensor:
        nodes, classes = targets[split]
        if logits.shape[-1] <= largest:
            raise checks.error("model", f"with outputs for the classes 0 to {largest}", model, "See graph.num_classes.")
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(classes, tf.gather(logits, nodes))
        return tf.reduce_mean(each) + sum(model.losses if penalized or split == "train" else [])

    @tf.function(autograph=False)
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(model(inputs, training=True), "train")
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, [variable.value for variable in variables]), variables)
        if not validate:
            return (loss,)
        logits = model(inputs, training=False)
        nodes, classes = targets["val"]
        right = tf.equal(tf.argmax(tf.gather(logits, nodes), axis=1, output_type="int32"), classes)
        return loss, loss_of(logits, "val"), tf.reduce_mean(tf.cast(right, "float32"))

    return step
