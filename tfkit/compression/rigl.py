"""RigL: sparse from the first step to the last; small weights are dropped, and grown where the gradient is large.

Paper: Evci, Gale, Menick, Castro, Elsen. Rigging the lottery: making all tickets winners. ICML 2020,
https://arxiv.org/abs/1911.11134; algorithm 1, Erdos-Renyi-Kernel densities, cosine decay of the update fraction.

Differs: the batch that shows the dense gradient also takes its ordinary training step, after which the connections
change (the paper skips that step). Moments that the optimizer keeps of a regrown weight are not reset; without
gradient they have decayed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.base import Compressor, setting_for
from tfkit.compression.masking import (
    Masked,
    Moment,
    PruningMask,
    StepCallback,
    check_moment,
    check_shares,
    count_zeros,
    is_sparse,
    lowest_mask,
    pruning_masks,
)
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, surgery


def update_fraction(step: float, end: float, alpha: float) -> float:
    """Returns alpha / 2 * (1 + cos(pi * step / end)), the share of connections that move; 0 from `end` on."""
    return alpha / 2 * (1 + math.cos(math.pi * step / end)) if step < end else 0.0


def erdos_renyi_kernel(shapes: Sequence[Sequence[int]], sparsity: float) -> list[float]:
    """Returns a density for each weight: proportional to sum(shape) / prod(shape), at most 1, `1 - sparsity` overall.

    Args:
        shapes: of the weights.
        sparsity: share of zeros over all of them, in [0, 1).
    """
    sizes = np.array([math.prod(shape) for shape in shapes], dtype=float)
    raw = np.array([sum(shape) for shape in shapes], dtype=float) / sizes
    dense = np.zeros(len(sizes), dtype=bool)
    while True:
        budget = (1 - sparsity) * sizes.sum() - sizes[dense].sum()
        free = ~dense
        scale = budget / (raw * sizes)[free].sum() if free.any() else 0.0
        density = np.where(dense, 1.0, scale * raw)
        if not (density[free] > 1.0).any():
            return [float(d) for d in density]
        dense |= density > 1.0  # A weight that would need more than it has is dense; the others share the rest.


@keras.saving.register_keras_serializable(package="tfkit")
class RigLMask(PruningMask):
    """A mask that gathers the dense gradient, that of the masked weights too, on its way back.

    The stored weight receives gradient only where the mask is 1. `gradient` adds up what arrives; the callback sets it
    to zero before the batch it wants to see.
    """

    def build(self, input_shape: Sequence[int]) -> None:
        super().build(input_shape)
        options = {"shape": tuple(input_shape), "trainable": False, "autocast": False}
        self.gradient = self.add_weight(name="gradient", initializer="zeros", **options)
        self.allowed = self.add_weight(name="allowed", initializer="ones", **options)

    def adapt(self, value: np.ndarray) -> None:
        # What an earlier step has pruned does not grow again.
        self.allowed.assign((value != 0).astype("float32") if is_sparse(value) else np.ones_like(value))
        self.mask.assign(self.allowed)

    def transform(self, weight: Any) -> Any:
        @keras.ops.custom_gradient
        def gather(w: Any, mask: Any) -> Any:
            def backward(*gradients: Any, upstream: Any = None) -> Any:
                (arriving,) = gradients if upstream is None else (upstream,)
                self.gradient.assign_add(keras.ops.cast(arriving, self.gradient.dtype))
                return keras.ops.where(mask > 0, arriving, keras.ops.zeros_like(arriving)), keras.ops.zeros_like(mask)

            return keras.ops.where(mask > 0, w, keras.ops.zeros_like(w)), backward

        # Keras hands out variables as they are; as tensors they are not taken for what the function captures.
        return gather(tf.convert_to_tensor(weight), tf.convert_to_tensor(self.mask.value))


@keras.saving.register_keras_serializable(package="tfkit")
class RigL(Compressor):
    """Trains a sparse model whose connections move; the number of connections stays the same throughout.

    Args:
        sparsity: share of zeros, in [0, 1), over all weights together or, as a mapping from layer-name patterns, of
            each (layers without a match stay dense).
        distribution: of a single share: `"erk"`, the paper's Erdos-Renyi-Kernel densities; `"uniform"`, the same share
            in each weight.
        initial: the first connections: `"random"`, as the paper, for a model that has not been trained; `"magnitude"`,
            the largest weights, for a trained one.
        fraction: share of the connections that move at the first update (the paper's alpha).
        frequency: training steps between two updates (the paper's Delta T).
        end: when the connections come to rest; an int counts training steps, a float is a fraction of the `fit` call.
        seed: of the random connections.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.9,
        *,
        distribution: Literal["erk", "uniform"] = "erk",
        initial: Literal["random", "magnitude"] = "random",
        fraction: float = 0.3,
        frequency: int = 100,
        end: Moment = 0.75,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        check_shares("sparsity", sparsity)
        checks.choice("distribution", distribution, ("erk", "uniform"))
        checks.choice("initial", initial, ("random", "magnitude"))
        if not 0 < fraction <= 1:
            raise ValueError(f"Argument `fraction` must be a share in (0, 1]. Received: {fraction!r}.")
        checks.integer("frequency", frequency, 1)
        check_moment("end", end)
        self.sparsity = sparsity
        self.distribution = distribution
        self.initial = initial
        self.fraction = fraction
        self.frequency = frequency
        self.end = end
        self.seed = checks.integer("seed", seed, 0)

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        target = setting_for(self.sparsity, layer)
        return [] if target is None else [RigLMask(target=float(target))]

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns a new trainable model with its first connections chosen."""
        prepared = super().prepare(model)
        found = pruning_masks(prepared)
        if found and self.distribution == "erk" and not isinstance(self.sparsity, Mapping):
            for masked, density in zip(
                found, erdos_renyi_kernel([m.value.shape for m in found], self.sparsity), strict=True
            ):
                masked.mask.target = 1.0 - density
        rng = np.random.default_rng(self.seed)
        for masked in found:
            allowed = keras.ops.convert_to_numpy(_rigl(masked).allowed) > 0
            score = rng.random(masked.value.shape) if self.initial == "random" else np.abs(masked.value)
            zeros = count_zeros(masked.value.size, float(masked.mask.target or 0))
            masked.mask.mask.assign(
                lowest_mask(np.where(allowed, score, -1.0), max(zeros, int(np.sum(~allowed))))  # Never the forbidden.
            )
        return prepared

    def callbacks(self) -> list[keras.callbacks.Callback]:
        return [RigLCallback(self)]


class RigLCallback(StepCallback):
    """Drops and grows connections every `frequency` steps; logs the sparsity."""

    pruning: RigL

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._end = self.in_steps("end", self.pruning.end)
        self._next = self.pruning.frequency
        self._watching = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.count_from(epoch, this_fit=isinstance(self.pruning.end, float))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        step = self.step()
        self._watching = self._next <= step < self._end
        if self._watching:
            self._next = (step // self.pruning.frequency + 1) * self.pruning.frequency
            self._fraction = update_fraction(step, self._end, self.pruning.fraction)
            for masked in pruning_masks(self.model):
                gradient = _rigl(masked).gradient
                gradient.assign(keras.ops.zeros_like(gradient))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._watching:
            update_connections(self.model, self._fraction)


def update_connections(model: keras.Model, fraction: float) -> None:
    """Drops the smallest `fraction` of each weight's connections, and grows as many where the gradient is largest.

    A weight that grows starts at zero. One that is dropped may grow again at once, and then keeps its value.

    Args:
        model: prepared by `RigL`; the masks' `gradient` holds that of the last batch.
        fraction: share of the connections, in [0, 1].
    """
    for layer in surgery.leaf_layers(model):
        if not isinstance(layer, Reparameterized):
            continue
        stored = surgery.compressible_weights(layer.layer)
        for name, chain in layer.transforms.items():
            for mask in chain:
                if isinstance(mask, RigLMask):
                    value = keras.ops.convert_to_numpy(layer.effective_weights()[name])
                    old = keras.ops.convert_to_numpy(mask.mask) > 0
                    gradient = keras.ops.convert_to_numpy(mask.gradient)
                    allowed = keras.ops.convert_to_numpy(mask.allowed) > 0
                    new = moved_mask(value, gradient, old, allowed, fraction)
                    grown = new & ~old
                    stored[name].assign(np.where(grown, 0.0, keras.ops.convert_to_numpy(stored[name])))
                    mask.mask.assign(new.astype(np.float32))


def moved_mask(
    value: np.ndarray, gradient: np.ndarray, mask: np.ndarray, allowed: np.ndarray, fraction: float
) -> np.ndarray:
    """Returns the mask after one drop and growth (algorithm 1), with as many ones as before.

    Args:
        value: weights.
        gradient: of the loss by all weights, the masked ones too.
        mask: True where there is a connection.
        allowed: True where there may be one; holds all of `mask`.
        fraction: share of the connections to drop.
    """
    count = int(mask.sum())
    moving = int(fraction * count)
    kept = lowest_mask(np.where(mask, np.abs(value), -1.0), mask.size - (count - moving)) > 0
    candidates = np.where(allowed & ~kept, np.abs(gradient), -1.0)
    return np.asarray(kept | (lowest_mask(candidates, mask.size - moving) > 0))


def _rigl(masked: Masked) -> RigLMask:
    assert isinstance(masked.mask, RigLMask)
    return masked.mask
