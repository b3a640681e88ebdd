"""Importance sampling: of many examples, scored by a forward pass, train on those whose gradients matter.

Paper: Katharopoulos, Fleuret. Not all samples are created equal: deep learning with importance sampling. ICML 2018,
https://arxiv.org/abs/1803.00942, algorithm 1: presample B examples, score each by the gradient at the last layer's
pre-activations, draw b of them in proportion, weight each by 1 / (B p), as soon as the smoothed tau, by which the batch
would have to grow for the same gain, exceeds (B + 3 b) / (3 b); before that, train on b uniform ones.

Differs: `fit` hands over batches of B examples, also before sampling is on, when the first b of them are trained on: an
epoch is always N / B steps. Scores come from inference mode. `resampling="systematic"` draws the same number of
each example on average with less variance.
"""

from __future__ import annotations

import time
from typing import Any, Literal, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from tfkit.internal import checks
from tfkit.training import sampling
from tfkit.training.wrapper import Wrapper, batch_size, mean_reduction, rows


class SamplingReport(NamedTuple):
    """What importance sampling gained and cost on given examples.

    Attributes:
        tau: the paper's estimate from the scores.
        variance_ratio: variance of the sampled gradient over that of the uniform one, exact; below 1 is a gain.
        scoring_ms: time to score a presample of B examples, in milliseconds.
        step_ms: time of a plain training step's gradient on b examples, in milliseconds.
        time_ratio: (scoring_ms + step_ms) / step_ms.
        pays: whether the variance falls by more than the time grows: variance_ratio * time_ratio < 1.
        steps, sampled_steps: of training so far, and those of them that sampled.
    """

    tau: float
    variance_ratio: float
    scoring_ms: float
    step_ms: float
    time_ratio: float
    pays: bool
    steps: int
    sampled_steps: int

    def __str__(self) -> str:
        verdict = "pays" if self.pays else "does not pay: train uniformly, or with a larger batch"
        return (
            f"importance sampling {verdict}. Variance x {self.variance_ratio:.2f}, time x {self.time_ratio:.2f}, "
            f"tau {self.tau:.2f}; {self.sampled_steps} of {self.steps} steps sampled"
        )


@keras.saving.register_keras_serializable(package="tfkit")
class ImportanceSampling(Wrapper):
    """Wraps a model so that `fit` trains it with importance sampling.

    Losses, metrics, callbacks and weights of examples work as ever; metrics are those of the examples that were drawn,
    weighted as their losses are. Pass `fit` the presample size as `batch_size`.

    Args:
        model: the model to train, with one output.
        batch_size: b, examples in a step.
        presample: B / b as `fit` is called; sets the threshold only.
        threshold: of tau; None: (B + 3 b) / (3 b). 0 samples from the first step on.
        smoothing_factor: of the moving average of tau.
        score: "gradient_norm", "loss" or "uniform".
        resampling: "multinomial" or "systematic".
        seed: of the draws.

    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
    >>> sampled = ImportanceSampling(model, batch_size=8, presample=4)
    >>> sampled.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = sampled.fit(np.ones((64, 2)), np.arange(64) % 3, batch_size=32, verbose=0)
    """

    def __init__(
        self,
        model: keras.Model,
        batch_size: int = 32,
        presample: float = 3.0,
        *,
        threshold: float | None = None,
        smoothing_factor: float = 0.9,
        score: Literal["gradient_norm", "loss", "uniform"] = "gradient_norm",
        resampling: Literal["multinomial", "systematic"] = "multinomial",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.presample = checks.number("presample", presample, 1)
        self.threshold = (presample + 3) / 3 if threshold is None else checks.number("threshold", threshold, 0)
        self.smoothing_factor = checks.number("smoothing_factor", smoothing_factor, 0, 1, open_high=True)
        self.score = checks.choice("score", score, sampling.SCORES)
        self.resampling = checks.choice("resampling", resampling, sampling.RESAMPLING)
        self.seed = checks.integer("seed", seed, 0)
        make = {"initializer": "zeros", "trainable": False, "aggregation": "mean"}
        self._tau = self.add_weight(name="tau", **make)
        self._steps = self.add_weight(name="steps", **make)
        self._sampled = self.add_weight(name="sampled_steps", **make)

    def compile(self, *arguments: Any, **keywords: Any) -> None:
        """As `keras.Model.compile`; the loss must be one mean over examples, which is Keras' default."""
        super().compile(*arguments, **keywords)
        if isinstance(self.loss, (list, tuple, dict)):
            raise checks.error("loss", "one loss of one output", self.loss, "Scores of several losses do not compare.")
        if not mean_reduction(self.loss):
            raise checks.error("loss", "a loss with reduction='sum_over_batch_size'", self.loss)

    @property
    def tau(self) -> float:
        """The smoothed tau."""
        return float(self._tau)

    def scores(self, x: Any, y: Any, sample_weight: Any = None) -> Any:
        """Returns the scores of examples, (batch,)."""
        found, _ = sampling.scores_of(self.model, self.loss, x, y, self.score)
        if sample_weight is not None:
            found *= tf.cast(tf.reshape(sample_weight, tf.shape(found)), found.dtype)
        return found

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        given = batch_size(x)
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        count = tf.minimum(given, max(self.batch_size // replicas, 1))
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group if context is not None else 0
        on = self._tau > self.threshold if self.threshold > 0 else tf.constant(True)

        def draw() -> Any:
            p = sampling.probabilities(self.scores(x, y, sample_weight))
            step = tf.cast(self.optimizer.iterations, tf.int32)
            indices = sampling.resample(p, count, tf.stack([self.seed + 7919 * replica, step]), self.resampling)
            return indices, sampling.importance_weights(p, indices), sampling.variance_reduction(p)

        def first() -> Any:
            # The scores of what is trained on estimate tau, without another pass over the rest.
            part = slice(0, count)
            p = sampling.probabilities(self.scores(rows(x, part), rows(y, part), rows(sample_weight, part)))
            return tf.range(count), tf.ones((count,), p.dtype), sampling.variance_reduction(p)

        indices, weights, tau = tf.cond(on, draw, first)
        weights.set_shape((None,))
        if context is not None and replicas > 1:
            tau = context.all_reduce(tf.distribute.ReduceOp.MEAN, tau)
        chosen = rows(sample_weight, indices)
        if chosen is not None:
            weights *= tf.cast(tf.reshape(chosen, tf.shape(weights)), weights.dtype)
        result = super().train_step((rows(x, indices), rows(y, indices), weights))
        first_step = self._steps < 0.5
        average = self.smoothing_factor * self._tau + (1 - self.smoothing_factor) * tau
        self._tau.assign(tf.where(first_step, tau, average))
        self._steps.assign(self._steps + 1)
        self._sampled.assign(self._sampled + tf.cast(on, tf.float32))
        return result

    def report(self, x: Any, y: Any, *, seed: int = 0, repeats: int = 5) -> SamplingReport:
        """Measures on a presample what sampling gains in variance and costs in time.

        Args:
            x, y: NumPy arrays; B = `presample` times `batch_size` of them are drawn.
            seed: of the draw.
            repeats: timings, of which the least is taken.
        """
        wanted = min(round(self.presample * self.batch_size), len(x))
        chosen = np.random.default_rng(seed).choice(len(x), wanted, replace=False)
        x, y = tf.convert_to_tensor(x[chosen]), tf.convert_to_tensor(y[chosen])
        p = sampling.probabilities(self.scores(x, y))
        uniform, sampled = sampling.gradient_variance(self.model, self.loss, x, y, p.numpy())
        score = tf.function(lambda: self.scores(x, y))
        part = slice(0, self.batch_size)
        step = tf.function(lambda: self._gradient(rows(x, part), rows(y, part)))
        scoring, stepping = ([_seconds(run) for _ in range(repeats + 1)] for run in (score, step))
        scoring_ms, step_ms = (1000 * min(each[1:]) for each in (scoring, stepping))
        ratio, cost = sampled / max(uniform, 1e-30), (scoring_ms + step_ms) / step_ms
        return SamplingReport(
            float(sampling.variance_reduction(p)), ratio, scoring_ms, step_ms, cost, ratio * cost < 1,
            round(float(self._steps)), round(float(self._sampled)),
        )  # fmt: skip

    def _gradient(self, x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(sampling.per_example_loss(self.loss, y, self.model(x, training=True)))
        return tape.gradient(loss, self.model.trainable_weights)

    def get_config(self) -> dict[str, Any]:
        names = ("batch_size", "presample", "threshold", "smoothing_factor", "score", "resampling", "seed")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
