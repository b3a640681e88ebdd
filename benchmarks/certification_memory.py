"""Peak memory and time of certifying a convolutional network of six layers on images of CIFAR-10's shape.

    python benchmarks/certification_memory.py            # 16 images in one batch; some minutes
    python benchmarks/certification_memory.py --quick    # two digits, narrow layers: does it run?

Four convolutions and two dense layers, trained for an epoch on CIFAR-10, since what bounds cost depends on how many
neurons are undecided. Certified is the margin at epsilon, by CROWN in L-infinity, of all images as one batch. Memory is
the largest resident set of the process, in which nothing else runs but TensorFlow and the training before it; its size
before the first bound stands beside it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import keras
import numpy as np

from benchmarks import common
from benchmarks.common import say
from tfkit import data
from tfkit.robustness.certification import Network
from tfkit.robustness.certification.base import as_method
from tfkit.robustness.certification.margins import margin_rows

WIDTHS = (32, 32, 64, 64)
EPSILON = 0.25 / 255


def network(widths: tuple[int, ...]) -> keras.Model:
    """Convolutions of 3 x 3, every second one with strides of two, and two dense layers; to logits."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    body = [
        layers.Conv2D(width, 3, strides=1 + number % 2, padding="same", activation="relu")
        for number, width in enumerate(widths)
    ]
    head = [layers.Flatten(), layers.Dense(4 * widths[-1], activation="relu"), layers.Dense(10)]
    return keras.Sequential([keras.Input((32, 32, 3)), *body, *head])


def peak_gb() -> float:
    """The largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two digits, narrow layers; writes no result")
    parser.add_argument("--out", type=Path, default=common.RESULTS / "certification_memory.json")
    arguments = parser.parse_args()
    quick = arguments.quick
    images = data.load("mnist5k" if quick else "cifar10", validation=0)
    x_train, x_test = images.x_train, images.x_test
    if quick:  # Digits in the shape of CIFAR-10.
        around = ((0, 0), (2, 2), (2, 2), (0, 0))
        x_train, x_test = (np.repeat(np.pad(part, around), 3, -1) for part in (x_train[:500], x_test))
    model = network((4, 4, 8, 8) if quick else WIDTHS)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    model.fit(x_train, images.y_train[: len(x_train)], batch_size=64, epochs=1, verbose=0)
    x = x_test[: 2 if quick else arguments.examples]
    ready = Network(model)
    labels = ready.forward(x).argmax(1)
    before = peak_gb()
    started = time.perf_counter()
    problem = ready.problem(x, np.full(len(x), EPSILON), np.inf, (0.0, 1.0), "float32")
    margins = as_method("crown").lower(ready, problem, margin_rows(labels, 10), {}).min(1)
    margin_s = time.perf_counter() - started
    figures = {
        "peak_gb": peak_gb(), "peak_gb_before": before, "margin_s": margin_s,
        "certified_at_epsilon": float((margins > 0).mean()),
    }  # fmt: skip
    for key, value in figures.items():
        say(f"{key}: {value:.3g}")
    if quick:
        return
    common.write_result(
        arguments.out, figures, data={"name": images.name, "train": len(images.y_train), "examples": len(x)}, seeds=[0],
        settings={"widths": WIDTHS, "epsilon": EPSILON, "neurons": sum(int(np.prod(layer.output.shape[1:])) for layer in
                  model.layers[:-1] if not isinstance(layer, keras.layers.Flatten)), "arithmetic": "float32"},
        versions=common.versions("tensorflow", "keras", "numpy"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
