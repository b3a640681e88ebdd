"""Movement pruning: weights that training moves towards zero are dropped, not those that are small.

Paper: Sanh, Wolf, Rush. Movement pruning: adaptive sparsity by fine-tuning. NeurIPS 2020,
https://arxiv.org/abs/2005.07683; hard movement pruning (top-v masks, straight-through scores, section 4).

Differs: the top-v mask is renewed every `frequency` steps, the paper's at each; `frequency=1` is the paper's. Of equal
scores the smaller weights go first, since at the start all scores are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from tfkit.compression.base import setting_for
from tfkit.compression.masking import (
    Masked,
    PruningMask,
    ScheduledPruning,
    check_shares,
    count_zeros,
    lowest_mask,
)
from tfkit.compression.pruning import check_scope
from tfkit.compression.reparameterized import WeightTransform


@keras.saving.register_keras_serializable(package="tfkit")
class MovementMask(PruningMask):
    """`w' = w` where the mask is 1, else 0, with a trainable score S for each weight.

    With g the gradient at w', dL/dw = g where the mask is 1, and dL/dS = g * w everywhere, as if the mask were S itself
    (the straight-through estimator; equation 2 of the paper). A weight that moves away from zero gains score.
    """

    def build(self, input_shape: Sequence[int]) -> None:
        super().build(input_shape)
        self.scores = self.add_weight(name="scores", shape=tuple(input_shape), initializer="zeros", autocast=False)

    def transform(self, weight: Any) -> Any:
        scores = keras.ops.cast(self.scores, weight.dtype)
        # The second term is zero, and has the gradient that the scores need.
        return super().transform(weight) + (scores - keras.ops.stop_gradient(scores)) * keras.ops.stop_gradient(weight)


@keras.saving.register_keras_serializable(package="tfkit")
class MovementPruning(ScheduledPruning):
    """Prunes the weights of lowest movement score, step by step while a trained model is fine-tuned.

    The optimizer that trains the weights trains the scores too. With the constant schedule, or without training, there
    are no scores yet, and the smallest weights go, as in magnitude pruning.

    Args:
        sparsity: share of zeros in each weight, in [0, 1); or a mapping from layer-name patterns to shares (layers
            without a match are left alone). With `scope="global"`, the share over all the weights together.
        begin, end: the fractions of the training, or steps, between which the sparsity grows. The scores need the time
            before `begin` to tell anything.
        schedule, frequency, initial_sparsity: see `ScheduledPruning`.
        scope: `"layer"`, each weight to its own share; or `"global"`, scores of all weights ranked together.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.9,
        *,
        schedule: Literal["constant", "polynomial"] = "polynomial",
        begin: float = 0.1,
        end: float = 0.7,
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
        return [] if target is None else [MovementMask(target=float(target))]

    def masks_at(self, found: Sequence[Masked], ramp: float) -> list[np.ndarray]:
        scores = [_scores(masked) for masked in found]
        sizes = [np.abs(masked.value) for masked in found]
        if self.scope == "layer":
            return [
                lowest_mask(s, count_zeros(s.size, self.share_at(float(m.mask.target or 0), ramp)), size)
                for s, size, m in zip(scores, sizes, found, strict=True)
            ]
        flat, ties = (np.concatenate([array.ravel() for array in arrays]) for arrays in (scores, sizes))
        share = self.share_at(float(self.sparsity), ramp)  # type: ignore[arg-type]
        mask = lowest_mask(flat, count_zeros(flat.size, share), ties)
        parts = np.split(mask, np.cumsum([s.size for s in scores])[:-1])
        return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]

    def final_zeros(self, found: Sequence[Masked]) -> list[int]:
        if self.scope == "layer":
            return [count_zeros(m.value.size, float(m.mask.target or 0)) for m in found]
        # One threshold for all leaves no promise to a single weight; together they must reach the share.
        have = [int(np.sum(keras.ops.convert_to_numpy(m.mask.mask) == 0)) for m in found]
        wanted = count_zeros(sum(m.value.size for m in found), float(self.sparsity)) if found else 0  # type: ignore[arg-type]
        return have if sum(have) >= wanted else [zeros + 1 for zeros in have]


def _scores(masked: Masked) -> np.ndarray:
    """Returns the scores of a weight; what an earlier step has set to zero ranks below everything."""
    assert isinstance(masked.mask, MovementMask)
    scores = keras.ops.convert_to_numpy(masked.mask.scores)
    return np.where(masked.value == 0, -np.inf, scores)
