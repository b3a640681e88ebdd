"""How much each layer minds being compressed, and how zeros and bits are shared out over the layers by that.

One layer at a time is pruned, quantized or cut to half its rank, without training, and the Kullback-Leibler divergence
of the predictions from those of the model as it was is taken over held-out examples. The loss itself will not do: that
of an overconfident model falls when it is damaged a little. Of a small change the divergence is about curvature times
squared distance; the curvature of a layer found so is what ranks its weights beside those of other layers, as in LeCun,
Denker, Solla. Optimal brain damage. NIPS 1989,
https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html, with one curvature for a
layer instead of one for each weight.
"""

from __future__ import annotations

import glob
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.pruning import magnitude_mask
from tfkit.internal import checks, surgery

#: What a layer is tried at. Strong enough to be told from the noise of a few hundred examples.
PRUNED_SHARE, QUANTIZED_BITS, RANK_SHARE = 0.8, 3, 0.5
#: A layer that minds nothing still counts: curvatures below this share of the median are taken for it.
LEAST_CURVATURE = 0.01
MAX_SHARE = 0.995


class LayerSensitivity(NamedTuple):
    """What compressing one layer alone does.

    Attributes:
        layer: its name.
        weights: how many.
        pruned, quantized, low_rank: divergence in nats with 80 % of its weights zero, with 3 bits a weight, and with
            half its rank (0 where there is no rank to halve).
        pruned_curvature, quantized_curvature: the first two, over the squared distance that the weights moved.
    """

    layer: str
    weights: int
    pruned: float
    quantized: float
    low_rank: float
    pruned_curvature: float
    quantized_curvature: float


class Sensitivity(NamedTuple):
    """The layers of a model, in the order of computation.

    Attributes:
        samples: examples it was taken over.
        layers: a row a layer.
    """

    samples: int
    layers: tuple[LayerSensitivity, ...]


def kernels(model: keras.Model) -> dict[str, list[np.ndarray]]:
    """Returns the compressible weights of each layer, by the layer's name."""
    found: dict[str, list[np.ndarray]] = {}
    for layer in surgery.leaf_layers(model):
        source = surgery.source(layer)
        for variable in surgery.compressible_weights(source).values():
            found.setdefault(source.name, []).append(keras.ops.convert_to_numpy(variable))
    return found


def measure(model: keras.Model, x: np.ndarray, *, output: str, samples: int = 512) -> Sensitivity:
    """Measures a model layer by layer.

    Args:
        model: a plain classifier; it is not changed.
        x: held-out examples (examples, ...); the first `samples` are used.
        output: what the model gives: `"logits"`, `"softmax"` or `"sigmoid"`.
        samples: at most this many.

    Returns:
        A row for each layer with compressible weights.
    """
    copy = surgery.rebuild(model)
    inputs = tf.constant(x[:samples])

    @tf.function
    def compiled() -> tf.Tensor:
        return log_probabilities(copy(inputs, training=False), output)

    base = compiled().numpy().astype(np.float64)

    def divergence() -> float:
        gap = np.sum(np.exp(base) * (base - compiled().numpy()), axis=-1)
        return float(np.mean(np.nan_to_num(gap, nan=1e3, posinf=1e3)))

    rows = []
    variables: dict[str, list[Any]] = {}
    for layer in surgery.leaf_layers(copy):
        for variable in surgery.compressible_weights(layer).values():
            variables.setdefault(layer.name, []).append(variable)
    for name, held in variables.items():
        values = [keras.ops.convert_to_numpy(variable) for variable in held]
        changes = {
            "pruned": [value * magnitude_mask(value, PRUNED_SHARE) for value in values],
            "quantized": [rounded(value, QUANTIZED_BITS) for value in values],
            "low_rank": [_half_rank(value) for value in values],
        }
        moved, distance = {}, {}
        for kind, changed in changes.items():
            distance[kind] = sum(float(np.sum((a - b) ** 2)) for a, b in zip(values, changed, strict=True))
            for variable, value in zip(held, changed, strict=True):
                variable.assign(value)
            moved[kind] = max(divergence(), 0.0) if distance[kind] > 0 else 0.0
        for variable, value in zip(held, values, strict=True):
            variable.assign(value)
        rows.append(
            LayerSensitivity(
                name,
                sum(value.size for value in values),
                moved["pruned"],
                moved["quantized"],
                moved["low_rank"],
                *(moved[kind] / max(distance[kind], 1e-12) for kind in ("pruned", "quantized")),
            )
        )
    return Sensitivity(len(inputs), tuple(rows))


def log_probabilities(outputs: Any, output: str) -> tf.Tensor:
    """Returns the logarithms of a classifier's probabilities, (examples, classes), of any of the forms of `measure`."""
    outputs = tf.cast(outputs, "float32")
    if output == "logits":
        return tf.nn.log_softmax(outputs)
    if output == "sigmoid":
        outputs = tf.concat([1.0 - outputs, outputs], axis=-1)
    return tf.math.log(tf.maximum(outputs, keras.config.epsilon()))


def rounded(value: np.ndarray, bits: int) -> np.ndarray:
    """Rounds each output channel (the last axis) to the symmetric grid of its largest magnitude."""
    largest = np.abs(value).max(axis=tuple(range(value.ndim - 1)))
    scale = np.where(largest > 0, largest, 1.0) / (2 ** (bits - 1) - 1)
    return (np.round(value / scale) * scale).astype(value.dtype)


def _half_rank(value: np.ndarray) -> np.ndarray:
    matrix = value.reshape(-1, value.shape[-1])
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    rank = max(1, round(RANK_SHARE * len(s)))
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).reshape(value.shape).astype(value.dtype)


def curvatures(sensitivity: Sensitivity, kind: str) -> dict[str, float]:
    """Returns the curvature of each layer; `kind` is `"pruned"` or `"quantized"`. One of zero is lifted."""
    found = {row.layer: float(getattr(row, f"{kind}_curvature")) for row in sensitivity.layers}
    positive = [value for value in found.values() if value > 0]
    least = LEAST_CURVATURE * float(np.median(positive)) if positive else 1.0
    return {name: max(value, least) for name, value in found.items()}


def sparsity_by_sensitivity(model: keras.Model, sensitivity: Sensitivity, sparsity: float) -> dict[str, float]:
    """Shares the zeros of a model out: those weights go whose square times their layer's curvature is least.

    Args:
        model: the model that was measured.
        sensitivity: of its layers.
        sparsity: share of zeros over all the compressible weights, in [0, 1).

    Returns:
        The share of zeros of each layer, by a pattern that matches its name only.
    """
    sparsity = checks.number("sparsity", sparsity, 0, 1, open_high=True)
    factors = curvatures(sensitivity, "pruned")
    scores = {
        name: np.concatenate([np.sqrt(factors[name]) * np.abs(value).ravel() for value in values])
        for name, values in kernels(model).items()
    }
    together = np.concatenate(list(scores.values()))
    count = round(sparsity * len(together))
    if not count:
        return {}
    threshold = np.partition(together, count - 1)[count - 1]
    shares = {name: float(np.mean(score <= threshold)) for name, score in scores.items()}
    return {glob.escape(name): round(min(share, MAX_SHARE), 4) for name, share in shares.items() if share > 0}


def price_by_sensitivity(model: keras.Model, sensitivity: Sensitivity, price: float) -> dict[str, float]:
    """Shares the price of a bit out, for `WeightClustering(entropy=...)`: a bit costs the same loss in every layer.

    Args:
        model: the model that was measured.
        sensitivity: of its layers.
        price: of the layer of median size of effect, as a share of the variance of its weights.

    Returns:
        The price for each layer, by a pattern that matches its name only; within a factor of 4 of `price`.
    """
    factors = curvatures(sensitivity, "quantized")
    effects = {
        name: factors[name] * float(np.var(np.concatenate([value.ravel() for value in values])))
        for name, values in kernels(model).items()
    }
    middle = float(np.median(list(effects.values())))
    return {
        glob.escape(name): round(float(np.clip(price * middle / max(effect, 1e-30), price / 4, 4 * price)), 4)
        for name, effect in effects.items()
    }
