"""The one mechanism of compression: a layer whose weights are functions of stored ones.

Masks, shared values, fake quantization and low precision are all maps `w -> w'`. `Reparameterized` applies such maps to
the selected weights of any layer at every call, and gradients flow through them; `unwrap` applies them once and gives
the plain layer back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfkit.internal import surgery


class WeightTransform(keras.layers.Layer):
    """A function `w -> w'` of one weight, with its own variables. Subclasses write `transform`.

    It is a layer so that Keras tracks, saves and restores its variables.
    """

    #: True when the output does not depend on the stored weight, which then takes no part in training.
    replaces_weight = False

    def adapt(self, value: np.ndarray) -> None:
        """Sets the state from the weight's current value, an array of the weight's shape."""

    def transform(self, weight: Any) -> Any:
        """Returns the transformed weight, a tensor of the same shape, differentiable where that makes sense."""
        raise NotImplementedError(f"{type(self).__name__} must write `transform`.")

    def call(self, weight: Any) -> Any:
        return self.transform(weight)

    def constraint(self, weight: np.ndarray) -> keras.constraints.Constraint | None:
        """Returns the constraint a plain layer should carry so that later steps know the structure of its weight."""
        return None


@keras.saving.register_keras_serializable(package="tfkit")
class Reparameterized(keras.layers.Layer):
    """Calls `layer` with `transform(w)` in place of `w` for each selected weight.

    Args:
        layer: the wrapped layer; its weights stay the trainable (latent) ones.
        transforms: for each weight, named relative to the layer (`kernel`, `_query_dense/kernel`; see
            `tfkit.internal.surgery.compressible_weights`), the transforms to apply in order.
        **kwargs: `name` and the like; the name defaults to the wrapped layer's, so that `get_layer` finds it.

    Calling it takes the arguments of the wrapped layer and gives its outputs; updates of non-trainable variables (batch
    statistics, seeds) reach the wrapped layer.
    """

    is_reparameterized = True

    def __init__(self, layer: keras.Layer, transforms: Mapping[str, Sequence[WeightTransform]], **kwargs: Any) -> None:
        kwargs.setdefault("name", layer.name)
        kwargs.setdefault("dtype", layer.dtype_policy)
        super().__init__(**kwargs)
        self.layer = layer
        self._transform_names = [name for name, chain in transforms.items() for _ in chain]
        self._transform_list = [transform for chain in transforms.values() for transform in chain]
        # The wrapper is called exactly as the wrapped layer is, so that `training` and the masks of every argument
        # (`query_mask` …), which Keras fills in by name, arrive where they are meant to.
        self._call_signature = layer._call_signature
        self.call_signature_parameters = layer.call_signature_parameters
        self._call_has_training_arg = layer._call_has_training_arg
        self._call_has_mask_arg = layer._call_has_mask_arg
        self._call_has_context_arg = layer._call_has_context_arg
        self._allow_non_tensor_positional_args = layer._allow_non_tensor_positional_args
        self.supports_masking = layer.supports_masking
        self.supports_jit = layer.supports_jit
        for transform in self._transform_list:
            transform.trainable = transform.trainable and layer.trainable
        if layer.built:
            self.build(None)

    @property
    def transforms(self) -> dict[str, list[WeightTransform]]:
        """The transforms of each weight, in the order of their application."""
        chains: dict[str, list[WeightTransform]] = {}
        for name, transform in zip(self._transform_names, self._transform_list, strict=True):
            chains.setdefault(name, []).append(transform)
        return chains

    def build(self, input_shape: Any = None) -> None:
        if not self.layer.built:
            self.layer.build(input_shape)
        weights = surgery.compressible_weights(self.layer)
        for name, chain in self.transforms.items():
            if name not in weights:
                raise ValueError(
                    f"Argument `transforms` must name weights of layer '{self.layer.name}': {sorted(weights)}. "
                    f"Received: '{name}'."
                )
            for transform in chain:
                if not transform.built:
                    transform.build(tuple(weights[name].shape))
                if transform.replaces_weight:
                    weights[name].trainable = False

    def effective_weights(self) -> dict[str, Any]:
        """Returns the transformed weights as tensors, by name."""
        weights = surgery.compressible_weights(self.layer)
        return {name: _apply(chain, weights[name]) for name, chain in self.transforms.items()}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        weights = surgery.compressible_weights(self.layer)
        effective = {id(weights[name]): value for name, value in self.effective_weights().items()}
        inner = [*self.layer.trainable_variables, *self.layer.non_trainable_variables]
        mapping = [(variable, effective.get(id(variable), variable)) for variable in inner]
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            outputs = self.layer(*args, **kwargs)
        for loss in scope.losses:
            self.add_loss(loss)
        for variable in self.layer.non_trainable_variables:
            if id(variable) not in effective:
                updated = scope.get_current_value(variable)
                if updated is not None:
                    variable.assign(updated)
        return outputs

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        return self.layer.compute_mask(inputs, previous_mask)

    def unwrap(self) -> keras.Layer:
        """Returns a new plain layer that computes the same function, with the transforms applied once."""
        values = {name: keras.ops.convert_to_numpy(value) for name, value in self.effective_weights().items()}
        overrides: dict[str, Any] = {}
        for name, chain in self.transforms.items():
            for transform in chain:
                constraint = transform.constraint(values[name])
                if constraint is not None and "/" not in name:
                    overrides[surgery.constraint_name(self.layer, name)] = keras.constraints.serialize(constraint)
            self._drop_stale_grid(name, values[name], overrides)
        plain = surgery.copy_layer(self.layer, **overrides)
        for name, variable in surgery.compressible_weights(plain).items():
            if name in values:
                variable.assign(values[name])
        return plain

    def _drop_stale_grid(self, name: str, value: np.ndarray, overrides: dict[str, Any]) -> None:
        """Ends the constraint of an earlier quantization that the new values no longer keep."""
        argument = surgery.constraint_name(self.layer, name)
        grid: Any = getattr(self.layer, argument, None)
        if argument not in overrides and hasattr(grid, "holds") and not grid.holds(value):
            overrides[argument] = None

    def get_config(self) -> dict[str, Any]:
        transforms = {
            name: [keras.saving.serialize_keras_object(transform) for transform in chain]
            for name, chain in self.transforms.items()
        }
        return {
            **super().get_config(),
            "layer": keras.saving.serialize_keras_object(self.layer),
            "transforms": transforms,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Reparameterized:
        config = dict(config)
        layer = keras.saving.deserialize_keras_object(config.pop("layer"))
        transforms = {
            name: [keras.saving.deserialize_keras_object(transform) for transform in chain]
            for name, chain in config.pop("transforms").items()
        }
        return cls(layer, transforms, **config)

    def get_build_config(self) -> dict[str, Any]:
        return self.layer.get_build_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        if not self.layer.built:
            self.layer.build_from_config(config)
        self.build(None)


def _apply(chain: Sequence[WeightTransform], weight: Any) -> Any:
    value = keras.ops.convert_to_tensor(weight)
    for transform in chain:
        value = transform.transform(value)
    return value
