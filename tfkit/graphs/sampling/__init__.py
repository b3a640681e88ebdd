"""Samplers: batches of a graph that does not fit a step, deterministic by seed and made ahead."""

from __future__ import annotations

from tfkit.graphs.sampling.blocks import Batch, Block, Sampler
from tfkit.graphs.sampling.cluster_gcn import ClusterSampler, partition
from tfkit.graphs.sampling.dataset import sampled_dataset
from tfkit.graphs.sampling.graph_saint import SaintSampler
from tfkit.graphs.sampling.layer_wise import LayerWiseSampler
from tfkit.graphs.sampling.neighbour import NeighbourSampler
from tfkit.graphs.sampling.node_model import NodeModel
from tfkit.graphs.sampling.pipeline import ahead

__all__ = [
    "Batch",
    "Block",
    "ClusterSampler",
    "LayerWiseSampler",
    "NeighbourSampler",
    "NodeModel",
    "SaintSampler",
    "Sampler",
    "ahead",
    "partition",
    "sampled_dataset",
]
