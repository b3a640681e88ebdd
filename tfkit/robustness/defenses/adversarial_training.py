"""Adversarial training: each step trains on the worst points that projected gradient descent finds near its batch.

Paper: Madry, Makelov, Schmidt, Tsipras, Vladu. Towards deep learning models resistant to adversarial attacks.
arXiv 1706.06083, https://arxiv.org/abs/1706.06083, equation 2.1: min over the weights of the mean of the largest loss
within the ball.

Differs: the radius may grow over the first steps, without which a small network at a large radius can stay at chance;
the loss may keep a share of the clean loss. Examples are crafted against the network as it predicts (dropout off,
batch normalization by its moving averages), so that crafting changes no state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks
from tfkit.robustness.attacks.gradients import climb
from tfkit.robustness.attacks.norms import NORMS, checked_bounds, random_start

Loss = Callable[[Any], Any]


class AdversarialMetrics(keras.metrics.Metric):
    """Copies of the compiled metrics for the adversarial predictions; their names begin with "adversarial_"."""

    def __init__(self) -> None:
        super().__init__(name="adversarial_metrics")
        self.compiled: Any = None

    def copy(self, compiled: Any) -> None:
        """Takes copies of what `compile` made of the metrics, or nothing if there are none."""
        if compiled is not None:
            metrics = _copies(compiled._user_metrics), _copies(compiled._user_weighted_metrics)
            compiled = type(compiled)(*metrics, output_names=compiled.output_names)
        self.compiled = compiled

    @property
    def variables(self) -> list[Any]:
        return [] if self.compiled is None else self.compiled.variables

    def update_state(self, y: Any, y_pred: Any, sample_weight: Any = None) -> None:
        if self.compiled is not None:
            self.compiled.update_state(y, y_pred, sample_weight)

    def reset_state(self) -> None:
        if self.compiled is not None:
            self.compiled.reset_state()

    def result(self) -> dict[str, Any]:
        found = self.compiled.result() if self.compiled is not None and self.compiled.built else {}
        return {f"adversarial_{name}": value for name, value in found.items()}


@keras.saving.register_keras_serializable(package="tfkit")
class AdversarialTraining(keras.Model):
    """Wraps a model, so that `fit` trains it on adversarial examples.

    `compile` it as the model itself, with any loss, metrics and optimizer. The logs have each metric twice, on the
    examples as they are and, as `adversarial_...`, on the adversarial ones; `loss` is what is minimised. Afterwards the
    trained network is `self.model`.

    Args:
        model: a built Keras model with one input.
        epsilon: radius of the ball, in units of the input.
        norm: "linf" or "l2".
        steps: of projected gradient ascent for each batch.
        step_size: of one such step; None: 2.5 epsilon / steps, so that the edge is reached from any start.
        random_start: begin at a random point of the ball, not at the example.
        clean_weight: share of the clean loss in what is minimised; 0 is the paper's.
        warmup_steps: training steps over which the radius grows evenly from 0 to epsilon.
        bounds: least and greatest value of an input.
        seed: of the random starts.

    Example:
        robust = AdversarialTraining(model, epsilon=0.3, steps=10)
        robust.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
        robust.fit(x, y, epochs=20)
    """

    def __init__(
        self,
        model: keras.Model,
        epsilon: float,
        *,
        norm: str = "linf",
        steps: int = 10,
        step_size: float | None = None,
        random_start: bool = True,
        clean_weight: float = 0.0,
        warmup_steps: int = 0,
        bounds: Sequence[float] = (0.0, 1.0),
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(model, keras.Model) or len(model.inputs or ()) != 1:
            raise checks.error("model", "a built Keras model with one input", model)
        self.model = model
        self.epsilon = checks.number("epsilon", epsilon, 0)
        self.norm = checks.choice("norm", norm, NORMS)
        self.steps = checks.integer("steps", steps, 1)
        self.step_size = None if step_size is None else checks.number("step_size", step_size, 0)
        self.random_start = bool(random_start)
        self.clean_weight = checks.number("clean_weight", clean_weight, 0, 1)
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps, 0)
        self.bounds = checked_bounds(bounds)
        self.seed = seed
        self.draws = keras.random.SeedGenerator(seed)
        self.adversarial_metrics = AdversarialMetrics()
        self.build(model.input_shape)

    def build(self, input_shape: Any) -> None:
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    # What a variant changes.

    def craft(self, x: Any, y: Any, sample_weight: Any, epsilon: Any) -> Any:
        """Returns the adversarial examples of a batch, shaped as `x`."""

        def loss(points: Any) -> Any:
            return self.compute_loss(points, y, self.model(points, training=False), sample_weight, training=False)

        return self._ascend(loss, x, epsilon)

    def objective(self, x: Any, adversarial: Any, y: Any, sample_weight: Any, training: bool) -> tuple[Any, Any, Any]:
        """Returns what is minimised, a scalar, and the predictions of the examples and of the adversarial ones."""
        weight = self.clean_weight
        predicted = self.model(adversarial, training=training)
        value = self.compute_loss(adversarial, y, predicted, sample_weight, training=training)
        if not weight:
            return value, self.model(x, training=False), predicted
        clean = self.model(x, training=training)
        value = (1 - weight) * value + weight * self.compute_loss(x, y, clean, sample_weight, training=training)
        return value, clean, predicted

    # What Keras calls.

    def compile(self, *args: Any, jit_compile: bool | str = "auto", **kwargs: Any) -> None:
        if jit_compile == "auto":
            # On a CPU, XLA takes two to nine times as long for the convolutions of this loop.
            jit_compile = bool(tf.config.list_physical_devices("GPU")) and "auto"
        super().compile(*args, jit_compile=jit_compile, **kwargs)
        self.adversarial_metrics.copy(self._compile_metrics)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras does this itself only where `compile` is its own.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        adversarial = self.craft(x, y, sample_weight, self.current_epsilon())
        with tf.GradientTape() as tape:
            value, clean, predicted = self.objective(x, adversarial, y, sample_weight, training=True)
            scaled = self.optimizer.scale_loss(value)
        self.optimizer.apply(tape.gradient(scaled, self.trainable_variables), self.trainable_variables)
        return self._logs(x, y, sample_weight, value, clean, predicted)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        adversarial = self.craft(x, y, sample_weight, tf.constant(self.epsilon))
        value, clean, predicted = self.objective(x, adversarial, y, sample_weight, training=False)
        return self._logs(x, y, sample_weight, value, clean, predicted)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        # Keras calls this on symbols, to make the metrics' variables; the steps update each with its own predictions.
        self.adversarial_metrics.update_state(y, y_pred, sample_weight)
        return super().compute_metrics(x, y, y_pred, sample_weight)

    def get_config(self) -> dict[str, Any]:
        names = ("epsilon", "norm", "steps", "step_size", "random_start", "clean_weight", "warmup_steps", "seed")
        return {
            **super().get_config(),
            "model": keras.saving.serialize_keras_object(self.model),
            "bounds": list(self.bounds),
            **{name: getattr(self, name) for name in names},
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AdversarialTraining:
        return cls(**{**config, "model": keras.saving.deserialize_keras_object(config["model"])})

    # The rest is how.

    def current_epsilon(self) -> Any:
        """Returns the radius of this training step, a scalar."""
        if not self.warmup_steps:
            return tf.constant(self.epsilon)
        done = tf.cast(tf.convert_to_tensor(self.optimizer.iterations), "float32") + 1
        return self.epsilon * tf.minimum(1.0, done / self.warmup_steps)

    def _ascend(self, loss: Loss, x: Any, epsilon: Any, start: Any = None) -> Any:
        step = 2.5 / self.steps if self.step_size is None else self.step_size / max(self.epsilon, 1e-30)
        if start is None:
            start = x
            if self.random_start:
                start = x + random_start(tf.shape(x), epsilon, self.norm, self._next_seed())
        return climb(loss, x, start, epsilon, step * epsilon, self.steps, self.norm, self.bounds)

    def _next_seed(self) -> Any:
        return tf.cast(self.draws.next(), "int32")

    def _logs(self, x: Any, y: Any, sample_weight: Any, value: Any, clean: Any, predicted: Any) -> dict[str, Any]:
        self._loss_tracker.update_state(value, sample_weight=tf.shape(x)[0])
        if self._compile_metrics is not None:
            self._compile_metrics.update_state(y, clean, sample_weight)
            self.adversarial_metrics.update_state(y, predicted, sample_weight)
        return self.get_metrics_result()


def _copies(metrics: Any) -> Any:
    """Returns metrics that share no state with those given; names and functions pass as they are."""
    if isinstance(metrics, (list, tuple)):
        return [_copies(metric) for metric in metrics]
    if isinstance(metrics, dict):
        return {name: _copies(metric) for name, metric in metrics.items()}
    return metrics.__class__.from_config(metrics.get_config()) if isinstance(metrics, keras.Metric) else metrics
