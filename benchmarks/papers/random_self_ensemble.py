"""Random self-ensemble on Fashion-MNIST under Carlini and Wagner's attack over c, as Liu et al. have it.

    python benchmarks/papers/random_self_ensemble.py --cache build/rse   # about 25 minutes on one core
    python benchmarks/papers/random_self_ensemble.py --quick             # few images and steps: does it run?

Liu, Cheng, Zhang, Hsieh, https://arxiv.org/abs/1712.00673, figure 4: accuracy on CIFAR-10 under the attack at growing
c, the weight of the misclassification in |x' - x|^2 + c max(margin, 0). Three networks of the same layers, trained on
20,000 images of Fashion-MNIST: plain; single noise (noise before the first convolution only, the mean of 10 draws);
and RSE (noise before every convolution, the mean of 10 draws). RSE is also asked for one draw only. The attack is that
of the paper's section 4: it knows everything, and against a random network every step takes the mean of the gradients
of 10 draws (expectation over transformation). An example counts as right if the network is right at the last point
that the attack holds for the best; for a random network that is asked once, with draws that the attack has not seen.
The summed difference is over all c.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np
import tensorflow as tf

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from tfkit import data
from tfkit.robustness.defenses import RandomSelfEnsemble

WEIGHTS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: Abstract of the paper: accuracy in percent under the attack within a distortion; without an attack 92.
PAPER = {"network": "VGG16, CIFAR-10", "no defense": 10.0, "best earlier": 48.0, "RSE": 86.0}
SAMPLES = 10
#: Deviations of the noise layers; None: no noise.
NOISE: dict[str, dict[str, float] | None] = {
    "plain": None,
    "single noise": {"init_noise": 0.2, "inner_noise": 0.0},
    "RSE": {"init_noise": 0.2, "inner_noise": 0.1},
}


def network(shape: tuple[int, ...], seed: int) -> keras.Model:
    """Four convolutions and a fully connected layer."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inputs = x = keras.Input(shape)
    for filters, strides in ((16, 1), (32, 2), (32, 1), (64, 2)):
        x = layers.Conv2D(filters, 3, strides, "same", activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x)))


def train(dataset: data.Dataset, noise: dict[str, float] | None, epochs: int, seed: int) -> keras.Model:
    """Adam with cosine decay."""
    model = network(dataset.input_shape, seed)
    trained = model if noise is None else RandomSelfEnsemble(model, samples=SAMPLES, seed=seed, **noise)
    schedule = keras.optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(dataset.y_train) // 64))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    trained.compile(keras.optimizers.Adam(schedule), loss, metrics=["accuracy"], jit_compile=False)
    trained.fit(dataset.x_train, dataset.y_train, batch_size=64, epochs=epochs, verbose=0)
    return trained


def carlini_wagner(scores: Any, x: Any, y: Any, weight: float, steps: int, rate: float = 0.01) -> Any:
    """Minimises |x' - x|^2 + weight max(margin, 0) in tanh space by Adam, at one c, as the paper's figure has it.

    Args:
        scores: to logits; a random network gives another draw each time, and takes the mean over draws itself.
        x: (batch, height, width, channels), in [0, 1].
        y: (batch,).
        weight: c.
        steps, rate: of Adam.

    Returns:
        For each example, the point with the smallest distance among those that were misclassified, or else the last.
    """
    # Inputs at the bounds would have no finite place in tanh space.
    place = tf.math.atanh((2 * x - 1) * 0.999999)
    wanted = tf.one_hot(y, 10)
    spread = [-1, 1, 1, 1]

    def body(step: Any, w: Any, first: Any, second: Any, best: Any, distance: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(w)
            points = (tf.tanh(w) + 1) / 2
            logits = scores(points)
            margin = tf.reduce_sum(wanted * logits, 1) - tf.reduce_max(logits - 1e9 * wanted, 1)
            squared = tf.reduce_sum((points - x) ** 2, axis=[1, 2, 3])
            value = tf.reduce_sum(squared + weight * tf.maximum(margin, 0.0))
        slope = tape.gradient(value, w)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        time = tf.cast(step + 1, tf.float32)
        w -= rate * (first / (1 - 0.9**time)) / (tf.sqrt(second / (1 - 0.999**time)) + 1e-8)
        better = (margin < 0) & (squared < distance)
        best = tf.where(tf.reshape(better, spread), points, best)
        return step + 1, w, first, second, best, tf.where(better, squared, distance)

    zeros, far = tf.zeros_like(x), tf.fill(tf.shape(y), np.float32(np.inf))
    _, w, _, _, best, distance = tf.while_loop(lambda step, *_: step < steps, body, (0, place, zeros, zeros, x, far))
    return tf.where(tf.reshape(distance < np.inf, spread), best, (tf.tanh(w) + 1) / 2)


def accuracies(models: dict[str, Any], x: np.ndarray, y: np.ndarray, steps: int) -> dict[str, dict[str, float]]:
    """Returns for each network its accuracy in percent: clean, and at each c."""
    rows: dict[str, dict[str, float]] = {}
    labels = tf.constant(y)
    for name, (attacked, predicts) in models.items():

        @tf.function
        def attack(points: Any, classes: Any, weight: Any, attacked: Any = attacked) -> Any:
            return carlini_wagner(attacked, points, classes, weight, steps)

        def accuracy(points: Any, predicts: Any = predicts) -> float:
            found = np.concatenate([np.asarray(predicts(points[at : at + 100])) for at in range(0, len(y), 100)])
            return 100 * float(np.mean(found.argmax(axis=1) == y))

        rows[name] = {"clean": accuracy(tf.constant(x))}
        for weight in WEIGHTS:
            parts = [
                attack(tf.constant(x[at : at + 100]), labels[at : at + 100], tf.constant(weight))
                for at in range(0, len(y), 100)
            ]
            rows[name][str(weight)] = accuracy(tf.concat(parts, axis=0))
        say(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in rows[name].items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=200, help="test images that are attacked")
    parser.add_argument("--steps", type=int, default=200, help="of the attack at each c")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="few images and steps; writes no result")
    parser.add_argument("--cache", type=Path, help="folder that keeps trained networks")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "random_self_ensemble.json")
    arguments = parser.parse_args()
    dataset = data.load("fashion_mnist").subset(test=arguments.images)
    if arguments.quick:
        arguments.steps, arguments.epochs = 3, 1
        dataset = dataset.subset(train=500, test=20)
    settings = f"{len(dataset.y_train)}_{arguments.epochs}_{arguments.seed}"
    networks = {
        name: kept(
            arguments.cache,
            f"{name}_{settings}".replace(" ", "_"),
            lambda noise=noise: train(dataset, noise, arguments.epochs, arguments.seed),
        )
        for name, noise in NOISE.items()
    }
    # What is attacked, and what answers. A random network is attacked through its mean over draws.
    models = {name: (network, network) for name, network in networks.items()}
    models["RSE, one draw"] = (networks["RSE"], networks["RSE"].single)
    rows = accuracies(models, dataset.x_test, dataset.y_test, arguments.steps)
    if arguments.quick:
        return
    mean = {name: float(np.mean([row[str(weight)] for weight in WEIGHTS])) for name, row in rows.items()}
    common.write_result(
        arguments.out,
        {
            "rse_minus_plain_points": mean["RSE"] - mean["plain"],
            "rse_minus_single_points": mean["RSE"] - mean["single noise"],
            "rse_clean_accuracy": rows["RSE"]["clean"],
            "plain_clean_accuracy": rows["plain"]["clean"],
        },
        data={"name": dataset.name, "train": len(dataset.y_train), "attacked": len(dataset.y_test)},
        seeds=[arguments.seed],
        results={"paper": PAPER, "weights": WEIGHTS, "steps": arguments.steps, "samples": SAMPLES, "accuracy": rows,
                 "mean_over_weights": mean},
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
