"""Embeddings: a vector for each node, and how they are compared."""

from __future__ import annotations

from tfkit.graphs.embeddings.base import Embedding
from tfkit.graphs.embeddings.evaluation import F1, LinkSplit, classify_nodes, predict_links, reconstruct, split_links
from tfkit.graphs.embeddings.grarep import GraRep
from tfkit.graphs.embeddings.hope import HOPE
from tfkit.graphs.embeddings.line import LINE
from tfkit.graphs.embeddings.netmf import NetMF, deepwalk_matrix
from tfkit.graphs.embeddings.spectral import LaplacianEigenmaps
from tfkit.graphs.embeddings.verse import VERSE
from tfkit.graphs.embeddings.walks import DeepWalk, Node2Vec, random_walks

__all__ = [
    "F1",
    "HOPE",
    "LINE",
    "VERSE",
    "DeepWalk",
    "Embedding",
    "GraRep",
    "LaplacianEigenmaps",
    "LinkSplit",
    "NetMF",
    "Node2Vec",
    "classify_nodes",
    "deepwalk_matrix",
    "predict_links",
    "random_walks",
    "reconstruct",
    "split_links",
]
