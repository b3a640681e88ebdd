"""Linear scaling: the learning rate grows with the batch, after a gradual warm-up, with momentum corrected.

Paper: Goyal et al. Accurate, large minibatch SGD: training ImageNet in 1 hour. arXiv, https://arxiv.org/abs/1706.02677.
When the batch is multiplied by k, multiply the learning rate by k (section 2.1); rise to it gradually over the first
epochs (2.2); with the learning rate inside the momentum buffer, correct it when the rate changes (3, remark 2); start
the last scale of each residual block at zero (5.1); each worker normalises by the statistics of its own examples (3).

Differs: the warm-up rises with every step, and may be constant or absent, as the paper compares. The statistics of one
worker's examples on one machine are had by `MicroBatched`.
"""

from __future__ import annotations

from typing import Any, Literal

import keras
import tensorflow as tf

from tfkit.internal import checks


@keras.saving.register_keras_serializable(package="tfkit")
class LinearScaling(keras.optimizers.schedules.LearningRateSchedule):
    """The rate of a small batch times batch_size / base_batch_size, with a warm-up from the small batch's rate.

    Args:
        base_rate: the learning rate that serves `base_batch_size`: a number, or a schedule over the steps of the large
            batch, which the warm-up multiplies.
        batch_size: examples in a step, over all workers and accumulated micro-batches.
        base_batch_size: the batch that `base_rate` was found for; 256 in the paper.
        warmup_steps: steps until the full rate; the paper takes five epochs.
        warmup: "gradual", from the base rate to the full one; "constant", the base rate until `warmup_steps` are done;
            "none".

    >>> schedule = LinearScaling(0.1, batch_size=1024, base_batch_size=256, warmup_steps=10)
    >>> [round(float(schedule(step)), 2) for step in (0, 5, 10, 99)]
    [0.1, 0.25, 0.4, 0.4]
    """

    def __init__(
        self,
        base_rate: float | keras.optimizers.schedules.LearningRateSchedule,
        batch_size: int,
        base_batch_size: int = 256,
        warmup_steps: int = 0,
        warmup: Literal["gradual", "constant", "none"] = "gradual",
    ) -> None:
        super().__init__()
        if not isinstance(base_rate, keras.optimizers.schedules.LearningRateSchedule):
            base_rate = checks.number("base_rate", base_rate, 0)
        self.base_rate = base_rate
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.base_batch_size = checks.integer("base_batch_size", base_batch_size, 1)
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps, 0)
        self.warmup = checks.choice("warmup", warmup, ("gradual", "constant", "none"))

    @property
    def factor(self) -> float:
        """k, by which the batch has grown."""
        return self.batch_size / self.base_batch_size

    def __call__(self, step: Any) -> Any:
        base = self.base_rate(step) if callable(self.base_rate) else self.base_rate
        rate = tf.cast(base, tf.float32) * self.factor
        if self.warmup == "none" or not self.warmup_steps:
            return rate
        done = tf.minimum(tf.cast(step, tf.float32) / self.warmup_steps, 1.0)
        if self.warmup == "constant":
            done = tf.floor(done)
        return rate * (1 / self.factor + (1 - 1 / self.factor) * done)

    def get_config(self) -> dict[str, Any]:
        names = ("batch_size", "base_batch_size", "warmup_steps", "warmup")
        base = self.base_rate
        if callable(base):
            base = keras.saving.serialize_keras_object(base)
        return {"base_rate": base, **{name: getattr(self, name) for name in names}}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> LinearScaling:
        if isinstance(config["base_rate"], dict):
            config = {**config, "base_rate": keras.saving.deserialize_keras_object(config["base_rate"])}
        return cls(**config)


@keras.saving.register_keras_serializable(package="tfkit")
class PolynomialWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise from zero to `peak`, then `peak (1 - t / T)^power`, as LARS is trained with power 2.

    Args:
        peak: the highest learning rate.
        total_steps: the step at which the rate reaches `end`.
        warmup_steps: steps of the rise; the first step has the rate peak / warmup_steps.
        power: of the decay.
        end: the last rate.

    >>> schedule = PolynomialWarmup(1.0, total_steps=12, warmup_steps=2)
    >>> [round(float(schedule(step)), 2) for step in (0, 1, 2, 7, 12)]
    [0.5, 1.0, 1.0, 0.25, 0.0]
    """

    def __init__(
        self, peak: float, total_steps: int, warmup_steps: int = 0, power: float = 2.0, end: float = 0.0
    ) -> None:
        super().__init__()
        self.peak = checks.number("peak", peak, 0)
        self.total_steps = checks.integer("total_steps", total_steps, 1)
        self.warmup_steps = checks.integer("warmup_steps", warmup_steps, 0, self.total_steps - 1)
        self.power = checks.number("power", power, 0)
        self.end = checks.number("end", end, 0, self.peak)

    def __call__(self, step: Any) -> Any:
        step = tf.cast(step, tf.float32)
        left = 1 - tf.clip_by_value((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 0.0, 1.0)
        decayed = self.end + (self.peak - self.end) * tf.pow(left, self.power)
        rise = self.peak * (step + 1) / max(self.warmup_steps, 1)
        return tf.where(step < self.warmup_steps, rise, decayed)

    def get_config(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("peak", "total_steps", "warmup_steps", "power", "end")}


@keras.saving.register_keras_serializable(package="tfkit")
class MomentumCorrectedSGD(keras.optimizers.SGD):
    """SGD whose momentum stays that of the current learning rate while the rate changes.

    Keras keeps the learning rate inside the velocity, v = m v - rate g. When the rate changes, the old velocity still
    carries the old rate, and the paper multiplies it by the quotient of the two. That equals what is done here:
    v = m v + g, w = w - rate v.

    Args:
        learning_rate: a number or a schedule.
        momentum: in [0, 1).
        **kwargs: the other arguments of `keras.optimizers.SGD`.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule = 0.01,
        momentum: float = 0.9,
        name: str = "momentum_corrected_sgd",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, momentum=momentum, name=name, **kwargs)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if not self.momentum:
            super().update_step(gradient, variable, learning_rate)
            return
        velocity = self.momentums[self._get_variable_index(variable)]
        rate = tf.cast(learning_rate, variable.dtype)
        gradient = tf.cast(tf.convert_to_tensor(gradient), variable.dtype)
        # The buffer holds the velocity divided by the rate, with SGD's sign.
        new = self.momentum * tf.convert_to_tensor(velocity.value) - gradient
        self.assign(velocity, new)
        self.assign_add(variable, rate * (self.momentum * new - gradient if self.nesterov else new))


def zero_gamma(model: keras.Model) -> list[str]:
    """Sets to zero the scale of the last normalisation of each residual branch, so that each block starts as identity.

    A residual block is an `Add` layer. Of its inputs, the branches are followed back to the nearest normalisation
    without another layer with weights between; among several such, the one with most layers before it is the residual
    branch, and the others are shortcuts, which keep their scale.

    Args:
        model: a functional model; changed in place.

    Returns:
        The names of the layers that were set.

    Raises:
        ValueError: if there is no residual block that ends in a normalisation.
    """
    changed = []
    for layer in model.layers:
        if not isinstance(layer, keras.layers.Add):
            continue
        found = [(_depth(tensor), _normalisation(tensor)) for tensor in layer._inbound_nodes[0].input_tensors]
        ends = sorted((pair for pair in found if pair[1] is not None), key=lambda pair: pair[0])
        if ends and ends[-1][1].gamma is not None:
            ends[-1][1].gamma.assign(keras.ops.zeros_like(ends[-1][1].gamma))
            changed.append(ends[-1][1].name)
    if not changed:
        raise checks.error("model", "a model with residual blocks that end in a normalisation", model.name)
    return changed


def _normalisation(tensor: Any) -> Any:
    """The normalisation layer that gives this tensor, through layers without weights; None if there is none."""
    history = tensor._keras_history
    while not getattr(history.operation, "variables", []):
        tensors = history.operation._inbound_nodes[0].input_tensors
        if len(tensors) != 1:
            return None
        history = tensors[0]._keras_history
    kinds = (keras.layers.BatchNormalization, keras.layers.LayerNormalization, keras.layers.GroupNormalization)
    return history.operation if isinstance(history.operation, kinds) else None


def _depth(tensor: Any) -> float:
    """The number of layers with weights before this tensor, on the longest way."""
    counts: dict[int, int] = {}

    def count(at: Any) -> int:
        operation = at._keras_history.operation
        if id(operation) not in counts:
            inputs = operation._inbound_nodes[0].input_tensors if operation._inbound_nodes else []
            own = bool(getattr(operation, "variables", []))
            counts[id(operation)] = own + max((count(each) for each in inputs), default=0)
        return counts[id(operation)]

    return count(tensor)
