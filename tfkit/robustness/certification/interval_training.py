"""Certified training: the loss is that of the worst outputs that interval bounds allow.

Paper: Gowal, Dvijotham, Stanforth, Bunel, Qin, Uesato, Arandjelovic, Mann, Kohli. On the effectiveness of interval
bound propagation for training verifiably robust models. 2018, https://arxiv.org/abs/1810.12715

loss = kappa CE(f(x), y) + (1 - kappa) CE(worst, y). The worst output has 0 at the class y and minus the lower bound of
the margin e_y - e_j elsewhere, bounded through the last layer. First comes plain training (`warmup`), then, over `ramp`
steps, epsilon grows from 0 to its value while kappa falls from 1 to `kappa`; both stay there.

Differs: any norm; the box of inputs is an option.
"""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from tfkit.compression.fake_quantize import FakeQuantize
from tfkit.internal import checks, surgery
from tfkit.robustness.certification import propagation
from tfkit.robustness.certification.network import Network
from tfkit.robustness.certification.propagation import Bounds, Row, Setting
from tfkit.robustness.certification.region import Ball, ball, check_clip, norm_order

Tensor = Any


class IntervalBoundTraining(keras.Model):
    """Trains a classifier to be certified by interval bounds.

    Wrap a model, `compile` with an optimizer, `fit`; the model itself learns, and is what to save and to certify.

    Args:
        model: to logits, without batch normalization, whose statistics have no bounds while they move.
        epsilon: radius to train for; a little above the one to certify helps.
        norm: "linf", "l2" or "l1".
        clip: the range of inputs, or None.
        warmup: steps of plain training.
        ramp: steps in which epsilon grows and kappa falls.
        kappa: weight of the plain loss at the end.

    Metrics: `loss`, `accuracy`, and `certified`, the share of examples certified by the bounds trained on; in `fit` at
    the epsilon of the step, in `evaluate` at the full one.
    """

    def __init__(
        self,
        model: keras.Model,
        epsilon: float,
        norm: str = "linf",
        *,
        clip: tuple[float, float] | None = (0.0, 1.0),
        warmup: int = 2000,
        ramp: int = 10000,
        kappa: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.epsilon = checks.number("epsilon", epsilon, 0)
        self.order = norm_order(norm)
        self.clip = check_clip(clip)
        self.warmup = checks.integer("warmup", warmup, 0)
        self.ramp = checks.integer("ramp", ramp, 1)
        self.kappa = checks.number("kappa", kappa, 0, 1)
        for layer in surgery.leaf_layers(model):
            if isinstance(layer, keras.layers.BatchNormalization):
                raise ValueError(
                    f"Argument `model` must have no batch normalization. Received: layer '{layer.name}'. Train without "
                    "it, or fold it first."
                )
            if isinstance(layer, FakeQuantize) and not layer.fixed:
                raise ValueError(
                    f"Argument `model` must have no quantizer whose range moves. Received: layer '{layer.name}'. Fix "
                    "its range with `freeze`, or train before quantizing."
                )
        self.model = model
        self._network = Network(model)
        if self._network.graph.dropped_softmax:
            raise ValueError("Argument `model` must end in logits, without a softmax.")
        self.setting = Setting(self.order, self.clip is not None, "ignored")
        self.step = self.add_weight(name="step", shape=(), dtype="int64", initializer="zeros", trainable=False)
        self._trackers = {name: keras.metrics.Mean(name) for name in ("loss", "accuracy", "certified")}

    @property
    def metrics(self) -> list[keras.metrics.Metric]:
        return list(self._trackers.values())

    def compile(self, optimizer: Any = "adam", **kwargs: Any) -> None:
        """Sets the optimizer. The loss is the class's own; XLA is left out, since it compiles these graphs slowly."""
        super().compile(optimizer=optimizer, **{"jit_compile": False, **kwargs})

    def build(self, input_shape: Any) -> None:
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    def progress(self) -> Tensor:
        """How far the ramp has come, from 0 to 1."""
        done = tf.cast(tf.convert_to_tensor(self.step), tf.float32) - self.warmup
        return tf.clip_by_value(done / self.ramp, 0.0, 1.0)

    def margins(self, region: Ball, rows: Tensor, progress: Tensor) -> Tensor:
        """Lower bounds of the margins, (examples, classes - 1), as the loss takes them."""
        return self.by_intervals(self.ranges(region), region, rows)

    def ranges(self, region: Ball, need_lines: bool = False) -> Bounds:
        """Interval bounds of all nodes."""
        wanted = range(1, self._network.last + 1)
        return propagation.advance(
            self._network.nodes, propagation.start(region), wanted, self.setting, need_lines=need_lines
        )

    def by_intervals(self, bounds: Bounds, region: Ball, rows: Tensor) -> Tensor:
        """The margins that interval bounds prove."""
        row = Row(self._network.last, coefficients=rows)
        return propagation.backward(self._network.nodes, bounds, region, row, self.setting, stop=True)[0]

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        progress = self.progress()
        kappa = 1.0 - (1.0 - self.kappa) * progress
        with tf.GradientTape() as tape:
            logits, worst = self._outputs(x, y, self.epsilon * progress, progress, training=True)
            losses = kappa * _entropy(y, logits) + (1.0 - kappa) * _entropy(tf.zeros_like(y), worst)
            loss = tf.reduce_mean(losses if weights is None else losses * tf.cast(weights, losses.dtype))
            total = loss + sum(self.model.losses)
        variables = self.model.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(total, variables), variables, strict=True))
        self.step.assign_add(1)
        return self._track(loss, y, logits, worst)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        logits, worst = self._outputs(x, y, tf.constant(self.epsilon), tf.constant(1.0), training=False)
        loss = tf.reduce_mean(self.kappa * _entropy(y, logits) + (1 - self.kappa) * _entropy(tf.zeros_like(y), worst))
        return self._track(loss, y, logits, worst)

    def _outputs(
        self, x: Tensor, y: Tensor, epsilon: Tensor, progress: Tensor, training: bool
    ) -> tuple[Tensor, Tensor]:
        """The logits, and the worst ones with the right class at place 0."""
        x, y = tf.cast(x, tf.float32), tf.cast(tf.reshape(y, (-1,)), tf.int32)
        logits = self.model(x, training=training)
        region = ball(x, tf.fill(tf.shape(x)[:1], epsilon), self.clip, "real")
        lower = self.margins(region, _rows(y, self._network.outputs), progress)
        return logits, tf.concat([tf.zeros_like(lower[:, :1]), -lower], 1)

    def _track(self, loss: Tensor, y: Tensor, logits: Tensor, worst: Tensor) -> dict[str, Any]:
        right = tf.argmax(logits, 1, tf.int32) == tf.cast(tf.reshape(y, (-1,)), tf.int32)
        self._trackers["loss"].update_state(loss)
        self._trackers["accuracy"].update_state(tf.cast(right, tf.float32))
        self._trackers["certified"].update_state(tf.cast(tf.reduce_max(worst[:, 1:], 1) < 0, tf.float32))
        return {name: tracker.result() for name, tracker in self._trackers.items()}


def _rows(y: Tensor, classes: int) -> Tensor:
    """e_y - e_j for each other class j, (examples, classes - 1, classes)."""
    places = tf.range(classes - 1)[None]
    others = places + tf.cast(places >= y[:, None], tf.int32)
    return tf.one_hot(y, classes)[:, None] - tf.one_hot(others, classes)


def _entropy(y: Tensor, logits: Tensor) -> Tensor:
    return tf.nn.sparse_softmax_cross_entropy_with_logits(tf.cast(tf.reshape(y, (-1,)), tf.int32), logits)
