"""Deep Compression: prune, share the weights that remain, and entropy-code the result.

Paper: Han, Mao, Dally. Deep compression: compressing deep neural networks with pruning, trained quantization and
Huffman coding. ICLR 2016, https://arxiv.org/abs/1510.00149.

Pruning and trained quantization are the two stages here; the third, relative indexing and Huffman coding, is done on
the exported file by `tfkit.export.pack`, without loss.

Differs: pruning follows a schedule within one training run, instead of repeated rounds of pruning and retraining.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import keras

from tfkit.compression.base import Chain, Compressor
from tfkit.compression.clustering import Initialization, WeightClustering
from tfkit.compression.pruning import MagnitudePruning

#: Share of zeros by kind of layer, after table 4: AlexNet keeps 35 to 38 % of the weights of conv2 to conv5, but 9 % of
#: those of fc6 and fc7.
PAPER_SPARSITY: Mapping[str, float] = {"*Conv*": 0.65, "*": 0.91}
#: Index width by kind of layer: 256 shared values in convolutions, 32 in fully connected layers (section 5).
PAPER_BITS: Mapping[str, int] = {"*Conv*": 8, "*": 5}


@keras.saving.register_keras_serializable(package="tfkit")
class DeepCompression(Chain):
    """Magnitude pruning, then weight clustering, each followed by training.

    Args:
        sparsity: share of zeros; one number, or a mapping from layer patterns (names or classes) to shares.
        bits: index width of the shared values, likewise.
        begin, end: the pruning schedule, as fractions of its training or in steps; see `MagnitudePruning`.
        seed: for the random initialisation of k-means, which is linear by default.
        initialization: see `WeightClustering`.
        include, exclude: see `Compressor`.

    Use `apply(model, fit)`, then `tfkit.export.convert` and `tfkit.export.pack`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = PAPER_SPARSITY,
        bits: int | Mapping[str, int] = PAPER_BITS,
        *,
        begin: float = 0.0,
        end: float = 0.6,
        initialization: Initialization = "linear",
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__(
            [
                MagnitudePruning(sparsity, begin=begin, end=end, include=include, exclude=exclude),
                WeightClustering(bits, initialization=initialization, seed=seed, include=include, exclude=exclude),
            ]
        )
        self.include, self.exclude = self.compressors[0].include, self.compressors[0].exclude
        self.sparsity = sparsity
        self.bits = bits
        self.begin = begin
        self.end = end
        self.initialization = initialization
        self.seed = seed

    # Not its stages, as for any chain, but the settings they come from.
    get_config = Compressor.get_config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**config)
