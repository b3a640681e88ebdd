"""LAMB: Adam with a learning rate for each layer.

Paper: You et al. Large batch optimization for deep learning: training BERT in 76 minutes. ICLR 2020,
https://arxiv.org/abs/1904.00962, algorithm 2:

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  r = m^ / (sqrt(v^) + epsilon) with both bias-corrected,
    w = w - gamma phi(|w|) / |r + lambda w| (r + lambda w)

Differs: phi is the identity, or clips the norm to `bounds`. A layer whose weights or update are zero takes the plain
Adam step. Unlike `keras.optimizers.Lamb`, the weight decay stands inside the trust ratio, as in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training.layerwise import SMALL, LayerwiseOptimizer, dense, norm, trust_ratio


@keras.saving.register_keras_serializable(package="tfkit")
class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments.

    Args:
        learning_rate: gamma, a number or a schedule.
        beta_1, beta_2: decay rates of the two moments, in [0, 1).
        epsilon: added to the root of the second moment.
        weight_decay: lambda, inside the ratio.
        bounds: the least and the greatest value of phi(|w|); None: the norm as it is.
        exclude: see `LayerwiseOptimizer`.

    >>> optimizer = LAMB(learning_rate=2e-3, weight_decay=0.01)
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 1e-3,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float = 0.0,
        bounds: tuple[float, float] | None = None,
        exclude: Sequence[str] = SMALL,
        name: str = "lamb",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate, weight_decay, exclude, name, **kwargs)
        self.beta_1 = checks.number("beta_1", beta_1, 0, 1, open_high=True)
        self.beta_2 = checks.number("beta_2", beta_2, 0, 1, open_high=True)
        self.epsilon = checks.number("epsilon", epsilon, 0)
        if bounds is not None:
            low, high = (checks.number("bounds", bound, 0) for bound in bounds)
            if low > high:
                raise checks.error("bounds", "(least, greatest)", bounds, "Swap them.")
            bounds = (low, high)
        self.bounds = bounds

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.moments, self.squares = self.add_optimizer_variables(variables, ["moment", "square"])

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        weight = tf.convert_to_tensor(variable)
        dtype = weight.dtype
        gradient, rate = dense(gradient, dtype), tf.cast(learning_rate, dtype)
        index = self._get_variable_index(variable)
        moment, square = self.moments[index], self.squares[index]
        count = tf.cast(self.iterations + 1, dtype)
        first = self.beta_1 * tf.convert_to_tensor(moment.value) + (1 - self.beta_1) * gradient
        second = self.beta_2 * tf.convert_to_tensor(square.value) + (1 - self.beta_2) * tf.square(gradient)
        self.assign(moment, first)
        self.assign(square, second)
        first /= 1 - tf.pow(tf.constant(self.beta_1, dtype), count)
        second /= 1 - tf.pow(tf.constant(self.beta_2, dtype), count)
        update = first / (tf.sqrt(second) + self.epsilon) + self.decay_of(variable) * weight
        if self.adapted(variable):
            size = norm(weight) if self.bounds is None else tf.clip_by_value(norm(weight), *self.bounds)
            rate *= tf.cast(trust_ratio(size, norm(update)), dtype)
        self.assign_sub(variable, rate * update)

    def get_config(self) -> dict[str, Any]:
        names = ("beta_1", "beta_2", "epsilon", "bounds")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
