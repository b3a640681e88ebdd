"""Maximum inner product search: for a query, the items of the largest inner products."""

from __future__ import annotations

from tfkit.retrieval.base import Index, IndexFileError, SearchResult
from tfkit.retrieval.default import default_index
from tfkit.retrieval.euclidean import EuclideanTransform, L2ALSHTransform, SignALSHTransform, SimpleLSHTransform
from tfkit.retrieval.exact import Exact
from tfkit.retrieval.greedy_mips import GreedyMIPS
from tfkit.retrieval.ivf import IVF
from tfkit.retrieval.kd_tree import KDTree
from tfkit.retrieval.lsh import NormRangingLSH, SimpleLSH
from tfkit.retrieval.norm_scan import NormScan
from tfkit.retrieval.nsw import NSW
from tfkit.retrieval.pca_tree import PCATree
from tfkit.retrieval.router import Router
from tfkit.retrieval.router_report import Choice, RouterReport
from tfkit.retrieval.sampling import DiamondSampling, WedgeSampling
from tfkit.retrieval.scann import ScaNN
from tfkit.retrieval.tuning import Tuning, autotune

__all__ = [
    "IVF",
    "NSW",
    "Choice",
    "DiamondSampling",
    "EuclideanTransform",
    "Exact",
    "GreedyMIPS",
    "Index",
    "IndexFileError",
    "KDTree",
    "L2ALSHTransform",
    "NormRangingLSH",
    "NormScan",
    "PCATree",
    "Router",
    "RouterReport",
    "ScaNN",
    "SearchResult",
    "SignALSHTransform",
    "SimpleLSH",
    "SimpleLSHTransform",
    "Tuning",
    "WedgeSampling",
    "autotune",
    "default_index",
]
