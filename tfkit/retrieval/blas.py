"""The threads of NumPy's matrix products, which must not add to those that an index was asked to use."""

from __future__ import annotations

import threadpoolctl

#: So many queries are looked up one by one: a matrix product gains nothing, and to set BLAS's threads takes longer.
FEW = 3
_CONTROLLER: list[threadpoolctl.ThreadpoolController] = []


def blas() -> threadpoolctl.ThreadpoolController:
    """Returns what sets the threads of NumPy's BLAS; to look for it takes a millisecond, so that is done once."""
    if not _CONTROLLER:
        _CONTROLLER.append(threadpoolctl.ThreadpoolController().select(user_api="blas"))
    return _CONTROLLER[0]
