"""Randomized smoothing: the class that wins under Gaussian noise, with a radius within which it provably keeps winning.

Paper: Cohen, Rosenfeld, Kolter. Certified adversarial robustness via randomized smoothing. ICML 2019,
https://arxiv.org/abs/1902.02918: theorem 1 and the programs PREDICT and CERTIFY of section 3.2. The radius is sigma
times the normal quantile of a lower confidence bound (Clopper, Pearson) on the share of draws that give the class.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from scipy import stats

from tfkit.internal import checks

ABSTAIN = -1


class Certificate(NamedTuple):
    """What is certain, with probability 1 - alpha for each example.

    Attributes:
        classes: int64, (examples,): the smoothed prediction, or -1 where nothing can be said.
        radius: float64, (examples,): L2 radius within which that prediction cannot change; 0 where nothing can be said.
        lower: float64, (examples,): confidence bound on the share of draws that give the class.
    """

    classes: np.ndarray
    radius: np.ndarray
    lower: np.ndarray

    @property
    def abstained(self) -> np.ndarray:
        """Bool, (examples,): where nothing can be said."""
        return self.classes == ABSTAIN

    def certified_accuracy(self, y: Any, radius: float = 0.0) -> float:
        """Returns the share of examples that are right and certified for at least a radius."""
        return float(np.mean((self.classes == np.asarray(y)) & (self.radius >= radius)))


def lower_confidence_bound(hits: Any, draws: int, alpha: float) -> np.ndarray:
    """Returns the one-sided lower bound of Clopper and Pearson on a probability, at confidence 1 - alpha.

    >>> float(np.round(lower_confidence_bound(100, 100, 0.001), 6))  # alpha ** (1 / 100)
    0.933254
    """
    hits = np.asarray(hits)
    return np.where(hits > 0, stats.beta.ppf(alpha, np.maximum(hits, 1), draws - hits + 1), 0.0)


def certified_radius(lower: Any, sigma: float) -> np.ndarray:
    """Returns sigma times the normal quantile of the bound; 0 where that is at most a half."""
    lower = np.asarray(lower, np.float64)
    return np.where(lower > 0.5, sigma * stats.norm.ppf(np.maximum(lower, 0.5)), 0.0)


class RandomizedSmoothing:
    """A classifier smoothed by Gaussian noise.

    The base network should have been trained with the same noise, as by `keras.layers.GaussianNoise(sigma)` at its
    input.

    Args:
        model: a Keras model, or any function of tensors, to scores (batch, classes).
        sigma: deviation of the noise, in units of the input.
        batch_size: noisy inputs that go through the network together.
        seed: of the noise.
    """

    def __init__(self, model: Any, sigma: float, *, batch_size: int = 1000, seed: int = 0) -> None:
        if not callable(model):
            raise checks.error("model", "a Keras model or a function of tensors", model)
        self.model = model
        self.sigma = checks.number("sigma", sigma, 1e-12)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.seed = checks.integer("seed", seed, 0)
        self._calls = 0
        self._count = tf.function(self._counts, reduce_retracing=True)

    def counts(self, x: Any, draws: int) -> np.ndarray:
        """Counts the classes that noisy copies of each example get; every call draws anew.

        Args:
            x: (examples, ...).
            draws: noisy copies of each example.

        Returns:
            int64, (examples, classes); each row sums to `draws`.
        """
        x = np.asarray(x, np.float32)
        draws = checks.integer("draws", draws, 1)
        # So many examples at a time that a batch holds at least one draw of each.
        parts = []
        for at in range(0, len(x), self.batch_size):
            chunk = x[at : at + self.batch_size]
            self._calls += 1
            together = min(max(1, self.batch_size // len(chunk)), draws)
            seed = np.array([self.seed, self._calls], np.int32)
            parts.append(self._count(tf.constant(chunk), together, tf.constant(draws), tf.constant(seed)).numpy())
        return np.concatenate(parts).astype(np.int64)

    def _counts(self, x: Any, together: int, draws: Any, seed: Any) -> Any:
        examples = tf.shape(x)[0]
        classes = int(self._scores(x[:1]).shape[-1])
        rounds = -(-draws // together)

        def body(at: Any, counted: Any) -> tuple[Any, Any]:
            drawn = tf.random.experimental.stateless_fold_in(seed, at)
            noise = tf.random.stateless_normal(tf.concat([[together], tf.shape(x)], 0), drawn)
            noisy = tf.reshape(x + self.sigma * noise, tf.concat([[together * examples], tf.shape(x)[1:]], 0))
            found = tf.reshape(tf.argmax(self._scores(noisy), axis=-1), (together, examples))
            # The last round may draw more than are wanted.
            wanted = tf.cast(at * together + tf.range(together) < draws, tf.int32)
            return at + 1, counted + tf.reduce_sum(
                tf.one_hot(found, classes, dtype=tf.int32) * wanted[:, None, None], 0
            )

        return tf.while_loop(lambda at, _: at < rounds, body, (0, tf.zeros((examples, classes), tf.int32)))[1]

    def _scores(self, x: Any) -> Any:
        return self.model(x, training=False) if hasattr(self.model, "layers") else self.model(x)

    def predict(self, x: Any, *, draws: int = 1000, alpha: float = 0.001) -> np.ndarray:
        """Returns the smoothed classes, int64, (examples,); -1 where the two leading classes are too close.

        Args:
            x: (examples, ...).
            draws: noisy copies of each example.
            alpha: probability of an answer that is not the smoothed class.
        """
        alpha = checks.number("alpha", alpha, 1e-12, 1, open_high=True)
        counted = self.counts(x, draws)
        order = np.argsort(-counted, axis=1, kind="stable")[:, :2]
        first, second = np.take_along_axis(counted, order, axis=1).T
        # Two-sided binomial test at one half: twice the lower tail of the second count.
        p_value = np.minimum(1.0, 2 * stats.binom.cdf(second, first + second, 0.5))
        return np.where(p_value <= alpha, order[:, 0], ABSTAIN)

    def certify(self, x: Any, *, selection_draws: int = 100, draws: int = 10_000, alpha: float = 0.001) -> Certificate:
        """Certifies the smoothed prediction of each example.

        Args:
            x: (examples, ...).
            selection_draws: noisy copies from which the class is guessed.
            draws: other copies, by which the guess is confirmed; they bound the radius: 10,000 certify up to 3.2 sigma.
            alpha: probability that a certificate is wrong.
        """
        alpha = checks.number("alpha", alpha, 1e-12, 1, open_high=True)
        # The guess must not see the draws that confirm it.
        guess = self.counts(x, selection_draws).argmax(axis=1)
        hits = np.take_along_axis(self.counts(x, draws), guess[:, None], axis=1)[:, 0]
        lower = lower_confidence_bound(hits, draws, alpha)
        sure = lower > 0.5
        return Certificate(np.where(sure, guess, ABSTAIN), certified_radius(lower, self.sigma), lower)
