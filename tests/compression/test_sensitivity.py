"""Sensitivity: the effect of a known grid, each metric against NumPy, and the assignment against brute force."""

import itertools

import keras
import numpy as np
import pytest

from tests import zoo
from tfkit.compression import PostTrainingQuantization, Sensitivity, SensitivityRow, layer_sensitivity
from tfkit.compression.sensitivity import quantized

L = keras.layers
X = zoo._normal(30, 6)


def two_layers(last="linear"):
    model = keras.Sequential([keras.Input((6,)), L.Dense(8, activation="relu"), L.Dense(4, activation=last)])
    rng = np.random.default_rng(0)
    for layer in model.layers:
        layer.kernel.assign(rng.normal(size=layer.kernel.shape))
    return model


def outputs_with(model, position, bits):
    """The outputs with one kernel quantized, by NumPy."""
    kernels = [np.asarray(layer.kernel).copy() for layer in model.layers]
    limit = 2 ** (bits - 1) - 1
    scale = np.abs(kernels[position]).max(axis=0 if bits == 8 else None) / limit
    kernels[position] = np.round(kernels[position] / scale) * scale
    return np.maximum(X @ kernels[0], 0) @ kernels[1]


def softmax(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_metrics_against_numpy():
    model = two_layers()
    before = [weight.copy() for weight in model.get_weights()]
    labels = np.random.default_rng(1).integers(0, 4, 30)
    given = {"labels": labels, "loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)}
    float_outputs = np.asarray(model(X))
    p = softmax(float_outputs)
    entropy = -np.log(p[np.arange(30), labels]).mean()
    for metric in ("mse", "kl", "loss"):
        result = layer_sensitivity(model, X, bits=(8, 3), metric=metric, **(given if metric == "loss" else {}))
        assert [(row.layer, row.bits) for row in result.rows] == [
            (layer.name, bits) for layer in model.layers for bits in (8, 3)
        ]
        assert result.baseline == pytest.approx(entropy if metric == "loss" else 0, abs=1e-5)
        for row, (position, bits) in zip(result.rows, itertools.product((0, 1), (8, 3)), strict=True):
            outputs = outputs_with(model, position, bits)
            q = softmax(outputs)
            wanted = {
                "mse": np.square(outputs - float_outputs).mean(),
                "kl": (p * np.log(p / q)).sum(axis=1).mean(),
                "loss": -np.log(q[np.arange(30), labels]).mean() - entropy,
            }[metric]
            assert row.effect == pytest.approx(wanted, rel=2e-3, abs=2e-6)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_kl_of_probabilities_is_that_of_logits():
    logits, probabilities = two_layers(), two_layers("softmax")
    a = layer_sensitivity(logits, X, bits=(3,), metric="kl").rows
    b = layer_sensitivity(probabilities, X, bits=(3,), metric="kl", from_logits=False).rows
    np.testing.assert_allclose([row.effect for row in a], [row.effect for row in b], rtol=1e-4)


def test_weights_on_the_grid_have_no_effect():
    model = two_layers()
    for layer in model.layers:
        layer.kernel.assign(quantized(layer, 4))
    *_, effects = layer_sensitivity(model, X, bits=(4, 2)).matrix()
    assert (effects[:, 0] < 1e-10).all() and (effects[:, 1] > 1e-3).all()


def test_names_and_order_suit_mixed_precision():
    model = keras.Sequential([keras.Input((6, 6, 2)), L.SeparableConv2D(4, 3), L.ReLU(), L.Flatten(), L.Dense(3)])
    x = zoo._normal(20, 6, 6, 2)
    result = layer_sensitivity(model, x, bits=(8, 4), weight_scale="mse")
    layers, widths, effects = result.matrix()
    assert widths == [8, 4] and effects.shape == (3, 2) and (effects[:, 1] > effects[:, 0]).all()
    assert len(result.table().splitlines()) == 4
    bits = result.assign(6)
    prepared = PostTrainingQuantization(x, bits=bits).prepare(model)
    given = {name: prepared.get_layer(name).transforms["kernel"][0].bits for name in layers}
    assert given == bits and set(bits.values()) == {4, 8}


def test_assignment_is_the_best_one_where_that_is_clear():
    rows = [
        SensitivityRow(name, "Dense", 100, bits, effect)
        for name, effects in (("a", (0.0, 1.0, 5.0)), ("b", (0.0, 0.1, 0.2)), ("c", (0.0, 3.0, 9.0)))
        for bits, effect in zip((8, 4, 2), effects, strict=True)
    ]
    result = Sensitivity("mse", 0.0, tuple(rows))
    effects = dict(zip("abc", result.matrix()[2], strict=True))
    for mean_bits in (8, 6, 14 / 3, 10 / 3, 2):
        chosen = result.assign(mean_bits)
        assert sum(chosen.values()) <= 3 * mean_bits + 1e-9
        fitting = [c for c in itertools.product((0, 1, 2), repeat=3) if sum((8, 4, 2)[i] for i in c) <= 3 * mean_bits]
        best = min(sum(effects[n][i] for n, i in zip("abc", c, strict=True)) for c in fitting)
        assert sum(effects[n][(8, 4, 2).index(b)] for n, b in chosen.items()) == pytest.approx(best)
    with pytest.raises(ValueError, match="mean_bits"):
        result.assign(1.5)


def test_bad_arguments_are_refused():
    model = two_layers()
    for arguments in ({"metric": "accuracy"}, {"bits": ()}, {"bits": (8, 8)}, {"bits": (1,)}, {"metric": "loss"}):
        with pytest.raises(ValueError, match="Received"):
            layer_sensitivity(model, X, **arguments)
    loss = {"metric": "loss", "loss": "mse"}
    with pytest.raises(ValueError, match="`labels`"):
        layer_sensitivity(model, X, np.zeros((29, 4)), **loss)
    with pytest.raises(ValueError, match="`data`"):
        layer_sensitivity(model, X * np.nan)
    several, x = zoo.nested()
    doubled = keras.Model(several.input, [several.output["score"], several.output["score"] * 2.0])
    with pytest.raises(ValueError, match="several outputs"):
        layer_sensitivity(doubled, x, metric="kl")
