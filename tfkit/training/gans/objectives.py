"""What the generator and the discriminator of a GAN minimise: one row an objective.

Scores are the discriminator's outputs before any sigmoid, (batch, 1); each loss is a mean over the batch.

Goodfellow et al., https://arxiv.org/abs/1406.2661 (minimax and non-saturating); Mao et al. LSGAN,
https://arxiv.org/abs/1611.04076; Arjovsky et al. WGAN, https://arxiv.org/abs/1701.07875; Gulrajani et al. WGAN-GP,
https://arxiv.org/abs/1704.00028; Miyato et al., hinge with spectral normalisation, https://arxiv.org/abs/1802.05957;
Mescheder et al. R1, https://arxiv.org/abs/1801.04406; Jolicoeur-Martineau, relativistic average,
https://arxiv.org/abs/1807.00734.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf


class Objective(NamedTuple):
    """A pair of losses, and what else belongs to it.

    Attributes:
        discriminator: (scores of real, scores of generated examples) -> its loss.
        generator: (scores of real, scores of generated examples) -> its loss.
        penalty: on the discriminator's gradients: "", "wgan_gp" or "r1".
        weight: of that penalty.
        clip: to which every weight of the discriminator is clipped after its steps; 0: not at all.
        discriminator_steps: in the paper, for one of the generator.
        uses_real: whether the generator's loss looks at real examples.
    """

    discriminator: Callable[[Any, Any], Any]
    generator: Callable[[Any, Any], Any]
    penalty: str = ""
    weight: float = 0.0
    clip: float = 0.0
    discriminator_steps: int = 1
    uses_real: bool = False


def _mean(values: Any) -> Any:
    return tf.reduce_mean(values)


def _log_loss(real: Any, fake: Any) -> Any:
    """-log sigmoid(real) - log(1 - sigmoid(fake))."""
    return _mean(tf.nn.softplus(-real)) + _mean(tf.nn.softplus(fake))


def _relativistic_discriminator(real: Any, fake: Any) -> Any:
    return (_log_loss(real - _mean(fake), fake - _mean(real))) / 2


def _relativistic_generator(real: Any, fake: Any) -> Any:
    return (_log_loss(fake - _mean(real), real - _mean(fake))) / 2


def _wasserstein(real: Any, fake: Any) -> Any:
    return _mean(fake) - _mean(real)


OBJECTIVES: dict[str, Objective] = {
    "minimax": Objective(_log_loss, lambda real, fake: -_mean(tf.nn.softplus(fake))),
    "non_saturating": Objective(_log_loss, lambda real, fake: _mean(tf.nn.softplus(-fake))),
    "lsgan": Objective(
        lambda real, fake: (_mean(tf.square(real - 1)) + _mean(tf.square(fake))) / 2,
        lambda real, fake: _mean(tf.square(fake - 1)) / 2,
    ),
    "wgan": Objective(_wasserstein, lambda real, fake: -_mean(fake), clip=0.01, discriminator_steps=5),
    "wgan_gp": Objective(
        _wasserstein, lambda real, fake: -_mean(fake), penalty="wgan_gp", weight=10.0, discriminator_steps=5
    ),
    "hinge": Objective(
        lambda real, fake: _mean(tf.nn.relu(1 - real)) + _mean(tf.nn.relu(1 + fake)), lambda real, fake: -_mean(fake)
    ),
    "r1": Objective(_log_loss, lambda real, fake: _mean(tf.nn.softplus(-fake)), penalty="r1", weight=10.0),
    "relativistic": Objective(_relativistic_discriminator, _relativistic_generator, uses_real=True),
}


def gradient_penalty(score: Callable[[Any], Any], points: Any, kind: str) -> Any:
    """Returns E (|grad| - 1)^2 for "wgan_gp", or E |grad|^2 / 2 for "r1", of the discriminator's score at points.

    Args:
        score: points (batch, ...) to scores (batch, 1).
        points: where to take the gradient.
        kind: "wgan_gp" or "r1".
    """
    with tf.GradientTape() as tape:
        tape.watch(points)
        total = tf.reduce_sum(score(points))
    gradient = tape.gradient(total, points)
    squared = tf.reduce_sum(tf.square(tf.reshape(gradient, (tf.shape(points)[0], -1))), axis=1)
    if kind == "r1":
        return _mean(squared) / 2
    return _mean(tf.square(tf.sqrt(squared + 1e-12) - 1))
