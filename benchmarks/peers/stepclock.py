"""Seconds a training step, measured the same way on both sides and in interleaved rounds.

A step is the time from the end of one batch of a compiled `fit` to the end of the next, so it contains whatever a
method's callbacks do. Machines are noisy, hence the rounds: every method trains for a short while in each round, and
what is reported is the median over rounds of its time over that of the float model in the same round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def make_clock(callback_class: Any) -> Any:
    """A callback of the given Keras generation whose `ends` lists the time at which each batch ended, in seconds."""

    class StepClock(callback_class):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.ends: list[float] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.ends.append(time.perf_counter())

    return StepClock()


def steps_of(x: np.ndarray, y: np.ndarray, batch_size: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Exactly `steps` full batches of the data, repeated where it has fewer."""
    rows = np.resize(np.arange(len(x)), batch_size * steps)
    return x[rows], y[rows]


def step_seconds(
    fits: Mapping[str, Callable[[Any], Any]],
    clock: Callable[[], Any],
    *,
    rounds: int,
    skip: int = 3,
    reference: str = "float",
) -> dict[str, dict[str, float]]:
    """Time the steps of several compiled models in interleaved rounds.

    Args:
        fits: Name to a function that runs one short `fit` with the callback it is given, which it must put last.
        clock: Makes a fresh callback.
        rounds: Rounds to count; one more, in which everything compiles, comes first and is thrown away.
        skip: Steps to leave out at the start of each fit.
        reference: The name whose step is the unit.

    Returns:
        For each name: `step_ms` (median over all rounds) and `over_float` (median over rounds of the ratio).
    """
    times: dict[str, list[float]] = {name: [] for name in fits}
    for number in range(rounds + 1):
        for name, fit in fits.items():
            watch = clock()
            fit(watch)
            gaps = [b - a for a, b in zip(watch.ends, watch.ends[1:], strict=False)][skip:]
            if number:
                times[name].append(statistics.median(gaps))
    return {
        name: {
            "step_ms": 1e3 * statistics.median(values),
            "over_float": statistics.median(v / r for v, r in zip(values, times[reference], strict=True)),
        }
        for name, values in times.items()
    }
