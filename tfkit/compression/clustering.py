"""Weight clustering (trained quantization): a weight tensor shares a few values, which are then trained.

Paper: Han, Mao, Dally. Deep compression. ICLR 2016, https://arxiv.org/abs/1510.00149, section 3: k-means over a layer's
weights (equation 2) with Forgy, density-based or linear initialisation; the gradient of a shared value is the sum of
the gradients of the weights that share it (equation 3).

Differs: k-means is solved on sorted values with prefix sums (the same fixed point, O(k log n) a round). Zeros are
neither clustered nor trained, so pruned weights stay pruned and cost no entry of the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np

from tfkit.compression.base import Compressor, setting_for
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import folding, surgery

Initialization = Literal["linear", "density", "random"]

#: More distinct values than this are not a codebook worth keeping: its index would not fit in a byte.
MAX_CLUSTERS = 256


def is_clustered(value: np.ndarray) -> bool:
    """Whether a weight's non-zero values come from a small codebook rather than being (nearly) all different."""
    nonzero = value[value != 0]
    # A single value says nothing: kernels are initialized so.
    return 1 < len(np.unique(nonzero)) <= min(MAX_CLUSTERS, nonzero.size // 2)


def initial_centroids(
    values: np.ndarray, clusters: int, initialization: Initialization, rng: np.random.Generator
) -> np.ndarray:
    """Returns `clusters` starting centroids for 1-D values: section 3.2 of the paper.

    `linear` spaces them evenly between minimum and maximum, `density` at even quantiles, `random` (Forgy) draws values.
    """
    if initialization == "linear":
        return np.linspace(values.min(), values.max(), clusters)
    if initialization == "density":
        return np.quantile(values, np.linspace(0, 1, clusters))
    return np.sort(rng.choice(values, size=clusters, replace=False))


def kmeans_1d(values: np.ndarray, centroids: np.ndarray, max_rounds: int = 200) -> np.ndarray:
    """Lloyd's algorithm in one dimension.

    Args:
        values: array of shape (n,).
        centroids: starting centroids of shape (k,).

    Returns:
        Sorted centroids of shape (k,) at the fixed point; a cluster that loses all its values keeps its centroid.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    centroids = np.sort(np.asarray(centroids, dtype=np.float64))
    for _ in range(max_rounds):
        borders = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], borders, [len(ordered)]])
        counts = np.diff(edges)
        totals = sums[edges[1:]] - sums[edges[:-1]]
        updated = np.where(counts > 0, totals / np.maximum(counts, 1), centroids)
        if np.array_equal(updated, centroids):
            break
        centroids = np.sort(updated)
    return centroids


def nearest(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Returns the index of the nearest of the sorted centroids, an int array of the shape of `values`."""
    return np.searchsorted((centroids[1:] + centroids[:-1]) / 2, values)


@keras.saving.register_keras_serializable(package="tfkit")
class SharedValues(WeightTransform):
    """`w' = codebook[assignment]`, zero where the weight was zero; the codebook is what trains.

    Args:
        clusters: number of distinct non-zero values.
        initialization: where k-means starts.
        seed: for the random initialisation.
    """

    replaces_weight = True

    def __init__(self, clusters: int, initialization: Initialization = "linear", seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clusters = clusters
        self.initialization = initialization
        self.seed = seed

    def build(self, input_shape: Sequence[int]) -> None:
        self.codebook = self.add_weight(name="codebook", shape=(self.clusters,), initializer="zeros", autocast=False)
        # Entry 0 is the value zero, which no gradient moves; entry i is codebook[i - 1].
        self.assignment = self.add_weight(
            name="assignment", shape=tuple(input_shape), initializer="zeros", dtype="int32", trainable=False
        )

    def adapt(self, value: np.ndarray) -> None:
        nonzero = value[value != 0].astype(np.float64)
        distinct = np.unique(nonzero)
        if len(distinct) <= self.clusters:
            centroids = distinct
        else:
            rng = np.random.default_rng(self.seed)
            start = initial_centroids(nonzero, self.clusters, self.initialization, rng)
            centroids = kmeans_1d(nonzero, start)
        assignment = np.where(value != 0, 1 + nearest(value, centroids), 0)
        self.codebook.assign(np.pad(centroids, (0, self.clusters - len(centroids))).astype("float32"))
        self.assignment.assign(assignment.astype("int32"))

    def transform(self, weight: Any) -> Any:
        codebook = keras.ops.concatenate([keras.ops.zeros((1,), dtype=self.codebook.dtype), self.codebook])
        return keras.ops.cast(keras.ops.take(codebook, self.assignment, axis=0), weight.dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "clusters": self.clusters,
            "initialization": self.initialization,
            "seed": self.seed,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class WeightClustering(Compressor):
    """Makes each weight tensor share few values, found by k-means and then trained.

    Args:
        bits: index width; a tensor has at most `2**bits` distinct values, zero included. One number, or a mapping from
            layer-name patterns to numbers (layers without a match are left alone).
        initialization: `"linear"` (the paper's choice: it keeps the rare large weights), `"density"` or `"random"`.
        fold: make batch normalizations part of the layers before them first, as the conversion to TFLite does anyway:
            scaling each channel afterwards would leave few values shared in the file.
        seed: for the random initialisation.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int] = 5,
        *,
        initialization: Initialization = "linear",
        fold: bool = True,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        for width in bits.values() if isinstance(bits, Mapping) else [bits]:
            if not 1 <= width <= 8:
                raise ValueError(f"Argument `bits` must be from 1 to 8 (2 to 256 shared values). Received: {width!r}.")
        if initialization not in ("linear", "density", "random"):
            raise ValueError(
                f"Argument `initialization` must be 'linear', 'density' or 'random'. Received: {initialization!r}."
            )
        self.bits = bits
        self.initialization = initialization
        self.fold = fold
        self.seed = seed

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns a new trainable model with shared values; see `Compressor.prepare`.

        Normalizations are folded on plain models only: one that another compressor has prepared keeps its own.
        """
        stacked = surgery.is_graph(model) and any(
            surgery.source(layer) is not layer for layer in surgery.leaf_layers(model)
        )
        return super().prepare(folding.fold_batch_normalization(model) if self.fold and not stacked else model)

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        bits = setting_for(self.bits, layer)
        nonzero = np.count_nonzero(value)
        if bits is None or nonzero == 0:
            return []
        # Zero is one of the 2**bits values only where there are zeros to represent.
        clusters = 2**bits - (1 if nonzero < value.size else 0)
        return [SharedValues(min(clusters, nonzero), self.initialization, self.seed)]
