"""Sampled batches as a data set for Keras' `fit`, made ahead of the step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
import tensorflow as tf

from tfkit.graphs.graph import Graph
from tfkit.graphs.sampling.blocks import Sampler
from tfkit.graphs.sampling.pipeline import ahead
from tfkit.internal import checks


def sampled_dataset(sampler: Sampler, graph: Graph, *, prefetch: int = 4) -> tf.data.Dataset:
    """Returns a data set of ((features, *blocks), labels, weights): an epoch of the sampler for each pass.

    Every pass draws new batches, those of the sampler's next epoch.

    Args:
        sampler: over nodes that have labels.
        graph: with features and one class number a node.
        prefetch: batches that are made ahead.
    """
    if graph.features is None or graph.labels is None or graph.labels.ndim != 1:
        raise checks.error("graph", "with features and one class number a node", graph)
    labels = np.asarray(graph.labels)
    first = next(iter(sampler.batches(0)))
    width = graph.features.shape[1]
    block = tf.SparseTensorSpec((None, None), tf.float32)
    features = tf.SparseTensorSpec((None, width), tf.float32) if sp.issparse(graph.features) else None
    features = features or tf.TensorSpec((None, width), tf.float32)
    epochs = itertools.count()

    def batches() -> Iterator[tuple[Any, ...]]:
        for batch in ahead(sampler.batches(next(epochs)), prefetch):
            # Nodes outside the sampler's have weight 0, and may have no label.
            yield batch.tensors(graph.features), np.maximum(labels[batch.targets], 0), batch.weights

    signature = (
        (features, *[block] * len(first.blocks)),
        tf.TensorSpec((None,), tf.int32),
        tf.TensorSpec((None,), tf.float32),
    )
    data = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return data.apply(tf.data.experimental.assert_cardinality(len(sampler)))
