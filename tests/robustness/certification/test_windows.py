"""Bounds from windows against those over whole images: the same numbers, by another way."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
import pytest

from tfkit.robustness.certification import Network, windows

LAYERS = keras.layers


def plain() -> list[keras.Layer]:
    """Strides, an even kernel, a scale between two convolutions and one behind an activation."""
    return [
        LAYERS.Conv2D(3, 3, strides=2, padding="same"),
        LAYERS.BatchNormalization(),
        LAYERS.ReLU(),
        LAYERS.Rescaling(0.5, 0.3),
        LAYERS.Conv2D(4, (3, 2), padding="same", activation="tanh"),
        LAYERS.Conv2D(3, 2, dilation_rate=2, activation="relu"),
    ]


def linear() -> list[keras.Layer]:
    """Two convolutions without an activation between them, whose padding must not pass biases on."""
    return [
        LAYERS.Conv2D(3, 3, padding="same", bias_initializer="ones"),
        LAYERS.Conv2D(4, 3, padding="same", bias_initializer="ones", activation="relu"),
        LAYERS.DepthwiseConv2D(3, padding="same", activation="leaky_relu"),
        LAYERS.Conv2D(3, 3, padding="same", strides=2, activation="relu"),
    ]


def network(body: Callable[[], list[keras.Layer]]) -> Network:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((9, 8, 2)), *body(), LAYERS.Flatten(), LAYERS.Dense(3)])
    for layer in model.layers:
        if isinstance(layer, LAYERS.BatchNormalization):
            layer.set_weights(
                [np.random.default_rng(0).uniform(0.5, 1.5, shape.shape) for shape in layer.get_weights()]
            )
    return Network(model)


@pytest.mark.parametrize(
    ("body", "order", "clip", "slopes"),
    [
        (plain, np.inf, (0.0, 1.0), "adaptive"),
        (plain, 2.0, (0.0, 1.0), "parallel"),
        (linear, np.inf, (0.0, 1.0), "parallel"),
        (linear, 1.0, None, "adaptive"),
    ],
)
def test_windows_give_the_bounds_of_whole_images(body, order, clip, slopes, monkeypatch):
    x = np.random.default_rng(1).uniform(size=(2, 9, 8, 2))
    epsilon = np.array([0.02, 0.06]) * (1 if np.isinf(order) else 10)
    found = []
    for whole in (True, False):
        if not whole:  # Chunks of a few rows of places.
            monkeypatch.setattr("tfkit.robustness.certification.network.CHUNK_BYTES", 100_000)
        ready = network(body)
        monkeypatch.setattr(ready, "_volume", lambda target, whole=whole: 0 if whole else 10**12)
        problem = ready.problem(x, epsilon, order, clip, "float32")
        found.append(ready.intermediate(problem, slopes=slopes)[1])
    used = [target for target in ready.targets if windows.windows_of(ready.nodes, target)]
    assert len(used) >= 2
    ranges = [(np.array(bounds.low[target]), np.array(bounds.high[target])) for bounds in found for target in used]
    for (whole_low, whole_high), (low, high) in zip(ranges[: len(used)], ranges[len(used) :], strict=True):
        # Over whole images only what is undecided is refined.
        assert (low >= whole_low - 1e-9).all() and (high <= whole_high + 1e-9).all()
        undecided = (whole_low < 0) & (whole_high > 0)
        assert undecided.any()
        np.testing.assert_allclose(low[undecided], whole_low[undecided], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(high[undecided], whole_high[undecided], rtol=1e-9, atol=1e-12)


def test_no_windows_where_a_network_is_no_chain_of_images():
    inputs = keras.Input((8, 8, 1))
    first = LAYERS.Conv2D(2, 3, padding="same", activation="relu")(inputs)
    second = LAYERS.Add()([LAYERS.Conv2D(2, 3, padding="same")(first), first])
    third = LAYERS.ReLU()(LAYERS.Conv2D(2, 3)(LAYERS.ReLU()(second)))
    ready = Network(keras.Model(inputs, LAYERS.Dense(2)(LAYERS.Flatten()(third))))
    convolutions = [target for target in ready.targets if type(ready.nodes[target]).__name__ == "Convolution"]
    assert [windows.windows_of(ready.nodes, target) is not None for target in convolutions] == [True, False]
