"""A calculator for planning: how much of the speed of many workers is left after their gradients are summed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tfkit.internal import checks


class ScalingPoint(NamedTuple):
    """What to expect of so many workers.

    Attributes:
        workers: how many.
        step_ms: time of a step.
        communication_ms: time to sum the gradients, of which a part may be hidden behind the backward pass.
        examples_per_second: of all workers.
        efficiency: that speed over `workers` times the speed of one.
        global_batch: examples in a step.
    """

    workers: int
    step_ms: float
    communication_ms: float
    examples_per_second: float
    efficiency: float
    global_batch: int


def scaling(
    parameters: int,
    compute_ms: float,
    batch_per_worker: int,
    workers: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000),
    *,
    bandwidth_gbit_s: float = 100.0,
    latency_us: float = 10.0,
    bytes_per_parameter: int = 4,
    overlap: float = 0.0,
) -> list[ScalingPoint]:
    """Estimates data-parallel training with a ring all-reduce.

    Assumptions: every worker computes as fast as the measured one, with the same number of examples; the slowest link
    of the ring has the given bandwidth both ways at once; n workers send 2 (n - 1) / n of the gradient in 2 (n - 1)
    messages; input is never waited for; `overlap` of the backward pass's time (two thirds of the computation) can hide
    communication.

    Args:
        parameters: trainable weights.
        compute_ms: measured time of one worker's step without communication, in milliseconds.
        batch_per_worker: examples in it.
        workers: numbers of workers.
        bandwidth_gbit_s: of the slowest link, in gigabits a second.
        latency_us: of a message, in microseconds.
        bytes_per_parameter: 4, or 2 with half-precision gradients.
        overlap: share of the backward pass during which sums run, in [0, 1].

    >>> [point] = scaling(25_000_000, 100.0, 32, [8], bandwidth_gbit_s=10.0, latency_us=0.0)
    >>> round(point.communication_ms), round(point.efficiency, 2)  # 2 * 7/8 * 100 MB at 1.25 GB/s
    (140, 0.42)
    """
    checks.integer("parameters", parameters, 1)
    checks.number("compute_ms", compute_ms, 1e-9)
    checks.integer("batch_per_worker", batch_per_worker, 1)
    checks.number("bandwidth_gbit_s", bandwidth_gbit_s, 1e-9)
    checks.number("latency_us", latency_us, 0)
    checks.number("overlap", overlap, 0, 1)
    points = []
    for count in workers:
        checks.integer("workers", count, 1)
        sent_bytes = 2 * (count - 1) / count * parameters * bytes_per_parameter
        communication_ms = sent_bytes * 8 / (bandwidth_gbit_s * 1e6) + 2 * (count - 1) * latency_us / 1e3
        hidden = min(communication_ms, overlap * compute_ms * 2 / 3)
        step_ms = compute_ms + communication_ms - hidden
        speed = count * batch_per_worker / step_ms * 1e3
        points.append(
            ScalingPoint(count, step_ms, communication_ms, speed, compute_ms / step_ms, count * batch_per_worker)
        )
    return points
