"""A seed of its own for every initializer of a model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def seeds(seed: int | None) -> Iterator[int | None]:
    """Yields seeds without end: independent ones drawn from `seed`, or None again and again for None.

    Layers given one and the same seed would start with the same numbers.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    while True:
        yield None if rng is None else int(rng.integers(2**31))
