"""Maximum inner product search: for a query, the items of the largest inner products."""

from __future__ import annotations

from tfkit.retrieval.base import Index, IndexFileError, SearchResult
from tfkit.retrieval.exact import Exact
from tfkit.retrieval.ivf import IVF
from tfkit.retrieval.norm_scan import NormScan

__all__ = ["IVF", "Exact", "Index", "IndexFileError", "NormScan", "SearchResult"]
