"""Random numbers inside compiled loops: the generator SplitMix64, whose state is one number.

Paper: Steele, Lea, Flood. Fast splittable pseudorandom number generators. OOPSLA 2014,
https://doi.org/10.1145/2660193.2660195
"""

from __future__ import annotations

import numpy as np

from tfkit.retrieval.kernels import kernel

_STEP, _FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@kernel
def advance(state):  # type: ignore[no-untyped-def]
    """Moves `state`, uint64 (1,), on, and returns 64 random bits."""
    state[0] += _STEP
    bits = state[0]
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    return bits ^ (bits >> np.uint64(31))


@kernel
def uniform(state):  # type: ignore[no-untyped-def]
    """Returns a number in [0, 1), a multiple of 2^-53."""
    return np.float64(advance(state) >> np.uint64(11)) * 2.0**-53


@kernel
def below(state, count):  # type: ignore[no-untyped-def]
    """Returns an integer from 0 to count - 1."""
    return np.int64(uniform(state) * count)
