"""LARS and LARC: stochastic gradient descent with a learning rate for each layer.

Paper: You, Zhang, Hsieh, Demmel, Keutzer. ImageNet training in minutes. ICPP 2018, https://arxiv.org/abs/1709.05011;
the algorithm is that of You, Gitman, Ginsburg. Large batch training of convolutional networks, arXiv 1708.03888:

    lambda = eta |w| / (|g| + beta |w|),    v = m v + gamma lambda (g + beta w),    w = w - v

with gamma the learning rate, eta the trust coefficient and beta the weight decay. LARC clips: gamma lambda becomes
min(gamma, lambda), so that no layer moves faster than plain SGD would move it.

Differs: a layer whose weights or gradient are zero takes the plain SGD step. Each weight has a ratio of its own, a
layer's kernel another than its bias. LARC leaves biases, and scales and shifts of normalisation, to plain SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training.layerwise import SMALL, LayerwiseOptimizer, dense, norm


def local_rate(weight: Any, gradient: Any, trust_coefficient: float, weight_decay: float, epsilon: float = 0.0) -> Any:
    """Returns eta |w| / (|g| + beta |w| + epsilon), or 1 where |w| or |g| is zero.

    >>> rate = local_rate(tf.constant([3.0, 4.0]), tf.constant([0.0, 2.0]), 0.01, 0.1)  # 0.01 * 5 / (2 + 0.1 * 5)
    >>> round(float(rate), 6)
    0.02
    """
    size, slope = norm(weight), norm(gradient)
    below = slope + weight_decay * size + epsilon
    both = tf.logical_and(size > 0, slope > 0)
    return tf.where(both, trust_coefficient * size / tf.where(both, below, 1.0), 1.0)


@keras.saving.register_keras_serializable(package="tfkit")
class LARS(LayerwiseOptimizer):
    """Layer-wise adaptive rate scaling.

    Args:
        learning_rate: gamma, a number or a schedule. Since lambda multiplies it, it is far above that of SGD.
        momentum: m, in [0, 1).
        trust_coefficient: eta.
        weight_decay: beta, inside the ratio.
        nesterov: whether to look ahead: w = w - (m v + gamma lambda (g + beta w)) with the new v.
        epsilon: added to the denominator of lambda.
        exclude: see `LayerwiseOptimizer`; none by default. A weight that is excluded takes the plain step, at a rate
            that is far above that of SGD: networks with biases may then diverge.

    >>> optimizer = LARS(learning_rate=8.0, weight_decay=1e-4)
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        epsilon: float = 0.0,
        exclude: Sequence[str] = (),
        name: str = "lars",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, exclude, name, **kwargs)
        self.momentum = checks.number("momentum", momentum, 0, 1, open_high=True)
        self.trust_coefficient = checks.number("trust_coefficient", trust_coefficient, 0)
        self.nesterov = bool(nesterov)
        self.epsilon = checks.number("epsilon", epsilon, 0)

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.velocities = self.add_optimizer_variables(variables, "velocity")

    def rate(self, weight: Any, gradient: Any, decay: float, learning_rate: Any) -> Any:
        """The rate of an adapted layer, gamma lambda."""
        local = local_rate(weight, gradient, self.trust_coefficient, decay, self.epsilon)
        return learning_rate * tf.cast(local, learning_rate.dtype)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        weight = tf.convert_to_tensor(variable)
        gradient = dense(gradient, weight.dtype)
        rate = tf.cast(learning_rate, weight.dtype)
        decay = self.decay_of(variable)
        if self.adapted(variable):
            rate = self.rate(weight, gradient, decay, rate)
        step = rate * (gradient + decay * weight)
        velocity = self.velocities[self._get_variable_index(variable)]
        new = self.momentum * tf.convert_to_tensor(velocity.value) + step
        self.assign(velocity, new)
        self.assign_sub(variable, self.momentum * new + step if self.nesterov else new)

    def get_config(self) -> dict[str, Any]:
        names = ("momentum", "trust_coefficient", "nesterov", "epsilon")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(package="tfkit")
class LARC(LARS):
    """Layer-wise adaptive rate clipping: as `LARS`, with min(gamma, lambda) for gamma lambda.

    Args:
        learning_rate: gamma, the highest rate that a layer gets; that of SGD.
        trust_coefficient: eta.
        momentum, weight_decay, nesterov, epsilon: see `LARS`.
        exclude: see `LayerwiseOptimizer`.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.1,
        momentum: float = 0.9,
        trust_coefficient: float = 0.02,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        epsilon: float = 0.0,
        exclude: Sequence[str] = SMALL,
        name: str = "larc",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate, momentum, trust_coefficient, weight_decay, nesterov, epsilon, exclude, name, **kwargs
        )

    def rate(self, weight: Any, gradient: Any, decay: float, learning_rate: Any) -> Any:
        local = local_rate(weight, gradient, self.trust_coefficient, decay, self.epsilon)
        # Where the ratio is undefined, `local_rate` gives 1; the plain step is wanted there, whatever gamma.
        plain = tf.logical_or(norm(weight) <= 0, norm(gradient) <= 0)
        return tf.where(plain, learning_rate, tf.minimum(learning_rate, tf.cast(local, learning_rate.dtype)))
