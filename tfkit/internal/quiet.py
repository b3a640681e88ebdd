"""Quiet for compiled code that cannot be told to be quiet."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet_stderr(log: Any) -> Iterator[None]:
    """Sends what C++ code writes to file descriptor 2 into `log`, an open file; of all threads, while this lasts."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        os.dup2(log.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
