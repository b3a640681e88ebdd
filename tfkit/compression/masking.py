"""What all pruning methods share: the mask of a weight, the schedule that moves it, and the callback that drives it.

Paper: Zhu, Gupta. To prune, or not to prune: exploring the efficacy of pruning for model compression. 2017,
https://arxiv.org/abs/1710.01878; `polynomial` is its equation 1.

Differs: the masks are set every `frequency` training steps by exact counts, not by a threshold learned or guessed.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from tfkit.compression.base import Compressor, copy_wrapped
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import surgery

Moment = int | float


#: Fewer zeros than this share are an accident (an initialization, a padding row), not a pruning.
LEAST_SPARSITY = 0.01


def is_sparse(value: np.ndarray) -> bool:
    """Whether a weight has zeros worth keeping: at least one in a hundred is exactly zero, but not all are."""
    zeros = value.size - np.count_nonzero(value)
    return bool(0 < zeros < value.size and zeros >= LEAST_SPARSITY * value.size)


def polynomial(progress: float, initial: float, final: float, power: float = 3.0) -> float:
    """Zhu & Gupta, equation 1: sparsity at `progress` in [0, 1] between the first and the last pruning step."""
    return final + (initial - final) * (1.0 - min(max(progress, 0.0), 1.0)) ** power


def lowest_mask(scores: np.ndarray, zeros: int, ties: np.ndarray | None = None) -> np.ndarray:
    """Returns a float32 0/1 array with exactly `zeros` zeros, at the lowest scores.

    Args:
        scores: any shape.
        zeros: how many.
        ties: of equal scores the ones with lower `ties` go first, then those that come first in the array.
    """
    mask = np.ones(scores.size, dtype=np.float32)
    if zeros:
        # A stable order makes the result independent of the platform's partition algorithm.
        order = (
            np.argsort(scores, axis=None, kind="stable") if ties is None else np.lexsort((ties.ravel(), scores.ravel()))
        )
        mask[order[:zeros]] = 0.0
    return mask.reshape(scores.shape)


def count_zeros(size: int, sparsity: float) -> int:
    """Returns `round(sparsity * size)`, but never all: a dead layer learns no more."""
    return min(round(sparsity * size), size - 1)


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


class Masked(NamedTuple):
    """A pruning mask of a model in its place.

    Attributes:
        mask: the transform.
        value: the weight just before the mask is applied.
        layer: the layer that holds the weight, unwrapped.
    """

    mask: PruningMask
    value: np.ndarray
    layer: keras.Layer


def pruning_masks(model: keras.Model) -> list[Masked]:
    """Returns the pruning masks of a prepared model, in graph order."""
    found = []
    for layer in surgery.leaf_layers(model):
        if isinstance(layer, Reparameterized):
            weights = surgery.compressible_weights(layer.layer)
            for name, chain in layer.transforms.items():
                value = keras.ops.convert_to_tensor(weights[name])
                for transform in chain:
                    if isinstance(transform, PruningMask):
                        found.append(Masked(transform, keras.ops.convert_to_numpy(value), layer.layer))
                    value = transform.transform(value)
    return found


def input_axis(layer: keras.Layer, value: np.ndarray) -> int | None:
    """Returns the axis of a weight over which the layer sums its inputs' features; None if there is no such axis."""
    if isinstance(layer, keras.layers.Embedding) or value.ndim < 2:
        return None
    if isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D)):
        return None
    if isinstance(layer, (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)):
        return value.ndim - 1
    if isinstance(layer, (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)):
        return value.ndim - 2
    return 0 if value.ndim == 2 else None


class ScheduledPruning(Compressor):
    """Base of methods whose masks follow a schedule. Subclasses write `transforms_for`, `masks_at`, `final_zeros`.

    Args:
        schedule: `"constant"` prunes fully when `begin` is reached (at `prepare` if it is 0: one-shot);
            `"polynomial"` raises the sparsity from `initial_sparsity` along a cubic between `begin` and `end`.
        begin: first pruning step; an int counts training steps, a float in [0, 1] is a fraction of the `fit` call.
        end: last pruning step of the polynomial schedule, in the unit of `begin`. After it the mask stays as it is.
        frequency: training steps between two updates of the mask.
        initial_sparsity: where the polynomial schedule starts.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        *,
        schedule: Literal["constant", "polynomial"],
        begin: Moment,
        end: Moment,
        frequency: int,
        initial_sparsity: float = 0.0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        check_share("initial_sparsity", initial_sparsity)
        if schedule not in ("constant", "polynomial"):
            raise ValueError(f"Argument `schedule` must be 'constant' or 'polynomial'. Received: {schedule!r}.")
        check_moment("begin", begin)
        check_moment("end", end)
        if schedule == "polynomial" and type(begin) is type(end) and end < begin:
            raise ValueError(f"Argument `end` must not be before `begin`. Received: begin={begin}, end={end}.")
        if frequency < 1:
            raise ValueError(f"Argument `frequency` must be at least 1 training step. Received: {frequency}.")
        self.schedule = schedule
        self.begin = begin
        self.end = end
        self.frequency = frequency
        self.initial_sparsity = initial_sparsity

    @abc.abstractmethod
    def masks_at(self, found: Sequence[Masked], ramp: float) -> list[np.ndarray]:
        """Returns the new 0/1 mask of each weight at `ramp` in [0, 1] of the schedule."""

    @abc.abstractmethod
    def final_zeros(self, found: Sequence[Masked]) -> list[int]:
        """Returns how many zeros each mask has at least when the schedule has ended."""

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
        if self.is_short(model):
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

    def is_short(self, model: keras.Model) -> bool:
        """Whether a prepared model has fewer zeros than its schedule ends with."""
        found = pruning_masks(model)
        have = [int(np.sum(keras.ops.convert_to_numpy(masked.mask.mask) == 0)) for masked in found]
        return any(zeros < wanted for zeros, wanted in zip(have, self.final_zeros(found), strict=True))

    def update_masks(self, model: keras.Model, ramp: float) -> None:
        """Sets every pruning mask from the current weights.

        Args:
            model: a model prepared by this compressor.
            ramp: progress along the schedule in [0, 1]; 1 is the final sparsity.
        """
        found = pruning_masks(model)
        if found:
            for masked, new in zip(found, self.masks_at(found, ramp), strict=True):
                masked.mask.mask.assign(new)

    def share_at(self, target: float, ramp: float) -> float:
        """Returns the share of zeros at `ramp` of the schedule of a weight whose final share is `target`."""
        if self.schedule == "constant":
            return target
        return polynomial(ramp, min(self.initial_sparsity, target), target)


class StepCallback(keras.callbacks.Callback):
    """Base of callbacks that act at given training steps of a model with pruning masks."""

    def __init__(self, pruning: Compressor) -> None:
        super().__init__()
        self.pruning = pruning
        self._offset: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if not pruning_masks(self.model):
            raise ValueError(
                f"The pruning callback must train a model that `{type(self.pruning).__name__}.prepare` gave. "
                f"Received: model '{self.model.name}' without pruning masks."
            )
        steps = self.params.get("steps")
        self._total = steps * self.params["epochs"] if steps else None
        self._offset = None

    def count_from(self, epoch: int, *, this_fit: bool) -> None:
        """Starts counting: steps count from the model's first; fractions are of this fit, which may go on later."""
        if self._offset is None:
            iterations = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations))
            self._offset = iterations - epoch * (self.params.get("steps") or 0) if this_fit else 0

    def step(self) -> int:
        """Returns the number of training steps done."""
        return int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) - (self._offset or 0)

    def in_steps(self, name: str, moment: Moment) -> int:
        """Returns a moment as a number of steps."""
        if not isinstance(moment, float):
            return int(moment)
        if self._total is None and moment > 0:
            raise ValueError(
                f"Argument `{name}` of {type(self.pruning).__name__} must be a number of steps when the length of an "
                f"epoch is unknown. Received: the fraction {moment}. Pass an int, or `steps_per_epoch` to `fit`."
            )
        return round(moment * self._total) if self._total else 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            kept = [keras.ops.convert_to_numpy(masked.mask.mask) for masked in pruning_masks(self.model)]
            logs["sparsity"] = 1.0 - sum(float(m.sum()) for m in kept) / sum(m.size for m in kept)


class PruningCallback(StepCallback):
    """Moves the masks of a prepared model along the schedule of its `ScheduledPruning`; logs the sparsity."""

    pruning: ScheduledPruning

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._begin = self.in_steps("begin", self.pruning.begin)
        self._end = self.in_steps("end", self.pruning.end)
        self._next = self._begin
        self._done = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.count_from(epoch, this_fit=isinstance(self.pruning.begin, float) and isinstance(self.pruning.end, float))

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        pruning = self.pruning
        if self._done:
            return
        step = self.step()
        if step < self._next:
            return
        last = pruning.schedule == "constant" or step >= self._end
        span = max(self._end - self._begin, 1)
        pruning.update_masks(self.model, ramp=1.0 if last else (step - self._begin) / span)
        # A step of the loop may be several of training (steps_per_execution), so exact multiples would be missed.
        self._next = self._begin + ((step - self._begin) // pruning.frequency + 1) * pruning.frequency
        self._done = last

    def on_train_end(self, logs: Any = None) -> None:
        # A fit shorter than the schedule still ends at the sparsity that was asked for.
        if not self._done and self.step() >= self._begin:
            self.pruning.update_masks(self.model, ramp=1.0)


def check_share(name: str, share: float) -> None:
    """Raises ValueError unless `share` is in [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"Argument `{name}` must be a share in [0, 1). Received: {share!r}. For 90 % write 0.9.")


def check_shares(name: str, share: float | Mapping[str, float]) -> None:
    """Checks one share, or each of a mapping from layer patterns."""
    for value in share.values() if isinstance(share, Mapping) else [share]:
        check_share(name, value)


def check_moment(name: str, moment: Moment) -> None:
    """Raises ValueError unless `moment` is a number of steps, or a fraction of the training."""
    if not math.isfinite(moment) or moment < 0 or (isinstance(moment, float) and moment > 1):
        raise ValueError(
            f"Argument `{name}` must be an int >= 0 (training steps) or a float in [0, 1] (fraction of the "
            f"training). Received: {moment!r}."
        )
