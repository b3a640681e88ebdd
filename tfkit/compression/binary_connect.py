"""BinaryConnect: the layer computes with quantized weights, and the gradient updates latent float ones.

Paper: Courbariaux, Bengio, David. BinaryConnect: training deep neural networks with binary weights during propagations.
NIPS 2015, https://arxiv.org/abs/1511.00363, algorithm 1, deterministic: w_b = sign(w); w = clip(w - eta dL/dw_b).

Differs: ternary and k-bit sets and a fitted scale are offered too, as in ProxQuant, whose baseline this is; and the
weights can be fixed before the last epochs, in which normalizations and biases are trained on, as ProxQuant does.
"""

from __future__ import annotations

from typing import Any

import keras

from tfkit.compression.quantized_sets import HardQuantized, Quantity, SetQuantizer


@keras.saving.register_keras_serializable(package="tfkit")
class StraightThroughPoint(HardQuantized):
    """`w' =` the nearest point of the set, with the gradient passed straight through to `w`."""

    def soft(self, weight: Any) -> Any:
        scale = keras.ops.stop_gradient(self.refined(weight))
        return weight + keras.ops.stop_gradient(self.point(weight, scale) - weight)


class Clip(keras.constraints.Constraint):
    """Clips latent weights to [-bound, bound]: beyond it they would take ever longer to change sign, without effect.

    Args:
        bound: the largest magnitude.
        then: a constraint that the variable had before; applied first.
        quantity: the weight whose scale follows the latent values.
    """

    def __init__(self, bound: float, then: Any, quantity: Quantity) -> None:
        self.bound = bound
        self.then = then
        self.quantity = quantity

    def __call__(self, w: Any) -> Any:
        clipped = keras.ops.clip(w if self.then is None else self.then(w), -self.bound, self.bound)
        transform = self.quantity.transform
        scale = transform.refined(self.quantity.incoming(clipped))
        transform.scale.assign(keras.ops.where(transform.hardened > 0, transform.scale, scale))
        return clipped


@keras.saving.register_keras_serializable(package="tfkit")
class BinaryConnect(SetQuantizer):
    """Trains latent weights with the gradient at their nearest points of a quantized set.

    Args:
        bits, scale: see `SetQuantizer`; 1 bit and `scale=1.0` are the paper's.
        hard_epoch: when the weights are fixed; see `SetQuantizer`. `1.0`: at the end.
        include, exclude, preserve: see `Compressor`.

    Latent weights are clipped to [-1, 1], or to the outermost point of a fixed set.
    """

    transform = StraightThroughPoint

    def step(self, quantity: Quantity, optimizer: Any, start: int, horizon: int | None) -> Any:
        transform = quantity.transform
        outermost = (transform.fixed_scale or 0.0) * max(2 ** (transform.bits - 1) - 1, 1)
        return Clip(outermost or 1.0, quantity.variable.constraint, quantity)
