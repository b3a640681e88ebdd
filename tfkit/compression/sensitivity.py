"""How much a model suffers when the weights of one layer alone are quantized, for each layer and width.

Paper: Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort. A white paper on neural network quantization.
2021, https://arxiv.org/abs/2106.08295, section 3.7 (per-layer analysis). The assignment of widths is the greedy one
of Dong et al. HAWQ, https://arxiv.org/abs/1905.03696, with the measured loss in place of their Hessian.

Differs: the effects of layers are taken to add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression import calibration
from tfkit.compression.fake_quantize import QuantizedGrid, weight_scale
from tfkit.compression.quantization_aware import QuantizationAware, split_separable
from tfkit.compression.quantized_layers import WEIGHTED, has_channel_scales
from tfkit.internal import checks, folding, surgery

METRICS = ("mse", "kl", "loss")


class SensitivityRow(NamedTuple):
    """The effect of one layer at one width.

    Attributes:
        layer: its name.
        kind: its class.
        weights: how many.
        bits: width of their integers.
        effect: mean squared change of the outputs, mean divergence in nats of the predicted classes from the float
            model's, or rise of the loss.
    """

    layer: str
    kind: str
    weights: int
    bits: int
    effect: float


class Sensitivity(NamedTuple):
    """A table of effects.

    Attributes:
        metric: what `effect` is: `"mse"`, `"kl"` or `"loss"`.
        baseline: loss of the float model; 0 for the other metrics.
        rows: by layer in order of computation, then by width from wide to narrow.
    """

    metric: str
    baseline: float
    rows: tuple[SensitivityRow, ...]

    def matrix(self) -> tuple[list[str], list[int], np.ndarray]:
        """Returns (layers, widths, effects), effects being (layers, widths): ready for a heat map or lines."""
        layers = list(dict.fromkeys(row.layer for row in self.rows))
        widths = list(dict.fromkeys(row.bits for row in self.rows))
        effects = np.array([row.effect for row in self.rows]).reshape(len(layers), len(widths))
        return layers, widths, effects

    def table(self) -> str:
        """Returns the effects as text, a line for each layer."""
        layers, widths, effects = self.matrix()
        weights = {row.layer: row.weights for row in self.rows}
        space = max(map(len, layers), default=5)
        lines = [f"{'layer':<{space}} {'weights':>9} " + " ".join(f"{width:>6} bits" for width in widths)]
        for layer, values in zip(layers, effects, strict=True):
            lines.append(f"{layer:<{space}} {weights[layer]:>9} " + " ".join(f"{value:>11.3g}" for value in values))
        return "\n".join(lines)

    def assign(self, mean_bits: float) -> dict[str, int]:
        """Returns a width for each layer, for a `bits` of `PostTrainingQuantization`.

        From the widest, the step down that costs the least effect for each bit saved is taken, until the weights have
        `mean_bits` on average.

        Args:
            mean_bits: bits of a weight to reach, over the weights of all layers.

        Raises:
            ValueError: `mean_bits` is less than the narrowest width in the table.
        """
        layers, widths, effects = self.matrix()
        order = np.argsort(widths)[::-1]
        widths, effects = [widths[i] for i in order], effects[:, order]
        checks.number("mean_bits", mean_bits, min(widths))
        sizes = np.array([next(row.weights for row in self.rows if row.layer == layer) for layer in layers])
        chosen = np.zeros(len(layers), int)
        while np.array(widths)[chosen] @ sizes > mean_bits * sizes.sum() + 1e-9:
            best: tuple[float, int, int] = (np.inf, 0, 0)
            for i, at in enumerate(chosen):
                for to in range(at + 1, len(widths)):
                    saved = (widths[at] - widths[to]) * sizes[i]
                    best = min(best, (float(effects[i, to] - effects[i, at]) / saved, i, to))
            chosen[best[1]] = best[2]
        return {layer: widths[at] for layer, at in zip(layers, chosen, strict=True)}


def layer_sensitivity(
    model: keras.Model,
    data: Any,
    labels: Any = None,
    *,
    bits: Sequence[int] = (8, 6, 4, 3, 2),
    metric: str = "mse",
    loss: Any = None,
    from_logits: bool = True,
    weight_scale: str = "max",
    samples: int = 300,
    seed: int = 0,
) -> Sensitivity:
    """Quantizes the weights of one layer after the other, and measures what that does to the model's outputs.

    Batch normalizations are folded first, as they are when the model is quantized.

    Args:
        model: a functional or built sequential model; it is not changed.
        data: inputs, an array (samples, ...) or a list or dictionary of them.
        labels: for `metric="loss"`, (samples, ...).
        bits: widths to try, from 2 to 8.
        metric: `"mse"`: mean squared change of all outputs; `"kl"`: mean divergence of the predicted classes (of the
            one output) from the float model's; `"loss"`: rise of the loss.
        loss: for `metric="loss"`, a Keras loss or a function of (labels, outputs).
        from_logits: for `metric="kl"`, whether the output is logits rather than probabilities.
        weight_scale: `"max"` or `"mse"`, see `PostTrainingQuantization`.
        samples: most inputs taken, a random choice.
        seed: of that choice.

    Returns:
        The table.

    Raises:
        ValueError: an argument breaks its rule, or the data do not fit or are not finite.
    """
    checks.choice("metric", metric, METRICS)
    checks.choice("weight_scale", weight_scale, calibration.WEIGHT_SCALES)
    widths = [checks.integer("bits", width, 2, 8) for width in bits]
    if not widths or len(set(widths)) < len(widths):
        raise checks.error("bits", "widths from 2 to 8, each once", bits)
    if (metric == "loss") != (labels is not None and loss is not None):
        raise ValueError(
            "Arguments `labels` and `loss` must be given for metric='loss', and for it alone. "
            f"Received: metric='{metric}', labels={'given' if labels is not None else None}, loss={loss!r}."
        )
    flat = folding.fold_batch_normalization(split_separable(model, QuantizationAware()))
    if labels is not None:
        labels = np.asarray(labels)
        arrays = keras.tree.map_structure(np.asarray, data)
        if any(len(array) != len(labels) for array in keras.tree.flatten(arrays)):
            raise checks.error("labels", "as many as there are inputs", labels)
        order = np.random.default_rng(seed).permutation(len(labels))[:samples]
        data, labels = keras.tree.map_structure(lambda array: array[order], arrays), labels[order]
    inputs = calibration.input_batches(flat, data, samples, seed)
    starts = np.cumsum([0, *(len(batch[0]) for batch in inputs)])
    batches = [
        (batch, tf.constant(labels[start : start + len(batch[0])] if labels is not None else 0))
        for batch, start in zip(inputs, starts[:-1], strict=True)
    ]
    effects = _Effects(flat, batches, metric, loss, from_logits)
    rows = []
    for layer in surgery.leaf_layers(flat):
        if isinstance(layer, WEIGHTED):
            kernel = keras.ops.convert_to_numpy(layer.kernel)
            for width in widths:
                layer.kernel.assign(quantized(layer, width, weight_scale))
                rows.append(SensitivityRow(layer.name, type(layer).__name__, kernel.size, width, effects.measure()))
                layer.kernel.assign(kernel)
    return Sensitivity(metric, effects.baseline, tuple(rows))


def quantized(layer: Any, bits: int, scale: str = "max") -> np.ndarray:
    """Returns a layer's kernel rounded to the grid that a file of this width would have."""
    kernel = keras.ops.convert_to_numpy(layer.kernel)
    depthwise = isinstance(layer, keras.layers.DepthwiseConv2D)
    choose = calibration.mse_weight_scale if scale == "mse" else weight_scale
    scales = choose(kernel, bits=bits, depthwise=depthwise, per_channel=has_channel_scales(layer, bits))
    return keras.ops.convert_to_numpy(QuantizedGrid(scales, bits, depthwise)(kernel))


class _Effects:
    """Measures a model against what it was when this was made, in one compiled graph for all its weights."""

    def __init__(self, model: keras.Model, batches: list[Any], metric: str, loss: Any, from_logits: bool) -> None:
        loss = keras.losses.get(loss) if loss is not None else None
        view = keras.Model(model.inputs, model.outputs)  # Takes and gives lists.
        count = len(model.inputs)

        def outputs(*inputs: Any) -> list[Any]:
            return keras.tree.flatten(view(list(inputs), training=False))

        def effect(labels: Any, *tensors: Any) -> Any:
            values, references = outputs(*tensors[:count]), tensors[count:]
            if metric == "loss":
                return tf.reduce_mean(tf.cast(loss(labels, values[0]), tf.float32))
            if metric == "kl":
                p, q = (_log_probabilities(x, from_logits) for x in (references[0], values[0]))
                return tf.reduce_mean(tf.reduce_sum(tf.exp(p) * (p - q), axis=-1))
            changes = [tf.reshape(x - y, [tf.shape(y)[0], -1]) for x, y in zip(references, values, strict=True)]
            return tf.reduce_mean(tf.square(tf.concat(changes, axis=1)))

        inputs, labels = batches[0]
        given = tf.function(outputs, autograph=False).get_concrete_function(*map(_spec, inputs))
        self.batches = [(labels, *inputs, *given(*inputs)) for inputs, labels in batches]
        if metric == "kl" and len(model.outputs) != 1:
            raise checks.error("metric", "'mse' or 'loss' for a model of several outputs", metric)
        self.sizes = [len(inputs[0]) for inputs, _ in batches]
        self._effect = tf.function(effect, autograph=False).get_concrete_function(*map(_spec, self.batches[0]))
        self.baseline = 0.0
        self.baseline = self.measure()

    def measure(self) -> float:
        """Returns the mean effect over the data, less the baseline."""
        effects = [float(self._effect(*batch)) for batch in self.batches]
        return float(np.average(effects, weights=self.sizes)) - self.baseline


def _spec(tensor: Any) -> tf.TensorSpec:
    return tf.TensorSpec([None, *tensor.shape[1:]] if tensor.shape.rank else [], tensor.dtype)


def _log_probabilities(outputs: Any, from_logits: bool) -> Any:
    return tf.nn.log_softmax(outputs) if from_logits else tf.math.log(tf.maximum(outputs, 1e-12))
