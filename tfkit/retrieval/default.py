"""The index that a user gets who asks for none in particular."""

from __future__ import annotations

import warnings
from typing import Any

from tfkit.retrieval import scann
from tfkit.retrieval.base import Index
from tfkit.retrieval.nsw import NSW


def default_index(items: Any, *, target_recall: float = 0.95, threads: int | None = None) -> Index:
    """Builds `ScaNN`, or `NSW` with a warning where the package that ScaNN needs is not installed.

    Args:
        items: (items, dimension).
        target_recall: share of the true best to find, by rule of thumb. `autotune` measures instead.
        threads: most threads to build with; None: as many as the process may use.
    """
    if scann.available():
        return scann.ScaNN(target_recall=target_recall).build(items, threads=threads)
    warnings.warn(
        "The package `scann` is not installed (it has Linux wheels only), so the index is NSW, which needs no package "
        "and takes longer to build. On Linux: pip install 'tfkit[retrieval]'.",
        stacklevel=2,
    )
    return NSW().build(items, threads=threads)
