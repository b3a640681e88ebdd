"""The base of training algorithms that wrap a model: the wrapper predicts as the model does, and trains its weights."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf


class Wrapper(keras.Model):
    """A model that calls another; subclasses bring their own `train_step`.

    Args:
        model: the model that is trained. It shares its weights with the wrapper, so that after `fit` it is the result.
    """

    def __init__(self, model: keras.Model, **kwargs: Any) -> None:
        if not isinstance(model, keras.Model):
            raise TypeError(f"Argument `model` must be a keras.Model. Received: {type(model).__name__}.")
        super().__init__(**kwargs)
        self.model = model
        self.built = model.built

    def build(self, input_shape: Any) -> None:
        if not self.model.built:
            self.model.build(input_shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self.model(inputs, training=training)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return self.model.compute_output_shape(input_shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "model": keras.saving.serialize_keras_object(self.model)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**{**config, "model": model})


def batch_size(x: Any) -> Any:
    """Returns the number of examples of a batch, a scalar tensor, for any nest of tensors."""
    return tf.shape(next(tensor for tensor in tf.nest.flatten(x) if tensor is not None))[0]


def rows(nest: Any, which: Any) -> Any:
    """Returns the examples `which` (indices or a slice) of every tensor of a batch; None stays None."""
    if nest is None:
        return None
    if isinstance(which, slice):
        return tf.nest.map_structure(lambda tensor: tensor[which], nest)
    return tf.nest.map_structure(lambda tensor: tf.gather(tensor, which), nest)


def mean_reduction(loss: Any) -> bool:
    """Whether a compiled loss is the mean over examples, which weights of examples can be folded into."""
    losses = [each for each in tf.nest.flatten(loss) if isinstance(each, keras.losses.Loss)]
    return all(each.reduction in ("sum_over_batch_size", "mean") for each in losses)
