"""Fast adversarial training: one large step from a random start, and a watch for the moment when that stops working.

Paper: Wong, Rice, Kolter. Fast is better than free: revisiting adversarial training. ICLR 2020,
https://arxiv.org/abs/2001.03994, algorithm 3 and section 5.4: FGSM from a uniform start with a step of 1.25 epsilon;
training stops when the accuracy under PGD on training examples falls suddenly (catastrophic overfitting).
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import climb
from tfkit.robustness.attacks.norms import random_start
from tfkit.robustness.defenses.adversarial_training import AdversarialTraining

#: Step of the paper, in units of epsilon.
STEP = 1.25


@keras.saving.register_keras_serializable(package="tfkit")
class FastAdversarialTraining(AdversarialTraining):
    """Wraps a model, so that `fit` trains it on single steps from random starts. Use it with `CatastrophicOverfitting`.

    Args:
        model: a built Keras model with one input.
        epsilon: radius of the ball, in units of the input.
        step_size: of the single step; None: 1.25 epsilon.
        **settings: see `AdversarialTraining`; `steps` is 1.
    """

    def __init__(self, model: keras.Model, epsilon: float, *, step_size: float | None = None, **settings: Any) -> None:
        if settings.pop("steps", 1) != 1:
            raise checks.error("steps", "1 in fast training", settings, "Use `AdversarialTraining` for more.")
        super().__init__(
            model, epsilon, steps=1, step_size=STEP * epsilon if step_size is None else step_size, **settings
        )


class CatastrophicOverfitting(keras.callbacks.Callback):
    """Stops training when the accuracy under PGD falls suddenly, and takes back the weights from before.

    Single-step training may from one moment on resist single steps only. The metrics of training do not show it.

    Args:
        x, y: some hundred training examples and their classes.
        steps: of projected gradient ascent.
        drop: fall of the accuracy below the best so far, in [0, 1], that counts as sudden.
        frequency: batches between two looks; None: once an epoch.
        seed: of the random starts.
    """

    def __init__(
        self, x: Any, y: Any, *, steps: int = 10, drop: float = 0.2, frequency: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.x, self.y = tf.constant(np.asarray(x), tf.float32), tf.constant(np.asarray(y))
        if len(self.x) != len(self.y) or not len(self.x):
            raise checks.error("y", f"a class for each of {len(self.x)} examples, at least one", y)
        self.steps = checks.integer("steps", steps, 1)
        self.drop = checks.number("drop", drop, 0, 1)
        self.frequency = None if frequency is None else checks.integer("frequency", frequency, 1)
        self.seed = seed
        self.accuracies: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        if not isinstance(model, AdversarialTraining):
            raise checks.error("model", "an `AdversarialTraining` model", model)
        self.accuracies, self.best = [], -1.0
        self.weights: list[np.ndarray] = []

        @tf.function
        def accuracy() -> Any:
            def loss(points: Any) -> Any:
                return model.compute_loss(points, self.y, model.model(points, training=False), training=False)

            seed = tf.constant([self.seed, 1])
            start = self.x + random_start(tf.shape(self.x), model.epsilon, model.norm, seed)
            step = 2.5 * model.epsilon / self.steps
            found = climb(loss, self.x, start, model.epsilon, step, self.steps, model.norm, model.bounds)
            right = tf.argmax(model.model(found, training=False), axis=-1, output_type=self.y.dtype) == self.y
            return tf.reduce_mean(tf.cast(right, tf.float32))

        self._accuracy = accuracy

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.frequency is not None and (batch + 1) % self.frequency == 0:
            self._look()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.frequency is None:
            self._look()

    def _look(self) -> None:
        reached = float(self._accuracy())
        self.accuracies.append(reached)
        if reached >= self.best:
            self.best, self.weights = reached, self.model.get_weights()
        elif self.best - reached > self.drop:
            self.model.set_weights(self.weights)
            self.model.stop_training = True
            warnings.warn(
                f"The accuracy under PGD fell from {100 * self.best:.1f} % to {100 * reached:.1f} %: catastrophic "
                "overfitting. Training stopped, and the weights from before are back. Use a smaller step, or more.",
                stacklevel=2,
            )
