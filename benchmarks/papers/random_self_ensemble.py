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
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from benchmarks.networks import kept
from tfkit import data
from tfkit.robustness.attacks import CarliniWagnerL2
from tfkit.robustness.attacks.tanh_space import to_box
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


class AtOneC(CarliniWagnerL2):
    """Carlini-Wagner at one c, as the paper's figure has it: nothing is searched for, and nothing shortened.

    Where no point was misclassified the last one is returned: a random network may get it wrong when asked again.
    `initial_c` may be set anew between calls; it is no part of the graph.

    Args:
        steps: of Adam.
    """

    halvings = 0

    def __init__(self, steps: int) -> None:
        super().__init__(search_steps=1, iterations=steps, learning_rate=0.01, abort_early=False, batch_size=100)

    def schedule(self, model: Any, x: np.ndarray, y: np.ndarray) -> Any:
        state, advance = super().schedule(model, x, y)

        def keep_last(state: Any) -> np.ndarray:
            lost = ~np.isfinite(state.nearest)
            state.best[lost] = to_box(state.w[lost], self.bounds)
            return advance(state)

        return state, keep_last


def accuracies(
    models: dict[str, Any], x: np.ndarray, y: np.ndarray, steps: int, cache: Path | None
) -> dict[str, dict[str, float]]:
    """Returns the accuracy in percent of all that answer: clean, and at each c; `cache` keeps each network's."""
    rows: dict[str, dict[str, float]] = {}
    for name, (attacked, answers) in models.items():

        def accuracy(points: Any, predicts: Any) -> float:
            found = np.concatenate([np.asarray(predicts(points[at : at + 100])) for at in range(0, len(y), 100)])
            return 100 * float(np.mean(found.argmax(axis=1) == y))

        def logits(points: Any, attacked: Any = attacked) -> Any:
            return attacked(points)

        kept_rows = None if cache is None else cache / f"{name}_{len(y)}_{steps}.json".replace(" ", "_")
        if kept_rows is not None and kept_rows.exists():
            found_rows = json.loads(kept_rows.read_text(encoding="utf-8"))
        else:
            found_rows = {label: {"clean": accuracy(x, predicts)} for label, predicts in answers.items()}
            attack = AtOneC(steps)
            for weight in WEIGHTS:
                attack.initial_c = weight
                points = attack(logits, x, y, epsilon=None).x_adv
                for label, predicts in answers.items():
                    found_rows[label][str(weight)] = accuracy(points, predicts)
            if kept_rows is not None:
                common.write_json(kept_rows, found_rows)
        for label, row in found_rows.items():
            say(f"{label}: " + ", ".join(f"{key} {value:.1f}" for key, value in row.items()))
        rows |= found_rows
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=200, help="test images that are attacked")
    parser.add_argument("--steps", type=int, default=200, help="of the attack at each c")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="few images and steps; writes no result")
    parser.add_argument("--cache", type=Path, help="folder that keeps trained networks and what is measured")
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
    models: dict[str, Any] = {name: (network, {name: network}) for name, network in networks.items()}
    models["RSE"][1]["RSE, one draw"] = networks["RSE"].single
    # What is kept belongs to these networks.
    cache = arguments.cache / f"rows_{settings}" if arguments.cache and not arguments.quick else None
    rows = accuracies(models, dataset.x_test, dataset.y_test, arguments.steps, cache)
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
