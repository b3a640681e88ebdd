"""ProxQuant: the weights stay floats, and a proximal step after each optimizer step pulls them to the quantized set.

Paper: Bai, Wang, Liberty. ProxQuant: quantized neural networks via proximal operators. ICLR 2019,
https://arxiv.org/abs/1810.00861, algorithm 1: w = prox(w - eta_t grad; eta_t lambda_t R) with lambda_t = lambda t, the
gradient taken at the float weights; after a while the weights are quantized hard, and only the rest is trained.

Differs: k-bit sets are even grids with one scale a tensor, which int8 kernels run, instead of sums of k scaled signs.
The step of the L1 prox is counted in units of the tensor's scale, so that one strength serves all layers (with the
paper's set {-1, 1} that is the paper's step). t counts training steps, and weights are not clipped to [-1, 1]; in the
authors' program t counts epochs, and they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from tfkit.compression.quantized_sets import Quantity, SetQuantizer
from tfkit.internal import checks


def prox_l1(w: Any, point: Any, strength: Any) -> Any:
    """Returns argmin_x 0.5 |x - w|^2 + strength |x - p|_1, minimised over the points p of the set too.

    Soft-thresholding towards the nearest point: the regularizer shaped like a W of section 3 of the paper.
    """
    away = w - point
    return point + keras.ops.sign(away) * keras.ops.maximum(keras.ops.abs(away) - strength, 0)


def prox_l2(w: Any, point: Any, strength: Any) -> Any:
    """Returns argmin_x 0.5 |x - w|^2 + 0.5 strength |x - p|^2: a step of the share strength / (1 + strength)."""
    return (w + strength * point) / (1 + strength)


PROX = {"l1": prox_l1, "l2": prox_l2}


class ProxStep(keras.constraints.Constraint):
    """The proximal step, in the place where Keras optimizers apply constraints: after the update, in the same graph.

    So it runs once a step with any optimizer, compiled, and with `steps_per_execution` too.

    Args:
        quantity: the weight.
        regularizer: "l1" or "l2".
        strength: lambda.
        optimizer: whose learning rate and step count are read.
        start: the step count at which t is 0.
        then: a constraint that the variable had before; applied first.
    """

    def __init__(self, quantity: Quantity, regularizer: str, strength: Any, optimizer: Any, start: int, then: Any):
        self.quantity = quantity
        self.regularizer = regularizer
        self.strength = strength
        self.optimizer = optimizer
        self.start = start
        self.then = then

    def __call__(self, w: Any) -> Any:
        w = keras.ops.convert_to_tensor(w if self.then is None else self.then(w))
        transform = self.quantity.transform
        value = self.quantity.incoming(w)
        scale = transform.refined(value)
        transform.scale.assign(keras.ops.where(transform.hardened > 0, transform.scale, scale))
        # Constraints come before the count of this step, with the learning rate of this step.
        step = keras.ops.cast(self.optimizer.iterations - self.start + 1, "float32")
        strength = keras.ops.cast(self.optimizer.learning_rate, "float32") * self.strength * step
        if self.regularizer == "l1":
            strength = strength * scale
        every = self.optimizer.gradient_accumulation_steps
        if every:
            strength = keras.ops.where((self.optimizer.iterations + 1) % every == 0, strength * every, 0.0)
        pulled = PROX[self.regularizer](value, transform.point(value, scale), keras.ops.cast(strength, w.dtype))
        # A masked weight has no say in the model and keeps what it holds.
        return keras.ops.where(value == 0, w, pulled) if transform.keep_zeros else pulled


@keras.saving.register_keras_serializable(package="tfkit")
class ProxQuant(SetQuantizer):
    """Trains float weights into a quantized set by proximal steps of growing strength.

    Args:
        bits, scale, hard_epoch: see `SetQuantizer`.
        regularizer: "l1" pulls every weight by the same length towards its nearest point and lets it rest there (the
            paper's choice for binary weights); "l2" by a share of its distance (for ternary and wider sets).
        strength: lambda of lambda_t = lambda t, with t in training steps; a step is pulled with learning rate times
            lambda_t. None: from `pull`.
        pull: what the pulls add up to by the hard quantization. Alone, the L1 prox would move a weight by so many
            scales, and the L2 prox would leave exp(-pull) of its distance.
        include, exclude, preserve: see `Compressor`.

    It needs no optimizer of its own: `fit` with any Keras optimizer and `callbacks()`.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int] = 1,
        *,
        scale: float | Literal["fit"] = "fit",
        regularizer: Literal["l1", "l2"] = "l1",
        strength: float | None = None,
        pull: float = 2.0,
        hard_epoch: float = 2 / 3,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(bits, scale=scale, hard_epoch=hard_epoch, include=include, exclude=exclude, preserve=preserve)
        self.regularizer = checks.choice("regularizer", regularizer, tuple(PROX))
        self.strength = None if strength is None else checks.number("strength", strength, 0)
        self.pull = checks.number("pull", pull, 0)

    def step(self, quantity: Quantity, optimizer: Any, start: int, horizon: int | None) -> Any:
        strength = self.strength
        if strength is None:
            if horizon is None:
                raise checks.error(
                    "strength", "a number when the length of an epoch is unknown", None, "Pass `steps_per_epoch` or it."
                )
            strength = self.pull / max(planned_pull(optimizer, start, horizon), 1e-30) if horizon else 0.0
        then = quantity.variable.constraint
        return ProxStep(quantity, self.regularizer, strength, optimizer, start, then)


def planned_pull(optimizer: Any, start: int, horizon: int) -> float:
    """Returns the sum of learning rate times t over t = 1 … horizon, the schedule of the optimizer included."""
    schedule = optimizer._learning_rate
    if not isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
        return float(optimizer.learning_rate) * horizon * (horizon + 1) / 2
    moments = np.rint(np.linspace(1, horizon, min(horizon, 200))).astype(int)
    # Schedules expect the optimizer's own integer count.
    rates = np.array([float(schedule(keras.ops.convert_to_tensor(start + t - 1, "int64"))) for t in moments.tolist()])
    return float((rates * moments).mean() * horizon)
