"""TRADES: the clean loss, and how far predictions move within the ball, weighed against each other.

Paper: Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan. Theoretically principled trade-off between robustness and accuracy.
ICML 2019, https://arxiv.org/abs/1901.08573, equation 5 and algorithm 1: loss(f(x), y) + beta max KL(f(x) || f(x')),
the maximum by projected gradient ascent from a Gaussian point very near x.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.defenses.adversarial_training import AdversarialTraining

#: Standard deviation of the start: at x itself the divergence has no slope.
START = 1e-3


def kl_divergence(logits: Any, others: Any) -> Any:
    """Returns KL(softmax(logits) || softmax(others)) of each row, (batch,)."""
    log_p, log_q = tf.nn.log_softmax(logits), tf.nn.log_softmax(others)
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=-1)


@keras.saving.register_keras_serializable(package="tfkit")
class TRADES(AdversarialTraining):
    """Wraps a model, so that `fit` minimises the TRADES loss.

    Args:
        model: a built Keras model with one input, to logits or probabilities, (batch, classes).
        epsilon: radius of the ball, in units of the input.
        beta: weight of the divergence, 1 / lambda of the paper, which has 1 to 6.
        from_logits: whether the model gives logits.
        **settings: see `AdversarialTraining`; `random_start` and `clean_weight` have no meaning here.
    """

    def __init__(
        self, model: keras.Model, epsilon: float, *, beta: float = 6.0, from_logits: bool = True, **settings: Any
    ) -> None:
        for name, default in (("random_start", True), ("clean_weight", 0.0)):
            if settings.get(name, default) != default:
                raise checks.error(name, "left out of TRADES", settings[name], "`beta` weighs the two parts.")
        super().__init__(model, epsilon, **settings)
        self.beta = checks.number("beta", beta, 0)
        self.from_logits = bool(from_logits)

    def _logits(self, x: Any, training: bool) -> Any:
        return self._as_logits(self.model(x, training=training))

    def _as_logits(self, predicted: Any) -> Any:
        return predicted if self.from_logits else tf.math.log(tf.maximum(predicted, 1e-12))

    def craft(self, x: Any, y: Any, sample_weight: Any, epsilon: Any) -> Any:
        fixed = tf.stop_gradient(self._logits(x, training=False))
        start = x + START * tf.random.stateless_normal(tf.shape(x), self._next_seed())

        def loss(points: Any) -> Any:
            return tf.reduce_sum(kl_divergence(fixed, self._logits(points, training=False)))

        return self._ascend(loss, x, epsilon, start)

    def objective(self, x: Any, adversarial: Any, y: Any, sample_weight: Any, training: bool) -> tuple[Any, Any, Any]:
        # One pass over both, so that batch normalization sees them together.
        both = self.model(tf.concat([x, adversarial], axis=0), training=training)
        clean, moved = tf.split(both, 2)
        divergence = kl_divergence(self._as_logits(clean), self._as_logits(moved))
        if sample_weight is not None:
            divergence *= tf.cast(tf.reshape(sample_weight, (-1,)), divergence.dtype)
        value = self.compute_loss(x, y, clean, sample_weight, training=training)
        return value + self.beta * tf.reduce_mean(divergence), clean, moved

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["random_start"], config["clean_weight"]
        return {**config, "beta": self.beta, "from_logits": self.from_logits}
