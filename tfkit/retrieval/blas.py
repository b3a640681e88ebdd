"""The threads of NumPy's matrix products, which must not add to those that an index was asked to use."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import threadpoolctl

#: So many queries are looked up one by one: a matrix product gains nothing, and to set BLAS's threads takes longer.
FEW = 3


class _Limits:
    """Counts who holds BLAS to how many threads: its setting is the process's, and indexes are searched side by side.

    Whoever comes first notes the setting, the least of all limits holds, and whoever goes last puts the setting back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._controller: Any = None
        self._active: list[int] = []
        self._first: Any = None
        self._usual = 1

    @contextlib.contextmanager
    def at_most(self, threads: int) -> Iterator[None]:
        """Holds BLAS to so many threads within the block; it never gets more than it has."""
        with self._lock:
            if self._controller is None:  # To look for the libraries takes a millisecond, so that is done once.
                self._controller = threadpoolctl.ThreadpoolController().select(user_api="blas")
            if not self._active:
                self._usual = max((library["num_threads"] for library in self._controller.info()), default=1)
            self._active.append(threads)
            limiter = self._controller.limit(limits=min(*self._active, self._usual))
            if len(self._active) == 1:
                self._first = limiter
        try:
            yield
        finally:
            with self._lock:
                self._active.remove(threads)
                if self._active:
                    self._controller.limit(limits=min(*self._active, self._usual))
                else:
                    self._first.restore_original_limits()


at_most = _Limits().at_most
