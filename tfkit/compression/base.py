"""The contract of every compression method: `prepare`, train, `finalize`."""

from __future__ import annotations

import abc
import fnmatch
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import keras
import numpy as np

from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, surgery

Fit = Callable[[keras.Model, list[keras.callbacks.Callback]], Any]

#: Arguments that may be a mapping from patterns of layers to values; see `setting_for`.
PATTERNED = ("sparsity", "bits", "entropy", "rank", "energy", "method")
#: A pattern for layers of a kind that a model happens to lack is no mistake.
KINDS = frozenset(name for name, value in vars(keras.layers).items() if inspect.isclass(value))


class NoEffectWarning(UserWarning):
    """A step was asked for and changed nothing."""


class Compressor(abc.ABC):
    """A compression method.

    `prepare` gives a new, trainable model; train it with the compressor's `callbacks()`; `finalize` gives a model of
    plain layers. The model that is given is never changed. `apply` does the three in a row.

    Args:
        include: names of layers to compress, with shell wildcards; all by default.
        exclude: names of layers to leave alone, with shell wildcards.
        preserve: keep the structure that earlier steps gave to the weights: zeros stay zero, shared values stay shared.
    """

    def __init__(self, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = (), preserve: bool = True) -> None:
        self.include = (include,) if isinstance(include, str) else tuple(include)
        self.exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self.preserve = preserve

    def get_config(self) -> dict[str, Any]:
        """Returns every argument of the constructor."""
        return {name: getattr(self, name) for name in self._arguments()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**config)

    def __repr__(self) -> str:
        """The call that makes this compressor, without the arguments left at their defaults."""
        changed = [
            f"{name}={_shown(getattr(self, name))}"
            for name, parameter in self._arguments().items()
            if parameter.default is inspect.Parameter.empty or getattr(self, name) != parameter.default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    @classmethod
    def _arguments(cls) -> dict[str, inspect.Parameter]:
        return {name: p for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}

    @abc.abstractmethod
    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        """Returns the transforms this method adds to one weight.

        Args:
            layer: the layer that holds the weight, unwrapped.
            name: the weight's name relative to the layer.
            value: the weight's current effective value, an array of its shape.
        """

    def selects(self, layer: keras.Layer) -> bool:
        """Whether `include` and `exclude` leave this layer to be compressed."""

        def matches(patterns: Sequence[str]) -> bool:
            return any(fnmatch.fnmatchcase(label, pattern) for label in self._names(layer) for pattern in patterns)

        return matches(self.include) and not matches(self.exclude)

    def _names(self, layer: keras.Layer) -> tuple[str, ...]:
        """Returns the names by which patterns may choose a layer; that of the layer it was split from is one."""
        return (layer.name,)

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns a new trainable model with this method applied; compile it before `fit`.

        Args:
            model: a functional or built sequential model, plain or prepared by another compressor.

        Raises:
            TypeError, ValueError: if the model cannot be rebuilt, or a pattern of a mapping matches nothing; the
                message says what to do.
        """
        self._check_patterns(model)
        wrapped = 0

        def replace(layer: keras.Layer) -> keras.Layer | None:
            nonlocal wrapped
            new = self._wrap(layer)
            wrapped += new is not None
            return new

        prepared = surgery.rebuild(model, replace)
        self._warn_if_unchanged(model, wrapped > 0)
        return prepared

    def _check_patterns(self, model: keras.Model) -> None:
        """Refuses mappings from patterns of which one matches no layer: its value would be lost without a word.

        Raises:
            TypeError, ValueError: the model cannot be rebuilt, or a pattern matches neither the name nor the class of a
                layer, nor any class of Keras.
        """
        layers = [surgery.source(layer) for layer in surgery.leaf_layers(surgery.as_functional(model))]
        kinds = {type(layer).__name__ for layer in layers} | KINDS
        for argument in PATTERNED:
            patterns = getattr(self, argument, None)
            for pattern in patterns if isinstance(patterns, Mapping) else ():
                if not (_finds(pattern, layers) or fnmatch.filter(kinds, pattern)):
                    raise ValueError(
                        f"Argument `{argument}` must map patterns of layers of the model, by name or class. Received: "
                        f"{pattern!r}, which matches no layer. The model's layers: {[layer.name for layer in layers]}."
                    )

    def _warn_if_unchanged(self, model: keras.Model, changed: bool) -> None:
        """Warns of patterns that match no layer of the model that was given, or if nothing was changed at all."""
        layers = [surgery.source(layer) for layer in surgery.leaf_layers(model)]
        names = [layer.name for layer in layers]
        if not changed:
            warnings.warn(
                f"{type(self).__name__} changed nothing: no layer it handles matches include={self.include}, "
                f"exclude={self.exclude}. The model's layers: {names}.",
                NoEffectWarning,
                stacklevel=3,
            )
            return
        for argument in ("include", "exclude"):
            for pattern in getattr(self, argument):
                if not _finds(pattern, layers):
                    warnings.warn(
                        f"{type(self).__name__}: {pattern!r} of `{argument}` matches no layer and has no effect. The "
                        f"model's layers: {names}.",
                        NoEffectWarning,
                        stacklevel=3,
                    )

    def callbacks(self) -> list[keras.callbacks.Callback]:
        """Returns the callbacks that `fit` needs for this method."""
        return []

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns a new model of plain layers that computes what the prepared model computes at inference."""
        return surgery.rebuild(model, lambda layer: layer.unwrap() if isinstance(layer, Reparameterized) else None)

    def apply(self, model: keras.Model, fit: Fit | None = None) -> keras.Model:
        """Prepares, trains and finalizes.

        Args:
            model: the model to compress.
            fit: compiles and trains the prepared model: `fit(model, callbacks)`. None: no training.

        Returns:
            The finalized model.
        """
        prepared = self.prepare(model)
        if fit is not None:
            fit(prepared, self.callbacks())
        return self.finalize(prepared)

    def _wrap(self, layer: keras.Layer) -> Reparameterized | None:
        """Returns the reparameterized copy of a layer, or None to leave it as it is."""
        source = surgery.source(layer)
        existing = layer.transforms if isinstance(layer, Reparameterized) else {}
        if not (self.selects(source) and surgery.compressible_weights(source)):
            return copy_wrapped(layer)
        added: dict[str, list[WeightTransform]] = {}
        for name, variable in surgery.compressible_weights(source).items():
            value = keras.ops.convert_to_numpy(variable)
            if not np.isfinite(value).all():
                raise ValueError(
                    f"Argument `model` must have finite weights. Received: NaN or infinity in '{name}' of layer "
                    f"'{source.name}'. Train it again, with a lower learning rate."
                )
            if name in existing:
                value = keras.ops.convert_to_numpy(layer.effective_weights()[name])
            chain = [] if name in existing or not self.preserve else preserving_transforms(value)
            added[name] = [*chain, *self.transforms_for(source, name, value)]
        if not any(added.values()):
            return copy_wrapped(layer)
        return _stack(layer, added)


def _finds(pattern: str, layers: Sequence[keras.Layer]) -> bool:
    """Whether a pattern matches the name of a layer, or of a part of it, before or after it was split."""
    names = [layer.name for layer in layers]
    split = [layer.name for layer in layers if type(layer).__name__.startswith("SeparableConv")]
    names += [f"{name}_{part}" for name in split for part in ("depthwise", "pointwise")]
    return any(fnmatch.fnmatchcase(name, one) for name in names for one in (pattern, f"{pattern}_*"))


def check_examples(data: Any) -> tuple[Any, Any]:
    """Returns `data` as a pair (inputs, targets) with as many of either.

    Raises:
        ValueError: it is none, or empty.
    """
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        raise checks.error("data", "a pair (inputs, targets) of arrays", data, "Pass some training examples.")
    arrays = keras.tree.flatten(tuple(data))
    if any(np.ndim(array) == 0 for array in arrays):
        raise checks.error("data", "a pair (inputs, targets) of arrays of examples", [np.shape(a) for a in arrays])
    lengths = {len(array) for array in arrays}
    if len(lengths) != 1 or 0 in lengths:
        raise checks.error("data", "inputs and as many targets, at least one", sorted(lengths))
    return data[0], data[1]


def _shown(value: Any) -> str:
    """Returns an argument as it is written, and arrays by their shapes."""
    shapes = (
        keras.tree.map_structure(
            lambda leaf: f"<{np.asarray(leaf).dtype}{np.shape(leaf)}>" if np.ndim(leaf) else leaf, value
        )
        if isinstance(value, tuple) or hasattr(value, "shape")
        else value
    )
    return repr(shapes)


@keras.saving.register_keras_serializable(package="tfkit")
class Chain(Compressor):
    """Several compressors one after the other.

    `apply` runs them in stages: each is prepared on, and trained from, the finalized result of the one before, which is
    how Deep Compression works; each keeps the structure it finds (see `Compressor.preserve`). `prepare` stacks all of
    them on one model instead, for training them jointly.

    Args:
        compressors: the stages, in order.
    """

    def __init__(self, compressors: Sequence[Compressor]) -> None:
        super().__init__()
        if not isinstance(compressors, Sequence):
            raise TypeError(
                f"Argument `compressors` must be a list of Compressor objects. Received: {type(compressors).__name__}."
            )
        self.compressors = list(compressors)
        for compressor in self.compressors:
            if not isinstance(compressor, Compressor):
                raise TypeError(
                    f"Argument `compressors` must hold Compressor objects. Received: {type(compressor).__name__}."
                )

    def get_config(self) -> dict[str, Any]:
        return {"compressors": [keras.saving.serialize_keras_object(stage) for stage in self.compressors]}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls([keras.saving.deserialize_keras_object(stage) for stage in config["compressors"]])

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        raise TypeError("A Chain adds no transforms of its own; its stages do.")

    def prepare(self, model: keras.Model) -> keras.Model:
        for compressor in self.compressors:
            model = compressor.prepare(model)
        return model

    def callbacks(self) -> list[keras.callbacks.Callback]:
        return [callback for compressor in self.compressors for callback in compressor.callbacks()]

    def finalize(self, model: keras.Model) -> keras.Model:
        for compressor in self.compressors:
            model = compressor.finalize(model)
        return model

    def apply(self, model: keras.Model, fit: Fit | Sequence[Fit | None] | None = None) -> keras.Model:
        """Runs the stages one after the other.

        Args:
            model: the model to compress.
            fit: one function `fit(model, callbacks)` for all stages, or one for each stage.
        """
        fits = list(fit) if isinstance(fit, Sequence) else [fit] * len(self.compressors)
        if len(fits) != len(self.compressors):
            raise ValueError(
                f"Argument `fit` must be one function or one for each of the {len(self.compressors)} stages. "
                f"Received: {len(fits)} functions."
            )
        for compressor, stage_fit in zip(self.compressors, fits, strict=True):
            model = compressor.apply(model, stage_fit)
        return model


def setting_for(setting: Any, layer: keras.Layer, default: Any = None, names: Sequence[str] = ()) -> Any:
    """Resolves a setting that is one value for all layers, or a mapping from patterns to values.

    A pattern is matched against the layer's name, then against its class (`"fc*"`, `"Conv2D"`). The first pattern that
    matches wins; a layer that no pattern matches gets `default`. `names` are further names of the layer.
    """
    if not isinstance(setting, Mapping):
        return setting
    for pattern, value in setting.items():
        if any(fnmatch.fnmatchcase(label, pattern) for label in (layer.name, type(layer).__name__, *names)):
            return value
    return default


def preserving_transforms(value: np.ndarray) -> list[WeightTransform]:
    """Returns the transforms that keep the structure found in a weight: shared values, or else zeros."""
    from tfkit.compression.clustering import SharedValues, is_clustered
    from tfkit.compression.pruning import Mask, is_sparse

    if is_clustered(value):
        return [SharedValues(clusters=len(np.unique(value[value != 0])))]
    if is_sparse(value):
        return [Mask()]
    return []


def copy_wrapped(layer: keras.Layer) -> Reparameterized | None:
    """Returns a copy of a reparameterized layer, and None for any other: a `replace` for `surgery.rebuild`."""
    if not isinstance(layer, Reparameterized):
        return None
    copy = surgery.copy_layer(layer.layer)
    transforms = {name: [surgery.copy_layer(t) for t in chain] for name, chain in layer.transforms.items()}
    wrapped = Reparameterized(copy, transforms, name=layer.name)
    wrapped.set_weights(layer.get_weights())
    return wrapped


def _stack(layer: keras.Layer, added: Mapping[str, Sequence[WeightTransform]]) -> Reparameterized:
    """Returns a copy of a layer with transforms added after those it has, each adapted to the value it receives."""
    if isinstance(layer, Reparameterized):
        old = copy_wrapped(layer)
        assert old is not None
        inner, kept = old.layer, old.transforms
    else:
        inner, kept = surgery.copy_layer(layer), {}
    chains = {name: [*kept.get(name, ()), *added.get(name, ())] for name in {**kept, **added}}
    chains = {name: chain for name, chain in chains.items() if chain}
    wrapped = Reparameterized(inner, chains, name=layer.name)
    weights = surgery.compressible_weights(inner)
    for name, chain in wrapped.transforms.items():
        value = keras.ops.convert_to_tensor(weights[name])
        for position, transform in enumerate(chain):
            if position >= len(kept.get(name, ())):
                transform.adapt(keras.ops.convert_to_numpy(value))
            value = transform.transform(value)
    return wrapped
