"""Graph layers and models: Keras layers on `(features, adjacency)`, sparse or dense."""

from __future__ import annotations

from tfkit.graphs.layers.appnp import APPNP, PageRankPropagation
from tfkit.graphs.layers.base import FeatureDropout, GraphLayer, GraphModel
from tfkit.graphs.layers.deep import DeepGCN, DropEdge, JumpingKnowledge, PairNorm
from tfkit.graphs.layers.gat import GAT, GATConv
from tfkit.graphs.layers.gcn import GCN, GCNConv
from tfkit.graphs.layers.gcnii import GCNII, GCNIIConv
from tfkit.graphs.layers.gin import GIN, GINConv
from tfkit.graphs.layers.graph_sage import GraphSAGE, SAGEConv, unsupervised_loss
from tfkit.graphs.layers.sgc import SGC, SGCConv

__all__ = [
    "APPNP",
    "GAT",
    "GCN",
    "GCNII",
    "GIN",
    "SGC",
    "DeepGCN",
    "DropEdge",
    "FeatureDropout",
    "GATConv",
    "GCNConv",
    "GCNIIConv",
    "GINConv",
    "GraphLayer",
    "GraphModel",
    "GraphSAGE",
    "JumpingKnowledge",
    "PageRankPropagation",
    "PairNorm",
    "SAGEConv",
    "SGCConv",
    "unsupervised_loss",
]
