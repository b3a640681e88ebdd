"""Weight clustering (trained quantization): a weight tensor shares a few values, which are then trained.

Paper: Han, Mao, Dally. Deep compression. ICLR 2016, https://arxiv.org/abs/1510.00149, section 3: k-means over a layer's
weights (equation 2) with Forgy, density-based or linear initialisation; the gradient of a shared value is the sum of
the gradients of the weights that share it (equation 3). With `entropy`, the shared values are chosen as in Chou,
Lookabaugh, Gray. Entropy-constrained vector quantization. IEEE Trans. ASSP 37(1), 1989,
https://doi.org/10.1109/29.17498: squared distance plus a price on the bits of the index.

Differs: k-means is solved on sorted values with prefix sums (the same fixed point, O(k log n) a round). Zeros are
neither clustered nor trained, so pruned weights stay pruned and cost no entry of the codebook. The entropy-constrained
choice may move further weights to zero, which is the cheapest value of a pruned tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import keras
import numpy as np

from tfkit.compression.base import Compressor, setting_for
from tfkit.compression.reparameterized import WeightTransform
from tfkit.internal import checks, folding, surgery

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


class EntropyConstrained(NamedTuple):
    """What `entropy_constrained_1d` found.

    Attributes:
        values: the shared values, sorted, shape (k,); those that no weight took are gone. Zero is among them if it was
            pinned and took any.
        assignment: index of the value of each weight, shape (n,).
        cost: mean squared distance plus `price` times the entropy of the index, after each round.
    """

    values: np.ndarray
    assignment: np.ndarray
    cost: tuple[float, ...]


def entropy_constrained_1d(
    values: np.ndarray, centroids: np.ndarray, price: float, *, zeros: int | None = None, max_rounds: int = 100
) -> EntropyConstrained:
    """Shares values under a price on bits: minimises the mean of `(w - c)**2 - price * log2(share of c)`.

    Assignment and update take turns as in k-means. In one dimension the weights of one shared value are an interval
    between two others', as the costs are parabolas of the same width.

    Args:
        values: weights, shape (n,).
        centroids: starting values, shape (k,).
        price: squared distance that one bit of the index is worth; 0 gives k-means.
        zeros: number of weights that are zero already; they count in the shares. Zero is then one of the shared values
            and is not moved. None: there is no such value.
        max_rounds: at most.
    """
    order = np.argsort(values, kind="stable")
    ordered = np.asarray(values, dtype=np.float64)[order]
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    squares = np.concatenate([[0.0], np.cumsum(ordered**2)])
    centroids = np.unique(np.asarray(centroids, dtype=np.float64))
    pinned = zeros is not None
    fixed = 0 if zeros is None else zeros
    if pinned:
        centroids = np.sort(np.append(centroids[centroids != 0], 0.0))
    lengths = np.zeros(len(centroids))
    total, costs = len(ordered) + fixed, []
    edges = np.zeros(len(centroids) + 1, dtype=np.int64)
    for _ in range(max_rounds):
        kept, borders = _cheapest_intervals(centroids, price * lengths)
        edges = np.concatenate([[0], np.searchsorted(ordered, borders), [len(ordered)]])
        used = (np.diff(edges) > 0) | ((centroids[kept] == 0) & pinned)
        centroids, edges = centroids[kept][used], np.concatenate([[0], edges[1:][used]])
        counts = np.diff(edges)
        means = (sums[edges[1:]] - sums[edges[:-1]]) / np.maximum(counts, 1)
        centroids = np.where((centroids == 0) & pinned, 0.0, means)
        counts = counts + np.where((centroids == 0) & pinned, fixed, 0)
        lengths = -np.log2(np.maximum(counts, 1) / total)
        spread = np.diff(squares[edges]) - 2 * centroids * np.diff(sums[edges]) + np.diff(edges) * centroids**2
        costs.append(float(spread.sum() + price * (counts * lengths).sum()) / total)
        if len(costs) > 1 and costs[-2] - costs[-1] <= 1e-12 * abs(costs[-2]):
            break
    assignment = np.empty(len(ordered), dtype=np.int64)
    assignment[order] = np.repeat(np.arange(len(centroids)), np.diff(edges))
    return EntropyConstrained(centroids, assignment, tuple(costs))


def _cheapest_intervals(centroids: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns which of the parabolas `(w - c)**2 + offset` are lowest somewhere, and the borders between those."""
    heights = centroids**2 + offsets  # The parabolas less w**2 are lines; their lower envelope is wanted.
    kept: list[int] = []
    borders: list[float] = []
    for index in range(len(centroids)):
        while kept:
            border = (heights[index] - heights[kept[-1]]) / (2 * (centroids[index] - centroids[kept[-1]]))
            if not borders or border > borders[-1]:
                borders.append(border)
                break
            kept.pop()
            borders.pop()
        kept.append(index)
    return np.array(kept), np.array(borders)


@keras.saving.register_keras_serializable(package="tfkit")
class SharedValues(WeightTransform):
    """`w' = codebook[assignment]`, zero where the weight was zero; the codebook is what trains.

    Args:
        clusters: number of distinct non-zero values.
        initialization: where k-means starts.
        seed: for the random initialisation.
        entropy: price of a bit; see `WeightClustering`.
    """

    replaces_weight = True

    def __init__(
        self,
        clusters: int,
        initialization: Initialization = "linear",
        seed: int = 0,
        entropy: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.clusters = clusters
        self.initialization = initialization
        self.seed = checks.integer("seed", seed, 0)
        self.entropy = entropy

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
            if self.entropy:
                self._adapt_to_entropy(value, nonzero, centroids)
                return
        assignment = np.where(value != 0, 1 + nearest(value, centroids), 0)
        self.codebook.assign(np.pad(centroids, (0, self.clusters - len(centroids))).astype("float32"))
        self.assignment.assign(assignment.astype("int32"))

    def _adapt_to_entropy(self, value: np.ndarray, nonzero: np.ndarray, centroids: np.ndarray) -> None:
        zeros = value.size - nonzero.size
        found = entropy_constrained_1d(nonzero, centroids, self.entropy * float(nonzero.var()), zeros=zeros)
        if not found.values.any():  # A layer of zeros would learn no more.
            found = entropy_constrained_1d(nonzero, centroids, 0.0)
        codes = np.cumsum(found.values != 0) * (found.values != 0)
        assignment = np.zeros(value.shape, dtype="int32")
        assignment[value != 0] = codes[found.assignment]
        codebook = found.values[found.values != 0]
        self.codebook.assign(np.pad(codebook, (0, self.clusters - len(codebook))).astype("float32"))
        self.assignment.assign(assignment)

    def transform(self, weight: Any) -> Any:
        codebook = keras.ops.concatenate([keras.ops.zeros((1,), dtype=self.codebook.dtype), self.codebook])
        return keras.ops.cast(keras.ops.take(codebook, self.assignment, axis=0), weight.dtype)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "clusters": self.clusters,
            "initialization": self.initialization,
            "seed": self.seed,
            "entropy": self.entropy,
        }


@keras.saving.register_keras_serializable(package="tfkit")
class WeightClustering(Compressor):
    """Makes each weight tensor share few values, found by k-means and then trained.

    Weights that share a value move together, so train with about a tenth of the learning rate that suits the plain
    model: with Adam, 1e-4 or less where layers are large.

    Args:
        bits: index width; a tensor has at most `2**bits` distinct values, zero included. One number, or a mapping from
            layer-name patterns to numbers (layers without a match are left alone).
        initialization: `"linear"` (the paper's choice: it keeps the rare large weights), `"density"` or `"random"`.
        fold: make batch normalizations part of the layers before them first, as the conversion to TFLite does anyway:
            scaling each channel afterwards would leave few values shared in the file.
        entropy: price of a bit of the index, as a share of the variance of the tensor's non-zero weights: values that
            few weights take cost more bits, and are left for cheaper ones nearby, zero among them. 0 is k-means; from
            0.01 (a tenth fewer bits, about) to 0.1 is of use. One number, or a mapping from layer-name patterns.
        short_biases: round the layers' biases to bfloat16 at the end. No code shortens float32 biases, so that they
            weigh in a small file.
        seed: for the random initialisation.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        bits: int | Mapping[str, int] = 5,
        *,
        initialization: Initialization = "linear",
        fold: bool = True,
        entropy: float | Mapping[str, float] = 0.0,
        short_biases: bool = False,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        for width in bits.values() if isinstance(bits, Mapping) else [bits]:
            checks.integer("bits", width, 1, 8)
        if initialization not in ("linear", "density", "random"):
            raise ValueError(
                f"Argument `initialization` must be 'linear', 'density' or 'random'. Received: {initialization!r}."
            )
        for price in entropy.values() if isinstance(entropy, Mapping) else [entropy]:
            if not 0 <= price <= 1:
                raise ValueError(f"Argument `entropy` must be a share in [0, 1]. Received: {price!r}.")
        self.bits = bits
        self.initialization = initialization
        self.fold = fold
        self.entropy = entropy
        self.short_biases = short_biases
        self.seed = checks.integer("seed", seed, 0)

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
        price = float(setting_for(self.entropy, layer, 0.0))
        # Zero is one of the 2**bits values only where there are zeros to represent.
        clusters = 2**bits - (1 if nonzero < value.size or price else 0)
        return [SharedValues(min(clusters, nonzero), self.initialization, self.seed, price)]

    def finalize(self, model: keras.Model) -> keras.Model:
        """Returns the plain model; see `Compressor.finalize`."""
        plain = super().finalize(model)
        if self.short_biases:
            for layer in surgery.leaf_layers(plain):
                bias = getattr(layer, "bias", None)
                if bias is not None and self.selects(layer) and surgery.compressible_weights(layer):
                    bias.assign(keras.ops.cast(keras.ops.cast(bias, "bfloat16"), bias.dtype))
        return plain
