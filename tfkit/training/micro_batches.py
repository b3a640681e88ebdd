"""Micro-batches: one step of a large batch on a machine that holds only a part of it at a time."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training.wrapper import Wrapper, batch_size, mean_reduction, rows


@keras.saving.register_keras_serializable(package="tfkit")
class MicroBatched(Wrapper):
    """Accumulates the gradient of each batch of `fit` over smaller ones, and takes one step.

    Against Keras' `gradient_accumulation_steps`: the optimizer, its schedule, its clipping and its moving averages see
    one step a batch; a last micro-batch that is smaller has the weight of its examples; and the step is that of the
    large batch to rounding. Normalisation uses the statistics of each micro-batch, as workers of a cluster do
    (Goyal et al., https://arxiv.org/abs/1706.02677, section 3).

    Args:
        model: the model to train.
        micro_batch_size: examples that go through the model at a time.

    >>> import numpy as np
    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> large = MicroBatched(model, micro_batch_size=32)
    >>> large.compile(keras.optimizers.SGD(0.1), "mse")
    >>> _ = large.fit(np.ones((100, 3)), np.ones(100), batch_size=100, verbose=0)
    >>> int(large.optimizer.iterations)
    1
    """

    def __init__(self, model: keras.Model, micro_batch_size: int, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.micro_batch_size = checks.integer("micro_batch_size", micro_batch_size, 1)

    def compile(self, *arguments: Any, **keywords: Any) -> None:
        """As `keras.Model.compile`; the loss must be a mean over examples, which is Keras' default."""
        super().compile(*arguments, **keywords)
        if not mean_reduction(self.loss):
            raise checks.error("loss", "a loss with reduction='sum_over_batch_size'", self.loss)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        count = batch_size(x)
        weights = self.trainable_weights
        size = self.micro_batch_size

        def more(start: Any, total: Any, sums: Any) -> Any:
            return start < count

        def micro_batch(start: Any, total: Any, sums: Any) -> Any:
            part = slice(start, tf.minimum(start + size, count))
            x_part, y_part, weight_part = rows(x, part), rows(y, part), rows(sample_weight, part)
            share = tf.cast(part.stop - start, tf.float32) / tf.cast(count, tf.float32)
            with tf.GradientTape() as tape:
                predicted = self(x_part, training=True)
                loss = self.compute_loss(x_part, y_part, predicted, weight_part, training=True)
                scaled = self.optimizer.scale_loss(loss * tf.cast(share, loss.dtype))
            gradients = tape.gradient(scaled, weights, unconnected_gradients="zero")
            self.compute_metrics(x_part, y_part, predicted, sample_weight=weight_part)
            sums = [total + tf.convert_to_tensor(part) for total, part in zip(sums, gradients, strict=True)]
            return part.stop, total + tf.cast(loss, tf.float32) * share, sums

        zeros = [tf.zeros(weight.shape, weight.dtype) for weight in weights]
        _, loss, gradients = tf.while_loop(
            more, micro_batch, (tf.constant(0), tf.constant(0.0), zeros), maximum_iterations=count
        )
        self._loss_tracker.update_state(loss, sample_weight=tf.cast(count, tf.float32))
        self.optimizer.apply_gradients(zip(gradients, weights, strict=True))
        return self.get_metrics_result()

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "micro_batch_size": self.micro_batch_size}
