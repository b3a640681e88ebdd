"""Graphs: convolutional layers that scale, samplers, and embeddings of nodes."""

from __future__ import annotations

from tfkit.graphs.convert import from_networkx, from_pyg, from_scipy, from_spektral, to_networkx, to_pyg_arrays
from tfkit.graphs.datasets import load, power_law_roles, stochastic_block_model, two_hop_quantiles
from tfkit.graphs.graph import Graph
from tfkit.graphs.layers import (
    APPNP,
    GAT,
    GCN,
    GCNII,
    GIN,
    SGC,
    DeepGCN,
    DropEdge,
    FeatureDropout,
    GATConv,
    GCNConv,
    GCNIIConv,
    GINConv,
    GraphLayer,
    GraphModel,
    GraphSAGE,
    JumpingKnowledge,
    PageRankPropagation,
    PairNorm,
    SAGEConv,
    SGCConv,
    unsupervised_loss,
)
from tfkit.graphs.normalization import add_self_loops, gcn_normalize, laplacian, row_normalize
from tfkit.graphs.propagation import propagate, to_tensor
from tfkit.graphs.training import (
    GraphBatch,
    History,
    accuracy,
    batch_graphs,
    edge_scores,
    full_batch,
    inputs_of,
    train_nodes,
)
from tfkit.graphs.sampling import (
    Batch,
    Block,
    ClusterSampler,
    LayerWiseSampler,
    NeighbourSampler,
    SaintSampler,
    Sampler,
    ahead,
    partition,
)
from tfkit.graphs.vr_gcn import VRGCN, propagate_features
