"""Adversarial training on MNIST at 0.3, as Madry et al. have it (https://arxiv.org/abs/1706.06083, table 1).

    python benchmarks/papers/adversarial_training.py --cache build/adversarial   # about half an hour on one core
    python benchmarks/papers/adversarial_training.py --quick                     # few digits, one epoch: does it run?

The paper trains two convolutions of 32 and 64 filters on 60,000 digits. Here the convolutions have 4x4 filters and
strides in place of pooling, which takes a sixth of the time, and there are 10,000 digits, of which 1,000 are held out.
So that they go further, each digit is shifted by up to two pixels, and the weights are averaged over the steps. The
radius grows over the first third of the training. The plan is judged on the held-out digits. The test set is attacked
once: 1,000 digits, 40 steps of 0.01 from each of 20 random starts; a digit counts only if it is right under all of
them.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import Shifted, kept
from tfkit import data
from tfkit.robustness.attacks.gradients import climb
from tfkit.robustness.attacks.norms import random_start
from tfkit.robustness.defenses import AdversarialTraining

EPSILON = 0.3
#: Table 1 of the paper: accuracy in percent, clean and under PGD with 40 steps and 20 restarts.
PAPER = {"training_digits": 60_000, "clean_accuracy": 98.8, "robust_accuracy": 90.4, "one_start": 93.2}


class Plan(NamedTuple):
    """How the network is trained."""

    epochs: int = 60
    steps: int = 8
    batch: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    averaging: float = 0.995
    warmup_share: float = 0.3


def network(seed: int) -> keras.Model:
    """Two strided convolutions and a hidden layer, 839,018 parameters."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inputs = keras.Input((28, 28, 1))
    x = layers.Conv2D(32, 4, 2, "same", activation="relu", kernel_initializer="he_normal")(inputs)
    x = layers.Conv2D(64, 4, 2, "same", activation="relu", kernel_initializer="he_normal")(x)
    x = layers.Dense(256, activation="relu", kernel_initializer="he_normal")(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(10)(x))


def train(x: np.ndarray, y: np.ndarray, plan: Plan, seed: int) -> keras.Model:
    """Trains on adversarial examples of shifted digits."""
    batches = Shifted(x, y, seed, plan.batch)
    total = plan.epochs * len(batches)
    model = network(seed)
    wrapped = AdversarialTraining(
        model, EPSILON, steps=plan.steps, warmup_steps=int(plan.warmup_share * total), seed=seed
    )
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-5, total, warmup_target=plan.learning_rate, warmup_steps=min(200, total // 4)
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=plan.weight_decay, clipnorm=1.0, use_ema=True, ema_momentum=plan.averaging
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapped.compile(optimizer, loss, metrics=["accuracy"])
    started = time.process_time()

    def report(epoch: int, logs: Any) -> None:
        found = ", ".join(f"{name} {value:.3f}" for name, value in logs.items())
        say(f"epoch {epoch + 1}: {found}; {time.process_time() - started:.0f} CPU seconds")

    wrapped.fit(
        batches, epochs=plan.epochs, shuffle=False, verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=report)],
    )  # fmt: skip
    return model


def attacked(model: keras.Model, x: np.ndarray, y: np.ndarray, restarts: int, steps: int = 40) -> dict[str, Any]:
    """Returns the accuracy in percent: clean, and after each further restart, the worst for each digit."""
    points, labels = tf.constant(x), tf.constant(y)

    def right(found: Any) -> Any:
        return tf.argmax(model(found, training=False), axis=1) == labels

    @tf.function
    def once(seed: Any) -> Any:
        def loss(found: Any) -> Any:
            scores = model(found, training=False)
            return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scores))

        start = points + random_start(tf.shape(points), EPSILON, "linf", seed)
        found = climb(loss, points, start, EPSILON, 0.01, steps, "linf", (0.0, 1.0))
        return right(found)

    standing = right(points).numpy()
    clean, by_restart = 100 * float(standing.mean()), []
    for restart in range(restarts):
        standing &= once(tf.constant([restart, 40])).numpy()
        by_restart.append(100 * float(standing.mean()))
    return {"clean_accuracy": clean, "robust_accuracy": by_restart[-1], "by_restart": by_restart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=Plan().epochs)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few digits, one epoch; writes no result")
    parser.add_argument("--cache", type=Path, help="folder that keeps the trained network")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "adversarial_training.json")
    arguments = parser.parse_args()
    plan, dataset, restarts = Plan(epochs=arguments.epochs), data.load("mnist"), 20
    if arguments.quick:
        plan, dataset, restarts = Plan(epochs=1, steps=2), dataset.subset(train=500, validation=50, test=100), 2
    name = "_".join(map(str, ["madry", *plan, len(dataset.y_train), arguments.seed]))
    started = time.process_time()
    model = kept(arguments.cache, name, lambda: train(dataset.x_train, dataset.y_train, plan, arguments.seed))
    seconds = time.process_time() - started
    held_out = attacked(model, dataset.x_validation, dataset.y_validation, min(restarts, 5))
    say(f"held out: {held_out}")
    test = dataset.subset(test=min(1000, len(dataset.y_test)))
    found = attacked(model, test.x_test, test.y_test, restarts)
    whole = 100 * float(np.mean(model.predict(dataset.x_test, verbose=0).argmax(1) == dataset.y_test))
    say(f"test: clean {whole:.2f} %, under attack {found['robust_accuracy']:.2f} %")
    if arguments.quick:
        return
    common.write_result(
        arguments.out,
        {"robust_accuracy": found["robust_accuracy"], "clean_accuracy": whole, "training_cpu_seconds": seconds},
        data={"name": "mnist", "train": len(dataset.y_train), "attacked": 1000, "test": len(dataset.y_test)},
        seeds=[arguments.seed],
        results={
            "paper": PAPER, "plan": plan._asdict(), "epsilon": EPSILON, "attack": {"steps": 40, "step_size": 0.01,
            "restarts": restarts}, "held_out": held_out, "test": found,
        },
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
