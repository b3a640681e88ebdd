"""Magnitude pruning: the smallest weights become zero and stay zero.

Paper: Han, Pool, Tran, Dally. Learning both weights and connections for efficient neural networks. NIPS 2015,
https://arxiv.org/abs/1506.02626; the polynomial schedule is that of Zhu, Gupta. To prune, or not to prune. 2017,
https://arxiv.org/abs/1710.01878, equation 1.

Differs: the paper derives each layer's threshold from its standard deviation; here the share of zeros is the setting,
and the threshold is the exact order statistic, so the sparsity that was asked for is the sparsity that comes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import keras
import numpy as np

from tfkit.compression.base import setting_for
from tfkit.compression.masking import (
    Mask,
    Masked,
    PruningCallback,
    PruningMask,
    ScheduledPruning,
    check_shares,
    count_zeros,
    is_sparse,
    lowest_mask,
    polynomial,
    pruning_masks,
)
from tfkit.compression.reparameterized import WeightTransform

__all__ = [
    "MagnitudePruning",
    "Mask",
    "PruningCallback",
    "PruningMask",
    "global_masks",
    "is_sparse",
    "magnitude_mask",
    "polynomial",
]


def magnitude_mask(value: np.ndarray, sparsity: float) -> np.ndarray:
    """Returns a 0/1 array of the shape of `value` with `round(sparsity * size)` zeros at the smallest magnitudes.

    Ties are broken by position, so the count is exact. At least one weight stays.
    """
    return lowest_mask(np.abs(value), count_zeros(value.size, sparsity))


def global_masks(values: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Like `magnitude_mask`, with one threshold over all the arrays together."""
    flat = np.concatenate([np.ravel(value) for value in values])
    mask = magnitude_mask(flat, sparsity)
    bounds = np.cumsum([value.size for value in values])[:-1]
    return [part.reshape(value.shape) for part, value in zip(np.split(mask, bounds), values, strict=True)]


@keras.saving.register_keras_serializable(package="tfkit")
class MagnitudePruning(ScheduledPruning):
    """Prunes the weights of smallest magnitude, at once or step by step while training.

    Args:
        sparsity: share of zeros in each weight, in [0, 1); or a mapping from layer-name patterns to shares (layers
            without a match are left alone). With `scope="global"`, the share over all the weights together.
        schedule: `"constant"` prunes to `sparsity` when `begin` is reached (at `prepare` if it is 0: one-shot);
            `"polynomial"` raises the sparsity from `initial_sparsity` along a cubic between `begin` and `end`.
        begin: first pruning step; an int counts training steps, a float in [0, 1] is a fraction of the `fit` call.
        end: last pruning step of the polynomial schedule, in the unit of `begin`. After it the mask stays as it is.
        frequency: training steps between two updates of the mask.
        initial_sparsity: where the polynomial schedule starts.
        scope: `"layer"`, each weight to its own share; or `"global"`, one threshold for all.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.8,
        *,
        schedule: Literal["constant", "polynomial"] = "polynomial",
        begin: float = 0.0,
        end: float = 0.6,
        frequency: int = 20,
        initial_sparsity: float = 0.0,
        scope: Literal["layer", "global"] = "layer",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        check_shares("sparsity", sparsity)
        super().__init__(
            schedule=schedule,
            begin=begin,
            end=end,
            frequency=frequency,
            initial_sparsity=initial_sparsity,
            include=include,
            exclude=exclude,
            preserve=preserve,
        )
        check_scope(scope, sparsity)
        self.sparsity = sparsity
        self.scope = scope

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        target = setting_for(self.sparsity, layer)
        if target is None:
            return []
        return [PruningMask(target=None if self.scope == "global" else float(target))]

    def masks_at(self, found: Sequence[Masked], ramp: float) -> list[np.ndarray]:
        if self.scope == "global":
            return global_masks([masked.value for masked in found], self.share_at(float(self.sparsity), ramp))  # type: ignore[arg-type]
        return [magnitude_mask(m.value, self.share_at(float(m.mask.target or 0), ramp)) for m in found]

    def final_zeros(self, found: Sequence[Masked]) -> list[int]:
        return [count_zeros(m.value.size, float(m.mask.target or 0)) for m in found]

    def is_short(self, model: keras.Model) -> bool:
        if self.scope != "global":
            return super().is_short(model)
        masks = [keras.ops.convert_to_numpy(masked.mask.mask) for masked in pruning_masks(model)]
        size = sum(mask.size for mask in masks)
        return bool(masks) and sum(int(np.sum(m == 0)) for m in masks) < count_zeros(size, float(self.sparsity))  # type: ignore[arg-type]


def check_scope(scope: str, sparsity: float | Mapping[str, float]) -> None:
    """Raises ValueError unless `scope` is known and fits the form of `sparsity`."""
    if scope not in ("layer", "global"):
        raise ValueError(f"Argument `scope` must be 'layer' or 'global'. Received: {scope!r}.")
    if scope == "global" and isinstance(sparsity, Mapping):
        raise ValueError(
            "Argument `sparsity` must be one number with scope='global', where one threshold serves all layers. "
            f"Received: {dict(sparsity)}. Use scope='layer'."
        )
