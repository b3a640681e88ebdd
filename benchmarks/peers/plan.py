"""What both sides of compression.py do: networks, data and hyperparameters, fixed before any result was seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: The compared methods, in the order of the table; "float" is the reference of every ratio.
METHODS = (
    "float",
    "prune",
    "prune_constant",
    "cluster_16",
    "cluster_32",
    "prune_cluster",
    "qat",
    "prune_qat",
    "prune_cluster_qat",
)
#: Few shared values and many zeros: what the entropy coder is made for.
DEEP = ("prune_cluster", "prune_cluster_qat")
INT8 = ("qat", "prune_qat", "prune_cluster_qat")


@dataclass(frozen=True)
class Plan:
    """Settings of one network, alike for tfkit and the peer.

    The optimizer is Adam, its rate falling from the given one to 0 along a cosine in each stage.

    Attributes:
        network: name of a function of `tfkit.models`.
        data: name of a data set of `tfkit.data`.
        sparsity: share of zeros in each kernel after pruning.
        clusters: shared values of the pruned and clustered network, zero included; a power of two.
        prune_updates: mask updates of the polynomial schedule, spread over the first 60 % of the steps.
        train_limit, test_limit: examples to use; None for all.
        timing_steps, timing_rounds: see `stepclock.step_seconds`.
    """

    network: str
    data: str
    sparsity: float
    clusters: int = 16
    batch_size: int = 128
    float_epochs: int = 12
    float_rate: float = 2e-3
    prune_epochs: int = 4
    prune_rate: float = 1e-3
    prune_updates: int = 20
    cluster_epochs: int = 2
    cluster_rate: float = 1e-4
    qat_epochs: int = 3
    qat_rate: float = 1e-4
    train_limit: int | None = None
    test_limit: int | None = None
    timing_steps: int = 12
    timing_rounds: int = 15

    def prune_pace(self, examples: int) -> tuple[int, int]:
        """(steps between two mask updates, last pruning step) for so many training examples.

        The last step is a multiple of the first number: tfmot updates only on such steps up to the last one, and
        would otherwise stop short of the sparsity it was asked for.
        """
        steps = -(-examples // self.batch_size) * self.prune_epochs
        every = max(1, round(0.6 * steps / self.prune_updates))
        return every, every * max(1, round(0.6 * steps / every))


FULL = (
    Plan("lenet5", "mnist", sparsity=0.9),
    Plan("convnet_bn", "fashion_mnist", sparsity=0.75),
)
QUICK = tuple(
    replace(
        plan,
        data="mnist5k",
        float_epochs=2,
        prune_epochs=2,
        prune_updates=4,
        cluster_epochs=1,
        qat_epochs=1,
        train_limit=512,
        test_limit=200,
        timing_steps=6,
        timing_rounds=1,
    )
    for plan in FULL
)
