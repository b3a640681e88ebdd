"""Bounds of outputs: against an independent computation, against points of the balls, and in limiting cases."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.robustness.certification.conftest import inside, scattered
from tfkit.compression.fake_quantize import FakeQuantize
from tfkit.robustness import certification
from tfkit.robustness.certification import Crown, FastLin, Network, UnsupportedLayerError, bounds
from tfkit.robustness.certification import network as network_module
from tfkit.robustness.certification.maximum import Maximum

L = keras.layers
ORDERS = {"l1": 1.0, "l2": 2.0, "linf": np.inf}


def reference(model, x, epsilon, order, method):
    """Fast-Lin and CROWN of a multilayer perceptron, neuron by neuron, as the papers have them."""
    dual = {1.0: np.inf, 2.0: 2, np.inf: 1}[order]
    weights, slopes = [], []
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dense):
            weights.append([np.asarray(value, np.float64) for value in layer.weights])
            slopes.append(0.0)
        if isinstance(layer, keras.layers.LeakyReLU):
            slopes[-1] = layer.negative_slope
    known = []

    def bound(row, constant, depth):
        """The least value of row z + constant, z being the numbers before activation `depth`."""
        for k in range(depth, -1, -1):
            kernel, bias = weights[k]
            row, constant = kernel @ row, constant + bias @ row
            if k == 0:
                return row @ x + constant - epsilon * np.linalg.norm(row, dual)
            low, high = known[k - 1]
            back = np.zeros_like(row)
            for i in range(len(row)):
                a, least, most = slopes[k - 1], low[i], high[i]
                if least >= 0 or most <= 0:
                    back[i] = row[i] * (1 if least >= 0 else a)
                    continue
                chord = (most - a * least) / (most - least)
                if row[i] < 0:
                    back[i], constant = row[i] * chord, constant + row[i] * (most - chord * most)
                else:
                    back[i] = row[i] * (chord if method == "fast_lin" else (1 if most > -least else a))
            row = back
        return None

    for depth, (kernel, _) in enumerate(weights):
        unit = np.eye(kernel.shape[1])
        low = np.array([bound(row, 0.0, depth) for row in unit])
        high = -np.array([bound(-row, 0.0, depth) for row in unit])
        known.append((low, high))
    return known[-1]


@pytest.mark.parametrize("method", ["fast_lin", "crown"])
@pytest.mark.parametrize("norm", ORDERS)
def test_equals_a_computation_neuron_by_neuron(mlp, method, norm):
    x = np.random.default_rng(0).uniform(size=(2, 5))
    epsilon = np.array([0.05, 0.3])
    alone = {"fast_lin": FastLin, "crown": Crown}[method](intersect=False)
    papers = tuple(bounds(mlp, x, epsilon, norm, alone, arithmetic="real"))
    for i in range(2):
        expected = reference(mlp, x[i], epsilon[i], ORDERS[norm], method)
        np.testing.assert_allclose((papers[0][i], papers[1][i]), expected, rtol=1e-9, atol=1e-9)


def test_intersecting_with_intervals_tightens(mlp):
    x = np.random.default_rng(0).uniform(size=(20, 5))
    both, alone = (tuple(bounds(mlp, x, 0.3, "linf", Crown(kept), arithmetic="real")) for kept in (True, False))
    widths = [high - low for low, high in (both, alone)]
    # Not everywhere: with other bounds, slopes adapt to something else.
    assert widths[0].mean() < widths[1].mean() and (widths[0] < widths[1] - 1e-3).any()
    intervals = tuple(bounds(mlp, x, 0.3, "linf", "interval", arithmetic="real"))
    assert (both[0] >= intervals[0] - 1e-9).all() and (both[1] <= intervals[1] + 1e-9).all()
    assert (alone[0] < intervals[0] - 1e-3).any()


@pytest.mark.parametrize("name", ["residual", "depthwise", "signal"])
@pytest.mark.parametrize("norm, clip", [("linf", (0.0, 1.0)), ("l2", None), ("l1", (0.0, 1.0))])
def test_hold_at_points_of_the_ball(zoo, name, norm, clip):
    model = zoo[name]
    network = Network(model)
    x = np.random.default_rng(0).uniform(size=(2, *network.graph.input_shape)).astype(np.float32)
    epsilon = {"linf": 0.05, "l2": 0.2, "l1": 0.5}[norm]
    points = inside(x, epsilon, ORDERS[norm], clip, 100)
    values = network.forward(points.reshape(-1, *x.shape[1:])).reshape(100, 2, -1)
    if not network.graph.dropped_softmax:
        shown = np.asarray(model(points[0].astype(np.float32)))
        np.testing.assert_allclose(values[0], shown, rtol=1e-3, atol=1e-4)
    unit = np.eye(values.shape[-1])
    rows = np.tile(np.concatenate([unit, -unit]), (2, 1, 1))
    problem = network.problem(x, np.full(2, epsilon), ORDERS[norm], clip, "float32")
    widths = {}
    for method in ("interval", "crown_ibp", "crown"):
        found = certification.base.as_method(method).lower(network, problem, rows, {})
        low, high = found[:, :3], -found[:, 3:]
        assert (low <= values).all() and (values <= high).all()
        widths[method] = (high - low).mean()
    assert widths["crown"] <= widths["crown_ibp"] <= widths["interval"]
    assert widths["crown"] < 0.9 * widths["interval"]


@pytest.fixture(scope="module")
def pooled():
    """A convolution, a ReLU and max pooling: many windows hold places that are 0 at their lowest."""
    body = [L.Conv2D(3, 3, activation="relu"), L.MaxPooling2D(2), L.Flatten(), L.Dense(3)]
    return scattered(keras.Sequential([keras.Input((8, 8, 1)), *body]))


@pytest.mark.parametrize("name", ["mlp", "pooled", "residual", "depthwise", "signal"])
@pytest.mark.parametrize("method", ["interval", "fast_lin", "crown", "crown_ibp"])
def test_float32_moves_bounds_by_no_more_than_its_rounding(mlp, pooled, zoo, name, method):
    """The account for a network that computes in float32 measures what computing its bounds in float32 does."""
    network = Network({"mlp": mlp, "pooled": pooled}.get(name) or zoo[name])
    x = np.random.default_rng(0).uniform(size=(6, *network.graph.input_shape)).astype(np.float32)
    rows = np.tile(np.concatenate([np.eye(3), -np.eye(3)]), (6, 1, 1))
    epsilon = np.float32([0.003, 0.01, 0.03, 0.04, 0.06, 0.1])

    def found(dtype, arithmetic):
        problem = network.problem(x, epsilon, np.inf, (0.0, 1.0), arithmetic, dtype)
        return certification.base.as_method(method).lower(network, problem, rows, {}).astype(np.float64)

    exact = found("float64", "real")
    account = exact - found("float64", "float32")
    assert (account > 0).all()
    assert (np.abs(found("float32", "real") - exact) <= 2 * account).all()


def test_a_maximum_is_bounded_by_the_place_that_is_large_on_average(pooled):
    """Not by one that rounding prefers: behind a ReLU, the lowest values of most places are equal."""
    network = Network(pooled)
    node = next(node for node in network.nodes if isinstance(node, Maximum))
    low = np.zeros((1, *node.shape[:2], 4, 3)) - 1e-15 * np.arange(4)[:, None]
    high = np.zeros(low.shape) + np.array([0.1, 0.2, 0.7, 0.3])[:, None]
    chosen = node.lines(tf.constant(low), tf.constant(high)).lower_slope.numpy()
    np.testing.assert_array_equal(chosen.argmax(-2), 2)


def test_radius_zero_is_the_output(mlp):
    x = np.random.default_rng(0).uniform(size=(3, 5)).astype(np.float32)
    low, high = bounds(mlp, x, 0.0, arithmetic="real")
    np.testing.assert_allclose(low, Network(mlp).forward(x), rtol=1e-9)
    assert (high - low < 1e-9).all() and (high >= low).all()
    low, high = bounds(mlp, x, 0.0)  # In float32, the network itself is off by a little.
    output = np.asarray(mlp(x), np.float64)
    assert (low < output).all() and (output < high).all() and (high - low < 1e-3).all()


def test_linear_network_is_bounded_exactly():
    model = scattered(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(2)]))
    kernel = np.asarray(model.layers[0].kernel, np.float64) @ np.asarray(model.layers[1].kernel, np.float64)
    x = np.ones((1, 4))
    for norm, dual in (("l1", np.inf), ("l2", 2), ("linf", 1)):
        low, high = bounds(model, x, 0.1, norm, arithmetic="real")
        np.testing.assert_allclose((high - low)[0], 0.2 * np.linalg.norm(kernel, dual, axis=0), rtol=1e-9)


def test_bounds_follow_the_weights(mlp):
    model = keras.models.clone_model(mlp)
    x = np.ones((1, 5))
    for norm in ("linf", "l1"):
        before = bounds(model, x, 0.1, norm)
        model.layers[0].kernel.assign(model.layers[0].kernel * 2.0)
        after = bounds(model, x, 0.1, norm)
        fresh = bounds(Network(model), x, 0.1, norm)
        assert not np.allclose(before.lower, after.lower)
        np.testing.assert_array_equal(after.lower, fresh.lower)


@pytest.mark.parametrize("kind", ["batch_normalization", "normalization", "fake_quantize", "convolution"])
def test_bounds_follow_ranges_and_statistics(kind, monkeypatch):
    """Also where passes have been compiled, and where a graph has numbers of a layer in it."""
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(2, 4, 4, 1)).astype(np.float32)
    layer = {
        "batch_normalization": lambda: L.BatchNormalization(),
        "normalization": lambda: L.Normalization(),
        "fake_quantize": lambda: FakeQuantize(bits=6),
        "convolution": lambda: L.SeparableConv2D(2, 2, dilation_rate=2),
    }[kind]()
    model = scattered(keras.Sequential([keras.Input((4, 4, 1)), layer, L.ReLU(), L.Flatten(), L.Dense(3)]))
    network = Network(model)

    def change(seed):
        drawn = np.random.default_rng(seed).normal(seed, seed + 1.0, (20, 4, 4, 1)).astype(np.float32)
        if kind == "normalization":
            layer.adapt(drawn)
        elif kind == "fake_quantize":
            layer(drawn, training=True)
        else:
            scattered(model, seed + 1)

    def ranges(source):
        return np.stack([*bounds(source, x, 0.05, method="crown_ibp", arithmetic="real")])

    widths = []
    for seed in range(3):
        expected = ranges(Network(model))
        with monkeypatch.context() as patch:
            patch.setattr(network_module, "EAGER_USES", 0)
            np.testing.assert_allclose(ranges(model), expected, atol=1e-12)
            np.testing.assert_allclose(ranges(network), expected, atol=1e-12)
        output = np.asarray(model(x, training=False))
        assert (expected[0] <= output + 1e-5).all() and (output <= expected[1] + 1e-5).all()
        widths.append((expected[1] - expected[0]).mean())
        change(seed)
    assert len(set(np.round(widths, 6))) == 3


def test_networks_let_their_models_go():
    import gc
    import weakref

    model = scattered(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]))
    bounds(model, np.zeros((1, 3)), 0.1)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_results_say_what_they_hold_for(mlp):
    found = bounds(mlp, np.full((1, 5), 0.5), 0.1, "l2", "fast_lin", clip=(0, 1))
    assert (found.norm, found.method, found.clip, found.arithmetic) == ("l2", "fast_lin", (0.0, 1.0), "float32")


def test_unsupported_layers_are_named():
    inputs = keras.Input((4, 4))
    model = keras.Model(inputs, keras.layers.LSTM(3, name="memory")(inputs))
    with pytest.raises(UnsupportedLayerError, match="'memory' of type LSTM"):
        Network(model)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "softmax", name="p"), keras.layers.Dense(2)])
    with pytest.raises(UnsupportedLayerError, match="softmax"):
        Network(model)
    with pytest.raises(UnsupportedLayerError, match="selu"):
        Network(keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "selu")]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": np.full((1, 5), np.nan)}, "`x` must be finite"),
        ({"x": np.zeros((1, 4))}, "`x` must be an array"),
        ({"x": np.full((1, 5), 2.0), "clip": (0, 1)}, "inside of `clip`"),
        ({"epsilon": -1.0}, "`epsilon`"),
        ({"norm": "l7"}, "`norm`"),
        ({"norm": "inf"}, "`norm`"),
        ({"norm": 2}, "`norm`"),
        ({"method": "magic"}, "`method`"),
        ({"arithmetic": "float16"}, "`arithmetic`"),
        ({"clip": (1, 0)}, "`clip`"),
    ],
)
def test_bad_arguments(mlp, change, message):
    arguments = {"x": np.zeros((1, 5)), "epsilon": 0.1} | change
    with pytest.raises(ValueError, match=message):
        bounds(mlp, **arguments)


def test_a_last_softmax_has_no_bounds(zoo):
    with pytest.raises(ValueError, match="logits"):
        bounds(zoo["residual"], np.zeros((1, 6, 6, 2)), 0.1)
