"""Defenses side by side: one network, the same digits, the same attacks.

    python benchmarks/compare_defenses.py --cache build/defenses   # about 25 minutes on one core
    python benchmarks/compare_defenses.py --quick                  # few digits, one epoch: does it run?

Every network has the same layers and starts from the same weights. The attack is projected gradient ascent with
restarts (40 steps), against random networks through the mean of the gradients of 8 draws, and against input
transformations both as they are and with the gradient passed straight through. Accuracies are in percent, on test
digits; an example counts only if it is right after every restart. Randomized smoothing is not attacked: its column is
what is certified, in L2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from tfkit import data
from tfkit.robustness import defenses
from tfkit.robustness.attacks.gradients import climb
from tfkit.robustness.attacks.norms import random_start

EPSILON = 0.2
RADII = (0.0, 0.05, 0.1, 0.2)
SIGMA = 0.5


def network(seed: int) -> keras.Model:
    """Two strided convolutions and a hidden layer."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(16, 4, 2, "same", activation="relu")(inputs)
    x = layers.Conv2D(32, 4, 2, "same", activation="relu")(x)
    x = layers.Dense(100, activation="relu")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def behind(layer: keras.Layer, model: keras.Model) -> keras.Model:
    """Returns the model with a layer before it."""
    inputs = keras.Input(model.input_shape[1:])
    return keras.Model(inputs, model(layer(inputs)))


def trainers(batches: int, epochs: int) -> dict[str, Callable[[keras.Model], keras.Model]]:
    """Returns what wraps the network for training, by the defense's name."""
    settings: dict[str, Any] = {"warmup_steps": batches * epochs // 3, "seed": 0}
    return {
        "none": lambda model: model,
        "adversarial training": lambda model: defenses.AdversarialTraining(model, EPSILON, steps=7, **settings),
        "TRADES": lambda model: defenses.TRADES(model, EPSILON, steps=7, beta=3.0, **settings),
        "free": lambda model: defenses.FreeAdversarialTraining(model, EPSILON, batch_size=64, replays=4, **settings),
        "fast": lambda model: defenses.FastAdversarialTraining(model, EPSILON, **settings),
        "random self-ensemble": lambda model: defenses.RandomSelfEnsemble(model, seed=0),
        "gaussian noise": lambda model: behind(keras.layers.GaussianNoise(SIGMA), model),
    }


def train(name: str, x: np.ndarray, y: np.ndarray, epochs: int) -> keras.Model:
    """Trains one defense from the same start; free training gets a quarter of the epochs."""
    batches = -(-len(y) // 64)
    model = trainers(batches, epochs)[name](network(0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], jit_compile=False)
    callbacks = [defenses.CatastrophicOverfitting(x[:500], y[:500])] if name == "fast" else []
    count = max(1, epochs // 4) if name == "free" else epochs
    model.fit(x, y, batch_size=64, epochs=count, verbose=0, callbacks=callbacks)
    return getattr(model, "model", model) if name != "random self-ensemble" else model


def accuracy_by_radius(
    attacked: Callable[[Any], Any], answers: Callable[[Any], Any], x: np.ndarray, y: np.ndarray, restarts: int
) -> dict[str, float]:
    """Returns the accuracy of what answers, in percent, under attacks that follow the gradient of what is attacked."""
    points, labels = tf.constant(x), tf.constant(y)

    @tf.function
    def attack(radius: Any, seed: Any) -> Any:
        def loss(found: Any) -> Any:
            return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, attacked(found)))

        start = points + random_start(tf.shape(points), radius, "linf", seed)
        return climb(loss, points, start, radius, radius / 10, 40, "linf", (0.0, 1.0))

    def right(found: Any) -> np.ndarray:
        return np.asarray(answers(found)).argmax(axis=1) == y

    result = {}
    for radius in RADII:
        standing = right(points)
        for restart in range(restarts if radius else 0):
            standing &= right(attack(tf.constant(radius), tf.constant([restart, 7])))
        result[str(radius)] = 100 * float(standing.mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--digits", type=int, default=500, help="test digits that are attacked")
    parser.add_argument("--quick", action="store_true", help="few digits, one epoch; writes no result")
    parser.add_argument("--cache", type=Path, help="folder that keeps trained networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "compare_defenses.json")
    arguments = parser.parse_args()
    dataset, restarts, draws = data.load("mnist").subset(test=arguments.digits), 5, 10_000
    if arguments.quick:
        dataset, restarts, draws, arguments.epochs = dataset.subset(train=300, test=50), 1, 200, 1
    x, y = dataset.x_test, dataset.y_test
    table: dict[str, dict[str, Any]] = {}
    seconds: dict[str, int] = {}
    models: dict[str, keras.Model] = {}
    for name in trainers(1, 1):
        file = f"{name}_{arguments.epochs}_{len(dataset.y_train)}".replace(" ", "_")

        def make(name: str = name) -> keras.Model:
            started = time.process_time()
            model = train(name, dataset.x_train, dataset.y_train, arguments.epochs)
            seconds[name] = round(time.process_time() - started)  # A network that was kept has no time here.
            return model

        models[name] = kept(arguments.cache, file, make)
        # A random network answers by its own draws, and is attacked through the mean of others.
        table[name] = {"pgd": accuracy_by_radius(models[name], models[name], x, y, restarts)}
        say(f"{name}: {table[name]['pgd']}, trained in {seconds.get(name, 'unknown')} CPU seconds")
    rounded = defenses.BitDepthReduction(1, straight_through=True)
    transformed = behind(rounded, models["none"])

    def hidden(found: Any) -> Any:
        # Zero, as frameworks have the gradient of rounding; `tf.round` has none, which attacks refuse.
        return models["none"](tf.round(found)) + 0.0 * tf.reduce_sum(found)

    table["bit depth, gradient hidden"] = {"pgd": accuracy_by_radius(hidden, transformed, x, y, restarts)}
    table["bit depth, straight through"] = {"pgd": accuracy_by_radius(transformed, transformed, x, y, restarts)}
    smoothed = defenses.RandomizedSmoothing(models["gaussian noise"], SIGMA).certify(x[:100], draws=draws)
    table["randomized smoothing"] = {
        "certified_l2": {str(r): 100 * smoothed.certified_accuracy(y[:100], r) for r in (0.0, 0.5, 1.0, 1.5)},
        "abstained_percent": 100 * float(smoothed.abstained.mean()),
    }
    for name in ("bit depth, gradient hidden", "bit depth, straight through", "randomized smoothing"):
        say(f"{name}: {table[name]}")
    if arguments.quick:
        return
    figures = {
        f"{name.replace(' ', '_').replace('-', '_').replace(',', '')}_at_{radius}": row["pgd"][str(radius)]
        for name, row in table.items()
        if "pgd" in row
        for radius in (0.0, EPSILON)
    } | {
        f"randomized_smoothing_certified_l2_{radius}": share
        for radius, share in table["randomized smoothing"]["certified_l2"].items()
    }
    common.write_result(
        arguments.out,
        figures,
        data={"name": dataset.name, "train": len(dataset.y_train), "attacked": len(y)},
        seeds=[0],
        table=[
            {"defense": name, **{f"epsilon {radius}": row["pgd"][str(radius)] for radius in RADII}}
            | ({"training cpu s": seconds[name]} if name in seconds else {})
            for name, row in table.items()
            if "pgd" in row
        ],
        settings={"restarts": restarts, "epsilon": EPSILON},
        versions=common.versions("tensorflow", "keras", "numpy", "scipy"),
    )


if __name__ == "__main__":
    main()
