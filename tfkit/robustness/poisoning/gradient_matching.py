"""Gradient matching: clean-label poison whose training gradient points where the attacker's would.

Paper: Geiping, Fowl, Huang, Czaja, Taylor, Moeller, Goldstein. Witches' brew: industrial scale data poisoning via
gradient matching. ICLR 2021, https://arxiv.org/abs/2009.02276, equation 3 and algorithm 1: perturbations of at most
epsilon a pixel that minimise 1 - cos(gradient of the target's adversarial loss, gradient of the poisons' loss), by
Adam on signs, with restarts.

Differs: the poisons are matched all at once, without data augmentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.data import Dataset
from tfkit.internal import checks
from tfkit.robustness.poisoning import record
from tfkit.robustness.poisoning.record import PoisonRecord

#: Shares of the steps after which the learning rate is divided by ten.
DROPS = (0.375, 0.625, 0.875)


def mismatch(wanted: Sequence[Any], found: Sequence[Any]) -> Any:
    """Returns 1 - the cosine between two gradients over all weights together."""
    inner = tf.add_n([tf.reduce_sum(a * b) for a, b in zip(wanted, found, strict=True)])
    sizes = [tf.add_n([tf.reduce_sum(part**2) for part in parts]) for parts in (wanted, found)]
    return 1 - inner / (tf.sqrt(sizes[0] * sizes[1]) + 1e-12)


def match(
    model: keras.Model, loss: Any, wanted: Sequence[Any], base: Any, labels: Any, start: Any, *, epsilon: float,
    rate: float, steps: int, bounds: tuple[float, float],
) -> tuple[Any, Any]:  # fmt: skip
    """Searches perturbations of poisons by Adam on the signs of the gradient.

    Args:
        model: to the predictions that `loss` takes.
        loss: mean loss of (labels, predictions).
        wanted: the attacker's gradient, one tensor a trainable weight.
        base: (poisons, ...), clean images.
        labels: (poisons,), theirs.
        start: (poisons, ...), first perturbations.
        epsilon: largest change of a pixel.
        rate: of Adam, in units of the input.
        steps: how many.
        bounds: of the inputs.

    Returns:
        The perturbations, (poisons, ...), and their mismatch.
    """
    weights = model.trainable_variables

    def value_of(delta: Any) -> Any:
        with tf.GradientTape() as inner:
            value = loss(labels, model(base + delta, training=False))
        return mismatch(wanted, inner.gradient(value, [weight.value for weight in weights]))

    def body(step: Any, delta: Any, first: Any, second: Any) -> tuple[Any, Any, Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(delta)
            value = value_of(delta)
        direction = tf.sign(tape.gradient(value, delta))
        first, second = 0.9 * first + 0.1 * direction, 0.999 * second + 0.001 * direction**2
        time = tf.cast(step + 1, tf.float32)
        update = (first / (1 - 0.9**time)) / (tf.sqrt(second / (1 - 0.999**time)) + 1e-8)
        dropped = tf.reduce_sum([tf.cast(time > share * steps, tf.float32) for share in DROPS])
        delta = tf.clip_by_value(delta - rate * 0.1**dropped * update, -epsilon, epsilon)
        return step + 1, tf.clip_by_value(base + delta, *bounds) - base, first, second

    zeros = tf.zeros_like(base)
    delta = tf.while_loop(lambda step, *_: step < steps, body, (0, start, zeros, zeros))[1]
    return delta, value_of(delta)


def gradient_matching(
    dataset: Dataset,
    model: keras.Model,
    target: np.ndarray,
    adversarial_class: int,
    rate: float = 0.01,
    *,
    epsilon: float = 16 / 255,
    steps: int = 250,
    learning_rate: float = 0.1,
    restarts: int = 8,
    from_logits: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> tuple[Dataset, PoisonRecord]:
    """Perturbs images of one class so that training on them makes a chosen input fall into that class.

    Args:
        dataset: left as it is.
        model: a network trained on the clean data, of the victim's kind.
        target: the input that shall be mistaken, shaped as one example.
        adversarial_class: the class it shall be taken for; its images are perturbed, and keep their labels.
        rate: share of all training examples that is changed.
        epsilon: largest change of a pixel.
        steps: of each search.
        learning_rate: of Adam on signs, in units of epsilon.
        restarts: searches from random perturbations, of which the best counts.
        from_logits: whether the model gives logits.
        bounds: of the inputs.
        seed: of the choice and the starts.

    Returns:
        The poisoned data set, and what was changed; `settings` has the mismatch of each restart.
    """
    target = np.asarray(target, dataset.x_train.dtype)
    if target.shape != dataset.input_shape:
        raise checks.error("target", f"one input, of shape {dataset.input_shape}", target)
    checks.number("epsilon", epsilon, 0)
    checks.number("learning_rate", learning_rate, 0)
    steps, restarts = checks.integer("steps", steps, 1), checks.integer("restarts", restarts, 1)
    label = record.checked_class("adversarial_class", adversarial_class, dataset)
    candidates = np.flatnonzero(dataset.y_train == label)
    count = record.count_of(rate, dataset, candidates)
    rng = np.random.default_rng(seed)
    indices = rng.choice(candidates, count, replace=False)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    base = tf.constant(dataset.x_train[indices], tf.float32)
    labels = tf.fill((count,), label)
    weights = [weight.value for weight in model.trainable_variables]
    with tf.GradientTape() as tape:
        value = loss(tf.constant([label]), model(target[None], training=False))
    wanted = tape.gradient(value, weights)

    @tf.function
    def search(start: Any) -> tuple[Any, Any]:
        return match(
            model, loss, wanted, base, labels, start, epsilon=epsilon, rate=learning_rate * epsilon, steps=steps,
            bounds=bounds,
        )  # fmt: skip

    found: list[tuple[float, np.ndarray]] = []
    for _ in range(restarts):
        start = tf.constant(rng.uniform(-epsilon, epsilon, base.shape), tf.float32)
        delta, value = search(tf.clip_by_value(base + start, *bounds) - base)
        found.append((float(value), delta.numpy()))
    best = min(found, key=lambda pair: pair[0])[1]
    inputs = np.clip(dataset.x_train[indices] + best, *bounds).astype(dataset.x_train.dtype)
    settings = {"adversarial_class": label, "epsilon": epsilon, "mismatches": [value for value, _ in found]}
    return record.poisoned(dataset, indices, method="gradient_matching", seed=seed, inputs=inputs, settings=settings)
