"""Lottery tickets: prune a trained network, put the weights that are left back where they began, and train again.

Paper: Frankle, Carbin. The lottery ticket hypothesis: finding sparse, trainable neural networks. ICLR 2019,
https://arxiv.org/abs/1803.03635 (iterative magnitude pruning with resetting); rewinding to an early step: Frankle,
Dziugaite, Roy, Carbin. Linear mode connectivity and the lottery ticket hypothesis. ICML 2020,
https://arxiv.org/abs/1912.05671.

Differs: after rewinding to a later step the whole training runs again, the paper leaves the first steps out. The paper
prunes a layer next to the output at half the rate; here a mapping gives each layer its share.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from tfkit.compression.base import Compressor, Fit, copy_wrapped, setting_for
from tfkit.compression.masking import (
    Moment,
    PruningMask,
    StepCallback,
    check_moment,
    check_shares,
    count_zeros,
    lowest_mask,
    pruning_masks,
)
from tfkit.compression.pruning import check_scope
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import checks, surgery


@keras.saving.register_keras_serializable(package="tfkit")
class LotteryTicket(Compressor):
    """Iterative magnitude pruning with weight rewinding.

    `apply` calls `fit` once to train the dense model and once after each round, `rounds + 1` times in all. Give it the
    model as it was before training: its weights are what is rewound to. `prepare` and `finalize` do one stage only.

    Args:
        sparsity: final share of zeros in each weight, in [0, 1), or a mapping from layer-name patterns (layers without
            a match stay dense); with `scope="global"` the share over all the weights.
        rounds: number of prunings; each leaves the same share of what was there.
        rewind: where the weights go back to: 0, the model that was given; an int, that training step of the first
            training; a float in [0, 1], that fraction of it; None, nowhere (plain iterative pruning).
        scope: `"layer"`, each weight to its own share; or `"global"`, one threshold for all.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.9,
        rounds: int = 5,
        *,
        rewind: Moment | None = 0,
        scope: Literal["layer", "global"] = "layer",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        check_shares("sparsity", sparsity)
        check_scope(scope, sparsity)
        checks.integer("rounds", rounds, 1)
        if rewind is not None:
            check_moment("rewind", rewind)
        self.sparsity = sparsity
        self.rounds = rounds
        self.rewind = rewind
        self.scope = scope

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        target = setting_for(self.sparsity, layer)
        return [] if target is None else [PruningMask(target=float(target))]

    def apply(self, model: keras.Model, fit: Fit | None = None) -> keras.Model:
        """Trains, prunes and rewinds `rounds` times, and trains the ticket.

        Args:
            model: the model before training.
            fit: compiles and trains a model from its current weights: `fit(model, callbacks)`. It should begin from the
                same seed each time.

        Returns:
            The trained ticket, a plain model.

        Raises:
            ValueError: `fit` is None.
        """
        if fit is None:
            raise ValueError("Argument `fit` must train the model, since only training tells which weights matter. "
                             "Received: None. Use MagnitudePruning to prune without training.")  # fmt: skip
        prepared = self.prepare(model)
        start = prepared.get_weights()
        record = _Record(self)
        fit(prepared, [record] if self.rewind else [])
        if self.rewind:
            start = record.weights(prepared)
        for number in range(1, self.rounds + 1):
            masks = self._masks(prepared, number / self.rounds)
            if self.rewind is not None:
                prepared = self.prepare(model)  # Nothing that the last training left behind comes along.
                prepared.set_weights(start)
            for masked, mask in zip(pruning_masks(prepared), masks, strict=True):
                masked.mask.mask.assign(mask)
            fit(prepared, [])
        return self.finalize(prepared)

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns the plain model. One that did not go through the rounds of `apply` is pruned now, with a warning."""
        found, wanted = pruning_masks(model), self._masks(model, 1.0)
        have = sum(int(np.sum(keras.ops.convert_to_numpy(masked.mask.mask) == 0)) for masked in found)
        if have < sum(int(np.sum(mask == 0)) for mask in wanted):
            warnings.warn(
                f"{self!r} prunes between the trainings that `apply` runs, and this model had none of them; it is "
                "pruned now, by magnitude, without training after it. Use `apply(model, fit)`, or MagnitudePruning.",
                UserWarning,
                stacklevel=2,
            )
            model = surgery.rebuild(model, copy_wrapped)
            for masked, mask in zip(pruning_masks(model), wanted, strict=True):
                masked.mask.mask.assign(mask)
        return super().finalize(model)

    def _masks(self, prepared: keras.Model, progress: float) -> list[np.ndarray]:
        """Returns masks that leave (1 - sparsity) ** progress of the weights, the largest of those that are left."""
        found = pruning_masks(prepared)
        old = [keras.ops.convert_to_numpy(masked.mask.mask) > 0 for masked in found]
        sizes = [np.where(mask, np.abs(masked.value), -1.0) for mask, masked in zip(old, found, strict=True)]
        if self.scope == "layer" or not found:
            shares = [1 - (1 - float(masked.mask.target or 0)) ** progress for masked in found]
            return [lowest_mask(s, count_zeros(s.size, share)) for s, share in zip(sizes, shares, strict=True)]
        flat = np.concatenate([size.ravel() for size in sizes])
        share = 1 - (1 - float(self.sparsity)) ** progress  # type: ignore[arg-type]
        parts = np.split(lowest_mask(flat, count_zeros(flat.size, share)), np.cumsum([s.size for s in sizes])[:-1])
        return [part.reshape(size.shape) for part, size in zip(parts, sizes, strict=True)]


class _Record(StepCallback):
    """Keeps the weights of the training step that is rewound to."""

    pruning: LotteryTicket
    _kept: list[np.ndarray] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        assert self.pruning.rewind is not None
        self._moment = self.in_steps("rewind", self.pruning.rewind)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.count_from(epoch, this_fit=True)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._kept is None and self.step() >= self._moment:
            self._kept = self.model.get_weights()

    def weights(self, model: keras.Model) -> list[np.ndarray]:
        """Returns what was kept; of a training that ended before, its last weights."""
        return model.get_weights() if self._kept is None else self._kept
