"""What the benchmarks of training share: data sets and their noisy versions, small networks, and medians of timings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from tfkit import data, models
from tfkit.internal import surgery

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def arrays(name: str, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns x_train, y_train, x_test, y_test of a data set or of a worse version of it.

    Args:
        name: a name of `tfkit.data`, with ":imbalanced" (half of the classes keep a twentieth) or ":noisy" (a tenth of
            the training labels are drawn anew).
        count: training examples to start from.
        seed: of what is left out or drawn.
    """
    base, _, kind = name.partition(":")
    found = data.load(base, seed=0)
    x, y = found.x_train[:count], found.y_train[:count].copy()
    rng = np.random.default_rng(seed)
    if kind == "imbalanced":
        keep = (y % 2 == 0) | (rng.random(len(y)) < 0.05)
        x, y = x[keep], y[keep]
    elif kind == "noisy":
        wrong = rng.random(len(y)) < 0.1
        y[wrong] = rng.integers(0, found.num_classes, wrong.sum())
    elif kind:
        raise ValueError(f"{name}: no such version; know :imbalanced and :noisy")
    return x, y, found.x_test, found.y_test


def network(shape: tuple[int, ...], seed: int) -> keras.Model:
    """A small ResNet for colour images, LeNet-300-100 for the others.

    Each example is normalised by itself: batches that are not drawn uniformly have statistics of their own, and a
    network that normalises by them is another one in inference.
    """
    model = models.get("resnet8" if shape[-1] == 3 else "lenet_300_100")(shape, seed=seed)

    def by_example(layer: keras.Layer) -> keras.Layer | None:
        """Replaces a normalisation by the batch; any other layer is copied."""
        normalises = isinstance(layer, keras.layers.BatchNormalization)
        return keras.layers.GroupNormalization(groups=1, name=layer.name) if normalises else None

    # A batch's normalisation is called with a mask, which the other kind does not know.
    return surgery.rebuild(model, by_example, lambda _, new, x, **options: new(x))


def evaluated(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the mean cross-entropy and the error in percent."""
    logits = model.predict(x, batch_size=500, verbose=0)
    loss = keras.losses.sparse_categorical_crossentropy(y, logits, from_logits=True)
    return float(np.mean(loss)), 100 * float(np.mean(logits.argmax(-1) != y))


class Clock(keras.callbacks.Callback):
    """Processor time of training alone, and the training loss at given intervals of it.

    Args:
        measure: called without arguments for (loss, error) at each mark; its own time does not count.
        marks: seconds of training between two measurements.
        limit: seconds after which training stops.
    """

    def __init__(self, measure: Callable[[], tuple[float, float]], marks: float, limit: float) -> None:
        super().__init__()
        self.measure, self.marks, self.limit = measure, marks, limit
        self.spent, self.points = 0.0, []  # type: ignore[var-annotated]
        self.steps = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.started = time.process_time()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps += 1
        if self.steps == 1:
            return  # compiling is not training
        self.spent += time.process_time() - self.started
        if self.spent >= self.marks * (len(self.points) + 1):
            loss, error = self.measure()
            self.points.append({"seconds": self.spent, "steps": self.steps, "train_loss": loss, "test_error": error})
        if self.spent >= self.limit:
            self.model.stop_training = True


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Returns the median processor seconds of each function, measured in turn."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            spent[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in spent.items()}
