"""Magnitude pruning: the smallest weights become zero and stay zero.

Paper: Han, Pool, Tran, Dally. Learning both weights and connections for efficient neural networks. NIPS 2015,
https://arxiv.org/abs/1506.02626; the polynomial schedule is that of Zhu, Gupta. To prune, or not to prune. 2017,
https://arxiv.org/abs/1710.01878, equation 1.

Differs: the paper derives each layer's threshold from its standard deviation; here the share of zeros is the setting,
and the threshold is the exact order statistic, so the sparsity that was asked for is the sparsity that comes out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from tfkit.compression.base import Compressor, copy_wrapped, setting_for
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import surgery


def is_sparse(value: np.ndarray) -> bool:
    """Whether a weight has zeros worth keeping: some exact zeros, but not only zeros."""
    return bool(0 < np.count_nonzero(value) < value.size)


def magnitude_mask(value: np.ndarray, sparsity: float) -> np.ndarray:
    """Returns a 0/1 array of the shape of `value` with `round(sparsity * size)` zeros at the smallest magnitudes.

    Ties are broken by position, so the count is exact. At least one weight stays.
    """
    zeros = min(round(sparsity * value.size), value.size - 1)  # Not the last one: a dead layer learns no more.
    mask = np.ones(value.size, dtype=np.float32)
    if zeros:
        # A stable order makes the result independent of the platform's partition algorithm.
        mask[np.argsort(np.abs(value), axis=None, kind="stable")[:zeros]] = 0.0
    return mask.reshape(value.shape)


def global_masks(values: Sequence[np.ndarray], sparsity: float) -> list[np.ndarray]:
    """Like `magnitude_mask`, with one threshold over all the arrays together."""
    flat = np.concatenate([np.ravel(value) for value in values])
    mask = magnitude_mask(flat, sparsity)
    bounds = np.cumsum([value.size for value in values])[:-1]
    return [part.reshape(value.shape) for part, value in zip(np.split(mask, bounds), values, strict=True)]


def polynomial(progress: float, initial: float, final: float, power: float = 3.0) -> float:
    """Zhu & Gupta, equation 1: sparsity at `progress` in [0, 1] between the first and the last pruning step."""
    return final + (initial - final) * (1.0 - min(max(progress, 0.0), 1.0)) ** power


@keras.saving.register_keras_serializable(package="tfkit")
class Mask(WeightTransform):
    """`w' = w` where the mask is 1, else 0. Adapting it keeps a value's zeros; masked weights receive no gradient."""

    def build(self, input_shape: Sequence[int]) -> None:
        self.mask = self.add_weight(
            name="mask", shape=tuple(input_shape), initializer="ones", trainable=False, autocast=False
        )

    def adapt(self, value: np.ndarray) -> None:
        self.mask.assign((value != 0).astype("float32") if is_sparse(value) else np.ones_like(value))

    def transform(self, weight: Any) -> Any:
        # A product would leave -0.0, whose random signs cost a bit each in the packed file.
        return keras.ops.where(self.mask > 0, weight, keras.ops.zeros_like(weight))


@keras.saving.register_keras_serializable(package="tfkit")
class PruningMask(Mask):
    """A mask that the pruning schedule still moves.

    Args:
        target: the final share of zeros of this weight; None when one threshold is shared by all layers.
    """

    def __init__(self, target: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target = target

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "target": self.target}


@keras.saving.register_keras_serializable(package="tfkit")
class MagnitudePruning(Compressor):
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
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        for share in sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]:
            _check_share("sparsity", share)
        _check_share("initial_sparsity", initial_sparsity)
        if schedule not in ("constant", "polynomial"):
            raise ValueError(f"Argument `schedule` must be 'constant' or 'polynomial'. Received: {schedule!r}.")
        if scope not in ("layer", "global"):
            raise ValueError(f"Argument `scope` must be 'layer' or 'global'. Received: {scope!r}.")
        if scope == "global" and isinstance(sparsity, Mapping):
            raise ValueError(
                "Argument `sparsity` must be one number with scope='global', where one threshold serves all layers. "
                f"Received: {dict(sparsity)}. Use scope='layer'."
            )
        for argument, moment in (("begin", begin), ("end", end)):
            if moment < 0 or (isinstance(moment, float) and moment > 1):
                raise ValueError(
                    f"Argument `{argument}` must be an int >= 0 (training steps) or a float in [0, 1] (fraction of the "
                    f"training). Received: {moment!r}."
                )
        if schedule == "polynomial" and type(begin) is type(end) and end < begin:
            raise ValueError(f"Argument `end` must not be before `begin`. Received: begin={begin}, end={end}.")
        if frequency < 1:
            raise ValueError(f"Argument `frequency` must be at least 1 training step. Received: {frequency}.")
        self.sparsity = sparsity
        self.schedule = schedule
        self.begin = begin
        self.end = end
        self.frequency = frequency
        self.initial_sparsity = initial_sparsity
        self.scope = scope

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        target = setting_for(self.sparsity, layer)
        if target is None:
            return []
        return [PruningMask(target=None if self.scope == "global" else float(target))]

    def prepare(self, model: keras.Model) -> keras.Model:
        prepared = super().prepare(model)
        if self.schedule == "constant" and self.begin == 0:
            self.update_masks(prepared, ramp=1.0)
        elif self.schedule == "polynomial" and self.begin == 0 and self.initial_sparsity > 0:
            self.update_masks(prepared, ramp=0.0)
        return prepared

    def callbacks(self) -> list[keras.callbacks.Callback]:
        return [PruningCallback(self)]

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns the plain model, with the sparsity that was asked for.

        Masks short of it (no training, or a callback that restored the weights of an early epoch) are brought to it
        first, with a warning, since nothing is trained after that.
        """
        if self._is_short(model):
            warnings.warn(
                f"The model had not reached {self!r} when it was finalized; it is pruned now, without training after "
                "it. Train the prepared model with `callbacks()`; let a callback that restores weights "
                "(EarlyStopping, ModelCheckpoint) watch only the epochs after the schedule's end.",
                UserWarning,
                stacklevel=2,
            )
            model = surgery.rebuild(model, copy_wrapped)
            self.update_masks(model, ramp=1.0)
        return super().finalize(model)

    def _is_short(self, model: keras.Model) -> bool:
        found = _pruning_masks(model)
        kept = [float(keras.ops.sum(mask.mask)) for mask, _ in found]
        if self.scope == "global":
            size = sum(value.size for _, value in found)
            return bool(found) and sum(kept) > size - round(float(self.sparsity) * size) + 0.5  # type: ignore[arg-type]
        wanted = [
            value.size - min(round(float(mask.target or 0) * value.size), value.size - 1) for mask, value in found
        ]
        return any(have > want + 0.5 for have, want in zip(kept, wanted, strict=True))

    def update_masks(self, model: keras.Model, ramp: float) -> None:
        """Sets every pruning mask from the current magnitudes.

        Args:
            model: a model prepared by this compressor.
            ramp: progress along the schedule in [0, 1]; 1 is the final sparsity.
        """
        masks, values = [], []
        for mask, value in _pruning_masks(model):
            masks.append(mask)
            values.append(value)
        if not masks:
            return
        if self.scope == "global":
            share = self._share(float(self.sparsity), ramp)  # type: ignore[arg-type]
            updated = global_masks(values, share)
        else:
            shares = [self._share(float(mask.target or 0), ramp) for mask in masks]
            updated = [magnitude_mask(value, share) for value, share in zip(values, shares, strict=True)]
        for mask, new in zip(masks, updated, strict=True):
            mask.mask.assign(new)

    def _share(self, target: float, ramp: float) -> float:
        if self.schedule == "constant":
            return target
        return polynomial(ramp, min(self.initial_sparsity, target), target)


class PruningCallback(keras.callbacks.Callback):
    """Moves the masks of a prepared model along the schedule of its `MagnitudePruning`; logs the sparsity."""

    def __init__(self, pruning: MagnitudePruning) -> None:
        super().__init__()
        self.pruning = pruning

    def on_train_begin(self, logs: Any = None) -> None:
        if not _pruning_masks(self.model):
            raise ValueError(
                "The pruning callback must train a model that `MagnitudePruning.prepare` gave. "
                f"Received: model '{self.model.name}' without pruning masks."
            )
        steps = self.params.get("steps")
        total = steps * self.params["epochs"] if steps else None
        self._begin = self._in_steps("begin", self.pruning.begin, total)
        self._end = self._in_steps("end", self.pruning.end, total)
        self._offset: int | None = None
        self._next = self._begin
        self._done = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if self._offset is None:
            # Steps count from the model's first; fractions are of this fit, which may go on at a later epoch.
            fractions = isinstance(self.pruning.begin, float) and isinstance(self.pruning.end, float)
            self._offset = self._iterations() - epoch * (self.params.get("steps") or 0) if fractions else 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        pruning = self.pruning
        step = self._iterations() - (self._offset or 0)
        if self._done or step < self._next:
            return
        last = pruning.schedule == "constant" or step >= self._end
        span = max(self._end - self._begin, 1)
        pruning.update_masks(self.model, ramp=1.0 if last else (step - self._begin) / span)
        # A step of the loop may be several of training (steps_per_execution), so exact multiples would be missed.
        self._next = self._begin + ((step - self._begin) // pruning.frequency + 1) * pruning.frequency
        self._done = last

    def on_train_end(self, logs: Any = None) -> None:
        # A fit shorter than the schedule still ends at the sparsity that was asked for.
        if not self._done and self._iterations() - (self._offset or 0) >= self._begin:
            self.pruning.update_masks(self.model, ramp=1.0)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            kept = [keras.ops.convert_to_numpy(mask.mask) for mask, _ in _pruning_masks(self.model)]
            logs["sparsity"] = 1.0 - sum(float(m.sum()) for m in kept) / sum(m.size for m in kept)

    def _iterations(self) -> int:
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))

    def _in_steps(self, name: str, moment: float, total: int | None) -> int:
        if not isinstance(moment, float):
            return int(moment)
        if total is None and moment > 0:
            raise ValueError(
                f"Argument `{name}` of MagnitudePruning must be a number of steps when the length of an epoch is "
                f"unknown. Received: the fraction {moment}. Pass an int, or `steps_per_epoch` to `fit`."
            )
        return round(moment * total) if total else 0


def _pruning_masks(model: keras.Model) -> list[tuple[PruningMask, np.ndarray]]:
    """Returns each pruning mask of a model with the value of the weight just before it is applied."""
    found = []
    for layer in surgery.leaf_layers(model):
        if isinstance(layer, Reparameterized):
            weights = surgery.compressible_weights(layer.layer)
            for name, chain in layer.transforms.items():
                value = keras.ops.convert_to_tensor(weights[name])
                for transform in chain:
                    if isinstance(transform, PruningMask):
                        found.append((transform, keras.ops.convert_to_numpy(value)))
                    value = transform.transform(value)
    return found


def _check_share(name: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ValueError(f"Argument `{name}` must be a share in [0, 1). Received: {share!r}. For 90 % write 0.9.")
