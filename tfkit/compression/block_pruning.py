"""Block and N:M pruning: zeros in the patterns that kernels can use.

Paper: Narang, Undersander, Diamos. Block-sparse recurrent neural networks. 2017, https://arxiv.org/abs/1711.02782
(blocks); Mishra et al. Accelerating sparse deep neural networks. 2021, https://arxiv.org/abs/2104.08378 (N:M).

Differs: blocks are ranked by their mean magnitude, not by the largest one, and the count is exact. N:M masks may be
reached gradually, one weight of each group at a time (the paper prunes once and trains on).

TFLite runs a fully-connected layer faster if its weights are zero in blocks of 1 output x 4 inputs (float) or
1 output x 16 inputs (int8), see `tfkit.compression.sparsity_speed`. It has no kernel for N:M patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import keras
import numpy as np

from tfkit.compression.base import setting_for
from tfkit.compression.masking import (
    Masked,
    PruningMask,
    ScheduledPruning,
    check_shares,
    count_zeros,
    input_axis,
    lowest_mask,
)
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import checks


def blocks_of(kernel: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Returns the mean magnitude of each block of a kernel.

    Args:
        kernel: (inputs, outputs), as Keras stores a dense layer.
        block: (outputs, inputs) of a block, as TFLite stores it.

    Returns:
        (blocks along the inputs, blocks along the outputs). Blocks that the edge cuts count what they have.
    """
    high, wide = block[1], block[0]
    padded = np.pad(np.abs(kernel).astype(np.float64), [(0, -kernel.shape[0] % high), (0, -kernel.shape[1] % wide)])
    total = padded.reshape(padded.shape[0] // high, high, -1, wide).sum(axis=(1, 3))
    rows = np.minimum(high, kernel.shape[0] - high * np.arange(total.shape[0]))
    columns = np.minimum(wide, kernel.shape[1] - wide * np.arange(total.shape[1]))
    return total / (rows[:, None] * columns)


def block_mask(kernel: np.ndarray, sparsity: float, block: tuple[int, int]) -> np.ndarray:
    """Returns a 0/1 array like `kernel` (inputs, outputs) that drops `round(sparsity * blocks)` whole blocks."""
    means = blocks_of(kernel, block)
    kept = lowest_mask(means, count_zeros(means.size, sparsity))
    return np.repeat(np.repeat(kept, block[1], axis=0), block[0], axis=1)[: kernel.shape[0], : kernel.shape[1]]


def nm_mask(weight: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    """Returns a 0/1 array that keeps the `n` largest magnitudes of each `m` consecutive weights along `axis`.

    A last group of fewer than `m` weights keeps at most `n`.
    """
    lines = np.moveaxis(np.abs(weight), axis, -1)  # (..., length)
    length = lines.shape[-1]
    padded = np.pad(lines, [(0, 0)] * (lines.ndim - 1) + [(0, -length % m)], constant_values=-1.0)
    groups = padded.reshape(*padded.shape[:-1], -1, m)
    ranks = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1, kind="stable")
    kept = (ranks < n).reshape(padded.shape)[..., :length]
    return np.moveaxis(kept, -1, axis).astype(np.float32)


@keras.saving.register_keras_serializable(package="tfkit")
class BlockPruning(ScheduledPruning):
    """Prunes dense layers in whole blocks, so that TFLite's sparse kernel can run them.

    Only `Dense` layers are touched: TFLite has sparse kernels for no others. Export the result with
    `tfkit.export.convert(model, path, sparse=True)`; of an int8 file use `tfkit.export.sparsify`.

    Args:
        sparsity: share of zero blocks in each kernel, in [0, 1); or a mapping from layer-name patterns to shares.
            Below about 0.75 the sparse kernel is slower than the dense one.
        block: (outputs, inputs) of a block: (1, 4) for float files, (1, 16) for int8.
        schedule, begin, end, frequency, initial_sparsity: see `ScheduledPruning`.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.9,
        block: Sequence[int] = (1, 4),
        *,
        schedule: Literal["constant", "polynomial"] = "polynomial",
        begin: float = 0.0,
        end: float = 0.6,
        frequency: int = 20,
        initial_sparsity: float = 0.0,
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
        if len(block) != 2:
            raise ValueError(f"Argument `block` must be (outputs, inputs). Received: {block!r}. For TFLite: (1, 4).")
        for side in block:
            checks.integer("block", side, 1)
        self.sparsity = sparsity
        self.block = [int(side) for side in block]

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        target = setting_for(self.sparsity, layer)
        if target is None or not isinstance(layer, keras.layers.Dense):
            return []
        return [PruningMask(target=float(target))]

    def masks_at(self, found: Sequence[Masked], ramp: float) -> list[np.ndarray]:
        return [block_mask(m.value, self.share_at(float(m.mask.target or 0), ramp), self._block) for m in found]

    def final_zeros(self, found: Sequence[Masked]) -> list[int]:
        zeros = []
        for masked in found:
            rows, columns = masked.value.shape
            count = -(-rows // self._block[1]) * -(-columns // self._block[0])
            dropped = count_zeros(count, float(masked.mask.target or 0))
            cut = rows % self._block[1] or columns % self._block[0]
            zeros.append(dropped if cut else dropped * self._block[0] * self._block[1])
        return zeros

    @property
    def _block(self) -> tuple[int, int]:
        return self.block[0], self.block[1]


@keras.saving.register_keras_serializable(package="tfkit")
class NMPruning(ScheduledPruning):
    """Keeps `n` weights in each group of `m` consecutive inputs.

    Dense and convolution kernels (along the input channels), and recurrent ones. Layers with fewer than `m` inputs, and
    depthwise ones, are left alone. TFLite has no kernel for the pattern: files get smaller when packed, not faster.

    Args:
        n: weights kept in each group.
        m: size of a group.
        schedule, begin, end, frequency: see `ScheduledPruning`; `"polynomial"` takes one more weight from each group at
            a time.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        n: int = 2,
        m: int = 4,
        *,
        schedule: Literal["constant", "polynomial"] = "polynomial",
        begin: float = 0.0,
        end: float = 0.6,
        frequency: int = 20,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(
            schedule=schedule,
            begin=begin,
            end=end,
            frequency=frequency,
            include=include,
            exclude=exclude,
            preserve=preserve,
        )
        checks.integer("m", m, 2)
        checks.integer("n", n, 1)
        if n >= m:
            raise ValueError(f"Argument `n` must be less than m={m}, or nothing is pruned. Received: {n}.")
        self.n = n
        self.m = m

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        axis = input_axis(layer, value)
        if axis is None or value.shape[axis] < self.m:
            return []
        return [PruningMask(target=1.0 - self.n / self.m)]

    def masks_at(self, found: Sequence[Masked], ramp: float) -> list[np.ndarray]:
        dropped = round(self.m * self.share_at(1.0 - self.n / self.m, ramp))
        axes = [input_axis(masked.layer, masked.value) for masked in found]
        return [nm_mask(m.value, self.m - dropped, self.m, axis or 0) for m, axis in zip(found, axes, strict=True)]

    def final_zeros(self, found: Sequence[Masked]) -> list[int]:
        zeros = []
        for masked in found:
            length = masked.value.shape[input_axis(masked.layer, masked.value) or 0]
            line = length // self.m * (self.m - self.n) + max(length % self.m - self.n, 0)
            zeros.append(masked.value.size // length * line)
        return zeros
