"""Saliency pruning: drop the weights whose removal changes the loss least, as data tell.

Paper: Lee, Ajanthan, Torr. SNIP: single-shot network pruning based on connection sensitivity. ICLR 2019,
https://arxiv.org/abs/1810.02340 (`"snip"`); Molchanov, Mallya, Tyree, Frosio, Kautz. Importance estimation for neural
network pruning. CVPR 2019, https://arxiv.org/abs/1906.10771 (`"taylor"`, equation 8); LeCun, Denker, Solla. Optimal
brain damage. NIPS 1989, https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html
(`"obd"`, `"hessian"`); rounds: de Jorge et al. Progressive skeletonization. ICLR 2021,
https://arxiv.org/abs/2006.09081.

Differs: Molchanov et al. prune filters, here single weights. OBD's curvature is that of the Fisher information, the
mean squared gradient of single examples (`"obd"`), or Hutchinson's unbiased estimate of the Hessian's diagonal
(`"hessian"`), not LeCun's backward recursion, which holds for plain networks only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from tfkit.compression.base import Compressor, check_examples, setting_for
from tfkit.compression.masking import PruningMask, check_shares, count_zeros, lowest_mask
from tfkit.compression.pruning import check_scope
from tfkit.compression.reparameterized import Reparameterized, WeightTransform
from tfkit.internal import checks, surgery

CRITERIA = ("snip", "taylor", "obd", "hessian")


@keras.saving.register_keras_serializable(package="tfkit")
class Connection(WeightTransform):
    """`w' = c * w` with a connection strength c of ones for each weight, whose derivatives are the saliencies."""

    def build(self, input_shape: Sequence[int]) -> None:
        self.strength = self.add_weight(
            name="strength", shape=tuple(input_shape), initializer="ones", trainable=False, autocast=False
        )

    def transform(self, weight: Any) -> Any:
        return weight * keras.ops.cast(self.strength, weight.dtype)


class _Connections(Compressor):
    """Puts a `Connection` on every weight, after what is there."""

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        return [Connection()]


def saliencies(
    model: keras.Model,
    data: tuple[Any, Any],
    loss: Any,
    criterion: str = "snip",
    *,
    batch_size: int = 64,
    draws: int = 4,
    seed: int = 0,
) -> dict[tuple[int, str], np.ndarray]:
    """Returns the saliency of each weight of a model, in inference mode.

    With c the connection strengths (ones), L the mean loss of all the data, L_b of a batch, L_i of an example:
    `"snip"`: |dL/dc| = |w dL/dw|; `"taylor"`: mean over batches of (dL_b/dc)^2; `"obd"`: 1/2 mean over examples of
    (dL_i/dc)^2, which is 1/2 w^2 times the empirical Fisher; `"hessian"`: 1/2 d^2L/dc^2 = 1/2 w^2 H, with negative
    estimates set to zero.

    Args:
        model: plain or prepared.
        data: inputs and targets; a structure of arrays (samples, ...) each.
        loss: a Keras loss, its name, or a structure of them for several outputs.
        criterion: one of `CRITERIA`.
        batch_size: examples taken at once. A short last batch is left out, unless it is the only one.
        draws: random vectors for each batch, of `"hessian"`.
        seed: of these vectors.

    Returns:
        float64 arrays of the shapes of the weights, by (position of the layer in `surgery.leaf_layers`, weight name).
    """
    checks.choice("criterion", criterion, CRITERIA)
    probed = _Connections(preserve=False).prepare(model)
    names, variables = [], []
    for position, weight, transform in _transforms(probed):
        if isinstance(transform, Connection):
            names.append((position, weight))
            variables.append(transform.strength.value)
    probed.compile(loss=loss)

    def mean_loss(x: Any, y: Any) -> Any:
        return probed.compute_loss(x, y, probed(x, training=False), training=False)

    generator = tf.random.Generator.from_seed(seed)
    step = {
        "snip": lambda x, y: _gradients(mean_loss, variables, x, y),
        "taylor": lambda x, y: [tf.square(g) for g in _gradients(mean_loss, variables, x, y)],
        "obd": lambda x, y: _squared_example_gradients(mean_loss, variables, x, y),
        "hessian": lambda x, y: _hessian_diagonals(mean_loss, variables, x, y, draws, generator),
    }[criterion]
    compiled = tf.function(step, reduce_retracing=True)
    total = [np.zeros(variable.shape, dtype=np.float64) for variable in variables]
    batches = _batches(data, batch_size)
    for x, y in batches:
        for sum_, part in zip(total, compiled(x, y), strict=True):
            sum_ += part.numpy()
    if not all(np.isfinite(sum_).all() for sum_ in total):
        raise ValueError(
            "Argument `data` must give a finite loss and finite gradients. Received: NaN or infinity. Look for them in "
            "the inputs, the targets and the model's weights."
        )
    scale = (0.5 if criterion in ("obd", "hessian") else 1.0) / len(batches)
    final: Callable[[np.ndarray], np.ndarray] = np.abs if criterion == "snip" else lambda t: np.maximum(t, 0.0)
    return {name: final(scale * sum_) for name, sum_ in zip(names, total, strict=True)}


def _transforms(model: keras.Model) -> Iterator[tuple[int, str, WeightTransform]]:
    """Yields (position of the layer, weight name, transform); names alone may repeat in nested models."""
    for position, layer in enumerate(surgery.leaf_layers(model)):
        if isinstance(layer, Reparameterized):
            for weight, chain in layer.transforms.items():
                for transform in chain:
                    yield position, weight, transform


def _gradients(loss: Callable[[Any, Any], Any], variables: list[tf.Variable], x: Any, y: Any) -> list[tf.Tensor]:
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(variables)
        value = loss(x, y)
    return list(tape.gradient(value, variables, unconnected_gradients="zero"))


def _squared_example_gradients(loss: Any, variables: list[tf.Variable], x: Any, y: Any) -> list[tf.Tensor]:
    """Returns the mean over a batch of the squared gradient of each example by itself."""
    count = tf.shape(tf.nest.flatten(x)[0])[0]

    def one(i: Any, sums: list[Any]) -> Any:
        x1, y1 = tf.nest.map_structure(lambda t: t[i : i + 1], (x, y))
        return i + 1, [s + tf.square(g) for s, g in zip(sums, _gradients(loss, variables, x1, y1), strict=True)]

    start = (tf.constant(0), [tf.zeros_like(variable) for variable in variables])
    _, sums = tf.while_loop(lambda i, sums: i < count, one, start)
    return [s / tf.cast(count, s.dtype) for s in sums]


def _hessian_diagonals(
    loss: Any, variables: list[tf.Variable], x: Any, y: Any, draws: int, generator: tf.random.Generator
) -> list[tf.Tensor]:
    """Returns the mean of z * (H z) over random signs z, whose expectation is the diagonal of the Hessian H."""
    sums = [tf.zeros_like(variable) for variable in variables]
    for _ in range(draws):
        signs = [tf.sign(generator.uniform(v.shape, -1.0, 1.0)) for v in variables]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            gradients = _gradients(loss, variables, x, y)
            product = tf.add_n([tf.reduce_sum(g * z) for g, z in zip(gradients, signs, strict=True)])
        rows = tape.gradient(product, variables, unconnected_gradients="zero")
        sums = [s + z * row / draws for s, z, row in zip(sums, signs, rows, strict=True)]
    return sums


def _batches(data: tuple[Any, Any], batch_size: int) -> list[Any]:
    count = len(keras.tree.flatten(data)[0])
    size = min(batch_size, count)
    starts = range(0, count - size + 1, size)
    return [keras.tree.map_structure(lambda a, s=s: tf.convert_to_tensor(a[s : s + size]), data) for s in starts]


@keras.saving.register_keras_serializable(package="tfkit")
class SaliencyPruning(Compressor):
    """Prunes at once, in `prepare`, the weights of least saliency; train the result to recover.

    `"snip"` is meant for a model that has not been trained, the others for a trained one.

    Args:
        sparsity: share of zeros over all weights, or with `scope="layer"` in each, where it may be a mapping from
            layer-name patterns (layers without a match are left alone).
        criterion: `"snip"`, `"taylor"`, `"obd"` or `"hessian"`, see `saliencies`.
        data: (inputs, targets) of some training examples; a few hundred serve.
        loss: the loss the model is trained with: a Keras loss or its name.
        scope: `"global"`, saliencies of all weights ranked together, as the papers; or `"layer"`.
        rounds: prune in so many steps of equal ratio, with new saliencies before each. More than one keeps a high
            sparsity from cutting a layer off.
        batch_size: examples taken at once.
        seed: of the random vectors of `"hessian"`.
        include, exclude, preserve: see `Compressor`.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] = 0.9,
        criterion: Literal["snip", "taylor", "obd", "hessian"] = "taylor",
        *,
        data: tuple[Any, Any],
        loss: Any,
        scope: Literal["global", "layer"] = "global",
        rounds: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        preserve: bool = True,
    ) -> None:
        super().__init__(include=include, exclude=exclude, preserve=preserve)
        check_shares("sparsity", sparsity)
        check_scope(scope, sparsity)
        checks.choice("criterion", criterion, CRITERIA)
        checks.integer("rounds", rounds, 1)
        checks.integer("batch_size", batch_size, 1)
        self.sparsity = sparsity
        self.criterion = criterion
        self.data = check_examples(data)
        self.loss = keras.losses.get(loss) if isinstance(loss, str) else loss
        self.scope = scope
        self.rounds = rounds
        self.batch_size = batch_size
        self.seed = checks.integer("seed", seed, 0)

    def get_config(self) -> dict[str, Any]:
        """Returns every argument; the data go along."""
        encoded = {name: keras.saving.serialize_keras_object(getattr(self, name)) for name in ("data", "loss")}
        return {**super().get_config(), **encoded}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SaliencyPruning:
        decoded = {name: keras.saving.deserialize_keras_object(config[name]) for name in ("data", "loss")}
        return cls(**{**config, **decoded})

    def __repr__(self) -> str:
        shapes = keras.tree.map_structure(lambda array: f"{np.asarray(array).dtype}{np.shape(array)}", self.data)
        loss = getattr(self.loss, "name", None) or getattr(self.loss, "__name__", None) or str(self.loss)
        return f"SaliencyPruning({self.sparsity!r}, {self.criterion!r}, data={shapes}, loss={loss!r})"

    def transforms_for(self, layer: keras.Layer, name: str, value: np.ndarray) -> Sequence[WeightTransform]:
        target = setting_for(self.sparsity, layer)
        return [] if target is None else [PruningMask(target=float(target))]

    def prepare(self, model: keras.Model) -> keras.Model:
        """Returns a new trainable model with its masks set for good."""
        prepared = super().prepare(model)
        for number in range(1, self.rounds + 1):
            self._prune(prepared, number / self.rounds)
        return prepared

    def _prune(self, prepared: keras.Model, progress: float) -> None:
        """Sets the masks so that a share of (1 - sparsity) ** progress of the weights is left."""
        found = [(t, (position, name)) for position, name, t in _transforms(prepared) if isinstance(t, PruningMask)]
        if not found:
            return
        masks = [mask for mask, _ in found]
        values = saliencies(prepared, self.data, self.loss, self.criterion, batch_size=self.batch_size, seed=self.seed)
        scores = [values[place] for _, place in found]
        # What is gone stays gone: it has no saliency, like many that are left, but ranks below them.
        scores = [np.where(keras.ops.convert_to_numpy(m.mask) > 0, s, -1.0) for m, s in zip(masks, scores, strict=True)]
        if self.scope == "global":
            flat = np.concatenate([score.ravel() for score in scores])
            share = 1 - (1 - float(self.sparsity)) ** progress  # type: ignore[arg-type]
            ends = np.cumsum([score.size for score in scores])[:-1]
            parts = np.split(lowest_mask(flat, count_zeros(flat.size, share)), ends)
            new = [part.reshape(score.shape) for part, score in zip(parts, scores, strict=True)]
        else:
            shares = [1 - (1 - float(mask.target or 0)) ** progress for mask in masks]
            new = [lowest_mask(s, count_zeros(s.size, share)) for s, share in zip(scores, shares, strict=True)]
        for mask, value in zip(masks, new, strict=True):
            mask.mask.assign(value)
