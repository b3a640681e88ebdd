"""Free adversarial training: one backward pass gives the step of the weights and that of the perturbation.

Paper: Shafahi, Najibi, Ghiasi, Xu, Dickerson, Studer, Davis, Taylor, Goldstein. Adversarial training for free! NeurIPS
2019, https://arxiv.org/abs/1904.12843, algorithm 1: each batch is replayed m times, its perturbation grows by epsilon
times the sign of the gradient each time, and is kept for the next batch.

Differs: any step size, and L2 besides L-infinity.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.norms import project, steepest
from tfkit.robustness.defenses.adversarial_training import AdversarialTraining


@keras.saving.register_keras_serializable(package="tfkit")
class FreeAdversarialTraining(AdversarialTraining):
    """Wraps a model, so that `fit` trains it on perturbations that grow with the weights' own gradients.

    Train for 1 / replays of the epochs: each batch makes `replays` steps of the optimizer.

    Args:
        model: a built Keras model with one input.
        epsilon: radius of the ball, in units of the input.
        batch_size: largest batch; one perturbation is kept for each of its rows.
        replays: m of the paper.
        step_size: of the perturbation; None: epsilon, as in the paper.
        **settings: see `AdversarialTraining`. `steps` is that of the ascent in `evaluate`.
    """

    def __init__(
        self,
        model: keras.Model,
        epsilon: float,
        *,
        batch_size: int,
        replays: int = 8,
        step_size: float | None = None,
        **settings: Any,
    ) -> None:
        if settings.get("clean_weight"):
            raise checks.error("clean_weight", "0 in free training", settings["clean_weight"])
        # Before Keras locks the state, and it locks it when the base class is made.
        self._rows = checks.integer("batch_size", batch_size, 1)
        super().__init__(model, epsilon, step_size=step_size, **settings)
        self.replays = checks.integer("replays", replays, 1)

    def build(self, input_shape: Any) -> None:
        shape = (self._rows, *input_shape[1:])
        if None in shape:
            raise checks.error("model", "one with inputs of a fixed size", input_shape)
        self.delta = self.add_weight(shape=shape, initializer="zeros", trainable=False, name="delta")
        super().build(input_shape)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        count, epsilon = tf.shape(x)[0], self.current_epsilon()
        step = epsilon if self.step_size is None else tf.constant(self.step_size)
        with tf.control_dependencies(
            [tf.debugging.assert_less_equal(count, self._rows, "A batch exceeds batch_size.")]
        ):
            delta = tf.identity(self.delta.value)[:count]
        clean = self.model(x, training=False)
        for _ in range(self.replays):
            points = tf.clip_by_value(x + project(delta, epsilon, self.norm), *self.bounds)
            with tf.GradientTape() as tape:
                tape.watch(points)
                predicted = self.model(points, training=True)
                value = self.compute_loss(points, y, predicted, sample_weight, training=True)
                scaled = self.optimizer.scale_loss(value)
            weights = self.trainable_variables
            slope, gradients = tape.gradient(scaled, (points, [weight.value for weight in weights]))
            delta = project(points - x + step * steepest(slope, self.norm), epsilon, self.norm)
            self.optimizer.apply(gradients, weights)
        self.delta.assign(tf.concat([delta, self.delta.value[count:]], axis=0))
        return self._logs(x, y, sample_weight, value, clean, predicted)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        del config["clean_weight"]
        return {**config, "batch_size": self._rows, "replays": self.replays}
