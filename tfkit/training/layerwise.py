"""What optimizers with a learning rate for each layer share: trust ratio, exclusions, weight decay inside the ratio."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from tfkit.internal import checks

#: Biases and the scales and shifts of normalisation, which the papers leave out of the trust ratio and of the decay.
SMALL = ("*bias", "*gamma", "*beta")


def trust_ratio(weight_norm: Any, update_norm: Any) -> Any:
    """Returns weight_norm / update_norm, or 1 where either is zero: a weight at zero must be able to leave it.

    Args:
        weight_norm: the norm of a layer's weights, a scalar.
        update_norm: the norm of what is to be subtracted from them, a scalar.

    >>> float(trust_ratio(keras.ops.array(3.0), keras.ops.array(1.5)))
    2.0
    >>> float(trust_ratio(keras.ops.array(0.0), keras.ops.array(1.5)))
    1.0
    """
    both = keras.ops.logical_and(weight_norm > 0, update_norm > 0)
    return keras.ops.where(both, weight_norm / keras.ops.where(both, update_norm, 1.0), 1.0)


def norm(tensor: Any) -> Any:
    """Returns the Euclidean norm over all entries, computed in float32."""
    return tf.sqrt(2.0 * tf.nn.l2_loss(tf.cast(tensor, tf.float32)))  # One pass, and no copy as of `tf.norm`.


def paths_in_layers(model: keras.Model, layers: type | tuple[type, ...]) -> tuple[str, ...]:
    """Returns the paths of the weights of all layers of these types, nested ones too, for an optimizer's `exclude`.

    Args:
        model: a built model.
        layers: a layer class or several.
    """
    found: list[Any] = [layer for layer in model._flatten_layers() if isinstance(layer, layers)]
    return tuple(dict.fromkeys(variable.path for layer in found for variable in layer.trainable_variables))


class LayerwiseOptimizer(keras.optimizers.Optimizer):
    """The base of `LARS`, `LARC` and `LAMB`.

    Args:
        learning_rate: a number or a `keras.optimizers.schedules.LearningRateSchedule`.
        weight_decay: the decay, added to the update before its norm is taken; Keras' own `weight_decay` is applied
            outside, after the ratio.
        exclude: patterns (as of `fnmatch`) of the paths of weights that get neither ratio nor decay. `paths_in_layers`
            gives those of a type of layer.
        **kwargs: the arguments of `keras.optimizers.Optimizer`: clipping, averaging, gradient accumulation.
    """

    def __init__(
        self,
        learning_rate: float | keras.optimizers.schedules.LearningRateSchedule,
        weight_decay: float,
        exclude: Sequence[str] = SMALL,
        name: str = "layerwise",
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.weight_decay = checks.number("weight_decay", weight_decay, 0)
        if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
            raise checks.error("exclude", "a list of patterns", exclude, 'Pass, for example, exclude=("*bias",).')
        self.exclude = tuple(exclude)
        self._adapted: list[bool] = []

    def build(self, variables: Sequence[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        paths = [variable.path for variable in variables]
        self._adapted = [not any(fnmatch.fnmatch(path, pattern) for pattern in self.exclude) for path in paths]

    def _apply_weight_decay(self, variables: Any) -> None:
        """Keras would decay here, outside the ratio."""

    def adapted(self, variable: Any) -> bool:
        """Whether this weight gets a ratio and a decay."""
        return self._adapted[self._get_variable_index(variable)]

    def decay_of(self, variable: Any) -> float:
        """The weight decay of this weight; `exclude_from_weight_decay` is heeded too."""
        return self.weight_decay if self.adapted(variable) and self._use_weight_decay(variable) else 0.0

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "exclude": list(self.exclude)}


def dense(gradient: Any, dtype: Any) -> Any:
    """Returns the gradient as one dense tensor, since a norm over some rows of an embedding is not the layer's."""
    return tf.cast(tf.convert_to_tensor(gradient), dtype)
