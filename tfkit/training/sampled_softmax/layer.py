"""A Keras layer that ends a model over many classes: sampled loss in training, all logits otherwise."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from tfkit.internal import checks
from tfkit.training.sampled_softmax.base import Sampler
from tfkit.training.sampled_softmax.loss import PREDICTIONS, sampled_softmax_loss


@keras.saving.register_keras_serializable(package="tfkit")
class SampledSoftmax(keras.layers.Layer):
    """Classes' weights with the sampled softmax loss, for `fit`.

    Called with (hidden, labels) it adds the mean loss of the batch to the model's losses and returns hidden; `logits`
    gives the scores of all classes. Compile the model without a loss. Labels of shape (batch, positives), -1 for none,
    make it multi-label: the positives of a row are never among its negatives, and their losses are averaged.

    Before a batch the sampler takes the new weights of the classes of the batch before, and every `refresh` batches
    those of all: optimisers with momentum move classes that were not drawn.

    Args:
        classes: how many.
        sampler: draws the negatives; None: all classes, the full softmax.
        samples: negatives of an example.
        prediction: "signed" or "absolute", see `sampled_softmax_loss`.
        refresh: batches between two builds of the sampler.
        seed: of the draws.
    """

    def __init__(
        self,
        classes: int,
        sampler: Sampler | None = None,
        samples: int = 64,
        prediction: str = "signed",
        refresh: int = 100,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.classes = checks.integer("classes", classes, 2)
        if sampler is not None and not isinstance(sampler, Sampler):
            raise checks.error("sampler", "a `Sampler` or None", sampler)
        self.sampler = sampler
        self.samples = checks.integer("samples", samples, 1)
        self.prediction = checks.choice("prediction", prediction, PREDICTIONS)
        self.refresh = checks.integer("refresh", refresh, 1)
        self.seed = checks.integer("seed", seed, 0)
        self._batches = 0
        self._touched = np.zeros(0, np.int64)

    def build(self, input_shape: Any) -> None:
        dimension = input_shape[0][-1] if isinstance(input_shape[0], (tuple, list)) else input_shape[-1]
        self.kernel = self.add_weight((self.classes, dimension), "glorot_uniform", name="kernel")

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        hidden, labels = inputs
        self.add_loss(ops.mean(self.example_loss(hidden, labels)))
        return hidden

    def logits(self, hidden: Any) -> Any:
        """Returns the scores of all classes, (batch, classes)."""
        return ops.matmul(hidden, ops.transpose(self.kernel))

    def example_loss(self, hidden: Any, labels: Any) -> Any:
        """Returns the loss of each example, (batch,)."""
        labels = ops.cast(labels, "int64")
        several = labels if len(labels.shape) == 2 else labels[:, None]
        there = several >= 0
        known = ops.maximum(several, 0)
        positive = ops.einsum("bd,bpd->bp", hidden, ops.take(self.kernel, known, axis=0))
        if self.sampler is None:
            everything = self.logits(hidden)
            everything = ops.abs(everything) if self.prediction == "absolute" else everything
            mark = ops.sum(ops.one_hot(several, self.classes), axis=1) > 0  # one_hot of -1 is all zeros.
            rest = ops.logsumexp(ops.where(mark, ops.full_like(everything, -1e9), everything), axis=-1)
            score = ops.abs(positive) if self.prediction == "absolute" else positive
            losses = ops.softplus(rest[:, None] - score)
        else:
            ids, logs = tf.numpy_function(
                self._draw,
                [tf.stop_gradient(hidden), several, tf.convert_to_tensor(self.kernel)],
                (tf.int64, tf.float32),
            )
            ids = tf.ensure_shape(ids, (None, self.samples))
            logs = tf.ensure_shape(logs, (None, self.samples))
            negative = ops.einsum("bd,bsd->bs", hidden, ops.take(self.kernel, ids, axis=0))
            hits = ops.any(ids[:, :, None] == several[:, None, :], axis=-1)
            losses = sampled_softmax_loss(positive, negative, logs, hits, self.prediction)
        there = ops.cast(there, losses.dtype)
        return ops.sum(losses * there, axis=1) / ops.maximum(ops.sum(there, axis=1), 1.0)

    def _draw(self, hidden: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.sampler is not None
        if self._batches % self.refresh == 0:
            self.sampler.build(weights)
        elif len(self._touched):
            self.sampler.update(self._touched, weights[self._touched])
        self._batches += 1
        drawn = self.sampler.sample(
            hidden, self.samples, positives=labels, seed=(self.seed * 1_000_003 + self._batches) % (1 << 62)
        )
        self._touched = np.unique(np.concatenate([drawn.ids.ravel(), labels[labels >= 0]]))
        return drawn.ids, drawn.log_probability

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape[0]

    def get_config(self) -> dict[str, Any]:
        sampler = None
        if self.sampler is not None:
            config = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in self.sampler.get_config().items()}
            sampler = {"class": type(self.sampler).__name__, "config": config}
        own = ("classes", "samples", "prediction", "refresh", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}, "sampler": sampler}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SampledSoftmax:
        described = config.pop("sampler", None)
        if described is not None:
            from tfkit.training import sampled_softmax

            if described["class"] not in sampled_softmax.__all__ or not described["class"].endswith("Sampler"):
                raise checks.error("sampler", "a sampler of tfkit", described["class"])
            described = getattr(sampled_softmax, described["class"])(**described["config"])
        return cls(sampler=described, **config)
