"""Feature collision: clean-label poison that looks like one class and has the features of one chosen input of another.

Paper: Shafahi, Huang, Najibi, Suciu, Studer, Dumitras, Goldstein. Poison frogs! Targeted clean-label poisoning attacks
on neural networks. NeurIPS 2018, https://arxiv.org/abs/1804.00792, algorithm 1: forward steps on |f(x) - f(t)|^2,
backward steps x = (x + rate beta b) / (1 + beta rate) towards the base image; watermarking, section 4.

Differs: beta is scaled to the squared sizes of features and inputs, as the authors' program does for its network. The
rate of each poison is halved when its objective rises. Poisons take the place of their base images instead of being
added.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tfkit.data import Dataset
from tfkit.internal import checks
from tfkit.robustness.poisoning import record
from tfkit.robustness.poisoning.features import feature_model
from tfkit.robustness.poisoning.record import PoisonRecord


def collide(
    extract: Any, base: Any, start: Any, wanted: Any, *, beta: Any, rate: float, steps: int, bounds: tuple[float, float]
) -> Any:
    """Minimises |f(x) - wanted|^2 + beta |x - base|^2 by forward-backward splitting, each row for itself.

    Args:
        extract: f, from (poisons, ...) to (poisons, features).
        base: (poisons, ...), the images that the poisons shall look like.
        start: (poisons, ...), where the search begins.
        wanted: (features,) or (poisons, features).
        beta: weight of the likeness.
        rate: of the forward steps.
        steps: how many.
        bounds: of the inputs.

    Returns:
        The poisons, shaped as `base`.
    """
    count = tf.shape(base)[0]
    spread = [-1] + [1] * (len(base.shape) - 1)

    def distance(x: Any) -> Any:
        return tf.reduce_sum((extract(x) - wanted) ** 2, axis=1)

    def objective(x: Any) -> Any:
        return distance(x) + beta * tf.reduce_sum(tf.reshape((x - base) ** 2, (count, -1)), axis=1)

    def body(step: Any, x: Any, value: Any, rates: Any) -> tuple[Any, Any, Any, Any]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(distance(x))
        wide = tf.reshape(rates, spread)
        forward = x - wide * tape.gradient(total, x)
        moved = tf.clip_by_value((forward + wide * beta * base) / (1 + beta * wide), *bounds)
        reached = objective(moved)
        better = reached < value
        return (
            step + 1,
            tf.where(tf.reshape(better, spread), moved, x),
            tf.where(better, reached, value),
            tf.where(better, rates, rates / 2),
        )

    rates = tf.fill((count,), tf.cast(rate, base.dtype))
    return tf.while_loop(lambda step, *_: step < steps, body, (0, start, objective(start), rates))[1]


def feature_collision(
    dataset: Dataset,
    model: keras.Model,
    target: np.ndarray,
    base_class: int,
    rate: float = 0.01,
    *,
    layer: str | None = None,
    beta: float = 0.25,
    opacity: float = 0.0,
    steps: int = 200,
    learning_rate: float = 0.01,
    bounds: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> tuple[Dataset, PoisonRecord]:
    """Makes images of one class collide with a chosen input in feature space; every label stays right.

    A network that is trained further on the result, with these features, draws its border so that `target` falls into
    `base_class`.

    Args:
        dataset: left as it is.
        model: a trained network with the victim's features.
        target: the input that shall be mistaken, shaped as one example.
        base_class: the class it shall be taken for.
        rate: share of all training examples that is changed.
        layer: of the features; None: what the last layer with weights receives.
        beta: weight of the likeness to the base image against that to the target's features; 0 forgets the image.
        opacity: of the target laid over the base images at the start and in what they shall look like.
        steps: of the search.
        learning_rate: of its forward steps, in units of the squared size of the features.
        bounds: of the inputs.
        seed: chooses the base images.

    Returns:
        The poisoned data set, and what was changed; `settings` says how near the features came.
    """
    target = np.asarray(target, dataset.x_train.dtype)
    if target.shape != dataset.input_shape:
        raise checks.error("target", f"one input, of shape {dataset.input_shape}", target)
    checks.number("opacity", opacity, 0, 1)
    checks.number("beta", beta, 0)
    checks.number("learning_rate", learning_rate, 1e-12)
    checks.integer("steps", steps, 1)
    candidates = np.flatnonzero(dataset.y_train == record.checked_class("base_class", base_class, dataset))
    count = record.count_of(rate, dataset, candidates)
    indices = np.random.default_rng(seed).choice(candidates, count, replace=False)
    extract = feature_model(model, layer)
    base = tf.constant((1 - opacity) * dataset.x_train[indices] + opacity * target, tf.float32)
    wanted = extract(target[None])
    # Both terms relative to where they start: |f(b) - f(t)|^2 is 1, and so is a change of x by a unit a pixel.
    scale = tf.reduce_mean(tf.reduce_sum((extract(base) - wanted) ** 2, axis=1))
    weight = beta / float(np.prod(dataset.input_shape))

    @tf.function
    def search(base: Any) -> Any:
        def scaled(x: Any) -> Any:
            return extract(x, training=False) / tf.sqrt(scale)

        return collide(
            scaled, base, base, wanted / tf.sqrt(scale), beta=weight, rate=learning_rate * base.shape[1], steps=steps,
            bounds=bounds,
        )  # fmt: skip

    found = search(base).numpy()
    before, after = (np.linalg.norm(extract(x) - wanted, axis=1).mean() for x in (base, found))
    settings = {
        "base_class": base_class,
        "beta": beta,
        "opacity": opacity,
        "feature_distance": {"before": float(before), "after": float(after)},
    }
    inputs = found.astype(dataset.x_train.dtype)
    return record.poisoned(dataset, indices, method="feature_collision", seed=seed, inputs=inputs, settings=settings)
