"""Equalization: the same function, and ranges that meet at the geometric mean."""

import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression.equalization import equalize, find_pairs
from tfkit.compression.fake_quantize import QuantizedGrid
from tfkit.internal import folding

L = keras.layers


def uneven(*layers, shape):
    """Returns a model whose kernels' channels differ by orders of magnitude."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), *layers])
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if layer.weights:
            kernel = np.asarray(layer.kernel)
            layer.kernel.assign(kernel * 10 ** rng.uniform(-2, 2, (1, kernel.shape[-1])))
            if layer.use_bias:
                layer.bias.assign(rng.normal(size=layer.bias.shape))
    return model


def same_function(model, result, shape):
    x = zoo._normal(8, *shape)
    wanted = np.asarray(model(x))
    np.testing.assert_allclose(result(x), wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_ranges_meet_at_the_geometric_mean():
    model = uneven(L.Dense(6, activation="relu"), L.Dense(4), shape=(5,))
    first, second = (np.asarray(layer.kernel) for layer in model.layers)
    r1, r2 = np.abs(first).max(axis=0), np.abs(second).max(axis=1)
    result, rows = equalize(model)
    a, b = (np.asarray(layer.kernel) for layer in result.layers if layer.weights)
    np.testing.assert_allclose(np.abs(a).max(axis=0), np.sqrt(r1 * r2), rtol=1e-5)
    np.testing.assert_allclose(np.abs(b).max(axis=1), np.sqrt(r1 * r2), rtol=1e-5)
    np.testing.assert_allclose(result.layers[1].bias, np.asarray(model.layers[0].bias) / np.sqrt(r1 / r2), rtol=1e-5)
    assert len(rows) == 1 and rows[0].spread_after < rows[0].spread_before
    same_function(model, result, (5,))


CHAINS = {
    "convolutions": [L.Conv2D(6, 3, activation="relu"), L.DepthwiseConv2D(3), L.ReLU(), L.Conv2D(4, 1)],
    "multiplier": [L.DepthwiseConv2D(3, depth_multiplier=2), L.LeakyReLU(), L.Conv2D(4, 1), L.DepthwiseConv2D(3)],
    "flattened": [L.Conv2D(4, 3), L.Activation("relu"), L.MaxPooling2D(2), L.Flatten(), L.Dense(3)],
    "averaged": [L.Conv2D(4, 3, activation="relu"), L.ZeroPadding2D(1), L.GlobalAveragePooling2D(), L.Dense(3)],
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_function_stays_and_the_ranges_agree(name):
    layers = [layer.__class__.from_config(layer.get_config()) for layer in CHAINS[name]]
    model = uneven(*layers, shape=(10, 10, 3))
    result, rows = equalize(model)
    weighted = [layer for layer in result.layers if layer.weights]
    assert len(rows) == len(weighted) - 1
    for first, second in zip(weighted, weighted[1:], strict=False):
        kernel = np.asarray(first.kernel)
        made = kernel.reshape(-1, np.prod(kernel.shape[-2:])) if "Depth" in type(first).__name__ else kernel
        made = np.abs(made).reshape(-1, made.shape[-1]).max(axis=0)
        read = np.asarray(second.kernel)
        read = np.abs(read.reshape(-1, len(made), read.shape[-1])).max(axis=(0, 2))
        np.testing.assert_allclose(made, read, rtol=1e-3)
    same_function(model, result, (10, 10, 3))


def test_what_does_not_commute_with_scaling_is_left_alone():
    for between in (L.ReLU(6.0), L.Activation("sigmoid"), L.LayerNormalization(), L.BatchNormalization()):
        model = keras.Sequential([keras.Input((5,)), L.Dense(6), between, L.Dense(3)])
        assert not find_pairs(model)
    inputs = keras.Input((6,))
    x = L.Dense(6)(inputs)
    assert not find_pairs(keras.Model(inputs, L.Dense(3)(x) + L.Dense(3)(x)))
    assert not find_pairs(keras.Model(inputs, [x, L.Dense(3)(x)]))


def test_folded_residual_network_keeps_its_function():
    model, x = zoo.residual()
    for layer in model.layers:
        if isinstance(layer, L.BatchNormalization):
            layer.gamma.assign(np.random.default_rng(0).uniform(0.1, 3, layer.gamma.shape))
    folded = folding.fold_batch_normalization(model)
    result, _ = equalize(folded)
    np.testing.assert_allclose(result(x), model(x), atol=1e-4)


def test_dead_channels_shared_values_and_grids():
    model = uneven(L.Dense(4, activation="relu"), L.Dense(3), shape=(5,))
    kernel = np.asarray(model.layers[0].kernel).copy()
    kernel[:, 1] = 0
    model.layers[0].kernel.assign(kernel)
    result, _ = equalize(model)
    assert all(np.isfinite(weight).all() for weight in result.get_weights())
    assert not np.asarray(result.layers[1].kernel)[:, 1].any()
    same_function(model, result, (5,))

    shared = keras.Sequential([keras.Input((40,)), L.Dense(40, activation="relu"), L.Dense(3)])
    shared.layers[0].kernel.assign(np.sign(np.asarray(shared.layers[0].kernel)) * 0.5)
    assert not equalize(shared)[1] and equalize(shared, preserve=False)[1]
    grid = keras.Sequential([keras.Input((5,)), L.Dense(4, kernel_constraint=QuantizedGrid(0.1)), L.Dense(3)])
    assert not equalize(grid)[1]
    assert not equalize(model, selects=lambda layer: layer is not None and layer.name != model.layers[1].name)[1]
